"""The documentation and the README: their Python runs, their links lead somewhere, their tables are
those of the classes. What needs the built site is in test_docs_site.py."""

from __future__ import annotations

import ast
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import doc_pages
import pytest
import torch
from doc_pages import DOCS, PAGES, ROOT, Block

import torchao8
from torchao8.optim.options import COMMON


def ids(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=ids)


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    """A page may say how to print what the library logs: to this process, and to no other test."""
    root, own = logging.getLogger(), logging.getLogger("torchao8")
    handlers, levels = list(root.handlers), (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


# Those of docs/use-with run in test/clients, which prepares their packages.
@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name != "use-with"], ids=ids)
def test_python_of_a_page_runs(
    page: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fresh_compiler: None,
    untouched_logging: None,
) -> None:
    """All blocks in their order, in one namespace, in an empty folder."""
    text = page.read_text(encoding="utf-8")
    for package in doc_pages.needed_packages(text):
        pytest.importorskip(package, reason=f"{ids(page)} needs {package}")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in doc_pages.blocks(text):
        if not block.is_excerpt:
            run(block, page, namespace)


def run(block: Block, page: Path, namespace: dict[str, Any]) -> None:
    # Lines before it, so that a traceback has the line of the page.
    code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
    exec(code, namespace)


def test_the_readme_is_one_screen_that_a_package_page_can_show() -> None:
    """A package page has no folder beside it: links are whole addresses."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert max(map(len, text.splitlines())) <= 120
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    assert [link for link in links if not link.startswith("https://")] == []


@EACH_PAGE
def test_python_that_does_not_run_is_still_python(page: Path) -> None:
    """An excerpt parses, and the names of this library in it exist."""
    for block in doc_pages.blocks(page.read_text(encoding="utf-8")):
        if not block.is_excerpt:
            continue
        tree = ast.parse(block.code)
        for node in ast.walk(tree):
            for name in doc_pages.names_of_library(node):
                assert doc_pages.exists(name), f"{page}:{block.line}: there is no {name}"


@EACH_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    """Files of the checkout, and headings in them."""
    broken = [link for link in doc_pages.links(page) if not doc_pages.resolves(page, link)]
    assert not broken


@EACH_PAGE
def test_marks_are_those_that_are_known(page: Path) -> None:
    """A misspelled mark would run what is not to run, or hide what should."""
    known = ("excerpt", "setup\n", "needs: ", "table: ", "end of table")
    for comment in re.findall(r"<!-- *(.*?)-->", page.read_text(encoding="utf-8"), re.DOTALL):
        assert comment.startswith(known), f"{ids(page)}: <!-- {comment}"


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "<!-- table: " in p.read_text(encoding="utf-8")], ids=ids
)
def test_tables_are_those_of_the_classes(page: Path) -> None:
    """`python tools/write_doc_tables.py` writes them anew."""
    spec = importlib.util.spec_from_file_location("tables", ROOT / "tools/write_doc_tables.py")
    assert spec is not None
    assert spec.loader is not None
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    text = page.read_text(encoding="utf-8")
    assert tables.with_tables(text) == text


def test_the_table_of_common_options_is_complete() -> None:
    """Written by hand, with links: all names, and the defaults that are the same in all classes."""
    page = (DOCS / "groups.md").read_text(encoding="utf-8")
    section = page.split("\n## Options that every optimizer has\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`[^|]*`) \|([^|]*)\|", section, re.MULTILINE)
    cells = {
        name: cell.strip("` ") for names, cell in rows for name in re.findall("`(.*?)`", names)
    }
    assert set(cells) == set(COMMON)
    defaults = torchao8.AdamW8bit([torch.nn.Parameter(torch.ones(1))]).defaults
    for name, cell in cells.items():
        if cell and name not in ("optim_bits", "is_paged"):  # a word on the classes
            assert ast.literal_eval(cell) == defaults[name], name


def test_every_public_name_is_in_the_reference() -> None:
    pages = (DOCS / "api").glob("*.md")
    listed = "".join(page.read_text(encoding="utf-8") for page in pages)
    directives = re.findall(r"^\.\. auto(?:class|function):: (\S+)$", listed, re.MULTILINE)
    missing = set(doc_pages.public_names()) - set(directives)
    assert not missing
    unknown = [name for name in directives if not doc_pages.exists(name)]
    assert not unknown


def test_every_optimizer_has_a_page_with_all_of_its_classes() -> None:
    """Formula, source, an example of its own, its options and its memory."""
    pages = {
        page.stem: page.read_text(encoding="utf-8")
        for page in (DOCS / "optimizers").glob("*.md")
        if page.stem != "index"
    }
    of_module: dict[str, set[str]] = {}
    for name in torchao8.optim.classes.__all__:
        module = sys.modules[getattr(torchao8, name).__module__]
        of_module.setdefault(module.__name__.rsplit(".", 1)[1], set()).add(name)
    assert set(pages) == set(of_module)
    for module, classes in of_module.items():
        text = pages[module]
        assert not [name for name in classes if f"`{name}`" not in text], module
        for needed in ("```math", "https://", "```python", "<!-- table: options", "## Memory"):
            assert needed in text, (module, needed)


# -- that the tests above can fail ---------------------------------------------------------------


def test_blocks_of_a_page() -> None:
    text = (
        "<!-- needs: torch, numpy -->\n<!-- setup\nx = 1\n-->\ntext\n```python\ny = x\n```\n"
        "1. a list\n   ```python\n   z = y\n   ```\n<!-- excerpt -->\n```python\nn(...)\n```\n"
        "```text\nno\n```\n~~~python\nw = z\n~~~\n"
    )
    found = doc_pages.blocks(text)
    assert [(b.code, b.line, b.is_excerpt) for b in found] == [
        ("x = 1\n", 3, False),
        ("y = x\n", 7, False),
        ("z = y\n", 11, False),
        ("n(...)\n", 15, True),
        ("w = z\n", 21, False),
    ]
    assert doc_pages.needed_packages(text) == ["torch", "numpy"]


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# One\n\n## Two words, `code`\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#two-words-code) [c](#here) [d](no.md) [e](other.md#no) "
        "[f](#no) [g](https://x.org) `[h](no.md)`\n\n```\n[i](no.md)\n```\n\n# Here\n"
    )
    broken = [link for link in doc_pages.links(page) if not doc_pages.resolves(page, link)]
    assert broken == ["no.md", "other.md#no", "#no"]


def test_a_name_that_does_not_exist_is_found() -> None:
    assert doc_pages.exists("torchao8.checkpoint.load_dcp")
    assert doc_pages.exists("torchao8.optim.base.LowPrecisionOptimizer")
    assert not doc_pages.exists("torchao8.AdamW9bit")
    assert not doc_pages.exists("torchao8.checkpoint.load_dpc")
    tree = ast.parse("from torchao8.checkpoint import load_dpc\ntorchao8.Adam9(p)\nimport torchao8")
    found = [name for node in ast.walk(tree) for name in doc_pages.names_of_library(node)]
    assert set(found) == {"torchao8.checkpoint.load_dpc", "torchao8.Adam9", "torchao8"}
