"""The Python of docs/use-with, with the real packages."""

import re
import textwrap
from pathlib import Path
from typing import Any

import environment  # noqa: F401 (before any client)
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "use-with"
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in sorted(DOCS.glob("*.md"))}
CLIENTS = sorted(set(PAGES) - {"index"})
# Blocks of Python, and comments that prepare them; not what has a comment "excerpt" before it.
BLOCKS = re.compile(
    r"^(?:<!-- setup\n(?P<setup>.*?)^-->"
    r"|(?P<excerpt><!-- excerpt -->\n)? *```python\n(?P<code>.*?)^ *```$)",
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize("name", CLIENTS)
def test_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES[name]
    for package in packages_of(text):
        pytest.importorskip(package, reason=f"no {package}: make test-clients")
    monkeypatch.chdir(tmp_path)
    codes = [
        "\n" * text.count("\n", 0, block.start()) + textwrap.dedent(block["setup"] or block["code"])
        for block in BLOCKS.finditer(text)
        if not block["excerpt"]
    ]
    assert len(codes) >= 2
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for code in codes:
        exec(compile(code, str(DOCS / f"{name}.md"), "exec"), namespace)


def packages_of(text: str) -> list[str]:
    (packages,) = re.findall(r"^<!-- needs: (.*?) -->$", text, re.MULTILINE)
    return packages.split(", ")


def test_every_page_is_in_the_table() -> None:
    links = re.findall(r"\| \[.*?\]\((\w+)\.md", PAGES["index"])
    assert sorted(set(links)) == CLIENTS
