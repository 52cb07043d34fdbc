"""What `reftune steer` is told: flags and checks; nothing heavy is imported, so that a wrong flag answers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reftune.engine.position_grammar import parse_positions
from reftune.errors import ReftuneError
from reftune.models import BUNDLED
from reftune.runs.recipe_values import coerce_fields, option, read_columns, read_layers


@dataclass(frozen=True)
class SteerSettings:
    """What to steer and how; validated when made.

    Raises:
        ReftuneError: naming the field, its value and the way out.
    """

    output: str = option("out", "Output", "Folder of the adapter, its figures, picture and card.")
    gguf: str | None = option(
        None,
        "Output",
        "Also write this file, which llama.cpp (--control-vector) and repeng read: all tokens are edited.",
    )
    positive_prompt: str | None = option(None, "Data", "Instruction under which the model writes the positive answers.")
    negative_prompt: str | None = option(None, "Data", "Instruction under which it writes the negative ones.")
    positive_label: str | None = option(None, "Data", "Labelled texts: the class that is wanted.")
    columns: str | dict[str, str] | None = option(None, "Data", "Names of your columns.", "field=column,...")
    limit_rows: int | None = option(None, "Data", "Read only the first rows.", "rows", least=1)
    eval_fraction: float = option(0.2, "Data", "Hold out this share to choose and measure on.", "share, 0 to 1")
    neutral_file: str | None = option(
        None,
        "Data",
        "Prompts with plain answers, for the KL divergence; default: 40 of reftune's, 160 with --kl.",
    )
    when: str | None = option(
        None, "Gate", "Act only where a probe says so: labelled prompts, where to act (1) and where not (0)."
    )
    when_label: str | None = option(None, "Gate", "The label in --when of prompts where to act; default: 1, true, yes.")
    model: str = option(BUNDLED, "Model", "Base model: 'smollm2' (bundled), a local folder, or a Hub name.")
    dtype: str | None = option(None, "Model", "Data type; default: bfloat16 on CUDA, else float32.")
    device: str | None = option(None, "Model", "cpu, cuda, ...; default: the best there is.")
    estimator: Literal["mean", "pca", "probe"] = option("mean", "Adapter", "How the direction is found.")
    train: Literal["reps", "reft-r1"] | None = option(
        None, "Adapter", "Train the direction on the pairs, from the one found: as --objective of `reftune train`."
    )
    layers: str | int | list[int] = option(
        "auto", "Adapter", "Layers to edit: 8, 3,9,18 or all; auto: the one that works best.", "layer numbers"
    )
    rank: int = option(1, "Adapter", "How many directions of each layer.", "dimensions", least=1)
    positions: str = option("l1+generated", "Adapter", "Tokens to edit, as for `reftune train`.")
    remove: bool = option(False, "Adapter", "Take the direction out of the hidden states (h - R^T R h).")
    scale: float | None = option(
        None, "Strength", "1: as far as the two sides lie apart; below 0: away from the positive side."
    )
    kl: float | None = option(
        None, "Strength", "Find the strength with this mean KL divergence from the base.", "nats a token"
    )
    judge: str | None = option(
        None, "Judge",
        "Who accepts answers: a classifier's folder (FOLDER:CLASS), module:function or file.py:function. The share of "
        "greedy answers accepted is told, without the edit and with it.",
    )  # fmt: skip
    epochs: float = option(3.0, "Running", "With --train: passes over the pairs.", "epochs")
    lr: float = option(4e-3, "Running", "With --train: peak learning rate.", "per step")
    batch_size: int = option(8, "Running", "Rows of one forward pass.", "rows", least=1)
    max_new_tokens: int = option(
        48, "Running", "Longest answer under an instruction or for a judge, in tokens.", "tokens", least=1
    )
    seed: int = option(42, "Running", "Seed of the held-out rows.", least=0)

    def __post_init__(self) -> None:
        coerce_fields(self)
        parsed = parse_positions(self.positions)
        object.__setattr__(self, "positions", parsed.text)
        object.__setattr__(self, "columns", read_columns(self.columns))
        if str(self.layers).strip().lower() != "auto":
            object.__setattr__(self, "layers", read_layers(self.layers))
        for name, least in (("rank", 1), ("batch_size", 1), ("max_new_tokens", 1), ("limit_rows", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and not least <= value < 2**31:
                raise ReftuneError(f"{name}={value}: must be at least {least}, and below 2**31.")
        if not 0 < self.eval_fraction < 1:
            raise ReftuneError(f"eval_fraction={self.eval_fraction}: must be above 0 and below 1.")
        if self.scale is not None and not 0 < abs(self.scale) <= 1e6:
            raise ReftuneError(f"scale={self.scale}: must not be 0, and at most a million either way.")
        if self.kl is not None and not 0 < self.kl <= 100:
            raise ReftuneError(f"kl={self.kl}: must be above 0 and at most 100 nats a token.")
        if self.remove and (self.kl is not None or self.scale is not None):
            raise ReftuneError("remove: what is taken out has no strength; leave --scale and --kl out.")
        for name, most in (("epochs", 1_000_000), ("lr", 100)):
            if not 0 < getattr(self, name) <= most:
                raise ReftuneError(f"{name}={getattr(self, name)}: must be above 0 and at most {most:,}.")
        if self.train is not None and self.remove:
            raise ReftuneError(f"train={self.train!r}: a direction that is taken out is not trained; leave one out.")
        if self.train == "reft-r1" and (self.rank > 1 or self.layers == "all" or isinstance(self.layers, list)):
            raise ReftuneError("train='reft-r1' trains one vector: leave --rank out, and name a single layer or none.")
        if self.remove and self.gguf:
            raise ReftuneError("remove: a control vector adds and takes nothing out; leave --gguf out.")
        if self.when is not None and self.gguf:
            raise ReftuneError("when: a control vector acts everywhere and has no gate; leave --gguf or --when out.")
        if self.when_label is not None and self.when is None:
            raise ReftuneError("when_label: there are no labelled prompts; give them with --when.")
        if (self.positive_prompt is None) != (self.negative_prompt is None):
            raise ReftuneError("positive_prompt and negative_prompt go together: give both instructions.")
        if not self.output.strip():
            raise ReftuneError(f"output={self.output!r} is no name; name a folder.")
