"""Settings that are known to do well, by name, and what a run takes where its recipe says `auto`.

The measurements are in docs/decisions/0015-defaults-that-are-the-best-known.md. Nothing heavy is imported at the top.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from reftune.errors import ReftuneError

AUTO = "auto"
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "completion": {"method": "direft", "rank": 1, "layers": "all", "positions": "l1+generated"},
    "classification": {"method": "loreft", "rank": 1, "layers": "all", "positions": "f3", "lr": 4e-3},
    "shared": {"method": "loreft", "rank": 4, "layers": "all", "positions": "l1+generated", "lr": 1e-3},
}
"""By task, and for users who share a rotation, what stands in place of `auto`; else `learning_rate` finds the rate."""
KNOWN: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "like": {
        "blog": {"method": "loreft", "rank": 4, "layers": "8/32", "positions": "l1", "lr": 4e-3},
        "paper": {"method": "loreft", "rank": 8, "layers": "all", "positions": "f7+l7", "lr": 9e-4},
        "serving": {"method": "loreft", "rank": 4, "layers": "10/30,14/30,18/30,22/30", "positions": "l1"},
    },
    "budget": {
        "tiny": {"rank": 1, "layers": "14/30", "positions": "l1"},
        "small": {"rank": 1, "layers": "all", "positions": "l1+generated"},
        "full": {"rank": 8, "layers": "all", "positions": "all"},
    },
}
"""The two dials of a recipe and what each of their words stands for; a setting that is given itself wins."""
_PAPER_RATE, _PAPER_WIDTH, _PAPER_LAYERS, _PAPER_RANK = 9e-4, 4096, 32, 8
"""The paper's rate for edits of rank 8 on all layers of a model of 7B."""
_BY_LAYERS, _HIGHEST_RATE = 0.43, 1.5e-2
"""How the rate grows as layers become fewer (4e-3 for one layer of 32), and the highest."""
USUAL_TOKENS, _MOST_BY_TOKENS = 300.0, 1.25
"""Learnt tokens of the step that the rate is for, and how much more it may be for longer ones."""
_CPU_TOKENS = 4096
STEP_ROWS = 8
"""Rows of a step of the optimiser where the batch size is `auto`."""


def chosen(task: str, like: str | None, budget: str | None) -> Mapping[str, Any]:
    """What a recipe's `auto` stands for."""
    return {**DEFAULTS[task], **KNOWN["like"].get(like or "", {}), **KNOWN["budget"].get(budget or "", {})}


def learning_rate(width: int, rank: int, layers: int, tokens: float) -> float:
    """The peak rate of AdamW for edits: the paper's, scaled.

    AdamW moves each of the rank x width numbers of a projection by the rate, so that the whole moves by its root; the
    effects of several layers add up, and a mean over few tokens is noisy, so that its steps must be smaller by the root
    of their number.

    Args:
        width: of the state that is edited.
        rank: of the edits.
        layers: how many are edited.
        tokens: learnt in a step of the optimiser.
    """
    rate = _PAPER_RATE * math.sqrt(_PAPER_WIDTH * _PAPER_RANK / (width * rank)) * (_PAPER_LAYERS / layers) ** _BY_LAYERS
    return float(f"{min(rate * min(math.sqrt(max(tokens, 1.0) / USUAL_TOKENS), _MOST_BY_TOKENS), _HIGHEST_RATE):.2g}")


def learnt_tokens(rows: Any) -> int:
    """How many tokens of tokenised rows are supervised."""
    return sum(sum(label >= 0 for label in labels) for labels in rows["labels"])


def rows_of_a_pass(together: int, longest: int, tokens: int) -> int:
    """How many of a step's rows go through the model at a time: the most that divide the step and keep to the tokens.

    Args:
        together: rows of a step of the optimiser.
        longest: tokens of the longest row.
        tokens: of a forward pass at most.
    """
    return max(n for n in range(1, together + 1) if together % n == 0 and (n == 1 or n * longest <= tokens))


def affordable_tokens(base: Any) -> int:
    """Tokens of a forward pass that half of the free memory holds; on the CPU no more than speed anything up."""
    import psutil
    import torch

    device = next(base.parameters()).device
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] / 2 / bytes_of_a_token(base))
    return min(_CPU_TOKENS, int(psutil.virtual_memory().available / 2 / bytes_of_a_token(base)))


def bytes_of_a_token(base: Any) -> int:
    """About what a token keeps until the backward pass: twenty states a layer, and three rows of logits."""
    config = base.config.get_text_config()
    states = 20 * getattr(config, "num_hidden_layers", 0) * getattr(config, "hidden_size", 0) * base.dtype.itemsize
    return states + 3 * 4 * getattr(config, "vocab_size", 0)


def placed(layers: str, depth: int) -> list[int]:
    """`8/32,-1` in a model of so many layers."""
    found: dict[int, None] = {}
    for part in layers.split(","):
        layer, slash, of = part.partition("/")
        found[min(int(int(layer) * depth / int(of) + 0.5), depth - 1) if slash else int(layer)] = None
    return list(found)


@contextmanager
def told_as_keys() -> Iterator[None]:
    """Errors of the ``with`` block about a field of `ReftConfig` name it as recipes and flags do."""
    try:
        yield
    except ReftuneError as error:
        name, equals, rest = str(error).partition("=")
        key = {"layers_to_transform": "layers", "r": "rank"}.get(name)
        if not equals or key is None:
            raise
        raise ReftuneError(f"{key}={rest}") from None
