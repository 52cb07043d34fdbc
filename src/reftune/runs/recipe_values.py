"""Values of recipes as YAML and a command line write them, and names as people misspell them."""

from __future__ import annotations

import difflib
import json
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from reftune.data.classification import NUMBER
from reftune.data.values import parse_json
from reftune.errors import ReftuneError
from reftune.output.targets import refuse_dangling
from reftune.runs.known_settings import KNOWN

_Made = TypeVar("_Made")
_MOST = 10**12
"""Of a number without a bound of its own: past it are slips of the keyboard, and what libraries cannot count."""
_MOST_VALUES = 100_000
"""Of a recipe; with aliases a short file can stand for more than any memory holds."""
_ONE_OF_TWO = (("eval_file", "eval_fraction"), ("warmup_ratio", "warmup_steps"), ("like", "budget"))
"""Keys that say the same in two ways."""


def option(
    default: Any, group: str, text: str, unit: str = "", aka: tuple[str, ...] = (), least: int | None = None
) -> Any:
    """A field with its help.

    Args:
        default: the field's own.
        group: where the help has it.
        text: the help.
        unit: of its values.
        aka: what other libraries call it, so that an unknown key can name ours.
        least: of a number; one without has both its bounds checked by its class.
    """
    return field(default=default, metadata={"group": group, "help": text, "unit": unit, "aka": aka, "least": least})


def as_flags(values: Any) -> list[str]:
    """A command's flags for the fields of a dataclass that are not at their defaults."""
    found: list[str] = []
    for item in fields(values):
        value, name = getattr(values, item.name), item.name.replace("_", "-")
        if value is True or value is False:
            found += [] if value is item.default else [f"--{name}" if value else f"--no-{name}"]
        elif value != item.default:
            found.append(f"--{name}={value}")
    return found


def typed_fields(owner: type, without: Collection[str] = ()) -> list[tuple[Field[Any], Any]]:
    """The fields of a dataclass in order, each with its type as an object (`str | None` for instance)."""
    kinds = typing.get_type_hints(owner)
    return [(item, kinds[item.name]) for item in fields(owner) if item.name not in without]


def also_known_as(owner: type, without: Collection[str] = ()) -> dict[str, tuple[str, ...]]:
    """The fields of a dataclass with other libraries' words for them, as `check_names` takes them."""
    return {item.name: item.metadata["aka"] for item in fields(owner) if item.name not in without}


def coerce_fields(owner: Any, words: Mapping[str, str] | None = None) -> None:
    """Make every field of a frozen dataclass, which is **changed**, its declared type; errors as for `coerce`.

    Args:
        owner: the dataclass.
        words: by field, a word that stands for a value and is left as it is.
    """
    for item, kind in typed_fields(type(owner)):
        value = getattr(owner, item.name)
        if value != (words or {}).get(item.name, MISSING):
            object.__setattr__(owner, item.name, coerce(item, kind, value))


def read_flags(owner: type[_Made], flags: Mapping[str, Any]) -> _Made:
    """A dataclass made of the given flags that are its fields, each as its field's type; errors as for `coerce`."""
    kinds = {item.name: (item, kind) for item, kind in typed_fields(owner)}
    with told_by_flag(flags):
        return owner(**{name: coerce(*kinds[name], value) for name, value in given(flags).items() if name in kinds})


def given(flags: Mapping[str, Any] | None) -> dict[str, Any]:
    """The flags that a command line gave: those that are not None."""
    return {name: value for name, value in (flags or {}).items() if value is not None}


def merged(values: Mapping[str, Any], flags: Mapping[str, Any] | None) -> dict[str, Any]:
    """A recipe's values and the given flags, which win also over what says the same in another way."""
    flags = given(flags)
    replaced = {b if a in flags else a for a, b in _ONE_OF_TWO if (a in flags) != (b in flags)}
    for dial in KNOWN.keys() & flags.keys():
        replaced |= KNOWN[dial].get(flags[dial], {}).keys()
    return {name: value for name, value in values.items() if name not in replaced} | flags


@contextmanager
def told_at(where: str) -> Iterator[None]:
    """Errors of the ``with`` block begin with where the fault is."""
    try:
        yield
    except ReftuneError as error:
        raise ReftuneError(f"{where}: {error}") from None


@contextmanager
def told_by_flag(flags: Mapping[str, Any] | None) -> Iterator[None]:
    """Errors of the ``with`` block about a field that a flag gave name the flag as people write it."""
    try:
        yield
    except ReftuneError as error:
        name, equals, rest = str(error).partition("=")
        if not equals or name not in given(flags):
            raise
        raise ReftuneError(f"--{name.replace('_', '-')}={rest}") from None


_Class = TypeVar("_Class", bound=type)


def no_type_check(cls: _Class) -> _Class:
    """Keep the tests' run-time type checks away from a class, by this decorator's name.

    A recipe takes what YAML and a command line give, and makes it the declared type itself. The decorator of that name
    in `typing` would also hide the annotations, from which options are made.
    """
    return cls


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        ReftuneError: no such file, not YAML, or no mapping.
    """
    if not path.is_file():
        refuse_dangling(path)
        close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=3)
        near = f"; near it: {', '.join(close)}" if close else ""
        raise ReftuneError(f"recipe {path}: there is no such file{near}.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        unfolded = _size(values, {})
    except RecursionError:
        raise ReftuneError(f"recipe {path} is nested too deeply, or contains itself: write it flatter.") from None
    except OSError as error:
        raise ReftuneError(f"recipe {path} cannot be read ({error.strerror or error}).") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # also: bytes that are no UTF-8, dates that are none
        raise ReftuneError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if unfolded > _MOST_VALUES:
        raise ReftuneError(f"recipe {path}: its aliases (*name) unfold to more than {_MOST_VALUES:,} values.")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ReftuneError(f"recipe {path} holds a {type(values).__name__}; write one `key: value` a line.")
    return {str(key): value for key, value in values.items()}


def _size(value: Any, known: dict[int, int]) -> int:
    """How many values these are with every alias written out; RecursionError where a value contains itself."""
    if not isinstance(value, (Mapping, list, tuple, set)):
        return 1
    if id(value) not in known:
        parts = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(value)]


def check_names(values: Iterable[str], names: Mapping[str, Sequence[str]], where: str = "", what: str = "key") -> None:
    """Refuse keys that are not among `names`; other libraries' words for them, their values, are told as near.

    Raises:
        ReftuneError: naming the place, the key (or `what` they are) and the names near it.
    """
    for key in values:
        if key in names:
            continue
        known_as = [name for name, others in names.items() if key in others]
        dashed = key.replace("-", "_")
        close = known_as or ([dashed] if dashed in names else difflib.get_close_matches(dashed, names, n=3, cutoff=0.5))
        way_out = f"did you mean {' or '.join(close)}?" if close else f"the {what}s are: {', '.join(names)}."
        raise ReftuneError(f"{where}{': ' if where else ''}unknown {what} {key!r}; {way_out}")


def read_number(name: str, value: Any, *, whole: bool = False, least: int | None = None, unit: str = "") -> Any:
    """A finite number of at least `least` (above 0 where that is None), `4e-3` as text too.

    Raises:
        ReftuneError: anything else.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    enough = number > 0 if least is None else number >= least
    if not enough or number > _MOST or (whole and not number.is_integer()):
        bound = ("above 0" if least is None else f"of at least {least}") + f" and at most {_MOST:,}" * (number > _MOST)
        unit = f" ({unit})" if unit else ""
        raise ReftuneError(f"{name}={value!r}: give {'a whole number' if whole else 'a number'} {bound}{unit}.")
    return int(number) if whole else number


def read_layers(value: Any) -> int | list[int] | str:
    """`"8"`, `8`, `"3,9,18"`, `[3, 9, 18]` or `"all"`, negatives from the end; `"8/32,16/32"` stays as it is.

    Raises:
        ReftuneError: anything else.
    """
    if isinstance(value, str) and value.strip().lower() == "all":
        return "all"
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    texts = [str(part).strip() for part in parts]
    if any("/" in text for text in texts) and all(map(_is_place, texts)):
        return ",".join(texts)
    try:
        numbers = [int(text) for text in texts]
    except ValueError:
        numbers = []
    if not numbers or any(isinstance(part, bool) for part in parts):
        raise ReftuneError(
            f"layers={value!r}: write a layer number (8), several (3,9,18) or all; -1 is the last, 8/32 the one as "
            "deep as 8 is of 32 (0/32 to 31/32)."
        )
    return numbers[0] if len(numbers) == 1 else numbers


def _is_place(text: str) -> bool:
    """Whether this is a layer's number, or a number out of so many layers (8/32)."""
    found = re.fullmatch(r"(-?\d{1,9})|(\d{1,9})/(\d{1,9})", text)
    return bool(found) and (found[2] is None or int(found[2]) < int(found[3]))


def read_factors(value: Any) -> list[float] | None:
    """`"2,4"`, `2` or `[2, 4]`.

    Raises:
        ReftuneError: anything else, or a number that is not above 0.
    """
    if value is None:
        return None
    parts = value if isinstance(value, (list, tuple)) else str(value).split(",")
    try:
        numbers = [float(str(part).strip()) for part in parts]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < number <= 1e6 for number in numbers):
        raise ReftuneError(f"factors={value!r}: write numbers above 0, as in 2,4,6.")
    return numbers


def read_names(field: str, value: Any, known: Sequence[str]) -> list[str] | None:
    """`"a,b"`, `"a"` or `["a", "b"]`, each of those that are known.

    Raises:
        ReftuneError: another name.
    """
    if value is None:
        return None
    names = [str(part).strip() for part in (value if isinstance(value, (list, tuple)) else str(value).split(","))]
    if not names or not {*names} <= {*known}:
        raise ReftuneError(f"{field}={value!r}: choose of {', '.join(known)}.")
    return names


def read_columns(value: Any) -> dict[str, str] | None:
    """`"prompt=question,completion=answer"` or a mapping.

    Raises:
        ReftuneError: a part without `=`.
    """
    if value is None or value == "":
        return None
    if isinstance(value, Mapping):
        return {str(name): str(column) for name, column in value.items()}
    found: dict[str, str] = {}
    for part in str(value).split(","):
        name, equals, column = part.partition("=")
        if not equals or not name.strip() or not column.strip():
            raise ReftuneError(f"columns={value!r}: write field=column, as in prompt=question,completion=answer.")
        found[name.strip()] = column.strip()
    return found


def read_chat_template_kwargs(value: Any) -> dict[str, Any] | None:
    """`"enable_thinking=false,effort=low"`, JSON of an object, or a mapping.

    Raises:
        ReftuneError: a part without `=`.
    """
    if value is None or value in ("", {}):
        return None
    if isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    try:
        if str(value).lstrip().startswith("{"):
            return dict(parse_json(str(value), "chat_template_kwargs"))
        pairs = read_columns(value) or {}
    except (ReftuneError, json.JSONDecodeError):
        raise ReftuneError(
            f"chat_template_kwargs={value!r}: write name=value, as in enable_thinking=false, or a JSON object."
        ) from None
    return {name: _json_or_text(text) for name, text in pairs.items()}


def _json_or_text(text: str) -> Any:
    try:
        return parse_json(text.lower() if text.lower() in ("true", "false", "null") else text, "chat_template_kwargs")
    except json.JSONDecodeError:
        return text


def read_labels(value: Any) -> list[str] | str | None:
    """`"no,yes"` or a list of names; `"number"` for a regression.

    Raises:
        ReftuneError: fewer than two names, a name twice, or one that YAML took for something else.
    """
    if value is None or value in ("", NUMBER):
        return value or None
    names = value if isinstance(value, (list, tuple)) else str(value).split(",")
    for name in names:
        if isinstance(name, bool) or not isinstance(name, (str, int)):
            raise ReftuneError(f"labels={value!r}: YAML reads an unquoted no, yes or null otherwise; put it in quotes.")
    found = [str(name).strip() for name in names]
    if len(set(found)) < max(2, len(found)) or not all(found):
        raise ReftuneError(f"labels={value!r}: give at least two different names (no,yes), or {NUMBER!r}.")
    return found


def default_text(default: Any) -> str | None:
    """A default as a reader writes it; None where there is none."""
    if default in (MISSING, None, ""):
        return None
    return f"{default:g}" if isinstance(default, float) else str(default)


def coerce(item: Field[Any], kinds: Any, value: Any) -> Any:
    """The value as the field's type, where it can only be meant so (`4e-3` is text to YAML).

    Args:
        item: the field.
        kinds: its type as an object, `str | None` for instance.
        value: what YAML or a command line gives.

    Raises:
        ReftuneError: it cannot be meant so.
    """
    options = (
        typing.get_args(kinds)
        if isinstance(kinds, types.UnionType) or typing.get_origin(kinds) is typing.Union
        else (kinds,)
    )
    if value is None:
        if type(None) in options:
            return None
        raise ReftuneError(
            f"{item.name}=null: give a value, or leave the key out (default {default_text(item.default)})."
        )
    if any(value in typing.get_args(option) for option in options if typing.get_origin(option) is Literal):
        return value
    wanted = next(option for option in options if option is not type(None))
    if typing.get_origin(wanted) is Literal:
        choices = typing.get_args(wanted)
        # What YAML makes of the words on and off, and of 4bit without its letters.
        words: dict[int, str] = {True: "on", False: "off"} if isinstance(value, bool) else {4: "4bit", 8: "8bit"}
        text = words.get(value, value) if isinstance(value, int) else value
        if text not in choices:
            raise ReftuneError(f"{item.name}={value!r}: choose {' or '.join(choices)}.")
        return text
    if wanted is bool:
        if not isinstance(value, bool):
            raise ReftuneError(f"{item.name}={value!r}: write true or false.")
        return value
    if wanted in (int, float):
        unit = f" of {item.metadata['unit']}" if item.metadata["unit"].isalpha() else ""
        try:
            number = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if math.isnan(number) or (wanted is int and not number.is_integer()):
            other = [f" or {word}" for option in options for word in typing.get_args(option)]
            what = "a whole number" if wanted is int else "a number"
            raise ReftuneError(f"{item.name}={value!r}: give {what}{unit}{''.join(other)}.")
        number = int(number) if wanted is int else number
        least = item.metadata["least"]
        if least is not None and not least <= number <= _MOST:
            most = f" and at most {_MOST:,}" if number > _MOST else ""
            raise ReftuneError(f"{item.name}={number}: must be at least {least}{most}.")
        return number
    if len(options) == 1 or options == (str, type(None)):
        if not isinstance(value, (str, int, float)) or isinstance(value, bool):
            raise ReftuneError(f"{item.name}={value!r}: give text.")
        return str(value)
    return value
