"""Which module of the package imports which: no cycle, and no package that knows one above it.

Read from the sources, so that imports for type checkers and imports inside functions count too. An
import of ``a.b`` also runs ``a/__init__.py``; that is not counted, as it is so for every module.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchao8

PACKAGE = Path(torchao8.__file__).parent
# Modules that import others of the package inside of functions, and why.
IN_FUNCTIONS = {
    "torchao8.__main__": "the report must print where the extension does not load",
    "torchao8._selfcheck": "the report imports it before it knows whether the extension loads",
}
# What a module or package, with all in it, must not import.
FORBIDDEN = {
    "torchao8.interop": ("torchao8.optim", "torchao8.checkpoint"),
    "torchao8.optim": ("torchao8.checkpoint", "torchao8.estimate"),
    "torchao8.optim._state": ("torchao8.optim._step", "torchao8.optim.base"),
    "torchao8.optim._step": ("torchao8.optim.base",),
    **dict.fromkeys(
        (
            "torchao8._messages",
            "torchao8._modes",
            "torchao8._numbers",
            "torchao8.block_layout",
            "torchao8.ops",
            "torchao8.shard_layout",
            "torchao8.sharding",
            "torchao8.state_bits",
        ),
        ("torchao8.optim", "torchao8.interop", "torchao8.checkpoint", "torchao8.estimate"),
    ),
}


def modules_in(package: Path) -> dict[str, Path]:
    """The file of each module, by its name; a package's is its ``__init__.py``."""
    found = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_in(tree: ast.AST, known: dict[str, Path]) -> Iterator[str]:
    """The modules that are imported anywhere in a piece of source."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports say where a name comes from"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                name = inner if inner in known else node.module
                if name in known:
                    yield str(name)


def graph_of(package: Path) -> dict[str, set[str]]:
    """The modules that each module imports."""
    known = modules_in(package)
    return {
        name: set(imports_in(ast.parse(path.read_text(encoding="utf-8")), known)) - {name}
        for name, path in known.items()
    }


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Modules of a cycle, in order; none if there is no cycle."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_no_cycle() -> None:
    assert cycle_in(graph_of(PACKAGE)) == []


@pytest.mark.parametrize("importer", FORBIDDEN)
def test_nothing_knows_what_is_above_it(importer: str) -> None:
    graph = graph_of(PACKAGE)
    assert any(is_in(name, importer) for name in graph)
    found = [
        (name, other)
        for name, others in graph.items()
        for other in others
        if is_in(name, importer) and any(is_in(other, above) for above in FORBIDDEN[importer])
    ]
    assert found == []


def test_imports_stand_at_the_top() -> None:
    """Those of other packages may stand in functions, where they take long or may be missing."""
    known = modules_in(PACKAGE)
    found = set()
    for name, path in known.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
        if any(
            next(imports_in(node, known), None) is not None
            for node in ast.walk(tree)
            if isinstance(node, functions)
        ):
            found.add(name)
    assert found == set(IN_FUNCTIONS)


@pytest.mark.parametrize(
    ("source", "is_cycle"),
    [
        ("import p.a", True),
        ("from p import a", True),
        ("from p.a import name", True),
        ("def f():\n    from p.a import name", True),
        ("if TYPE_CHECKING:\n    from p.a import name", True),
        ("from p import name", False),
        ("import a", False),
    ],
)
def test_a_cycle_is_found(source: str, is_cycle: bool, tmp_path: Path) -> None:
    """Of three modules, the last of which has the source."""
    sources = {"__init__": "", "a": "from p import b", "b": "from p.q import c", "q/c": source}
    for name, text in sources.items():
        path = tmp_path / "p" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    expected = ["p.a", "p.b", "p.q.c"] if is_cycle else []
    assert cycle_in(graph_of(tmp_path / "p")) == expected
