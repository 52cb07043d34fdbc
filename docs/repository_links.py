"""A hook of mkdocs: files of the repository that pages link to, such as an example, become pages of the site.

In the repository a link such as `../CONTRIBUTING.md` opens the file. The site holds `docs/` alone, so here each such
file gets a page under `repository/`, Markdown as it is and anything else as a code block, and the link leads there.
Pictures of such pages go along.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#:]+)(#[^)\s]*)?\)")
"""A link, or with a ! a picture."""
_FENCES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def on_files(files: Any, config: Any) -> Any:
    """Add a page for each file outside `docs/` that a page links to, and for those that these link to in turn."""
    queue = [(ROOT / "docs" / page.src_uri, page.src_uri) for page in files.documentation_pages()]
    known: set[Path] = set()
    while queue:
        source, _ = queue.pop()
        if source.suffix != ".md":
            continue
        text = source.read_text(encoding="utf-8")
        for picture, _, target, _ in _LINK.findall(text):
            found = (source.parent / target).resolve()
            if not _is_outside(found) or found in known:
                continue
            known.add(found)
            if picture:
                files.append(File.generated(config, _uri(found), abs_src_path=str(found)))
                continue
            page = File.generated(config, _page_of(found), content=_content(found))
            page.inclusion = page.inclusion.NOT_IN_NAV
            files.append(page)
            queue.append((found, page.src_uri))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links that leave `docs/` at those pages."""
    here = page.file.src_uri
    folder = ROOT / "docs" / posixpath.dirname(here)
    if here.startswith("repository/"):
        folder = ROOT / posixpath.dirname(here.removeprefix("repository/"))

    def redirected(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        found = (folder / target).resolve()
        if _is_outside(found):
            uri = _uri(found) if picture else _page_of(found)
        elif found.is_file() and here.startswith("repository/"):
            uri = found.relative_to(ROOT / "docs").as_posix()
        else:
            return match.group()
        return f"{picture}[{text}]({posixpath.relpath(uri, posixpath.dirname(here) or '.')}{anchor or ''})"

    return _LINK.sub(redirected, markdown)


def _is_outside(path: Path) -> bool:
    return path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(ROOT / "docs")


def _uri(path: Path) -> str:
    return f"repository/{path.relative_to(ROOT).as_posix()}"


def _page_of(path: Path) -> str:
    return _uri(path) if path.suffix == ".md" else f"{_uri(path)}.md"


def _content(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    return f"# {path.relative_to(ROOT).as_posix()}\n\n````{_FENCES.get(path.suffix, 'text')}\n{text}\n````\n"
