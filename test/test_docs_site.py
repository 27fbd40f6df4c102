"""The built documentation: `make docs` builds it and runs these tests.

The search box of the site is a program in JavaScript over an index in JavaScript. The tests run
both of them, as they were built.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import doc_pages
import pytest
from doc_pages import DOCS, ROOT

import torchao8

SITE = ROOT / "build" / "docs"
INDEX = SITE / "searchindex.js"


def is_stale() -> bool:
    """Whether a page, or a module that the reference is made from, has changed since the build."""
    sources = [*DOCS.rglob("*.*"), *Path(torchao8.__file__).parent.rglob("*.py")]
    return any(source.stat().st_mtime > INDEX.stat().st_mtime for source in sources)


# `make docs` sets it: there all of these tests must run.
MUST_RUN = "DOCS_ARE_BUILT" in os.environ
pytestmark = pytest.mark.skipif(
    not MUST_RUN and (not INDEX.exists() or is_stale()),
    reason="the documentation is not built: make docs",
)

# What the search program asks of a browser; nothing of it matters for its answers.
BROWSER = """
var window = globalThis;
var document = {getElementById: () => null};
var localStorage = {setItem: () => null};
var SPHINX_HIGHLIGHT_ENABLED = false;
var _ = text => text;
var _ready = () => null;
"""
ASK = """
(function (query) {
  const results = Search._performSearch(...Search._parseQuery(query));
  return JSON.stringify(results.reverse().map(([page, title, anchor]) => [page, title, anchor]));
})
"""


@pytest.fixture(scope="module")
def search() -> Callable[[str], list[list[str]]]:
    """What the search box shows for a query, best first: pages, titles and places in them."""
    if MUST_RUN:
        import py_mini_racer as racer
    else:
        reason = "no mini-racer: pip install mini-racer"
        racer = pytest.importorskip("py_mini_racer", reason=reason)
    context = racer.MiniRacer()
    context.eval(BROWSER)
    for script in ("_static/language_data.js", "_static/searchtools.js", "searchindex.js"):
        text = (SITE / script).read_text(encoding="utf-8")
        # `const` would hide the names from the next script.
        context.eval(re.sub(r"^const (?=\w+ = )", "var ", text, flags=re.MULTILINE))

    def ask(query: str) -> list[list[str]]:
        found: Any = json.loads(context.eval(f"{ASK}({json.dumps(query)})"))
        return found

    return ask


def words() -> list[tuple[str, str]]:
    """The words of docs/words.md and the page that each row names."""
    found = []
    for line in (DOCS / "words.md").read_text(encoding="utf-8").splitlines():
        row = re.match(r"^\| *(`.*?`) *\|.*\]\(([\w/-]+)\.md[^|]*\) *\|$", line)
        if row:
            found += [(word, row[2]) for word in re.findall("`(.*?)`", row[1])]
    return found


# What people who come from torch and from bitsandbytes type, and where they must arrive.
TYPED = {
    "paged": "memory",
    "is_paged": "memory",
    "min_8bit_size": "groups",
    "percentile_clipping": "groups",
    "optim_bits": "groups",
    "fused": "groups",
    "foreach": "groups",
    "state_dict": "checkpoints",
    "amsgrad": "optimizers/adam",
    "GlobalOptimManager": "migrating",
}


@pytest.mark.parametrize(("word", "page"), {**dict(words()), **TYPED}.items())
def test_a_word_leads_to_its_page(
    word: str, page: str, search: Callable[[str], list[list[str]]]
) -> None:
    found = search(word)
    assert found, f"the search finds nothing for {word!r}"
    assert found[0][0] == page, found[:5]


@pytest.mark.parametrize("name", torchao8.optim.classes.__all__)
def test_a_class_leads_to_its_page_or_reference(
    name: str, search: Callable[[str], list[list[str]]]
) -> None:
    module = getattr(torchao8, name).__module__.rsplit(".", 1)[1]
    assert {page for page, *_ in search(name)[:3]} & {f"optimizers/{module}", f"api/{module}"}


def test_a_word_that_is_nowhere_finds_nothing(
    search: Callable[[str], list[list[str]]],
) -> None:
    assert search("zyzzyva") == []


def test_all_typed_words_are_explained() -> None:
    assert dict(words()) | TYPED == dict(words())


def test_every_public_name_has_an_entry() -> None:
    """With an anchor that others can link to, and its arguments."""
    html = "".join(p.read_text(encoding="utf-8") for p in (SITE / "api").glob("*.html"))
    missing = [name for name in doc_pages.public_names() if f'id="{name}"' not in html]
    assert not missing


def test_every_page_was_built_and_is_in_the_navigation() -> None:
    index = (SITE / "index.html").read_text(encoding="utf-8")
    for page in DOCS.rglob("*.md"):
        path = page.relative_to(DOCS).with_suffix(".html").as_posix()
        assert (SITE / path).exists()
        assert path == "index.html" or f'href="{path}"' in index, path


def test_links_inside_the_site_lead_somewhere() -> None:
    """Files and anchors, in what the reader gets: also those that the themes make."""
    pages = {p: p.read_text(encoding="utf-8") for p in SITE.rglob("*.html")}
    anchors = {p: set(re.findall(r'\bid="([^"]+)"', text)) for p, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for link in set(re.findall(r'<a [^>]*?href="([^"]*)"', text)):
            if re.match(r"[a-z]+:", link) or link in ("", "#"):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path.partition("?")[0]).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors.get(target, {anchor})):
                broken.append((page.relative_to(SITE).as_posix(), link))
    assert not broken


def test_pages_need_no_other_site_to_be_shown() -> None:
    """Only the formulas come from elsewhere: MathJax."""
    for page in SITE.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        for source in re.findall(r'<(?:script|link|img)[^>]*? (?:src|href)="(https?:[^"]*)"', text):
            assert "mathjax" in source, (page, source)
