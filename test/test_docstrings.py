"""The docstrings of the classes, which must need no other page (optim/docstrings.py)."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_table import OF_4_BITS, OPTIMIZERS

import torchao8
from torchao8.optim import docstrings
from torchao8.optim.base import LowPrecisionOptimizer

CASES = {case.cls.__name__: case for case in (*OPTIMIZERS, *OF_4_BITS)}
CLASSES = [getattr(torchao8, name) for name in torchao8.optim.classes.__all__]
EACH = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
# An entry of "Args:", its text and the default at its end.
ENTRY = re.compile(r"^ {4}(\w+): (.*?)(?: Default: (\S.*))?\.$", re.MULTILINE | re.DOTALL)


def entries(doc: str) -> dict[str, tuple[str, str | None]]:
    """Name, text and default of each argument."""
    section = doc.split("\nArgs:\n")[1].split("\n\nRaises:\n")[0]
    found = {}
    for entry in re.split(r"\n(?= {4}\S)", section):
        match = ENTRY.fullmatch(" ".join(entry.split()).join(["    ", ""]))
        assert match is not None, entry
        found[match[1]] = (match[2], match[3])
    return found


def one_group(cls: type[LowPrecisionOptimizer], p: torch.Tensor) -> list[dict[str, Any]]:
    """Of a class of several rules it says the first of them."""
    return [{"params": [p], **cls._kinds[0]}]


@EACH
def test_every_argument_has_its_meaning_and_its_default(cls: type[LowPrecisionOptimizer]) -> None:
    doc, signature = inspect.getdoc(cls), inspect.signature(cls)
    assert doc is not None
    found = entries(doc)
    assert list(found) == list(signature.parameters)
    options = cls(one_group(cls, torch.nn.Parameter(torch.ones(1, 1)))).defaults
    for name, argument in signature.parameters.items():
        text, default = found[name]
        assert len(text) > 10, name
        if name == "params":
            assert default is None
            continue
        assert default is not None, name
        if argument.default is None:  # what the class makes of it, or a hint of torch.optim
            assert default in ("None", repr(options[name]))
        else:
            assert ast.literal_eval(default) == argument.default == options[name]


@EACH
def test_it_has_formula_source_state_and_errors(cls: type[LowPrecisionOptimizer]) -> None:
    doc = inspect.getdoc(cls)
    assert doc is not None
    assert "::\n\n    " in doc
    assert re.search(r"^    p = p", doc, re.MULTILINE)
    assert "Source: `" in doc
    for error in ("ValueError", "NotImplementedError", "TypeError"):
        assert f"    {error}: " in doc
    assert not re.search(r"\b[Ss]ee :class:", doc)
    assert max(map(len, doc.splitlines())) <= 100
    p = torch.nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones(64, 64)
    case = CASES.get(cls.__name__.removeprefix("Paged"))  # those of two rules are in no table
    options = {**case.base, **case.full} if case else {}
    for kind in cls._kinds:
        optimizer = cls([{"params": [p], **kind}], **options)
        optimizer.step()
        for key in optimizer.state[p]:
            name, codes_or_scale = re.fullmatch(
                r"(.*?)(_codes|_scale|_4bit|_4bit_scale)?", key
            ).groups()  # type: ignore[union-attr]
            assert f"``{name}``" in doc, key
            assert codes_or_scale is None or f"``{codes_or_scale}``" in doc


@EACH
def test_editors_that_read_the_source_show_what_the_class_is(
    cls: type[LowPrecisionOptimizer],
) -> None:
    """They do not run the package: the literal docstring must say what the class is."""
    tree = ast.parse(Path(inspect.getfile(cls)).read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    doc = ast.get_docstring(node)
    assert doc is not None
    summary, _, body = doc.partition("\n\n")
    assert f"{cls._bits}-bit" in summary or f"in {cls._bits} bits" in summary
    assert len(body) > 30
    assert str(inspect.getdoc(cls)).startswith(doc.split("\n\nArgs:")[0])
    if cls.__name__.startswith("Paged"):
        assert "is_paged" in doc


def test_a_python_without_docstrings_imports_the_package() -> None:
    code = "import torchao8; print(torchao8.AdamW8bit.__doc__)"
    root = Path(torchao8.__file__).parent.parent
    run = subprocess.run(
        [sys.executable, "-OO", "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == "None"


def test_a_subclass_keeps_its_own_docstring() -> None:
    class Mine(torchao8.AdamW8bit):
        """Mine."""

    class Silent(torchao8.AdamW8bit):
        pass

    assert Mine.__doc__ == "Mine."
    assert inspect.getdoc(Silent) == inspect.getdoc(torchao8.AdamW8bit)


def test_a_broken_docstring_names_its_class() -> None:
    """It breaks the import, where the reader has to learn at which class to look."""
    cls = type("Lion", (torchao8.Lion,), {"__doc__": "A rule.\n\n        Args:\n    lr: rate."})
    with pytest.raises(KeyError, match="docstring of Lion: expected a text of the argument 'param"):
        docstrings.complete(cls, {"Lion": cls})
