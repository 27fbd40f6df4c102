"""The pages of the documentation: their Python, their links, and what they must name.

A block of Python runs. Three comments, which no reader sees, say otherwise or more:

- ``<!-- excerpt -->`` on the line before a block: it does not run, as it needs a GPU, ranks or
  more than seconds. Its names of this library must exist all the same.
- ``<!-- setup``, lines of Python, ``-->``: what the blocks behind it need, such as a small model.
- ``<!-- needs: timm, torchvision -->``: the page is skipped where one of the packages is missing.
"""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torchao8

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
]

_FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>```+|~~~+)(?P<info>[^\n]*)\n(?P<code>.*?)^(?P=indent)(?P=fence) *$",
    re.MULTILINE | re.DOTALL,
)
_SETUP = re.compile(r"^<!-- setup\n(?P<code>.*?)^-->", re.MULTILINE | re.DOTALL)
_EXCERPT = re.compile(r"<!-- excerpt -->\n *\Z")
_LINK = re.compile(r"!?\[[^\]]*\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")


class Block(NamedTuple):
    """Python of a page, and the line that it begins in, from 1."""

    code: str
    line: int
    is_excerpt: bool


def blocks(text: str) -> list[Block]:
    found = []
    for match in [*_FENCE.finditer(text), *_SETUP.finditer(text)]:
        is_setup = match.re is _SETUP
        if not is_setup and match["info"].split()[:1] != ["python"]:
            continue
        line = text.count("\n", 0, match.start("code")) + 1
        excerpt = not is_setup and _EXCERPT.search(text[: match.start()]) is not None
        found.append(Block(textwrap.dedent(match["code"]), line, excerpt))
    return sorted(found, key=lambda block: block.line)


def needed_packages(text: str) -> list[str]:
    names = re.findall(r"^<!-- needs: (.*?) *-->", text, re.MULTILINE)
    return [name.strip() for line in names for name in line.split(",")]


def _without_code(text: str) -> str:
    return re.sub(r"`[^`\n]*`", "", re.sub(r"<!--.*?-->", "", _FENCE.sub("", text), flags=re.S))


def links(page: Path) -> list[str]:
    """Those to files and headings; what is on the web is not looked up."""
    found = _LINK.findall(_without_code(page.read_text(encoding="utf-8")))
    return [link for link in found if not re.match(r"[a-z]+:", link)]


def resolves(page: Path, link: str) -> bool:
    path, _, anchor = link.partition("#")
    target = (page.parent / path).resolve() if path else page
    if not target.exists():
        return False
    return not anchor or target.suffix != ".md" or anchor in _anchors(target)


@cache
def _anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST name them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *#* *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        number = 1
        unique = slug
        while unique in found:
            unique, number = f"{slug}-{number}", number + 1
        found.add(unique)
    return found


# -- names of the library ------------------------------------------------------------------------


def names_of_library(node: ast.AST) -> list[str]:
    """What an import or an attribute asks of the package, as dotted names."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torchao8":
        return [f"{node.module}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] == "torchao8"]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == "torchao8":
            return [f"torchao8.{node.attr}"]
    return []


def exists(name: str) -> bool:
    """Whether there is such a module, or such a name in one."""
    if name in _names_of_adapters():
        return True  # for packages that may not be installed
    parts = name.split(".")
    # The longest module of the name: torchao8.estimate is a function too, which hides the module.
    for known in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:known]))
        except ImportError:
            continue
        try:
            for part in parts[known:]:
                value = getattr(value, part)
        except AttributeError:
            continue
        return True
    return False


def public_names() -> list[str]:
    """All that users may import, by the name under which the reference has it."""
    names = _all_of_adapters()
    for name in torchao8.__all__:
        inner = getattr(getattr(torchao8, name), "__all__", None)
        if name not in ("__version__", "nn", "optim"):
            names += (
                [f"torchao8.{name}.{part}" for part in inner] if inner else [f"torchao8.{name}"]
            )
    return [*names, "torchao8.nn.StableEmbedding", "torchao8.optim.CommonOptions"]


def _adapters() -> dict[str, ast.Module]:
    """The sources of torchao8.integrations, by module: importing one needs its package."""
    folder = Path(torchao8.__file__).parent / "integrations"
    files = [file for file in folder.glob("*.py") if not file.stem.startswith("_")]
    return {f"torchao8.integrations.{f.stem}": ast.parse(f.read_bytes()) for f in files}


def _all_of_adapters() -> list[str]:
    names = []
    for module, tree in _adapters().items():
        for node in tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                names += [f"{module}.{name}" for name in ast.literal_eval(node.value)]
    return names


def _names_of_adapters() -> set[str]:
    return {*_adapters(), *_all_of_adapters()}
