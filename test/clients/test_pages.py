"""The Python of docs/use-with, with the real packages."""

import re
from pathlib import Path
from typing import Any

import environment  # noqa: F401 (before any client)
import pytest
from doc_pages import DOCS, blocks, needed_packages
from test_docs import run

PAGES = {page.stem: page for page in sorted((DOCS / "use-with").glob("*.md"))}
CLIENTS = sorted(set(PAGES) - {"index"})


@pytest.mark.parametrize("name", CLIENTS)
def test_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    packages = needed_packages(text)
    assert packages
    for package in packages:
        pytest.importorskip(package, reason=f"no {package}: make test-clients")
    monkeypatch.chdir(tmp_path)
    found = [block for block in blocks(text) if not block.is_excerpt]
    assert len(found) >= 2
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in found:
        run(block, PAGES[name], namespace)


def test_every_page_is_in_the_table() -> None:
    links = re.findall(r"\| \[.*?\]\((\w+)\.md", PAGES["index"].read_text(encoding="utf-8"))
    assert sorted(set(links)) == CLIENTS
