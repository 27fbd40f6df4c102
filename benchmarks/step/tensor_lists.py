"""The lists of parameter shapes to step over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorList:
    """A list of parameter shapes to step over."""

    label: str
    shapes: list[Shape]

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(math.prod(shape) for shape in self.shapes)


def _gpt2_block(d: int) -> list[Shape]:
    """The 12 parameters of one GPT-2 block of width `d`, with the weights as (in, out)."""
    norm = [(d,), (d,)]
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*norm, *attention, *norm, *mlp]


def gpt2_shapes(
    layers: int = 12, d: int = 768, vocab: int = 50257, context: int = 1024
) -> list[Shape]:
    """Parameter shapes of GPT-2, 124M by default: 148 tensors, the output tied to the embedding."""
    return [(vocab, d), (context, d), *(_gpt2_block(d) * layers), (d,), (d,)]


def resnet_shapes(blocks: tuple[int, ...] = (3, 4, 23, 3), classes: int = 1000) -> list[Shape]:
    """Parameter shapes of a ResNet of bottleneck blocks, ResNet-101 by default: 314 tensors."""

    def conv(out: int, into: int, size: int) -> list[Shape]:
        return [(out, into, size, size), (out,), (out,)]  # a batch norm follows each

    shapes, into = conv(64, 3, 7), 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        for block in range(count):
            shapes += conv(width, into, 1) + conv(width, width, 3) + conv(4 * width, width, 1)
            if block == 0:  # the shortcut changes the width, too
                shapes += conv(4 * width, into, 1)
            into = 4 * width
    return [*shapes, (classes, into), (classes,)]


def llama_shapes(
    layers: int = 32, d: int = 4096, hidden: int = 11008, vocab: int = 32000
) -> list[Shape]:
    """Parameter shapes of Llama, 7B by default, with the weights as (out, in)."""
    mlp: list[Shape] = [(hidden, d), (hidden, d), (d, hidden)]
    layer = [(d, d)] * 4 + mlp + [(d,), (d,)]
    return [(vocab, d), *(layer * layers), (d,), (vocab, d)]


def llama_layers(memory: int) -> int:
    """Layers of Llama 7B for `memory` bytes, of 32 at most.

    So many that three optimizers of 16 bytes a parameter fit in at a time (parameters, gradients
    and state in 32 bits): torch's, which is in every batch, and two more.
    """
    outside = TensorList("", llama_shapes(0)).numel
    of_layer = TensorList("", llama_shapes(1)).numel - outside
    return max(1, min(32, (memory // (3 * 16) - outside) // of_layer))


_FIXED = {
    "gpt2": TensorList("GPT-2 124M (148 tensors)", gpt2_shapes()),
    "block": TensorList("one block of GPT-2 (12 tensors, 7.1M parameters)", _gpt2_block(768)),
    "small": TensorList("1,000 tensors of 1,000 elements", [(1000,)] * 1000),
    "huge": TensorList("one tensor of 256M elements", [(16384, 16384)]),
    "tiny-148x64": TensorList("148 tensors of 64 elements", [(64,)] * 148),
    "tiny-1000x64": TensorList("1,000 tensors of 64 elements", [(64,)] * 1000),
    "tiny-148x4096": TensorList("148 tensors of 64 x 64 elements", [(64, 64)] * 148),
    "tiny-1000x4096": TensorList("1,000 tensors of 64 x 64 elements", [(64, 64)] * 1000),
    # A billion elements and the rest of the last rows: 1,000,341,504.
    "one": TensorList("one tensor of 244,224 x 4,096 (1.0e9 elements)", [(244_224, 4096)]),
    "resnet101": TensorList("ResNet-101 (314 tensors, 44.5M parameters)", resnet_shapes()),
}

# What "all" is on a device, in this order: what a time limit may cut off stands last.
TINY = tuple(name for name in _FIXED if name.startswith("tiny-"))
LISTS = {
    "cpu": ("gpt2", "block", "small", "huge", *TINY),
    "cuda": ("one", "gpt2", "llama", "resnet101", *TINY),
}


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


def tensor_list(name: str, layers: int = 32) -> TensorList:
    """The list of this name; `layers` is the depth of "llama"."""
    if name != "llama":
        return _FIXED[name]
    shapes = llama_shapes(layers)
    size = TensorList("", shapes).numel / 1e9
    label = f"Llama 7B, {layers} of 32 layers ({len(shapes)} tensors, {size:.2f}e9 parameters)"
    return TensorList(label, shapes)
