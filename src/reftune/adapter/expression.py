"""Several adapters at once, each with a strength: ``0.5*pirate + 0.3*formal - terse``. The one grammar, and a model."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from reftune.adapter.checkpoint import trained_beside_edits
from reftune.adapter.tensors import under
from reftune.engine.hooks import Engine
from reftune.errors import ReftuneError

_SIGN = re.compile(r"(?<=\S)\s+([+-])(?:\s+|$)")
_TERM = re.compile(r"(?P<sign>[+-]?)\s*(?:(?P<weight>[^*]*?)\s*\*\s*)?(?P<name>[^\s+*-][^*]*)")
_NUMBER = re.compile(r"(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?")
MOST_TERMS = 16
Terms = list[tuple[str, float]]


def parse_expression(text: str, known: Collection[str] | None = None) -> Terms:
    """The adapters of an expression with their strengths, in order.

    A term is a name, or ``number*name``. Between terms stands ``+`` or ``-`` with a space on both sides, because names
    may hold hyphens.

    Args:
        text: the expression.
        known: the names that there are; None: any.

    Raises:
        ReftuneError: naming the character at which there is no term, an unknown name, a name for the second time, a
            strength that is no finite number, or a seventeenth adapter.
    """

    def wrong(at: int, what: str) -> ReftuneError:
        return ReftuneError(f"adapter expression {text!r}, character {at + 1}: {what}")

    terms: dict[str, float] = {}
    start, sign = 0, 1.0
    for match in [*_SIGN.finditer(text), None]:
        part = text[start : len(text) if match is None else match.start()]
        at = start + len(part) - len(part.lstrip())
        found = _TERM.fullmatch(part.strip())
        if found is None:
            raise wrong(at, f"{part.strip()!r} is no term; write name or 0.5*name.")
        name, weight = found["name"], found["weight"]
        number = 1.0 if weight is None else float(weight) if _NUMBER.fullmatch(weight) else math.nan
        if not math.isfinite(number):
            raise wrong(at, f"the strength {weight!r} of {name!r} is no finite number; write 0.5*name.")
        at += found.start("name")
        if known is not None and name not in known:
            raise wrong(at, f"there is no adapter {name!r}; there are {', '.join(map(repr, known)) or 'none'}.")
        if name in terms:
            raise wrong(at, f"{name!r} stands here for the second time; write it once, with the sum of its strengths.")
        if len(terms) == MOST_TERMS:
            raise wrong(at, f"more than {MOST_TERMS} adapters at once.")
        terms[name] = number * sign * (-1 if found["sign"] == "-" else 1)
        if match is not None:
            start, sign = match.end(), -1.0 if match[1] == "-" else 1.0
    return list(terms.items())


@contextmanager
def mixture(model: nn.Module, expression: str) -> Iterator[None]:
    """Let several ReFT adapters of a model edit together, for the length of a ``with`` block; **changes the model**.

    At every site the adapters edit one after the other, in the order written, each multiplied by its strength (and by
    what ``set_scale`` gave it): what the server answers to the same expression. Adapters that are not named rest.

    Args:
        model: a ``PeftModel``, or one with edits of ``reftune.attach``.
        expression: over the adapters' names, as in ``"0.5*pirate + 0.3*formal - terse"``.

    Raises:
        ReftuneError: what is no expression, a name that is not on this model, or an adapter that replaces weights too.
    """
    base = under(model)
    engine = Engine.of(base)
    if engine is None:
        raise ReftuneError(f"adapter expression {expression!r}: this model has no ReFT adapters.")
    terms = parse_expression(expression, engine.adapter_names())
    check_shared(getattr(base, "peft_config", {}), [name for name, _ in terms])
    layers = list(engine.interventions.values())
    before = [(layer._active_adapter, {n: p.scale for n, p in layer.placements.items()}) for layer in layers]
    trained = [(parameter, parameter.requires_grad) for layer in layers for parameter in layer.parameters()]
    try:
        edit_together(engine, [(name, weight * engine.placements(name)[0].scale) for name, weight in terms])
        yield
    finally:
        for layer, (active, scales) in zip(layers, before, strict=True):
            layer._active_adapter = active
            for name, scale in scales.items():
                if name in layer.placements:
                    layer.placements[name].scale = scale
        for parameter, required in trained:  # leaving `disable_adapter` in the block changes it
            parameter.requires_grad = required


def edit_together(engine: Engine, terms: Sequence[tuple[str, float]]) -> None:
    """Let adapters edit one after the other, each multiplied by its strength, and no others; **changes the model**."""
    for layer in engine.interventions.values():
        layer._active_adapter = [name for name, _ in terms]
        for name, weight in terms:
            if name in layer.placements:
                layer.placements[name].scale = float(weight)


def check_shared(configs: Any, names: Sequence[str]) -> None:
    """Refuse adapters that replace weights of the base, where they are several.

    Raises:
        ReftuneError: naming the first such adapter.
    """
    for name in names if len(names) > 1 else ():
        if beside := trained_beside_edits(vars(configs[name]) if name in configs else {}):
            raise ReftuneError(
                f"adapter {name!r} replaces weights of the base model ({beside}), which the other adapters use too; "
                "use it by itself."
            )
