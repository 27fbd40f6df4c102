"""DTensor parameters: what of them lies on this rank, tensors that lie as they do, sums over ranks.

Where the blocks of a parameter lie and which random numbers round them depends on its global shape
alone. A shard therefore says where it lies, see :mod:`torchao8.shard_layout`. Process groups of a
DTensor's mesh are used only here; other files read its placements and call ``full_tensor()``.
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

from torchao8 import shard_layout
from torchao8.block_layout import MIN_ROW_LENGTH, row_length, row_start
from torchao8.shard_layout import ShardRows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
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


def placement_of(tensor: Tensor) -> tuple[tuple[int, ...], tuple[Placement, ...]]:
    """The shape of the mesh of a DTensor and its placements; both empty for a plain tensor."""
    if not is_dtensor(tensor):
        return (), ()
    return tuple(tensor.device_mesh.shape), tensor.placements


def cut_row_message(p: DTensor, block_size: int) -> str:
    """What to tell a person whose matrix keeps 32-bit state as its shards cut blocks, or bytes of
    packed codes."""
    row = row_length(p.shape, block_size)
    placed = (
        f"of shape {list(p.shape)} is placed as {p.placements} on a mesh of shape "
        f"{list(p.device_mesh.shape)}, which cuts its"
    )
    if shard_rows(p, block_size, 8) is not None:  # in 8 bits it would do
        return (
            f"{placed} 4-bit codes, two elements to a byte, elsewhere than its elements (rows of "
            f"{row}), so that it keeps 32-bit state. Shard it along dimension 0, or over a number "
            f"of ranks that divides dimension {row_start(p.shape, block_size)}."
        )
    return (
        f"{placed} blocks of {block_size} (rows of {row} "
        "elements), so that it keeps 32-bit state. Shard it along dimension 0, or choose a split "
        "of the row, or a smaller block_size, with shards that are multiples of the block (a last "
        f"one may be short, of {MIN_ROW_LENGTH} elements or more)."
    )


# -- where a shard lies ------------------------------------------------------------------------


def shard_rows(p: DTensor, block_size: int, bits: int) -> ShardRows | None:
    """Where the shard of this rank lies, of a parameter with state of so many bits; None for one
    whose shards cut blocks, or bytes of two elements."""
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate()
    where = None if coordinate is None else tuple(coordinate)
    return _shard_rows_on(mesh, p.shape, where, p.placements, block_size, bits)


def flat_shard_rows(p: DTensor) -> ShardRows:
    """Where the shard of this rank lies, of a parameter with 32-bit state."""
    mesh = p.device_mesh
    coordinate = mesh.get_coordinate()
    where = None if coordinate is None else tuple(coordinate)
    return _flat_shard_rows_on(mesh, p.shape, where, p.placements)


def wrong_shard_message(p: DTensor, where: ShardRows) -> str | None:
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
def _shard_rows_on(  # the shape of a mesh takes longer than the rest of it
    mesh: DeviceMesh,
    shape: tuple[int, ...],
    where: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
    block_size: int,
    bits: int,
) -> ShardRows | None:
    sizes = block_size, bits
    return shard_layout.block_rows(tuple(shape), tuple(mesh.shape), where, placements, *sizes)


@functools.cache
def _flat_shard_rows_on(
    mesh: DeviceMesh,
    shape: tuple[int, ...],
    where: tuple[int, ...] | None,
    placements: tuple[Placement, ...],
) -> ShardRows:
    return shard_layout.flat_rows(tuple(shape), tuple(mesh.shape), where, placements)


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
            if shard_layout.split_dim(placement) is not None and p.device_mesh.size(dim) > 1:
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
            if shard_layout.split_dim(placement) is not None:
                dist.all_reduce(numbers, dist.ReduceOp.MAX, group=p.device_mesh.get_group(dim))
    return numbers


# -- a parameter that is gathered ------------------------------------------------------------------


class Peers(NamedTuple):
    """The ranks that hold the parts of a tensor.

    Attributes:
        group: their process group; None where this rank holds all of it.
        coordinates: of each in the mesh, in the order of the group.
        here: which of them this rank is.
    """

    group: ProcessGroup | None
    coordinates: tuple[tuple[int, ...], ...]
    here: int


def peers(mesh: DeviceMesh | None, dims: tuple[int, ...]) -> Peers:
    """The ranks that differ from this one along some dimensions of a mesh, which it is part of.

    A collective of these ranks where there are several dimensions: a process group is made then,
    and kept for the next time.

    Args:
        mesh: None where there are no dimensions: then it is this rank alone.
    """
    coordinate = None if mesh is None else mesh.get_coordinate()
    if mesh is None or coordinate is None:
        return Peers(None, ((),), 0)
    import torch.distributed as dist

    where = tuple(coordinate)
    by_rank = _ranks_along(mesh, where, dims)
    group = mesh.get_group(dims[0]) if len(dims) == 1 else _group_of(tuple(sorted(by_rank)))
    coordinates = tuple(by_rank[rank] for rank in dist.get_process_group_ranks(group))
    return Peers(group, coordinates, coordinates.index(where))


@functools.cache
def _ranks_along(
    mesh: DeviceMesh, where: tuple[int, ...], dims: tuple[int, ...]
) -> dict[int, tuple[int, ...]]:
    """The coordinates of these ranks, by their numbers among all."""
    choices = [range(mesh.size(d)) if d in dims else (i,) for d, i in enumerate(where)]
    return {int(mesh.mesh[c]): c for c in itertools.product(*choices)}


# Process groups that peers() has made, by their ranks.
_made_groups: dict[tuple[int, ...], ProcessGroup] = {}


def _group_of(ranks: tuple[int, ...]) -> ProcessGroup:
    import torch.distributed as dist

    if len(ranks) == dist.get_world_size():
        world = dist.group.WORLD
        assert world is not None
        return world
    made = _made_groups.get(ranks)
    if made is not None:
        try:
            dist.get_process_group_ranks(made)
        except KeyError:  # all groups were destroyed since
            made = None
    if made is None:
        # Other ranks need not call it: they may have no such parameter.
        made = dist.new_group(list(ranks), use_local_synchronization=True)
        _made_groups[ranks] = made
    return made


# -- tensors that lie as a parameter does ----------------------------------------------------------


def like(p: Tensor, local_tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """A state of a global shape out of its part on this rank; the part itself for a plain ``p``.

    Shape and stride are given, since torch would work out the global shape from this rank's part as
    if all ranks had parts of that size. Uneven and empty shards would get a wrong one.
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


def local_tensors(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this rank holds of each of them, as :func:`local`, with less time spent on each."""
    if not torch.compiler.is_compiling():
        try:
            parts = parts_of(tensors)
        except AttributeError:  # plain ones among them
            parts = []
        if len(parts) == len(tensors) and set(map(type, parts)) == {Tensor}:
            return parts
    return [local(t) for t in tensors]


def parts_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The local tensors of DTensors as they are, also those that a collective still has to fill."""
    return [t._local_tensor for t in tensors]  # type: ignore[attr-defined]


def grads_of(params: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients of parameters, some of which are DTensors.

    The getter of ``grad`` looks for a ``__torch_function__`` of each DTensor, which has none, and
    that takes longer than all else that it does: it is told not to.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return [p.grad for p in params]


def local_grads(params: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """The local gradient of each DTensor parameter, see :func:`placed_grad`."""
    return [placed_grad(p, g) for p, g in zip(params, grads, strict=True)]  # type: ignore[arg-type]


def placed_grad(p: DTensor, grad: DTensor) -> Tensor:
    """The local gradient that belongs to the local parameter.

    A gradient may come in other placements, as partial sums over a dimension of the mesh that
    replicates the parameter: then it is brought into those of the parameter, a collective.
    """
    return local(same_placement(p, grad))


class Placements:
    """How DTensor parameters are placed, to notice when they, or their gradients, are placed
    otherwise.

    A spec never changes: a tensor that is placed otherwise has another one.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.specs = _specs_of(params)
        # Of gradients that were compared: FSDP2 gives them the spec of the parameter.
        self.grad_specs = self.specs

    def hold(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether the same parameters are placed as they were, and their gradients with them."""
        # A list compares its members by identity first, and this one's are mostly the same objects.
        if _specs_of(params) != self.specs:
            return False
        specs = _specs_of(grads)
        if specs != self.grad_specs:
            pairs = zip(specs, self.specs, strict=True)
            if any(g.placements != p.placements or g.mesh != p.mesh for g, p in pairs):
                return False
            self.grad_specs = specs
        return True


def _specs_of(tensors: Sequence[Tensor]) -> list[Any]:
    return [t._spec for t in tensors]  # type: ignore[attr-defined]


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
            index = shard_layout.shard_indices(
                tuple(shape), tuple(mesh.shape), coordinate, p.placements, d
            )
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
