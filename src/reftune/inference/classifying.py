"""Load a trained classifier, and let it tell the class (or the number) of texts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from peft import PeftModel
from safetensors import safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reftune import models
from reftune.adapter.checkpoint import WEIGHTS_FILE, read_adapter_config
from reftune.adapter.config import load_adapter
from reftune.data.classification import NUMBER, LabelScheme
from reftune.data.collating import CompletionCollator
from reftune.data.formats import LabelledText
from reftune.data.glue import GLUE
from reftune.data.tokenising import encode_dataset
from reftune.errors import ReftuneError
from reftune.inference.loading import adapter_folder, recorded_run, set_scale, single_folder
from reftune.output.json_files import read_json_object
from reftune.training.prompt_ends import with_prompt_ends

_NO_LIMIT = 10_000_000
"""Tokenizers without a limit state an enormous one."""
_HEADS = ("classifier.out_proj.weight", "classifier.weight", "score.weight", "logits_proj.weight")


@dataclass(frozen=True)
class EditedClassifier:
    """A base model with edits and a trained head, and how texts become its input.

    Attributes:
        model: the PEFT model, in evaluation mode (a plain one of `load_plain_classifier`).
        tokenizer: the one saved beside the adapter, else the base model's.
        scheme: its classes.
        max_length: tokens of a text, or of a pair; longer ones lose their end.
        glue: the GLUE task that it was trained for, whose metrics it is measured by.
        metric: what else it is measured by first.
        folder: where the adapter came from; None for one that was just trained.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheme: LabelScheme
    max_length: int | None = None
    glue: str | None = None
    metric: str | None = None
    folder: Path | None = None


@dataclass(frozen=True)
class Prediction:
    """What one text was taken for.

    Attributes:
        label: class name, or the predicted number.
        probability: of that class; None for a number.
        probabilities: of every class by name; empty for a number.
    """

    label: str | float
    probability: float | None
    probabilities: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """What a results file holds of it."""
        if self.probability is None:
            return {"label": self.label}
        return {"label": self.label, "probability": self.probability, "probabilities": self.probabilities}


def is_classifier(folder: str | Path) -> bool:
    """Whether an adapter folder holds a classifier.

    Raises:
        ReftuneError: no adapter there.
    """
    return read_adapter_config(Path(folder).expanduser()).get("task_type") == "SEQ_CLS"


def load_classifier(
    folder: str | Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    quantization: Any = None,
    scale: float = 1.0,
) -> EditedClassifier:
    """Load a classifier's folder onto its base model.

    Args:
        folder: an output folder of `reftune train` with `task: classification`, or one of its checkpoints.
        model: another name or folder of the base model than the one recorded.
        dtype: as in training where None.
        device: the best there is where None.
        quantization: as in training where None.
        scale: multiplies what the edit adds.

    Raises:
        ReftuneError: the folder, its files or its base model cannot be used, or it is no classifier.
    """
    folder, name, recorded = adapter_folder(folder, model, classifier=True)
    scheme = _recorded_scheme(folder, recorded)
    base, tokenizer = models.load(
        name,
        dtype or recorded.get("dtype"),
        device,
        quantization=quantization or recorded.get("quantization"),
        task="seq_cls",
        num_labels=scheme.outputs,
    )
    describe_labels(base, scheme)
    tokenizer = models.saved_tokenizer(folder, tokenizer)
    models.fit_to_tokenizer(base, tokenizer)
    edited = load_adapter(base, folder)
    edited.eval()
    set_scale(edited, scale)
    return EditedClassifier(
        edited, tokenizer, scheme, recorded.get("max_length"), recorded.get("glue"), recorded.get("metric"), folder
    )


def load_plain_classifier(folder: str | Path) -> EditedClassifier:
    """Load a text classification model that transformers saved, without an adapter.

    Raises:
        ReftuneError: the folder is no such model.
    """
    folder = Path(folder)
    config = read_json_object(folder / "config.json")
    kinds = config.get("architectures") or []
    if not any(str(kind).endswith("ForSequenceClassification") for kind in kinds):
        said = ", ".join(map(str, kinds)) or "nothing"
        raise ReftuneError(f"{folder / 'config.json'}: the model is for {said}, not for sequence classification.")
    new: list[str] = []
    model, tokenizer = models.load(str(folder), task="seq_cls", new_weights=new)
    if new:
        raise ReftuneError(f"{folder} does not hold all weights of a classifier: {', '.join(new[:3])}.")
    described: Any = model.config
    regression = described.problem_type == "regression" or described.num_labels == 1
    names = () if regression else tuple(str(described.id2label[number]) for number in range(described.num_labels))
    limit = int(tokenizer.model_max_length) if tokenizer.model_max_length < _NO_LIMIT else None
    return EditedClassifier(model, tokenizer, LabelScheme(names), limit)


def describe_labels(model: Any, scheme: LabelScheme) -> None:
    """Write the classes, and the loss that belongs to them, into a base model's configuration; **changes it**."""
    names = scheme.names or ("LABEL_0",)
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: number for number, name in enumerate(names)}
    model.config.problem_type = "regression" if scheme.regression else "single_label_classification"


@torch.no_grad()
def class_scores(
    classifier: EditedClassifier, rows: Sequence[LabelledText], batch_size: int = 32
) -> Float[np.ndarray, "rows outputs"]:
    """The head's float32 outputs: a logit for each class, or the number, in the order of the rows.

    Args:
        classifier: the model.
        rows: texts; their labels do not matter.
        batch_size: rows of one forward pass, which are of similar length.
    """
    model, scheme = classifier.model, classifier.scheme
    any_label: str | float = 0.0 if scheme.regression else scheme.names[0]
    encoded = encode_dataset(
        [replace(row, label=any_label) for row in rows],
        classifier.tokenizer,
        label_names=list(scheme.names),
        max_length=classifier.max_length,
    )
    collate = CompletionCollator(int(classifier.tokenizer.pad_token_id))  # type: ignore[arg-type]
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]["input_ids"]))
    scores = np.zeros((len(rows), scheme.outputs), dtype=np.float32)
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = collate([encoded[index] for index in chosen])
        del batch["labels"]
        inputs = with_prompt_ends(model, {name: value.to(model.device) for name, value in batch.items()})
        scores[chosen] = model(**inputs).logits.float().cpu().numpy()
    return scores


def predict(classifier: EditedClassifier, rows: Sequence[LabelledText], batch_size: int = 32) -> list[Prediction]:
    """What each text is taken for, in the order of the rows; arguments as for `class_scores`."""
    names = classifier.scheme.names
    found = []
    for scores in class_scores(classifier, rows, batch_size).astype(np.float64):
        if not names:
            found.append(Prediction(float(scores[0]), None, {}))
            continue
        shares = np.exp(scores - scores.max())
        shares /= shares.sum()
        best = int(shares.argmax())
        found.append(Prediction(names[best], float(shares[best]), dict(zip(names, map(float, shares), strict=True))))
    return found


def _recorded_scheme(folder: Path, recorded: dict[str, Any]) -> LabelScheme:
    """The classes that `run.yaml` names; where there is none, numbers, as many as the saved head has outputs."""
    outputs = _saved_outputs(folder)
    labels = GLUE[recorded["glue"]].labels if recorded.get("glue") in GLUE else recorded.get("labels")
    if labels is None:
        names = () if outputs == 1 else tuple(str(number) for number in range(outputs))
        return LabelScheme(names)
    scheme = LabelScheme(() if labels == NUMBER else tuple(map(str, labels)))
    if scheme.outputs != outputs:
        raise ReftuneError(
            f"{folder}: run.yaml names {scheme.outputs} classes and the saved head has {outputs} outputs: the two "
            "files are not of one run."
        )
    return scheme


def _saved_outputs(folder: Path) -> int:
    path = folder / WEIGHTS_FILE
    with safe_open(path, framework="pt") as tensors:
        names = list(tensors.keys())
        for ending in _HEADS:
            for name in names:
                if name.endswith("." + ending):
                    return int(tensors.get_slice(name).get_shape()[0])
    raise ReftuneError(f"{path} holds no classifier head ({', '.join(_HEADS)}); the adapter must be trained again.")


def training_columns(folder: str | Path) -> tuple[dict[str, str] | None, tuple[str, ...]]:
    """The columns that a classifier was trained on, as `read_texts` takes them: a mapping, and a GLUE task's names."""
    recorded = recorded_run(single_folder(folder))
    columns = recorded.get("columns")
    task = GLUE.get(recorded.get("glue") or "")
    return (columns if isinstance(columns, dict) else None), (task.columns if task else ())


def as_jsonl(rows: Sequence[LabelledText], found: Sequence[Prediction], adapter: str) -> str:
    """One object a row: its texts, label, probability, the probability of every class, and the classifier's name."""
    lines = []
    for row, prediction in zip(rows, found, strict=True):
        texts = {"text": row.text} if row.text_pair is None else {"text": row.text, "text_pair": row.text_pair}
        lines.append(json.dumps({**texts, **prediction.as_dict(), "adapter": adapter}, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def as_csv(rows: Sequence[LabelledText], found: Sequence[Prediction], adapter: str) -> str:
    """The same without the probabilities of the other classes."""
    pairs = any(row.text_pair is not None for row in rows)
    numbers = any(prediction.probability is None for prediction in found)
    header = ["text", *(["text_pair"] if pairs else []), "label", *([] if numbers else ["probability"]), "adapter"]
    written = io.StringIO()
    table = csv.DictWriter(written, header, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row, prediction in zip(rows, found, strict=True):
        texts = {"text": row.text, "text_pair": row.text_pair or ""}
        table.writerow({**texts, **prediction.as_dict(), "adapter": adapter})
    return written.getvalue()
