"""A whole classification run on a tiny encoder: what is chosen, tested, saved, loaded again and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from reftune.data.classification import read_texts
from reftune.errors import ReftuneError
from reftune.evaluation.classification import evaluate_classification
from reftune.inference.classifying import class_scores, load_classifier, predict
from reftune.inference.loading import load_edited
from reftune.runs import run_training
from reftune.runs.classification import head_modules, read_classification_data
from reftune.runs.recipe import TrainRecipe
from tests.tiny_classifier import classifier_tokenizer, glue_rows, save_tiny_encoder, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder, and the rows of two tasks."""
    place = tmp_path_factory.mktemp("classifiers")
    save_tiny_encoder(place / "encoder")
    for task in ("mnli", "stsb", "sst2"):
        write_jsonl(place / f"{task}.jsonl", glue_rows(task, 24, named=task == "mnli"))
        write_jsonl(place / f"{task}_held.jsonl", glue_rows(task, 20))
    return place


def recipe(folder: Path, rows: str, **changed: Any) -> TrainRecipe:
    options: dict[str, Any] = {
        "task": "classification", "train_file": folder / f"{rows}.jsonl", "eval_file": folder / f"{rows}_held.jsonl",
        "model": folder / "encoder", "rank": 1, "positions": "f3", "epochs": 3, "batch_size": 8, "lr": 0.02,
        "tensorboard": False, "device": "cpu", "output": folder / f"out-{rows}",
    } | changed  # fmt: skip
    return TrainRecipe(**{name: str(value) if isinstance(value, Path) else value for name, value in options.items()})


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """A finished MNLI run with both of its tests."""
    made = recipe(folder, "mnli", glue="mnli", split_eval=True, test_file=folder / "mnli_held.jsonl")
    return run_training(made).folder


def test_the_best_checkpoint_by_the_metric_is_the_one_that_is_tested(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert [entry["epoch"] for entry in metrics["epochs"]] == [1, 2, 3]
    assert metrics["validation"]["metric"] == "accuracy"
    assert metrics["validation"]["score"] == max(entry["accuracy"] for entry in metrics["epochs"])
    best = next(e for e in metrics["epochs"] if e["accuracy"] == metrics["validation"]["score"])
    assert metrics["validation"]["loss"] == pytest.approx(best["loss"], abs=1e-5)
    assert (metrics["validation"]["rows"], metrics["test"]["rows"]) == (10, 10)
    assert metrics["test_mismatched"]["rows"] == 20
    low, high = metrics["test"]["intervals"]["accuracy"]
    assert 0 <= low <= metrics["test"]["score"] <= high <= 1


def test_prefix_reuse_is_off_and_says_why(trained: Path, folder: Path) -> None:
    assert "both directions" in json.loads((trained / "metrics.json").read_text())["prefix_reuse"]
    with pytest.raises(ReftuneError, match="prefix_reuse='on' is not possible for a classifier"):
        recipe(folder, "sst2", prefix_reuse="on")


def test_only_edits_and_the_whole_head_are_trained(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["edit_parameters"] == 2 * (2 * 16 + 1)
    assert metrics["trainable_parameters"] == metrics["edit_parameters"] + (16 * 16 + 16) + (16 * 3 + 3)


def test_a_loaded_classifier_scores_as_in_its_run(trained: Path, folder: Path) -> None:
    classifier = load_classifier(trained, device="cpu")
    assert classifier.scheme.names == ("entailment", "neutral", "contradiction")
    rows = read_texts(folder / "mnli_held.jsonl")
    score = evaluate_classification(classifier, rows, batch_size=7)
    recorded = json.loads((trained / "metrics.json").read_text())["test_mismatched"]
    assert score.metrics == recorded["metrics"] and score.loss == pytest.approx(recorded["loss"], abs=1e-6)
    lines = (trained / "test_mismatched_predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["predicted"] for line in lines] == score.predictions
    assert classifier.model.base_model.model.config.id2label[1] == "neutral"


def test_padding_does_not_change_a_rows_scores(trained: Path, folder: Path) -> None:
    classifier = load_classifier(trained, device="cpu")
    rows = read_texts([{"premise": "a", "hypothesis": "b"}, {"premise": "a" * 60, "hypothesis": "c"}], labelled=False)
    together, alone = class_scores(classifier, rows, 2), class_scores(classifier, rows, 1)
    assert np.allclose(together, alone, atol=1e-5)


def test_a_checkpoint_of_a_run_loads_too(trained: Path) -> None:
    checkpoint = max(trained.glob("checkpoint-*"))
    found = predict(load_classifier(checkpoint, device="cpu"), read_texts([{"text": "x"}], labelled=False))
    assert sum(found[0].probabilities.values()) == pytest.approx(1)
    assert found[0].probability == max(found[0].probabilities.values())


def test_a_classifier_is_not_asked_to_write(trained: Path) -> None:
    with pytest.raises(ReftuneError, match="reftune predict"):
        load_edited(trained)


def test_a_number_is_predicted_where_labels_are_scores(folder: Path) -> None:
    run = run_training(recipe(folder, "stsb", split_eval=True))
    assert run.metrics["labels"] == "number" and set(run.metrics["test"]["metrics"]) == {
        "pearson", "spearman", "combined"
    }  # fmt: skip
    assert "labels: number" in (run.folder / "run.yaml").read_text()
    classifier = load_classifier(run.folder, device="cpu")
    (found,) = predict(classifier, read_texts([{"sentence1": "a", "sentence2": "b"}], labelled=False))
    assert isinstance(found.label, float) and found.as_dict() == {"label": found.label}


def test_a_run_goes_on_from_its_checkpoint(folder: Path) -> None:
    made = recipe(folder, "sst2", epochs=1, output=folder / "resumed")
    run_training(made)
    again = run_training(recipe(folder, "sst2", epochs=2, output=folder / "resumed", resume=True))
    assert [entry["epoch"] for entry in again.metrics["epochs"]] == [1, 2]


def test_whatever_started_at_random_is_saved_with_the_edits(folder: Path) -> None:
    """A BERT saved without its pooler gets a random one, without which the head would mean nothing."""
    tokenizer = classifier_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=1,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    run = run_training(recipe(folder, "sst2", model=folder / "bert", epochs=1, output=folder / "pooled"))
    rows = read_texts(folder / "sst2_held.jsonl")
    torch.manual_seed(99)  # the pooler that loading makes first is another one
    classifier = load_classifier(run.folder, device="cpu")
    assert evaluate_classification(classifier, rows).loss == pytest.approx(run.metrics["validation"]["loss"], abs=1e-6)
    base, loading = AutoModelForSequenceClassification.from_pretrained(folder / "bert", output_loading_info=True)
    assert head_modules(base, sorted(loading["missing_keys"])) == ["classifier", "bert.pooler.dense"]


def test_held_out_rows_come_from_the_share_of_training_rows_that_was_asked_for(folder: Path) -> None:
    data = read_classification_data(recipe(folder, "sst2", eval_file=None, eval_fraction=0.25, split_eval=True))
    assert (len(data.train), len(data.validation), len(data.tests["test"])) == (18, 3, 3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"split_eval": True, "eval_file": None}, "0 held-out rows to split"),
        ({"labels": "yes,no"}, None),
        ({"labels": "a,b,a"}, "at least two different names"),
        ({"labels": [False, True]}, "put it in quotes"),
        ({"metric": "pearson", "labels": "a,b"}, "does not measure classes"),
        ({"metric": "pearson"}, "does not measure these labels"),
        ({"task": "completion", "metric": "f1"}, "set task: classification"),
        ({"template": "%s"}, "leave it out"),
        ({"glue": "mnli"}, "column 'premise' is missing"),
        ({"glue": "sst2", "labels": "a,b"}, "has its own"),
        ({"model": "smolm2-nowhere"}, "smolm2-nowhere"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_refused(folder: Path, changed: dict[str, Any], words: str | None) -> None:
    if words is None:
        data = read_classification_data(recipe(folder, "sst2", **changed))
        assert data.train[0].label == "yes"  # the first name's number is 0
        return
    with pytest.raises(ReftuneError, match=words):
        run_training(recipe(folder, "sst2", **({"output": folder / "refused"} | changed)))
    assert not (folder / "refused" / "metrics.json").exists()
