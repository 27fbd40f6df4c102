"""The lists of parameter shapes to step over."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]

TINY = ("tiny-148x64", "tiny-1000x64", "tiny-148x4096", "tiny-1000x4096")
# What "all" is on a device, in this order: what a time limit may cut off stands last.
LISTS = {
    "cpu": ("gpt2", "block", "small", "huge", *TINY, "gpt2-hidden"),
    "cuda": ("huge", "gpt2", "small", "block", "one", "llama", "resnet101", *TINY, "gpt2-hidden"),
}


@dataclass(frozen=True)
class TensorList:
    """A list of parameter shapes to step over."""

    label: str
    shapes: list[Shape]

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)


def _resnet101() -> list[Shape]:

    def conv(out: int, into: int, size: int) -> list[Shape]:
        return [(out, into, size, size), (out,), (out,)]  # a batch norm follows each

    shapes, into = conv(64, 3, 7), 64
    for stage, count in enumerate((3, 4, 23, 3)):
        width = 64 << stage
        for block in range(count):
            shapes += conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:  # the shortcut changes the width, too
                shapes += conv(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (1000, into), (1000,)]


@functools.cache
def tensor_lists() -> dict[str, TensorList]:
    """All lists by name."""
    # Not before it is needed: a process may time another torchao8 than the one at hand.
    from torchao8._estimate_command import MODELS

    def of_model(name: str, *prefixes: str) -> list[Shape]:
        return [shape for key, shape in MODELS[name].items() if key.startswith(prefixes)]

    hidden = [shape for shape in of_model("gpt2", "h.") if len(shape) == 2]
    layers = [f"model.layers.{i}." for i in range(5)]
    lists = {
        "gpt2": ("GPT-2 124M (148 tensors)", of_model("gpt2", "")),
        "block": ("one block of GPT-2 (12 tensors, 7.1M parameters)", of_model("gpt2", "h.0.")),
        "gpt2-hidden": ("the hidden matrices of GPT-2 124M (48 tensors, 84.9M parameters)", hidden),
        "small": ("1,000 tensors of 1,000 elements", [(1000,)] * 1000),
        "huge": ("one tensor of 256M elements", [(16384, 16384)]),
        "tiny-148x64": ("148 tensors of 64 elements", [(64,)] * 148),
        "tiny-1000x64": ("1,000 tensors of 64 elements", [(64,)] * 1000),
        "tiny-148x4096": ("148 tensors of 64 x 64 elements", [(64, 64)] * 148),
        "tiny-1000x4096": ("1,000 tensors of 64 x 64 elements", [(64, 64)] * 1000),
        # A billion elements and the rest of the last rows: 1,000,341,504.
        "one": ("one tensor of 244,224 x 4,096 (1.0e9 elements)", [(244_224, 4096)]),
        "llama": ("5 layers of Llama 3 8B (45 tensors, 1.09e9 parameters)",
                  of_model("llama-8b", *layers)),
        "resnet101": ("ResNet-101 (314 tensors, 44.5M parameters)", _resnet101()),
    }  # fmt: skip
    return {name: TensorList(*one) for name, one in lists.items()}


def list_names(names: Sequence[str], known: Sequence[str]) -> list[str]:
    """Names of lists, with "tiny" and "all" spelled out.

    Raises:
        ValueError: a list is not among the known ones.
    """
    groups = {**{name: (name,) for name in known}, "tiny": TINY, "all": known}
    for name in names:
        if name not in groups:
            raise ValueError(f"one of {', '.join(groups)}, got {name}")
    return list(dict.fromkeys(one for name in names for one in groups[name]))
