"""A hook of mkdocs: `<!-- fields of reftune.ReftConfig -->` becomes a table of the dataclass's own fields.

Names, defaults, units and help come from the class, as the command line's flags do, so the pages cannot fall behind.
"""

import re
from dataclasses import MISSING, Field, fields
from importlib import import_module
from typing import Any

_MARK = re.compile(r"<!-- fields of ([\w.]+) -->")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Fill in the tables that a page asks for."""
    return _MARK.sub(lambda match: field_table(match[1]), markdown)


def field_table(name: str) -> str:
    """A Markdown table of a dataclass's fields; those that it inherits are left out, having their own documentation.

    Args:
        name: the class, by its full path.
    """
    module, _, cls_name = name.rpartition(".")
    cls = getattr(import_module(module), cls_name)
    inherited = {
        field.name for base in cls.__mro__[1:] if "__dataclass_fields__" in vars(base) for field in fields(base)
    }
    own = [field for field in fields(cls) if field.name not in inherited or field.name in vars(cls)]
    with_units = any(field.metadata.get("unit") for field in own)
    head = ["field", "default", *(["unit"] if with_units else []), "what it does"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for field in own:
        unit = [field.metadata.get("unit", "")] if with_units else []
        cells = [f"`{field.name}`", _default(field), *unit, field.metadata.get("help", "")]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def _default(field: Field[Any]) -> str:
    if field.default is MISSING or field.default == "":
        return ""
    return "none" if field.default is None else f"`{field.default}`"
