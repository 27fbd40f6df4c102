"""Configuration of Sphinx: `make docs` builds the site into build/docs."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.errors import ExtensionError

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

import torchao8  # noqa: E402 (the checkout comes first)

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "torchao8"
author = "The torchao8 contributors"
copyright = "2026, the torchao8 contributors"
release = version = torchao8.__version__

extensions = [
    "myst_parser",  # the pages are Markdown
    "sphinx.ext.autodoc",  # the reference is made from docstrings
    "sphinx.ext.napoleon",  # which have "Args:" and "Raises:"
    "sphinx_copybutton",
]
# Every reference in pages and docstrings must lead somewhere. Those to other projects are not
# looked up, so that the build needs no network.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|numpy|collections|typing|os|pathlib|inspect)\b.*")]

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]  # as GitHub shows them
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signatures of IDEs have them; here they would fill a screen
autodoc_mock_imports = ["timm", "torchtitan", "transformers"]  # what adapters need
napoleon_google_docstring = True
napoleon_numpy_docstring = False
maximum_signature_line_length = 90
copybutton_exclude = ".linenos, .gp, .go"

smartquotes = False  # defaults are Python

html_theme = "furo"
html_title = f"torchao8 {release}"
html_copy_source = False
html_show_sourcelink = False
exclude_patterns = ["*.inc"]


# Of words.md: "| `word`, `word` | ... | [text](page.md#heading) |"
_ROW = re.compile(
    r"^\| *(?P<words>`.*?`) *\|.*\]\((?P<page>[\w/-]+)\.md(#(?P<heading>[\w-]+))?\) *\|$"
)


def _words_of(page: str) -> dict[str, list[str]]:
    """The words that lead to a page, by the heading under which it is; "" is the page's title."""
    found: dict[str, list[str]] = {}
    for line in (DOCS / "words.md").read_text(encoding="utf-8").splitlines():
        row = _ROW.match(line)
        if row and row["page"] == page:
            found.setdefault(row["heading"] or "", []).extend(re.findall("`(.*?)`", row["words"]))
    return found


def _add_words(page: str, text: str) -> str:
    """Puts the words of torch and bitsandbytes into the index of the search, each at the heading
    that explains it: the first hit of a search is then this heading, not the page of words."""
    words = _words_of(page)
    lines: list[str] = []
    in_code, is_title = False, True
    for line in text.splitlines():
        in_code ^= line.lstrip().startswith(("```", "~~~"))
        if in_code or not line.startswith("#"):
            lines.append(line)
            continue
        slug = re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
        entries = words.pop(slug, []) + (words.pop("", []) if is_title else [])
        marks = ["", *(f"```{{index}} ! single: {entry}\n```" for entry in entries), ""]
        # Nothing may come before the title. Elsewhere the mark before a heading is its own, and one
        # behind it might be that of a comment, which the page does not have.
        lines += [line, *marks] if is_title else [*marks, line]
        is_title = False
    if words:
        raise ExtensionError(f"words.md: {page}.md has no heading {' or '.join(words)}")
    return "\n".join(lines) + "\n"


def _change_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Adds what would be noise where the pages are shown without Sphinx, on GitHub."""
    source[0] = _add_words(page, source[0])
    if page == app.config.root_doc:
        source[0] += (DOCS / "navigation.inc").read_text(encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("source-read", _change_source)
