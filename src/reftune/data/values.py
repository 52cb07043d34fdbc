"""Values as they are meant: what is missing, numbers and arrays of other libraries, whole Unicode text, JSON."""

import base64
import datetime
import decimal
import json
import re
from collections.abc import Mapping
from typing import Any

from reftune.errors import ReftuneError

_SURROGATE = re.compile("[\ud800-\udfff]")
_MISSING = ("NAType", "NaTType")
"""pandas' own words for a missing value, known by name so that pandas need not be there."""


def plain(value: Any, where: str) -> Any:
    """The value as Python has it: None where it is missing, numbers and arrays of other libraries as its own.

    Missing are None, NaN, `pandas.NA` and `NaT`. What is no text, number, list or mapping stays, and whoever wants a
    text of it names it in an error.

    Args:
        value: of a row, nested or not.
        where: row and field, for messages.

    Raises:
        ReftuneError: a text that is no Unicode.
    """
    if isinstance(value, str):
        return check_text(value, where)
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return None if value != value else float(value)
    if isinstance(value, Mapping):
        return {_key(key, where): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if type(value).__name__ in _MISSING or (isinstance(value, decimal.Decimal) and value.is_nan()):
        return None
    if getattr(getattr(value, "dtype", None), "kind", "") in ("M", "m"):  # its item() would be a bare number
        return None if getattr(value, "shape", None) == () and value != value else value
    tolist = getattr(value, "tolist", None)
    return value if tolist is None else plain(tolist(), where)


def _key(key: Any, where: str) -> str:
    return check_text(key if isinstance(key, str) else str(key), f"{where}: a name")


def check_text(text: str, where: str) -> str:
    """The text itself.

    Raises:
        ReftuneError: it holds half of a character (a lone surrogate), which no model can read and no file can keep.
    """
    if found := _SURROGATE.search(text):
        raise ReftuneError(
            f"{where} is no Unicode text: character {found.start() + 1} is the lone surrogate "
            f"\\u{ord(found.group()):04x}, half of a character; write the character whole or delete it"
        )
    return text


def parse_json(text: str, where: str) -> Any:
    """JSON as Python has it.

    Raises:
        json.JSONDecodeError: not JSON; the caller knows lines and columns.
        ReftuneError: JSON that no program reads: nested too deeply, or a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ReftuneError(f"{where}: lists or objects are nested too deeply; flatten them") from None
    except ValueError as error:  # Python's limit on the digits of a whole number
        raise ReftuneError(f"{where}: a number has too many digits; write it as text, in quotes") from error


def json_text(value: Any) -> str:
    """A row as one line of JSON: times in ISO form, bytes in base64, decimals and whatever else as their text."""
    return json.dumps(value, ensure_ascii=False, default=_as_json)


def _as_json(value: Any) -> str:
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    return str(value)
