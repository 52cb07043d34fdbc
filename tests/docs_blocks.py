"""Fenced blocks, links and headings of the repository's Markdown, for the tests that run and check them."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path

from tests.cli.tiny_folder import save_tiny_model

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
# Names of Markdown files that git would not track are not read: they are nobody's pages.
_IGNORED = {".venv", "site", "out", "outputs", "runs", "node_modules", "demo-output", ".pytest_cache", "build", "dist"}

_FENCE = re.compile(r"^(?P<indent> *)(?P<marks>`{3,})(?P<language>[\w-]*)(?P<rest>[^`\n]*)$")
_NOTE = re.compile(r"^ *<!-- (?P<about>not run|recipe|file): (?P<text>.+) -->$")
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page, line: where its fence stands.
        language: behind the fence.
        code: its text.
        notes: what the comment above it says: `not run` and why, the kind of `recipe`, the `file` that commands name.
    """

    page: Path
    line: int
    language: str
    code: str
    notes: dict[str, str]

    @property
    def not_run(self) -> str | None:
        return self.notes.get("not run")

    @property
    def where(self) -> str:
        return f"{name_of(self.page)}:{self.line}"


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def markdown_files() -> list[Path]:
    """Every Markdown file of the repository."""
    found = (p for p in ROOT.rglob("*.md") if not _IGNORED & set(p.relative_to(ROOT).parts[:-1]))
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(ROOT).parts))


def blocks(page: Path, *languages: str) -> list[Block]:
    """The page's fenced blocks in order; of these languages alone, where some are given."""
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    index = 0
    while index < len(lines):
        opened = _FENCE.match(lines[index])
        if not opened:
            index += 1
            continue
        closing = re.compile(rf"^ *{opened['marks']} *$")
        end = next((i for i in range(index + 1, len(lines)) if closing.match(lines[i])), None)
        assert end is not None, f"{name_of(page)}:{index + 1}: the block is not closed"
        noted = _NOTE.match(lines[index - 1]) if index else None
        notes = {noted["about"]: noted["text"]} if noted else {}
        indent = len(opened["indent"])
        code = "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines[index + 1 : end])
        found.append(Block(page, index + 1, opened["language"], code + "\n", notes))
        index = end + 1
    return [block for block in found if not languages or block.language in languages]


def run_python(block: Block, namespace: dict[str, object]) -> None:
    """Run a block as it stands; its errors name the page and the line."""
    exec(compile("\n" * block.line + block.code, str(block.page), "exec"), namespace)


def commands(block: Block) -> list[str]:
    """The command lines of a shell block, without comments, continued lines joined."""
    text = block.code.replace("\\\n", " ")
    lines = (re.split(r"\s+#", line)[0].strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def links(page: Path) -> list[str]:
    """Targets of the page's links and pictures, those in code left out."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.code.rstrip("\n"), "")
    text = re.sub(r"`[^`\n]*`", "", text)
    return [next(target for target in match.groups() if target) for match in _LINK.finditer(text)]


def anchors(page: Path) -> set[str]:
    """The anchors of the page's headings, as mkdocs makes them."""
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        text = text.replace(block.code.rstrip("\n"), "")
    found = set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))
    for heading in re.findall(r"^#+ +(.+?) *#*$", text, re.MULTILINE):
        plain = unicodedata.normalize("NFKD", re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading))
        plain = plain.encode("ascii", "ignore").decode()
        found.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower()))
    return found


def save_stand_in(folder: Path) -> Path:
    """What the pages' `smollm2` is in tests: as many layers, random, narrow, one token a byte, with room for a chat."""
    save_tiny_model(folder, hidden=64, layers=30)
    for name, key in (("config.json", "max_position_embeddings"), ("tokenizer_config.json", "model_max_length")):
        values = json.loads((folder / name).read_text(encoding="utf-8"))
        values[key] = 2048
        (folder / name).write_text(json.dumps(values), encoding="utf-8")
    return folder
