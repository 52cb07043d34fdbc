"""The house: which rooms there are, and which way imports may go."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "reftune"
ROOMS = sorted(path.parent.name for path in SOURCE.glob("*/__init__.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST, modules: set[str]) -> set[str]:
    """What a module imports of the package, at its top or inside its functions."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules else node.module for name in whole}
    return found & modules


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    modules = set(sources)
    return {name: imports(ast.parse(text), modules) - {name} for name, text in sources.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import one another, in a ring; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


GRAPH = import_graph({module_name(path): path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")})


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_no_circle_of_imports() -> None:
    assert circle(GRAPH) == []


def test_a_circle_would_be_found() -> None:
    sources = {"a": "from b import x", "b": "def f():\n    import c", "c": "from a import y", "d": "import a"}
    assert circle(import_graph(sources)) == ["a", "b", "c", "a"]


def test_engine_and_edits_import_nothing_of_the_rest() -> None:
    allowed = {"edits": {"edits", "errors"}, "engine": {"engine", "edits", "errors"}}
    for module, others in GRAPH.items():
        for other in others if room(module) in allowed else ():
            assert room(other) in allowed[room(module)], f"{module} imports {other}"
    for path in [*(SOURCE / "engine").glob("*.py"), *(SOURCE / "edits").glob("*.py")]:
        assert "peft" not in {name.split(".")[0] for name in names(path)}, f"{path} imports peft"


def names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return found | {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}


def test_nothing_imports_the_command_line() -> None:
    importers = {m for m, others in GRAPH.items() if any(room(other) == "cli" for other in others)}
    assert {room(module) for module in importers} <= {"cli", "__main__"}


def test_at_the_root_stand_the_exception_the_models_and_the_names() -> None:
    files = {path.name for path in SOURCE.glob("*.py")}
    assert files <= {"__init__.py", "__main__.py", "errors.py", "models.py"}


@pytest.mark.parametrize("name", ROOMS)
def test_each_room_says_what_it_is_for_and_what_it_must_not_import(name: str) -> None:
    said = ast.get_docstring(ast.parse((SOURCE / name / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert "mport" in said, f"{name}: say what it imports, or must not"
    assert ".py" in said, f"{name}: say which file to open for what"
    for word in said.replace("`", " ").split():
        if word.endswith(".py") and word.isascii() and "/" not in word:
            assert (SOURCE / name / word).is_file(), f"{name}: speaks of {word}, which is not there"
