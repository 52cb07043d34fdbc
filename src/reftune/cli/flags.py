"""Command-line options made from a dataclass's fields, so that no option is written twice."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field
from typing import Annotated, Any, Literal

import typer

from reftune.runs.recipe_values import default_text


def flag_name(item: Field[Any]) -> str:
    """`--gradient-accumulation` for the field `gradient_accumulation`."""
    return "--" + item.name.replace("_", "-")


def flag_parameter(item: Field[Any], kind: Any, default: Any = MISSING, text: str | None = None) -> inspect.Parameter:
    """A field as an option whose value is None unless it is given (so that a recipe's value can stand).

    Args:
        item: a dataclass field with `help`, `unit` and `group` in its metadata.
        kind: its type.
        default: another than the field's, for the help.
        text: another help than the field's.
    """
    name = flag_name(item)
    is_switch = kind is bool
    declared = [f"{name}/--no-{name[2:]}" if is_switch else name]
    default = item.default if default is MISSING else default
    told = "default:" in item.metadata["help"]
    shown = "" if told else ("on" if default else "") if is_switch else default_text(default)
    option = typer.Option(
        *declared,
        help=(text or item.metadata["help"]) + (f" (default: {shown})" if shown else ""),
        metavar=None if is_switch else _metavar(item, kind),
        rich_help_panel=item.metadata["group"],
        show_default=False,
    )
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[_parsed_as(kind) | None, option],
    )


def with_flags(
    function: Callable[..., Any],
    items: Iterable[tuple[Field[Any], Any]],
    texts: Mapping[str, str] | None = None,
    **defaults: Any,
) -> Callable[..., Any]:
    """The function with an option for each field in place of its `**flags`; **changes its signature**.

    Args:
        function: takes its own parameters and `**flags`, the fields' values by name.
        items: the fields, each with its type.
        texts: help by name in place of the fields' own.
        **defaults: what stands in place of the fields' own; the function itself must see to it.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    own = [
        parameter.replace(annotation=hints[name])
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    texts = texts or {}
    made = [flag_parameter(item, kind, defaults.get(item.name, MISSING), texts.get(item.name)) for item, kind in items]
    function.__signature__ = inspect.Signature([*own, *made])  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *made)}
    return function


def _options(kind: Any) -> tuple[Any, ...]:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return tuple(option for option in typing.get_args(kind) if option is not type(None))
    return (kind,)


def _parsed_as(kind: Any) -> Any:
    """What typer reads: text, because the recipe itself makes numbers and lists of it and says what is wrong."""
    return bool if kind is bool else str


def _metavar(item: Field[Any], kind: Any) -> str:
    first = _options(kind)[0]
    if typing.get_origin(first) is Literal:
        return "|".join(typing.get_args(first))
    unit = item.metadata["unit"].partition(",")[0]
    if unit and not unit.startswith("per "):
        return unit.upper().replace(" ", "-")
    return "NUMBER" if first in (int, float) else "TEXT"
