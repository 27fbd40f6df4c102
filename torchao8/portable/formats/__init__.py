"""The formats of state in plain operators, by their names; csrc/formats has those of kernels."""

from __future__ import annotations

import torchao8._C as _C
from torchao8.portable.form import Format
from torchao8.portable.formats import dynamic, mulaw

FORMATS: dict[str, Format] = {"dynamic": dynamic.FORMAT, "mulaw": mulaw.FORMAT}


def name_of(number: int) -> str:
    """Of the number that the ops take."""
    name: str = _C.FORMATS[number][0]
    return name
