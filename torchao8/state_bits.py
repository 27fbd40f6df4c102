"""Whether the state of a parameter has 32 bits in an optimizer of 8 or of 4 bits.

This follows from the parameter's global shape, from its placements if it is a DTensor, and from
three options. Layout of state, estimates and warnings all ask here, so that they cannot disagree.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

from torchao8.block_layout import MIN_ROW_LENGTH, row_length, row_start
from torchao8.shard_layout import keeps_blocks

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

# The reasons for 32 bits.
TOO_SMALL = "too small"
SHARDED_VECTOR = "sharded vector"
SHORT_ROWS = "sharded, with short rows"
CUT_ROWS = "rows cut inside a block"
OPTION = "optim_bits=32"  # of the group, which why_32bit does not look at


@functools.cache
def why_32bit(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    block_size: int,
    min_8bit_size: int,
    bits: int = 8,
) -> str | None:
    """Why the state of a parameter keeps 32 bits; None where it has ``bits``.

    >>> why_32bit((768,), (), (), 256, 4096)
    'too small'

    Args:
        shape: the global one.
        mesh_shape, placements: of a DTensor; both are empty for a plain tensor.
    """
    large_enough = (
        len(shape) > 0
        and math.prod(shape) >= min_8bit_size
        and row_length(shape, block_size) >= MIN_ROW_LENGTH
    )
    if not large_enough:
        return TOO_SMALL
    if not mesh_shape or keeps_blocks(shape, mesh_shape, placements, block_size, bits):
        return None
    if len(shape) == 1:
        return SHARDED_VECTOR
    return SHORT_ROWS if row_start(shape, block_size) == 0 else CUT_ROWS
