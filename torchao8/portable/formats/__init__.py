"""The formats of state in plain operators, by their names; csrc/formats has those of kernels."""

from __future__ import annotations

import torchao8._C as _C
from torchao8.portable.form import Format
from torchao8.portable.formats import dynamic, four_bit, mulaw

FORMATS: dict[str, Format] = {
    "dynamic": dynamic.FORMAT,
    "mulaw": mulaw.FORMAT,
    "4bit": four_bit.FORMAT,
}


def name_of(number: int) -> str:
    """Of the number that the ops take."""
    name: str = _C.FORMATS[number][0]
    return name


def bits_of(number: int) -> int:
    """Of a code of it."""
    bits: int = _C.FORMATS[number][1]
    return bits
