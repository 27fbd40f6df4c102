"""Which rank orthogonalizes which matrices, in which round, and what it gets and sends for that.

Every rank works out the same plan, from shapes, meshes and placements alone. No tensor and no
process group is looked at.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torchao8 import matrix_shape
from torchao8.matrix_shape import MatrixShape
from torchao8.optim._muon.newton_schulz import stack_room
from torchao8.shard_layout import ShardBoxes, shard_boxes, split_dim

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

# For each rank the numbers of the parameters that it owns in a round.
Owned = tuple[tuple[int, ...], ...]


def cost(shape: MatrixShape) -> int:
    """How long the products of the matrices take, but for a constant factor."""
    matrices, rows, columns = shape
    return matrices * rows * columns * min(rows, columns)


class Bundle(NamedTuple):
    """Parameters that have one owner, as they fill up the same stacks of matrices.

    Attributes:
        members: their numbers.
        stacks: the matrices that are computed for them, with those that fill up the last stack.
    """

    members: tuple[int, ...]
    stacks: MatrixShape


def bundles(shapes: Sequence[MatrixShape], device_type: str) -> list[Bundle]:
    """Puts parameters of the same shape of matrices together while that costs nothing.

    A stack takes the same time whether it is full or not. So the last stack of a parameter takes
    others that fit in, where a second owner would have to compute a stack for them.
    """
    made: list[tuple[list[int], MatrixShape]] = []
    last: dict[tuple[int, int], tuple[list[int], int]] = {}  # members, matrices that still fit in
    for i, shape in enumerate(shapes):
        count, rows, columns = shape
        members, free = last.get((rows, columns), ([], -1))
        if count > free:
            members, free = [], stack_room(shape, device_type)
            made.append((members, MatrixShape(free, rows, columns)))
        members.append(i)
        last[rows, columns] = members, free - count
    return [Bundle(tuple(members), stacks) for members, stacks in made]


def rounds(shapes: Sequence[MatrixShape], ranks: int, limit: int, device_type: str) -> list[Owned]:
    """Shares parameters out among ranks.

    In order of falling cost, each bundle goes to the rank that has least to do in the round. When
    that rank has no room left, the next round begins. So the ranks of a round are done at about the
    same time, and the stacks of a rank have at most ``limit`` elements, or are those of one bundle,
    which one of its parameters needs by itself.

    Args:
        shapes: of the parameters.
        ranks: how many there are.
        limit: elements that the stacks of a rank have at most in a round, if they are of more than
            one bundle.
        device_type: on which the matrices are computed: stacks are of different sizes.

    Returns:
        The rounds. What a rank owns of one shape of matrices is together.
    """
    made: list[Owned] = []
    filling = _Filling(ranks, limit)
    for bundle in sorted(bundles(shapes, device_type), key=lambda b: (-cost(b.stacks), b.members)):
        if not filling.take(bundle):
            made.append(filling.done(shapes))
            filling = _Filling(ranks, limit)
            filling.take(bundle)
    if any(filling.owned):
        made.append(filling.done(shapes))
    return made


class _Filling:
    """A round that still takes parameters."""

    def __init__(self, ranks: int, limit: int) -> None:
        self.limit = limit
        self.owned: list[list[int]] = [[] for _ in range(ranks)]
        self.held = [0] * ranks
        self.loads = [(0, 0, rank) for rank in range(ranks)]  # a heap: cost, parameters, rank

    def take(self, bundle: Bundle) -> bool:
        """Gives a bundle to a rank; False if that one has no room."""
        load, count, rank = self.loads[0]
        elements = math.prod(bundle.stacks)
        if count and self.held[rank] + elements > self.limit:
            return False
        more = count + len(bundle.members)
        heapq.heapreplace(self.loads, (load + cost(bundle.stacks), more, rank))
        self.owned[rank] += bundle.members
        self.held[rank] += elements
        return True

    def done(self, shapes: Sequence[MatrixShape]) -> Owned:
        return tuple(tuple(sorted(own, key=lambda i: (shapes[i][1:], i))) for own in self.owned)


class Whole(NamedTuple):
    """What is put together of a parameter: all of it, or of experts those that this rank has.

    Attributes:
        shape: of that.
        matrix: the matrices in it.
        placements: on the mesh of the parameter, of what splits its matrices; none where nothing
            does.
        dims: the dimensions of the mesh that split them.
    """

    shape: tuple[int, ...]
    matrix: MatrixShape
    placements: tuple[Placement, ...]
    dims: tuple[int, ...]


@functools.cache
def whole_of(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
    placements: tuple[Placement, ...],
    higher_dims: str,
) -> Whole:
    """What is put together of a parameter of this global shape, for the rank at a coordinate."""
    counting = len(shape) - 2 if higher_dims == "batch" else 0  # dimensions that count matrices
    split = [split_dim(placement) for placement in placements]
    dims = tuple(
        i
        for i, (d, size) in enumerate(zip(split, mesh_shape, strict=True))
        if d is not None and d >= counting and size > 1
    )
    here = shard_boxes(shape, mesh_shape, coordinate, placements).shape
    shape = (*here[:counting], *shape[counting:])
    matrix = matrix_shape.of(shape, higher_dims)
    if not dims:
        return Whole(shape, matrix, (), ())
    # What splits along dimensions that count matrices has been taken into account.
    return Whole(shape, matrix, tuple(_only(dims, placements)), dims)


def _only(dims: tuple[int, ...], placements: Sequence[Placement]) -> list[Placement]:
    from torch.distributed.tensor import Replicate

    return [p if i in dims else Replicate() for i, p in enumerate(placements)]


class Round(NamedTuple):
    """What a rank sends, receives and owns in a round.

    Attributes:
        members: the parameters, in the order of their owners.
        shapes: what lies here of each.
        to: how many elements go to each owner.
        of: how many elements of each rank come here.
        owned: the parameters that this rank owns.
        parts: for each rank, where what it has of these lies in them.
    """

    members: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    to: tuple[int, ...]
    of: tuple[int, ...]
    owned: tuple[int, ...]
    parts: tuple[tuple[ShardBoxes, ...], ...]


@functools.lru_cache(maxsize=64)
def plan(
    wholes: tuple[Whole, ...],
    mesh_shape: tuple[int, ...],
    coordinates: tuple[tuple[int, ...], ...],
    here: int,
    limit: int,
    device_type: str,
) -> tuple[Round, ...]:
    """The rounds of parameters that the same ranks have parts of.

    Args:
        wholes: of the parameters.
        mesh_shape: of the mesh that they share; empty where one rank has all of them.
        coordinates: of the ranks.
        here: which of these this one is.
        limit, device_type: see :func:`rounds`.
    """

    def part(i: int, rank: int) -> ShardBoxes:
        return shard_boxes(wholes[i].shape, mesh_shape, coordinates[rank], wholes[i].placements)

    made = []
    matrices = [whole.matrix for whole in wholes]
    for owned in rounds(matrices, len(coordinates), limit, device_type):
        shapes = [[part(i, here).shape for i in own] for own in owned]
        parts = [[part(i, rank) for i in owned[here]] for rank in range(len(coordinates))]
        made.append(
            Round(
                tuple(i for own in owned for i in own),
                tuple(shape for own in shapes for shape in own),
                tuple(sum(map(math.prod, own)) for own in shapes),
                tuple(sum(math.prod(boxes.shape) for boxes in own) for own in parts),
                owned[here],
                tuple(map(tuple, parts)),
            )
        )
    return tuple(made)
