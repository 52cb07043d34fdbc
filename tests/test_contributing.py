"""CONTRIBUTING.md: the paths that it names are there, and it leads into every room."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = re.findall(
    r"`((?:src|tests|docs|benchmarks|recipes|examples)/[^`\s]*|constraints[\w-]*\.txt|CHANGELOG\.md)`",
    (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"),
)


def test_every_path_that_is_named_is_there() -> None:
    assert len(PATHS) > 40
    assert [path for path in PATHS if "<" not in path and not (ROOT / path).exists()] == []


def test_every_room_is_led_into() -> None:
    rooms = [path.parent for path in (ROOT / "src" / "reftune").glob("*/__init__.py")]
    rooms += [
        ROOT / "src/reftune/training/prefix",
        *(path.parent for path in (ROOT / "src/reftune/serving").glob("*/__init__.py")),
    ]
    for room in rooms:
        name = f"{room.relative_to(ROOT).as_posix()}/"
        assert any(path.startswith(name) and "/" not in path.removeprefix(name) for path in PATHS), name
