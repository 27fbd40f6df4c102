"""Where the blocks of a quantized tensor lie.

A block is a run of elements that share one scale. Blocks divide rows (runs of trailing elements)
and never straddle two of them, so any split of the tensor along its leading dimensions falls
between blocks. A tensor is one row, all of it, if it is a vector or if its dimensions after the
first hold fewer than 16 elements together. All of this follows from the shape alone: nothing here
looks at values, strides or devices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

MIN_BLOCK_SIZE = 64
MAX_BLOCK_SIZE = 2048
BLOCK_SIZES = tuple(MIN_BLOCK_SIZE << i for i in range(6))  # up to MAX_BLOCK_SIZE
# With a scale for each shorter row, the scales would cost what the codes save.
MIN_ROW_LENGTH = 16


def check_block_size(block_size: int) -> None:
    """Raises ValueError unless ``block_size`` is a power of two from 64 to 2048."""
    valid = (
        isinstance(block_size, int)
        and MIN_BLOCK_SIZE <= block_size <= MAX_BLOCK_SIZE
        and block_size & (block_size - 1) == 0
    )
    if not valid:
        raise ValueError(
            f"block_size: expected a power of two from {MIN_BLOCK_SIZE} to {MAX_BLOCK_SIZE}, "
            f"got {block_size!r}"
        )


def row_start(shape: Sequence[int], block_size: int) -> int:
    """The dimension that starts a row: the largest k >= 1 whose ``shape[k:]`` fills a block, or 1.

    0 where the tensor is one row: a scalar, a vector, and what has fewer than 16 elements in
    ``shape[1:]``, as a matrix of rank 8 or a convolution of (64, 3, 1, 1).
    """
    if 0 < math.prod(shape[1:]) < MIN_ROW_LENGTH:  # rows of no elements stay rows
        return 0
    for k in range(len(shape) - 1, 1, -1):
        if math.prod(shape[k:]) >= block_size:
            return k
    return 1


def row_length(shape: Sequence[int], block_size: int) -> int:
    """Elements of one row of a tensor of this shape: 1 for a scalar, all of a vector."""
    return math.prod(shape[row_start(shape, block_size) :])


def scale_shape(shape: Sequence[int], block_size: int) -> tuple[int, ...]:
    """The shape of the scales: one number a block, the last block of a row may be short.

    >>> scale_shape((3072, 768), 256), scale_shape((64, 64, 3, 3), 256), scale_shape((5000,), 256)
    ((3072, 3), (64, 3), (20,))
    >>> scale_shape((4096, 8), 256)  # one row of 32,768 elements
    (128,)
    """
    blocks = -(-row_length(shape, block_size) // block_size)
    return (*shape[: row_start(shape, block_size)], blocks)


def codes_shape(shape: Sequence[int], block_size: int, bits: int = 8) -> tuple[int, ...]:
    """The shape of the codes: that of the tensor or, of 4 bits, two elements to a byte of a row.

    Element 2i of a row is the low half of byte i. A byte holds elements of one row: in a row of odd
    length the high half of the last byte is empty.

    >>> codes_shape((64, 3, 3, 3), 64), codes_shape((64, 3, 3, 3), 64, bits=4)
    ((64, 3, 3, 3), (64, 14))
    """
    if bits == 8:
        return tuple(shape)
    return (*shape[: row_start(shape, block_size)], -(-row_length(shape, block_size) // 2))


class Scales(NamedTuple):
    """Which elements share a scale: those of a block or, not ``block_wise``, of a whole tensor."""

    block_size: int
    block_wise: bool = True

    @staticmethod
    def of(group: Mapping[str, Any]) -> "Scales":
        """As the options of a parameter group have it."""
        return Scales(group["block_size"], group["block_wise"])

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a tensor of this (global) shape."""
        return scale_shape(shape, self.block_size) if self.block_wise else (1,)
