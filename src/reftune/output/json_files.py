"""JSON objects as they are found in files that somebody else may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reftune.errors import ReftuneError


def read_json_object(path: Path, way_out: str = "write it again") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        way_out: what the message advises.

    Raises:
        ReftuneError: it cannot be read, is no JSON, or holds something else than an object.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReftuneError(f"{path} cannot be read ({error.strerror or error}): {way_out}.") from None
    except MemoryError:
        raise ReftuneError(f"{path} is larger than the memory of this machine: {way_out}.") from None
    except RecursionError:
        raise ReftuneError(f"{path} is nested too deeply to be read: {way_out}.") from None
    except ValueError as error:  # also: bytes that are no UTF-8, an integer of thousands of digits
        raise ReftuneError(f"{path} is not valid JSON ({error}): {way_out}.") from None
    if not isinstance(found, dict):
        raise ReftuneError(f"{path} holds a {type(found).__name__}, not an object with keys: {way_out}.")
    return found
