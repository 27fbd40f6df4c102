"""DTensor parameters: what of them lies on this rank, and whether blocks of 8-bit state survive.

Whether a parameter is quantized, where its blocks lie and which random numbers round them depend
on its global shape alone. A shard therefore says where it lies: :class:`Place` holds the global
index of its rows. Everything the library knows about ``torch.distributed.tensor`` is in this file.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from torchao8.block_layout import MIN_ROW_LENGTH, row_length, row_start, scale_shape

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import Placement


def is_dtensor(value: object) -> TypeGuard[DTensor]:
    """Whether a value is a DTensor, without importing what takes longer than all of torchao8."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def is_flattened(p: Tensor) -> bool:
    """Whether FSDP1 keeps a parameter (``use_orig_params=True``): a vector of what lies here."""
    return getattr(p, "_fsdp_flattened", False)


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: its local tensor, or all of it where it is a plain one."""
    if is_dtensor(tensor):
        tensor = tensor.to_local()
        if hasattr(tensor, "wait"):  # a collective that may not be over yet
            tensor = tensor.wait()
    return tensor


# -- which parameters keep 8-bit state ------------------------------------------------------------


def keeps_blocks(p: DTensor, block_size: int) -> bool:
    """Whether every shard of a parameter, on whatever rank, holds whole blocks of 8-bit state.

    A tensor that is one row (:func:`torchao8.block_layout.row_start`), as a vector or a matrix of
    rank 8, never does, on a mesh of one rank neither: no block size fits all the ways to split it.
    """
    return _keeps_blocks(p.shape, p.device_mesh.shape, p.placements, block_size)


@functools.cache
def _keeps_blocks(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    block_size: int,
) -> bool:
    k = row_start(shape, block_size)
    if k == 0:
        return False
    dims = [_shards(placement) for placement in placements]
    if any(d is not None and d > k for d in dims):
        return False
    if k not in dims:
        return True
    # Along the row: every border must be one of blocks, for the scales as well, which DTensor
    # splits by its own rule.
    inner = math.prod(shape[k + 1 :])
    scales = scale_shape(shape, block_size)
    sizes = [size if d == k else 1 for size, d in zip(mesh_shape, dims, strict=True)]
    for coordinate in itertools.product(*(range(size) for size in sizes)):
        index = _indices(shape, mesh_shape, coordinate, placements, k)
        blocks = _indices(scales, mesh_shape, coordinate, placements, k)
        if not _covers(index, blocks, inner, shape[k], block_size):
            return False
        if index and len(index) * inner < MIN_ROW_LENGTH:  # the op would see one row in all
            return False
    return True


def _covers(
    index: Sequence[int], blocks: Sequence[int], inner: int, size: int, block_size: int
) -> bool:
    """Whether these indices of the dimension that starts a row hold just these blocks."""
    if not index or not blocks:
        return not index and not blocks
    first, last = index[0], index[-1] + 1
    return (
        last - first == len(index)
        and blocks[-1] + 1 - blocks[0] == len(blocks)
        and first * inner == blocks[0] * block_size
        and (last == size or last * inner % block_size == 0)
        and -(-last * inner // block_size) == blocks[-1] + 1
    )


def cut_row_message(p: DTensor, block_size: int) -> str | None:
    """What to tell a person whose matrix keeps 32-bit state for the way it is sharded.

    None for what is one row: a vanishing share of memory, and none of its splits would do.
    """
    if row_start(p.shape, block_size) == 0 or keeps_blocks(p, block_size):
        return None
    row = row_length(p.shape, block_size)
    return (
        f"of shape {list(p.shape)} is placed as {p.placements} on a mesh of shape "
        f"{list(p.device_mesh.shape)}, which cuts its blocks of {block_size} (rows of {row} "
        "elements), so that it keeps 32-bit state. Shard it along dimension 0, or choose a split "
        "of the row, or a smaller block_size, with shards that are multiples of the block (a last "
        f"one may be short, of {MIN_ROW_LENGTH} elements or more)."
    )


# -- where a shard lies ------------------------------------------------------------------------


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


class Place(NamedTuple):
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


def place(p: DTensor, block_size: int) -> Place | None:
    """Where the shard of this rank lies; None for a parameter whose shards cut blocks."""
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate()
    where = None if coordinate is None else tuple(coordinate)
    return _place_on(mesh, p.shape, where, p.placements, block_size)


def flat_place(p: DTensor) -> Place:
    """Where the shard of this rank lies, of a parameter with 32-bit state."""
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate()
    where = None if coordinate is None else tuple(coordinate)
    return _flat_place_on(mesh, p.shape, where, p.placements)


def wrong_shard_message(p: DTensor, where: Place) -> str | None:
    """What is wrong with the local tensor of a parameter, if anything is."""
    part = local(p)
    if p.device_mesh.get_coordinate() is None:
        return None
    if tuple(part.shape) != where.shape:
        return (
            f"of shape {list(p.shape)}, placed as {p.placements} on a mesh of shape "
            f"{list(p.device_mesh.shape)}: expected a local shape of {list(where.shape)} on this "
            f"rank, got {list(part.shape)}. FSDP2 over tensor parallelism makes the expected one; "
            "distribute_tensor splits an uneven dimension otherwise."
        )
    if not where.whole and not part.is_contiguous():
        return (
            f"placed as {p.placements}: expected a contiguous local tensor, as its shards lie "
            f"in several pieces of the whole, got strides {list(part.stride())} for shape "
            f"{list(part.shape)}"
        )
    return None


@functools.cache
def _place_on(  # the shape of a mesh takes longer than the rest of it
    mesh: DeviceMesh,
    shape: tuple[int, ...],
    where: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
    block_size: int,
) -> Place | None:
    return _place(tuple(shape), tuple(mesh.shape), where, placements, block_size)


@functools.cache
def _place(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
    block_size: int,
) -> Place | None:
    if not _keeps_blocks(shape, mesh_shape, placements, block_size):
        return None
    k = row_start(shape, block_size)
    inner = math.prod(shape[k + 1 :])
    if coordinate is None:  # this rank has no part in the mesh
        return Place((), True, 0, 0, (0,) * len(shape), (0,) * (k + 1))
    indices = [_indices(shape, mesh_shape, coordinate, placements, d) for d in range(len(shape))]
    leading, columns = indices[:k], indices[k]
    row = len(columns) * inner
    scales = (*(len(rows) for rows in leading), -(-row // block_size))
    starts = _row_offsets(shape, leading, inner * columns[0] if columns else 0)
    runs = _runs(starts, shape, k) if row else ()
    local_shape = tuple(len(index) for index in indices)
    whole = len(runs) < 2 and scale_shape(local_shape, block_size) == scales
    return Place(runs, whole, row, scales[-1], local_shape, scales)


@functools.cache
def _flat_place_on(
    mesh: DeviceMesh,
    shape: tuple[int, ...],
    where: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
) -> Place:
    return _flat_place(tuple(shape), tuple(mesh.shape), where, placements)


@functools.cache
def _flat_place(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
) -> Place:
    """A row ends where the last dimension that is split has a gap, and is as long as can be."""
    if coordinate is None:
        return Place((), True, 0, 0, (0,) * len(shape), ())
    indices = [_indices(shape, mesh_shape, coordinate, placements, d) for d in range(len(shape))]
    local_shape = tuple(len(index) for index in indices)
    if 0 in local_shape:
        return Place((), True, 0, 0, local_shape, ())
    last = local_shape[-1] if shape else 1
    split = [d for d in range(len(shape)) if local_shape[d] != shape[d]]
    if not split:
        return Place((Run(0, math.prod(shape) // last, 0, last),), True, last, 0, local_shape, ())
    k = split[-1]
    together = _common_length(indices[k])
    row = together * math.prod(shape[k + 1 :])
    starts = _row_offsets(shape, (*indices[:k], indices[k][::together]), 0)
    runs = _runs(starts, shape, k)
    if len(runs) > 1:
        return Place(runs, False, row, 0, local_shape, ())
    if len(starts) == 1 or runs[0].stride == row:  # without gaps: rows of any length will do
        runs = (Run(0, math.prod(local_shape) // last, starts[0], last),)
        row = last
    return Place(runs, row == last, row, 0, local_shape, ())


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


def _indices(
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
    splits = [(i, p) for i, p in enumerate(placements) if _shards(p) == dim]
    for i, factor in _in_order_of_split(splits, mesh_shape):
        index = _part(index, mesh_shape[i], coordinate[i], factor)
    return index


def _in_order_of_split(
    splits: Sequence[tuple[int, Placement]], mesh_shape: tuple[int, ...]
) -> list[tuple[int, int]]:
    """Which dimension of the mesh splits next, and the number of chunks it splits each."""
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


def _shards(placement: Placement) -> int | None:
    """The dimension that a placement splits, if it splits one."""
    if placement.is_replicate() or placement.is_partial():
        return None
    return placement.dim  # type: ignore[attr-defined]


# -- sums and maxima over a whole parameter --------------------------------------------------------


# The name of a process group (a type of its own in newer versions of torch, a str in all), and the
# indices of the parameters that its ranks hold different parts of.
ShardGroup = tuple[Any, list[int]]


def shard_groups(params: Sequence[Tensor]) -> list[ShardGroup]:
    """The process groups whose ranks hold different parts of parameters.

    Returns:
        One for each dimension of a mesh, so that a parameter that two dimensions shard is in two.
    """
    members: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if not is_dtensor(p) or p.device_mesh.get_coordinate() is None:
            continue
        for dim, placement in enumerate(p.placements):
            if _shards(placement) is not None and p.device_mesh.size(dim) > 1:
                name = p.device_mesh.get_group(dim).group_name
                members.setdefault(name, []).append(i)
    return list(members.items())


def sum_rows(rows: Tensor, groups: Sequence[ShardGroup]) -> Tensor:
    """Adds up what ranks know of the whole parameters: one all-reduce for each process group.

    Args:
        rows: int64, the first dimension that of the parameters.
        groups: of :func:`shard_groups`.
    """
    return _reduce_rows(rows, groups, "sum")


def largest_rows(rows: Tensor, groups: Sequence[ShardGroup]) -> Tensor:
    """The same with the largest of each number in place of the sum."""
    return _reduce_rows(rows, groups, "max")


def _reduce_rows(rows: Tensor, groups: Sequence[ShardGroup], how: str) -> Tensor:
    from torch.distributed._functional_collectives import all_reduce

    for name, members in groups:
        if len(members) == len(rows):
            rows = all_reduce(rows, how, name)
            continue
        parts = list(rows.unbind())
        reduced = all_reduce(torch.stack([parts[i] for i in members]), how, name)
        for i, part in zip(members, reduced.unbind(), strict=True):
            parts[i] = part
        rows = torch.stack(parts)
    return rows


def largest_over_shards(p: DTensor, numbers: Tensor) -> Tensor:
    """The largest of each number, of those that the ranks with other parts of ``p`` have."""
    import torch.distributed as dist

    if p.device_mesh.get_coordinate() is not None:
        for dim, placement in enumerate(p.placements):
            if _shards(placement) is not None:
                dist.all_reduce(numbers, dist.ReduceOp.MAX, group=p.device_mesh.get_group(dim))
    return numbers


# -- tensors that lie as a parameter does ----------------------------------------------------------


def like(p: Tensor, local_tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A state of a global shape out of its part on this rank; the part itself for a plain ``p``.

    Shape and stride are given, as torch would take those of uneven and empty shards to be alike.
    """
    if not is_dtensor(p):
        return local_tensor
    from torch.distributed.tensor import DTensor

    stride = [math.prod(shape[d + 1 :]) for d in range(len(shape))]
    return DTensor.from_local(
        local_tensor,
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=tuple(stride),
    )


def placed_grad(p: DTensor, grad: DTensor) -> Tensor:
    """The local gradient that belongs to the local parameter.

    A gradient may come in other placements, as partial sums over a dimension of the mesh that
    replicates the parameter: then it is brought into those of the parameter, a collective.
    """
    return local(same_placement(p, grad))


def is_placed_as(p: DTensor, value: DTensor) -> bool:
    """Whether a DTensor lies as a parameter does."""
    return value.placements == p.placements and value.device_mesh == p.device_mesh


def same_placement(p: DTensor, value: DTensor) -> DTensor:
    """A DTensor brought into the placements of a parameter; a collective where it has others."""
    if is_placed_as(p, value):
        return value
    return value.redistribute(p.device_mesh, p.placements)


def cut_out(p: DTensor, value: Tensor, shape: Sequence[int]) -> Tensor:
    """This rank's part of a plain tensor of the global shape of a state of ``p``."""
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate()
    for d in range(len(shape)):
        index: Sequence[int] = range(0)
        if coordinate is not None:
            index = _indices(tuple(shape), tuple(mesh.shape), coordinate, p.placements, d)
        if len(index) != shape[d]:
            value = value.index_select(
                d, torch.tensor(list(index), dtype=torch.int64, device=value.device)
            )
    return value


def agree(tensors: Iterable[Tensor], refused: bool) -> bool:
    """Whether any rank that shares one of the tensors refuses: then all of them must.

    A collective over the meshes of the DTensors among the tensors. Ranks need not have the same
    meshes: all go through theirs in one order, there and back, so that a refusal also gets from
    one mesh to the next.
    """
    import torch.distributed as dist

    meshes = {t.device_mesh for t in tensors if is_dtensor(t)}
    ordered = sorted(
        (mesh for mesh in meshes if mesh.size() > 1 and mesh.get_coordinate() is not None),
        key=lambda mesh: (mesh.size(), mesh.mesh.flatten().tolist(), tuple(mesh.shape)),
    )
    for mesh in ordered + ordered[::-1]:
        flag = torch.tensor(int(refused), dtype=torch.int64, device=mesh.device_type)
        for dim in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh.get_group(dim))
        refused = bool(flag)
    return refused
