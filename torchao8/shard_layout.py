"""Where a shard lies in its global tensor, and whether it holds whole blocks of quantized state.

All of this follows from shapes and placements alone, as :mod:`torchao8.block_layout` from shapes:
no tensor, process group or device is looked at.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torchao8.block_layout import MIN_ROW_LENGTH, codes_shape, row_start, scale_shape

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement


@functools.cache
def keeps_blocks(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    block_size: int,
    bits: int = 8,
) -> bool:
    """Whether every rank holds whole blocks of a DTensor of this global shape, in so many bits.

    (64, 768) in blocks of 256, ``Shard(1)``: 3 ranks hold 256 columns each, whole blocks; 2 ranks
    hold 384 each, which cuts the second block of every row.
    """
    k = row_start(shape, block_size)
    if k == 0:
        return False
    dims = [split_dim(placement) for placement in placements]
    if any(d is not None and d > k for d in dims):
        return False
    if k not in dims:
        return True
    # Along the row: every border must be one of blocks, for the scales as well, and of bytes for
    # packed codes. DTensor splits each of these tensors by its own rule.
    inner = math.prod(shape[k + 1 :])
    others = [(scale_shape(shape, block_size), block_size)]
    if bits == 4:
        others.append((codes_shape(shape, block_size, bits), 2))
    sizes = [size if d == k else 1 for size, d in zip(mesh_shape, dims, strict=True)]
    for coordinate in itertools.product(*(range(size) for size in sizes)):
        index = shard_indices(shape, mesh_shape, coordinate, placements, k)
        for other, length in others:
            pieces = shard_indices(other, mesh_shape, coordinate, placements, k)
            if not _covers(index, pieces, inner, shape[k], length):
                return False
        if index and len(index) * inner < MIN_ROW_LENGTH:  # the op would see one row in all
            return False
    return True


def _covers(
    index: Sequence[int], pieces: Sequence[int], inner: int, size: int, length: int
) -> bool:
    """Whether these indices of the dimension that starts a row hold just these pieces of so many
    elements, blocks or bytes."""
    if not index or not pieces:
        return not index and not pieces
    first, last = index[0], index[-1] + 1
    return (
        last - first == len(index)
        and pieces[-1] + 1 - pieces[0] == len(pieces)
        and first * inner == pieces[0] * length
        and (last == size or last * inner % length == 0)
        and -(-last * inner // length) == pieces[-1] + 1
    )


class Run(NamedTuple):
    """Rows of a local tensor that lie at equal distances in the global one.

    Attributes:
        first, last: the local rows, ``last`` not included.
        offset: flat index of the first element in the global tensor.
        stride: elements of the global tensor from one of these rows to the next.
    """

    first: int
    last: int
    offset: int
    stride: int


class ShardRows(NamedTuple):
    """Where the local tensor of a DTensor lies in the global one, by rows (see block_layout).

    Attributes:
        runs: of its rows; none where it is empty.
        whole: whether one run holds all of it, and its own shape has the same rows: then the op
            takes the local tensor as it is.
        row, blocks: elements, and blocks, of a local row; of 32-bit state, which has no blocks, a
            row is any elements that lie together, and blocks is 0.
        shape, scale_shape: of the local tensor and of its scales.
    """

    runs: tuple[Run, ...]
    whole: bool
    row: int
    blocks: int
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]

    def codes_shape(self, bits: int) -> tuple[int, ...]:
        """Of the local codes, see :func:`torchao8.block_layout.codes_shape`."""
        return self.shape if bits == 8 else (*self.scale_shape[:-1], -(-self.row // 2))


@functools.cache
def block_rows(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
    block_size: int,
    bits: int = 8,
) -> ShardRows | None:
    """Where a rank's shard lies, in rows of quantized state; None where shards cut blocks.

    (64, 768) in blocks of 256, ``Shard(1)`` over 3 ranks, the second one: 64 rows of 256 elements,
    the first at flat index 256 of the global tensor, the next 768 further: Run(0, 64, 256, 768).

    Args:
        coordinate: of the rank in the mesh; None if it has no part in it.
        bits: of the state: shards that keep the blocks of 8 bits may cut bytes of 4.
    """
    if not keeps_blocks(shape, mesh_shape, placements, block_size, bits):
        return None
    k = row_start(shape, block_size)
    inner = math.prod(shape[k + 1 :])
    if coordinate is None:  # this rank has no part in the mesh
        return ShardRows((), True, 0, 0, (0,) * len(shape), (0,) * (k + 1))
    indices = [
        shard_indices(shape, mesh_shape, coordinate, placements, d) for d in range(len(shape))
    ]
    leading, columns = indices[:k], indices[k]
    row = len(columns) * inner
    scales = (*(len(rows) for rows in leading), -(-row // block_size))
    starts = _row_offsets(shape, leading, inner * columns[0] if columns else 0)
    runs = _runs(starts, shape, k) if row else ()
    local_shape = tuple(len(index) for index in indices)
    whole = len(runs) < 2 and scale_shape(local_shape, block_size) == scales
    return ShardRows(runs, whole, row, scales[-1], local_shape, scales)


@functools.cache
def flat_rows(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
) -> ShardRows:
    """Where a rank's shard lies, in rows of 32-bit state: runs of elements without a gap.

    A row ends at the first gap in the last dimension that is split. (64, 768), ``Shard(1)`` over 2
    ranks, the second one: 64 rows of 384 elements, Run(0, 64, 384, 768).

    Args:
        coordinate: as of :func:`block_rows`.
    """
    if coordinate is None:
        return ShardRows((), True, 0, 0, (0,) * len(shape), ())
    indices = [
        shard_indices(shape, mesh_shape, coordinate, placements, d) for d in range(len(shape))
    ]
    local_shape = tuple(len(index) for index in indices)
    if 0 in local_shape:
        return ShardRows((), True, 0, 0, local_shape, ())
    last = local_shape[-1] if shape else 1
    split = [d for d in range(len(shape)) if local_shape[d] != shape[d]]
    if not split:
        return ShardRows(
            (Run(0, math.prod(shape) // last, 0, last),), True, last, 0, local_shape, ()
        )
    k = split[-1]
    together = _common_length(indices[k])
    row = together * math.prod(shape[k + 1 :])
    starts = _row_offsets(shape, (*indices[:k], indices[k][::together]), 0)
    runs = _runs(starts, shape, k)
    if len(runs) > 1:
        return ShardRows(runs, False, row, 0, local_shape, ())
    if len(starts) == 1 or runs[0].stride == row:  # without gaps: rows of any length will do
        runs = (Run(0, math.prod(local_shape) // last, starts[0], last),)
        row = last
    return ShardRows(runs, row == last, row, 0, local_shape, ())


def _common_length(index: Sequence[int]) -> int:
    """The greatest length of pieces that an index can be cut into without a gap inside of any."""
    if isinstance(index, range):
        return len(index)
    gaps = [i for i in range(1, len(index)) if index[i] != index[i - 1] + 1]
    ends = [0, *gaps, len(index)]
    return math.gcd(*(b - a for a, b in itertools.pairwise(ends)))


def _row_offsets(shape: tuple[int, ...], leading: Sequence[Sequence[int]], start: int) -> list[int]:
    """Flat global index of the first element of each local row."""
    offsets = [start]
    for d, index in enumerate(leading):
        step = math.prod(shape[d + 1 :])
        offsets = [offset + i * step for offset in offsets for i in index]
    return offsets


def _runs(starts: Sequence[int], shape: tuple[int, ...], k: int) -> tuple[Run, ...]:
    """Cuts rows into runs of one stride, each as long as can be."""
    runs, first = [], 0
    while first < len(starts):
        last = first + 1
        stride = starts[last] - starts[first] if last < len(starts) else math.prod(shape[k:])
        while last < len(starts) and starts[last] - starts[last - 1] == stride:
            last += 1
        runs.append(Run(first, last, starts[first], stride))
        first = last
    return tuple(runs)


class Box(NamedTuple):
    """Elements that are neighbours along each dimension, in the global and in the local tensor."""

    whole: tuple[slice, ...]
    local: tuple[slice, ...]


class ShardBoxes(NamedTuple):
    """A shard as boxes of the global tensor; none where it is empty.

    Attributes:
        shape: of the local tensor.
    """

    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


def shard_boxes(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
) -> ShardBoxes:
    """Where the elements of a rank's shard lie, to copy them between it and the global tensor.

    (7, 300), ``Shard(0)`` over 2 ranks, the second one: a shard of (3, 300), which is one box, the
    rows from 4 on. FSDP over tensor parallelism may give a rank several.
    """
    indices = [
        shard_indices(shape, mesh_shape, coordinate, placements, d) for d in range(len(shape))
    ]
    local = tuple(map(len, indices))
    if 0 in local:
        return ShardBoxes(local, ())
    cut = [_neighbours(index) for index in indices]
    boxes = [
        Box(tuple(whole for whole, _ in parts), tuple(mine for _, mine in parts))
        for parts in itertools.product(*cut)
    ]
    return ShardBoxes(local, tuple(boxes))


def _neighbours(index: Sequence[int]) -> list[tuple[slice, slice]]:
    """The runs of indices without a gap: as slices of the global dimension and of the local one."""
    if isinstance(index, range):
        return [(slice(index.start, index.stop), slice(0, len(index)))]
    starts = [0, *(i for i in range(1, len(index)) if index[i] != index[i - 1] + 1), len(index)]
    return [
        (slice(index[first], index[last - 1] + 1), slice(first, last))
        for first, last in itertools.pairwise(starts)
    ]


def shard_indices(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: Sequence[int],
    placements: Sequence[Placement],
    dim: int,
) -> Sequence[int]:
    """Global indices along one dimension of what a rank holds.

    Placements split a tensor from the first to the last. ``_StridedShard`` stands for a split that
    was made later than its place says, as FSDP splits what tensor parallelism has split: it waits
    for the splits behind it that its ``split_factor`` counts. Where these are even, it is the same
    as the interleaved split that torch defines it by; where they are not, it is what FSDP does.
    """
    index: Sequence[int] = range(shape[dim])
    splits = [(i, p) for i, p in enumerate(placements) if split_dim(p) == dim]
    for i, factor in _in_order_of_split(splits, mesh_shape):
        index = _part(index, mesh_shape[i], coordinate[i], factor)
    return index


def _in_order_of_split(
    splits: Sequence[tuple[int, Placement]], mesh_shape: tuple[int, ...]
) -> list[tuple[int, int]]:
    """The dimensions of the mesh in the order in which they split, each with the number of chunks
    that it splits one by one.

    A mesh of (4, 2): ``Shard(0), Shard(0)`` gives [(0, 1), (1, 1)]. FSDP over tensor parallelism,
    ``_StridedShard(0, split_factor=2), Shard(0)``, gives [(1, 1), (0, 1)]: the second splits first.
    """
    ordered: list[tuple[int, int]] = []
    for i, p in reversed(splits):
        factor = getattr(p, "split_factor", 1)
        # Those behind it that were split before: as many as make up the factor.
        position, product = 0, 1
        while product < factor and position < len(ordered):
            product *= mesh_shape[ordered[position][0]]
            position += 1
        if product == factor:
            ordered.insert(position, (i, 1))
        else:
            ordered.insert(0, (i, factor))
    return ordered


def _part(index: Sequence[int], parts: int, part: int, factor: int) -> Sequence[int]:
    """One of ``parts`` chunks, as torch.chunk cuts them; of each of ``factor`` chunks, if more."""
    if factor == 1:
        size = -(-len(index) // parts)
        return index[part * size : (part + 1) * size]
    chunks = [_part(_part(index, factor, f, 1), parts, part, 1) for f in range(factor)]
    return list(itertools.chain(*chunks))


def split_dim(placement: Placement) -> int | None:
    """The dimension that a placement splits, if it splits one."""
    if placement.is_replicate() or placement.is_partial():
        return None
    return placement.dim  # type: ignore[attr-defined]
