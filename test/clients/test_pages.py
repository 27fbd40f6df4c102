"""The Python of docs/use-with, with the real packages."""

from pathlib import Path
from typing import Any

import pytest
from doc_pages import DOCS, blocks, needed_packages
from test_docs import run

PAGES = {page.stem: page for page in (DOCS / "use-with").glob("*.md") if page.stem != "index"}


@pytest.mark.parametrize("name", PAGES)
def test_python_of_a_page_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = PAGES[name].read_text(encoding="utf-8")
    packages = needed_packages(text)
    assert packages
    for package in packages:
        pytest.importorskip(package, reason=f"no {package}: make test-clients")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(text):
        if not block.is_excerpt:
            run(block, PAGES[name], namespace)
