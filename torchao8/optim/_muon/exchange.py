"""A step of Muon on sharded matrices: each is orthogonalized whole, by one rank.

Momentum and its direction are element by element, so every rank makes those of its shards. One
all-to-all brings the directions of several matrices to their owners, which put them together and
orthogonalize them. Another one takes the parts back, and every rank updates its shards. A matrix
that lies whole on a rank stays there.

The products of a matrix have the same shape, strides and batch at every world size, see
:mod:`.newton_schulz`; all else is element by element. So the bits do not depend on how a parameter
is sharded.

The stacks of a rank have at most ``update.CHUNK`` elements at a time, or are those that one
parameter needs. Beside them are the same matrices as they are sent, the directions of the shards
of this rank, and what the products of a stack need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from torchao8 import ops, sharding
from torchao8.optim._muon import update
from torchao8.optim._muon.newton_schulz import orthogonalize_
from torchao8.optim._muon.owners import Round, Whole, plan, whole_of
from torchao8.optim._muon.step import Iterations, iterations_of
from torchao8.optim._state.layout import rounds_param
from torchao8.optim._step.bucket import Bucket, Work
from torchao8.optim._step.pages import pages_ahead

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from torchao8.sharding import Peers

_check_step_ = torch.ops.torchao8.check_muon_step_.default


def step_(
    work: Work,
    arguments: Callable[[Bucket], ops.Arguments],
    extremes: Mapping[int, Tensor],
    found_inf: Tensor | None,
) -> None:
    """Steps all parameters of a group of matrices, some of which are DTensors.

    A collective of the ranks that hold them, which must have gradients of the same ones: otherwise
    they wait for one another until the process group times out. It is never traced: optimizers call
    it through torch.compiler.disable.

    Args:
        arguments: those of the op of the rule, for a bucket of the work.
        extremes: of parameters whose states have one scale each, by their numbers in the work.
    """
    turns = list(_turns(work))
    taken = [[bucket.take(set(turn.numbers)) for bucket in work.buckets] for turn in turns]
    calls = [
        [_Call(work, b, arguments(b), extremes, found_inf) for b in buckets if b.params]
        for buckets in taken
    ]
    # What the ops of this group would refuse is refused before any of it is written or sent. Groups
    # before this one have stepped by then. If one rank alone refuses, the others wait for it.
    for call in (call for own in calls for call in own):
        call.check()
    ahead = iter(pages_ahead([(work, call.bucket) for own in calls for call in own]))
    iterations = iterations_of(work.group)
    for turn, own in zip(turns, calls, strict=True):
        flat = torch.zeros(sum(turn.round.to), dtype=torch.bfloat16, device=turn.device)
        directions = turn.directions(flat)
        for call in own:
            ops.prefetch_pages_(next(ahead), call.bucket.params[0])
            call.add_directions_(directions)
        turn.orthogonalize_(flat, iterations)
        if own:
            _update_(work, own, directions, iterations.match_rms)
    for bucket in work.buckets:
        if bucket.counts:
            ops.count_step_(bucket.steps, _to_device(found_inf, bucket.steps[0].device))


# -- rounds ----------------------------------------------------------------------------------------


class _Turn(NamedTuple):
    """A round, with the process group that it needs.

    Attributes:
        numbers: of its parameters in the work, in the order of ``round.members``.
        owned: those that this rank owns.
    """

    peers: Peers
    round: Round
    numbers: list[int]
    owned: list[Whole]
    device: torch.device

    def directions(self, flat: Tensor) -> dict[int, Tensor]:
        """What lies here of the direction of each parameter, by its number: views of what is sent
        and received, which has those of the first owner first."""
        shapes = [torch.Size(shape) for shape in self.round.shapes]
        parts = flat.split([shape.numel() for shape in shapes])
        views = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return dict(zip(self.numbers, views, strict=True))

    def orthogonalize_(self, flat: Tensor, iterations: Iterations) -> None:
        """Replaces the directions of all ranks by their parts of the orthogonal matrices."""
        group, (_, _, to, of, *_) = self.peers.group, self.round
        received = flat
        if group is not None:
            received = flat.new_empty(sum(of))
            dist.all_to_all_single(received, flat, list(of), list(to), group)
        if self.owned:
            sizes, shapes = zip(*((whole.shape, whole.matrix) for whole in self.owned), strict=True)
            wholes, stacks = update.make_stacks(sizes, shapes, self.device)
            in_wholes, in_received = self._parts(wholes, received)
            if in_wholes:
                torch._foreach_copy_(in_wholes, in_received)
            for stack in stacks:
                orthogonalize_(stack, iterations.coefficients, iterations.eps)
            if in_wholes:
                torch._foreach_copy_(in_received, in_wholes)
        if group is not None:
            dist.all_to_all_single(flat, received, list(to), list(of), group)

    def _parts(
        self, wholes: Sequence[Tensor], received: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The same elements as views of the matrices and of what has been received: of each rank
        its parts of all that is owned here."""
        placed = [
            (whole, part)
            for parts in self.round.parts
            for whole, part in zip(wholes, parts, strict=True)
        ]
        shapes = [torch.Size(part.shape) for _, part in placed]
        in_wholes: list[Tensor] = []
        in_received: list[Tensor] = []
        pieces = received.split([shape.numel() for shape in shapes])
        for (whole, part), shape, piece in zip(placed, shapes, pieces, strict=True):
            for box in part.boxes:
                in_wholes.append(whole[box.whole])
                in_received.append(piece.view(shape)[box.local])
        return in_wholes, in_received


def _turns(work: Work) -> Iterator[_Turn]:
    """The rounds of a step, in the same order on all ranks."""
    higher_dims = work.group["higher_dims"]
    # Parameters that the same ranks hold, by the mesh and its dimensions along which these differ.
    alike: dict[tuple[DeviceMesh | None, tuple[int, ...], torch.device], list[int]] = {}
    wholes: dict[int, Whole] = {}
    for k, p in enumerate(work.params):
        mesh, whole = _whole_of(p, higher_dims)
        if whole is not None:  # one without elements may have a scale, which every rank steps
            wholes[k] = whole
            key = mesh if whole.dims else None, whole.dims, sharding.local(p).device
            alike.setdefault(key, []).append(k)
    for (mesh, dims, device), numbers in alike.items():
        mesh_shape = () if mesh is None else tuple(mesh.shape)
        peers = sharding.peers(mesh, dims)
        mine = tuple(wholes[k] for k in numbers)
        at = peers.coordinates, peers.here
        for each in plan(mine, mesh_shape, *at, update.CHUNK, device.type):
            members = [numbers[i] for i in each.members]
            yield _Turn(peers, each, members, [mine[i] for i in each.owned], device)


def _whole_of(p: Tensor, higher_dims: str) -> tuple[DeviceMesh | None, Whole | None]:
    """What is put together of a parameter, and its mesh; nothing where this rank has no part."""
    if not sharding.is_dtensor(p):
        return None, whole_of(tuple(p.shape), (), (), (), higher_dims)
    mesh = p.device_mesh
    where = mesh.get_coordinate()
    if where is None:
        return mesh, None
    placed = tuple(p.shape), tuple(mesh.shape), tuple(where), p.placements
    return mesh, whole_of(*placed, higher_dims)


# -- op calls --------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call of the op with momentum buffers."""

    work: Work
    bucket: Bucket
    arguments: ops.Arguments
    of_extremes: Mapping[int, Tensor]
    found_inf: Tensor | None

    @property
    def found(self) -> Tensor | None:
        return _to_device(self.found_inf, self.bucket.params[0].device)

    @property
    def extremes(self) -> list[Tensor]:
        return [self.of_extremes[k] for k in self.bucket.numbers if k in self.of_extremes]

    @property
    def options(self) -> dict[str, Any]:
        format_number = self.bucket.state_format
        return {"block_size": self.work.group["block_size"], "state_format": format_number}

    @property
    def flags(self) -> dict[str, Any]:
        return {name: self.work.group[name] for name in ("nesterov", "maximize")}

    def check(self) -> None:
        """Raises RuntimeError for what the ops of the step would refuse."""
        _, params, grads, values, scales, steps, lr, numbers, grad_scale, factors = self.arguments
        _check_step_(
            params,
            grads,
            *values,
            *scales,
            steps,
            factors,
            self.extremes,
            lr,
            numbers,
            grad_scale,
            self.found,
            stochastic_params=self.work.group["stochastic_rounding"],
            shard_offsets=self.bucket.shard_offsets,
            shard_row_strides=self.bucket.shard_row_strides,
            **self.options,
            **self.flags,
        )

    def add_directions_(self, directions: Mapping[int, Tensor]) -> None:
        """Takes the gradients into the buffers, and adds the directions to those given."""
        parts = [
            _lies_as(piece, sharding.local(self.work.params[k]), directions[k])
            for piece, k in zip(self.bucket.params, self.bucket.numbers, strict=True)
        ]
        none = self.arguments.lr.new_zeros(())
        call = self.arguments._replace(params=parts, lr=none)
        ops.step_(*call, self.extremes, self.found, **self.options, **self.flags)


def _lies_as(piece: Tensor, param: Tensor, direction: Tensor) -> Tensor:
    """The part of a direction that lies where a piece of the local parameter does."""
    if piece.shape == param.shape:
        return direction
    if not piece.numel():
        return direction.new_zeros(piece.shape)
    # Only contiguous parameters are cut into pieces.
    first = piece.storage_offset() - param.storage_offset()
    return direction.view(-1)[first : first + piece.numel()].view(piece.shape)


def _update_(
    work: Work, calls: Sequence[_Call], directions: Mapping[int, Tensor], match_rms: bool
) -> None:
    """Decays what lies here of the parameters, and moves it."""
    factors: dict[int, Tensor] = {}
    for call in calls:
        kept = map(update.kept_factors, call.arguments.factors)
        factors.update(zip(call.bucket.numbers, kept, strict=False))
    lr, numbers = calls[0].arguments.lr, calls[0].arguments.numbers
    alike: dict[tuple[torch.dtype, bool, float], list[_Piece]] = {}
    assert work.matrices is not None
    for k, direction in directions.items():
        rate = update.rate_scale(work.matrices[k], match_rms)
        for piece in _pieces(work, k, direction):
            alike.setdefault((piece.param.dtype, bool(piece.place), rate), []).append(piece)
    for (_, _, rate), pieces in alike.items():
        members = [piece.number for piece in pieces]
        places = [piece.place for piece in pieces if piece.place]
        ops.step_(
            "muon_step_",
            [piece.param for piece in pieces],
            [piece.direction for piece in pieces],
            [[]],
            [[]],
            [work.steps[k] for k in members],
            lr,
            update.with_rate(numbers, rate),
            None,
            [factors[k] for k in members] if factors else [],
            [],
            calls[0].found,
            stochastic_params=work.group["stochastic_rounding"],
            seed=work.group["seed"],
            shard_offsets=[offset for offset, _ in places],
            shard_row_strides=[stride for _, stride in places],
            nesterov=False,
            maximize=False,
        )


class _Piece(NamedTuple):
    """Elements that one call updates.

    Attributes:
        number: of the parameter in the work.
        place: flat index of the first element in the global tensor, and elements of it from one row
            to the next; empty where no random number depends on it.
    """

    number: int
    param: Tensor
    direction: Tensor
    place: tuple[int, ...]


def _pieces(work: Work, k: int, direction: Tensor) -> Iterator[_Piece]:
    p = work.params[k]
    here = sharding.local(p)
    if not here.numel():
        return
    if not sharding.is_dtensor(p) or not rounds_param(work.group, p):
        yield _Piece(k, here, direction, ())
        return
    rows = sharding.flat_shard_rows(p)
    for run in rows.runs:
        param, part = here, direction
        if not rows.whole:
            param, part = (t.view(-1, rows.row)[run.first : run.last] for t in (here, direction))
        yield _Piece(k, param, part, (run.offset, run.stride))


def _to_device(value: Tensor | None, device: torch.device) -> Tensor | None:
    return value if value is None else value.to(device)
