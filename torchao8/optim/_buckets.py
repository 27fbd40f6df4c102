"""Sorting parameters, gradients and states into the op calls of a step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import sharding
from torchao8.block_layout import Scales, fits_8bit
from torchao8.optim import _clipping, _paging
from torchao8.optim._checkpoint import is_own
from torchao8.optim._checks import (
    NO_FLOAT16,
    check_grad,
    describe,
    is_readable_grad,
    meta_message,
    with_shape,
)
from torchao8.sharding import Place

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Group = dict[str, Any]


class Bucket(NamedTuple):
    """The tensors of one op call: one device, one dtype of parameters and of gradients, one format.

    They are plain tensors: of a DTensor, what lies on this rank. ``values`` and ``scales`` hold a
    list for each state, by its name: the codes and their scales, or the float32 values and an empty
    list. ``shard_offsets`` and ``shard_row_strides`` say where shards lie in their global tensors;
    both are empty where none is sharded, or where nothing depends on it. ``numbers`` are those of
    the parameters in their work.
    """

    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    values: dict[str, list[Tensor]]
    scales: dict[str, list[Tensor]]
    shard_offsets: list[int]
    shard_row_strides: list[int]
    numbers: list[int]

    def states_of(self, i: int) -> list[Tensor]:
        """All tensors of state of its i-th parameter."""
        lists = (*self.values.values(), *self.scales.values())
        return [tensors[i] for tensors in lists if tensors]

    def part(self, first: int, last: int) -> Bucket:
        """A bucket of some of its parameters, ``last`` not included."""
        return Bucket(
            self.params[first:last],
            self.grads[first:last],
            self.steps[first:last],
            {name: tensors[first:last] for name, tensors in self.values.items()},
            {name: tensors[first:last] for name, tensors in self.scales.items()},
            self.shard_offsets[first:last],
            self.shard_row_strides[first:last],
            self.numbers[first:last],
        )


class Work(NamedTuple):
    """What a step does in a parameter group: the parameters that have a gradient, in their order.

    Attributes:
        number, group: of the parameter group.
        buckets: the op calls. A parameter whose shard on this rank is empty is in none of them
            (but for one with a single scale, which is there as an empty piece), and one may be
            there in several pieces.
        numbers: of the parameters in the group.
        params: as they are in the group.
        grads: what lies on this rank.
        steps: the counts of steps.
        histories: of the norms of gradients, where these are clipped.
    """

    number: int
    group: Group
    buckets: list[Bucket]
    numbers: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    histories: list[Tensor]


class Columns:
    """A bucket in the making: one parameter after the other, with all that belongs to it."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.offsets: list[int] = []
        self.strides: list[int] = []
        self.numbers: list[int] = []

    def bucket(self, names: Sequence[str], quantized: bool) -> Bucket:
        """One list for each thing of a parameter."""
        width = 3 + len(names) * (2 if quantized else 1)
        columns = [self.tensors[i::width] for i in range(width)]
        states = columns[3 : 3 + len(names)]
        scales = columns[3 + len(names) :] if quantized else [[] for _ in names]
        return Bucket(
            columns[0],
            columns[1],
            columns[2],
            dict(zip(names, states, strict=True)),
            dict(zip(names, scales, strict=True)),
            self.offsets,
            self.strides,
            self.numbers,
        )

    def add(self, number: int, *tensors: Tensor) -> None:
        """Adds a parameter: itself, its gradient, its step, then its states."""
        self.tensors += tensors
        self.numbers.append(number)

    def add_shard(
        self,
        number: int,
        place: Place | None,
        p: Tensor,
        grad: Tensor,
        step: Tensor,
        states: list[Tensor],
        quantized: bool,
        block_wise: bool,
    ) -> None:
        """Adds what lies on this rank, if anything does: first all codes or values, then scales.

        In 32 bits there are no blocks, and where a parameter is not rounded stochastically (no
        place) nothing depends on where an element lies. Not block-wise, a rank where nothing lies
        still has the scales, and steps them.
        """
        half = len(states) // 2
        if place is None:
            if p.numel():
                self.add(number, p, grad, step, *states)
        elif not place.runs and quantized and not block_wise:
            p, grad, codes = p.reshape(0), grad.reshape(0), [t.reshape(0) for t in states[:half]]
            self.add(number, p, grad, step, *codes, *states[half:])
            self.offsets.append(0)
            self.strides.append(0)
        elif place.whole:
            for run in place.runs:
                self.add(number, p, grad, step, *states)
                self.offsets.append(run.offset)
                self.strides.append(run.stride)
        else:
            # As matrices, whose rows are those of the global tensor whatever the local shape.
            values = half if quantized else len(states)
            codes = [t.view(-1, place.row) for t in states[:values]]
            scales = [t.view(-1, place.blocks) if block_wise else t for t in states[values:]]
            p, grad = p.view(-1, place.row), grad.reshape(-1, place.row)
            for run in place.runs:
                a, b = run.first, run.last
                self.add(number, p[a:b], grad[a:b], step, *(t[a:b] for t in codes))
                self.tensors += [t[a:b] if block_wise else t for t in scales]
                self.offsets.append(run.offset)
                self.strides.append(run.stride)


def sort_into_buckets(
    optimizer: Optimizer,
    number: int,
    names: Sequence[str],
    init_states: Callable[[], None],
    place_of: Callable[[int, DTensor, bool], Place | None],
) -> Work:
    """The op calls that update the parameters of a group that have a gradient.

    Args:
        number: of the group.
        names: of the states of a parameter.
        init_states: makes the states that are missing.
        place_of: of the i-th parameter of the group, a DTensor: where its shard lies, in blocks
            (True) or as 32-bit state.

    Raises:
        RuntimeError: a gradient that no step can read; a state that does not fit the options.
        ValueError: a float16 parameter that is to be rounded stochastically.
    """
    group = optimizer.param_groups[number]
    beside = ["step", _clipping.KEY] if _clipping.clips(group) else ["step"]
    codes, scales = [f"{name}_codes" for name in names], [f"{name}_scale" for name in names]
    keys32, keys8 = [*beside, *names], [*beside, *codes, *scales]
    first_codes, first_scale = (codes[0], scales[0]) if names else ("", "")
    looks_at_pages = not torch.compiler.is_compiling() and bool(
        names and (group["is_paged"] or _paging.any_pages())
    )
    kinds: dict[Any, Columns] = {}
    work = Work(number, group, [], [], [], [], [], [])
    for i, p in enumerate(group["params"]):
        grad, state = p.grad, optimizer.state.get(p)
        if not state or "step" not in state:
            if grad is None and not p.requires_grad:
                continue
            init_states()
            state = optimizer.state[p]
        if grad is None:
            continue
        if not is_readable_grad(p, grad):
            check_grad(optimizer, p)
        rounds = rounds_param(group, p)
        if group["stochastic_rounding"] and p.dtype == torch.float16:
            name = type(optimizer).__name__
            raise ValueError(f"{name}: {describe(optimizer, p)}: {NO_FLOAT16}")
        quantized = first_codes in state
        keys = keys8 if quantized else keys32
        try:
            tensors = [state[key] for key in keys]
        except KeyError:
            raise RuntimeError(_keys_message(optimizer, p, keys)) from None
        # A state that no step would move, and no checkpoint could have; others' keys are no such.
        if len(state) > len(keys) and any(is_own(k) for k in state if k not in keys):
            raise RuntimeError(_keys_message(optimizer, p, keys))
        sharded = sharding.is_dtensor(p)
        place = place_of(i, p, True) if sharded else None
        scale = state[first_scale] if quantized else None
        if torch.compiler.is_compiling():
            # The check was made when the trace began. These are read so that a change of them
            # begins another one.
            if group["optim_bits"] == 8 and p.numel() >= group["min_8bit_size"]:
                pass
        elif names:  # what has no state has no format either
            first, keeps_blocks = tensors[len(beside)], not sharded or place is not None
            check_layout(optimizer, group, p, first, scale, keeps_blocks)
        step, states = tensors[0], tensors[len(beside) :]
        where = len(work.params)
        work.numbers.append(i)
        work.params.append(p)
        work.steps.append(step)
        work.histories.extend(tensors[1 : len(beside)])
        if not sharded:
            if looks_at_pages:
                _paging.check_place(optimizer, group, p, states[0])
            work.grads.append(grad)
            kind = (quantized, p.device, p.dtype, grad.dtype, False)
            kinds.setdefault(kind, Columns()).add(where, p, grad, step, *states)
            continue
        p_local, grad = sharding.local(p), sharding.placed_grad(p, grad)
        work.grads.append(grad)
        if not quantized:
            place = place_of(i, p, False) if rounds else None
        kind = (quantized, p_local.device, p.dtype, grad.dtype, place is not None)
        parts = [sharding.local(t) for t in states]
        if looks_at_pages:
            _paging.check_place(optimizer, group, p, parts[0])
        columns = kinds.setdefault(kind, Columns())
        block_wise = group["block_wise"]
        columns.add_shard(where, place, p_local, grad, step, parts, quantized, block_wise)
    for kind, made in kinds.items():
        if made.numbers and kind[1].type == "meta":
            raise RuntimeError(meta_message(optimizer, work.params[made.numbers[0]]))
    work.buckets.extend(made.bucket(names, kind[0]) for kind, made in kinds.items() if made.tensors)
    return _paging.pieces(work)


def rounds_param(group: Group, p: Tensor) -> bool:
    """Whether a parameter is written back with stochastic rounding."""
    return group["stochastic_rounding"] and p.dtype == torch.bfloat16


def place_of(optimizer: Optimizer, group: Group, p: DTensor, in_blocks: bool) -> Place | None:
    """Where the shard of a parameter lies, in blocks or as 32-bit state.

    Raises:
        ValueError: 32-bit state, and the local tensor is not what lies there. That of 8-bit state
            is checked when the state is made.
    """
    if in_blocks:
        return sharding.place(p, group["block_size"])
    place = sharding.flat_place(p)
    check_shard(optimizer, p, place)
    return place


def check_shard(optimizer: Optimizer, p: DTensor, place: Place) -> None:
    """Raises ValueError unless the local tensor of a parameter is the one of this place."""
    wrong = sharding.wrong_shard_message(p, place)
    if wrong is not None:
        raise ValueError(f"{type(optimizer).__name__}: {describe(optimizer, p)} {wrong}")


def check_layout(
    optimizer: Optimizer,
    group: Group,
    p: Tensor,
    first: Tensor | None,
    scale: Tensor | None,
    keeps_blocks: bool,
) -> None:
    """Raises RuntimeError if an option was changed after it had laid out the state, or the shape.

    Args:
        first: the parameter's first state, codes in 8 bits; None where it is missing.
        scale: of the parameter's first state, None in 32 bits.
        keeps_blocks: False for a DTensor that keeps 32-bit state for the way it is sharded.
    """
    shape = p.shape
    if first is not None and first.shape != shape:
        raise RuntimeError(
            f"{type(optimizer).__name__}: {describe(optimizer, p)} is of shape {list(shape)} now, "
            f"its state of shape {list(first.shape)}: it was resized, or its data replaced, after "
            "the first step. Build a new optimizer, or remove its state "
            "(optimizer.state.pop(parameter)), which then starts anew"
        )
    least, block_size = group["min_8bit_size"], group["block_size"]
    wants_8bit = (
        group["optim_bits"] == 8
        and p.numel() >= least
        and keeps_blocks
        and (scale is not None or fits_8bit(shape, block_size, least))
    )
    if wants_8bit != (scale is not None) or (
        scale is not None and scale.shape != _cached_scale_shape(shape, Scales.of(group))
    ):
        has = "32-bit state" if scale is None else f"8-bit state, scales {list(scale.shape)}"
        raise RuntimeError(
            f"{type(optimizer).__name__}: {with_shape(optimizer, p)} already has {has}, but its "
            f"group now says optim_bits={group['optim_bits']}, min_8bit_size={least}, "
            f"block_size={block_size}, block_wise={group['block_wise']}. Set them back, or build a "
            "new optimizer."
        )


@functools.cache
def _cached_scale_shape(shape: torch.Size, scales: Scales) -> tuple[int, ...]:
    return scales.shape(shape)


def _keys_message(optimizer: Optimizer, p: Tensor, keys: list[str]) -> str:
    return (
        f"{type(optimizer).__name__}: state of {describe(optimizer, p)}: expected the keys {keys}, "
        f"got {list(optimizer.state[p])}. An option that decides which state there is, such as "
        "amsgrad, centered or percentile_clipping, must be set before the first step."
    )
