"""Which state a parameter gets: its format, its keys, shapes and memory; and making it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torchao8 import ops, sharding
from torchao8._messages import describe, meta_message, warn_caller, with_shape
from torchao8._modes import normal_tensors
from torchao8.block_layout import BLOCK_SIZES, Scales
from torchao8.optim._params import check_grad, check_params
from torchao8.optim._state import paging
from torchao8.optim._state.changed import changed_options
from torchao8.optim._state.formats import (
    FLOAT32,
    FORMATS,
    FOUR_BIT,
    Format,
    Place,
    first_keys,
    format_in,
    holds,
)
from torchao8.optim._state.spec import Layout, State, beside_states, has_state
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import Group, check_4bit, clips
from torchao8.shard_layout import ShardRows
from torchao8.sharding import is_dtensor
from torchao8.state_bits import CUT_ROWS, OPTION, why_32bit

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def why_kept(group: Group, p: Tensor) -> str | None:
    """Why a parameter keeps 32-bit state under the options of its group; None where it keeps
    quantized state: by its global shape and by the way it is sharded."""
    if group["optim_bits"] == 32:
        return OPTION
    sizes = group["block_size"], group["min_8bit_size"], group["optim_bits"]
    return why_32bit(tuple(p.shape), *sharding.placement_of(p), *sizes)


def format_of(group: Group, p: Tensor) -> Format:
    """The format of the state of a parameter under the options of its group."""
    if why_kept(group, p) is not None:
        return FLOAT32
    return FOUR_BIT if group["optim_bits"] == 4 else FORMATS[group["state_format"]]


def check_device(optimizer: OptimizerContract, group: Group, p: Tensor, own: Format) -> None:
    """Raises NotImplementedError where the device of a parameter has no steps of a format."""
    device, op = sharding.local(p).device, optimizer._rule(group)._op
    if own.is_quantized and not ops.takes_format(op, own.name, device):
        there = [n for n in ops.FORMAT_NUMBERS if ops.takes_format(op, n, device)]
        steps = "the PyTorch operators" if ops.is_portable(device) else "the kernels"
        option = "optim_bits=4" if own is FOUR_BIT else f"state_format={own.name!r}"
        raise NotImplementedError(
            f"{type(optimizer).__name__}: {describe(optimizer, p)}: {option} is "
            f"not there on {device}, where {steps} of a step take {' or '.join(map(repr, there))}"
        )


def rounds_param(group: Group, p: Tensor) -> bool:
    """Whether a parameter is written back with stochastic rounding."""
    return group["stochastic_rounding"] and p.dtype == torch.bfloat16


def layout_of(
    optimizer: OptimizerContract,
    group: Group,
    p: Tensor,
    states: tuple[State, ...] | None = None,
) -> Layout:
    """Every key of ``optimizer.state[p]`` under the options of its group, and what stands there.

    Args:
        states: of the parameter, if they are known.

    Raises:
        ValueError: the step needs to know all of a parameter of which FSDP1 keeps a shard; the
            local tensor of a DTensor is not its shard.
        NotImplementedError: there are no steps of the format on the device.
    """
    scales, own = Scales.of(group), format_of(group, p)
    check_device(optimizer, group, p, own)
    _check_shards(optimizer, group, p, own)
    place = _place_of(p, scales, own, paging.folder_of(group, p))
    layout = beside_states(clips(group))
    for state in optimizer._states_of(group) if states is None else states:
        specs = own.specs(state, tuple(p.shape), scales, place)
        layout.update(zip(own.keys(state), specs, strict=True))
    return layout


def _place_of(p: Tensor, scales: Scales, own: Format, pages: str | None) -> Place:
    """Where the state of a parameter lies."""
    if not is_dtensor(p):
        return Place(pages=pages)
    rows = sharding.shard_rows(p, scales.block_size, own.bits) if own.is_quantized else None
    return Place(tuple(sharding.local(p).shape), rows, pages)


# -- checks ----------------------------------------------------------------------------------------


def check_layout(
    optimizer: OptimizerContract, group: Group, p: Tensor, states: tuple[State, ...]
) -> None:
    """Raises RuntimeError if a parameter was resized, or an option changed, after it had laid out
    the state of ``p``.

    Args:
        states: of the parameter.
    """
    state = optimizer.state[p]
    found = format_in(states, state)
    keys = first_keys(states, found)
    if keys and all(key in state for key in keys):  # a missing one is told of by its name
        check_format(optimizer, group, p, [state[key] for key in keys], found)


def check_format(
    optimizer: OptimizerContract,
    group: Group,
    p: Tensor,
    tensors: Sequence[Tensor],
    found: Format,
) -> None:
    """The same for the format that the state has.

    Args:
        tensors: of the state whose keys tell the format.
    """
    if found is FOUR_BIT:
        check_4bit(group)
    first, *scale = tensors
    if first.shape not in _codes_shapes(found.name, p.shape):
        name = type(optimizer).__name__
        raise RuntimeError(
            f"{name}: {describe(optimizer, p)} is of shape {list(p.shape)} now, "
            f"its state of shape {list(first.shape)}: it was resized, or its data replaced, after "
            "the first step. Build a new optimizer, or remove its state "
            "(optimizer.state.pop(parameter)), which then starts anew"
        )
    if format_of(group, p) is not found or (
        scale and scale[0].shape != _scale_shape(p.shape, Scales.of(group))
    ):
        has = f"{found.bits}-bit state{found.told_apart}"
        has += f", scales {list(scale[0].shape)}" if scale else ""
        blocks = scale[0] if scale else None
        raise RuntimeError(
            f"{type(optimizer).__name__}: {with_shape(optimizer, p)} already has {has}, but its "
            f"group now says {changed_options(group, p, found, blocks, why_kept(group, p))}. Set "
            "that back. To change it, make a new optimizer and load the state dict of this one, "
            "which converts the state"
        )
    if group["is_paged"] or paging.any_pages():
        paging.check_memory(optimizer, group, p, sharding.local(first))


@functools.cache
def _codes_shapes(name: str, shape: torch.Size) -> set[tuple[int, ...]]:
    """What the codes of a format may be of for this parameter, in blocks of any size."""
    return {FORMATS[name].codes_shape(shape, block_size) for block_size in BLOCK_SIZES}


@functools.cache
def _scale_shape(shape: torch.Size, scales: Scales) -> tuple[int, ...]:
    return scales.shape(shape)


def check_rule_takes(optimizer: OptimizerContract, group: Group, p: Tensor) -> None:
    """Raises ValueError for a parameter that the rule of its group does not take: programs put
    parameters into groups, and change options, after both were checked."""
    why = optimizer._why_refused(group, p)
    if why is not None:
        raise ValueError(f"{type(optimizer).__name__}: {describe(optimizer, p)}: {why}")


def check_shard(optimizer: OptimizerContract, p: DTensor, rows: ShardRows) -> None:
    """Raises ValueError unless the local tensor of a parameter is what lies there."""
    wrong = sharding.wrong_shard_message(p, rows)
    if wrong is not None:
        raise ValueError(f"{type(optimizer).__name__}: {describe(optimizer, p)} {wrong}")


def rows_of(optimizer: OptimizerContract, group: Group, p: DTensor, bits: int) -> ShardRows | None:
    """Where the shard of a parameter lies, with state of so many bits.

    Raises:
        ValueError: 32-bit state, and the local tensor is not what lies there. That of quantized
            state is checked when the state is made.
    """
    if bits < 32:
        return sharding.shard_rows(p, group["block_size"], bits)
    rows = sharding.flat_shard_rows(p)
    check_shard(optimizer, p, rows)
    return rows


def _check_shards(optimizer: OptimizerContract, group: Group, p: Tensor, own: Format) -> None:
    by_place = own.is_quantized or rounds_param(group, p) or optimizer._is_of_matrices(group)
    if is_dtensor(p) and by_place:
        quantized = own.is_quantized
        rows = sharding.shard_rows(p, group["block_size"], own.bits) if quantized else None
        check_shard(optimizer, p, sharding.flat_shard_rows(p) if rows is None else rows)
    one_scale = group["optim_bits"] == 8 and not group["block_wise"]
    needs_the_whole = one_scale or clips(group) or optimizer._has_trust_ratios(group)
    if needs_the_whole and sharding.is_flattened(p):
        raise ValueError(
            f"{type(optimizer).__name__}: {describe(optimizer, p)} was flattened by FSDP1, which "
            "does not tell where the shards of a parameter are; clipping by percentiles, trust "
            "ratios and block_wise=False need all of it. Shard with fully_shard (FSDP2)"
        )


# -- making state ----------------------------------------------------------------------------------


def gets_state(p: Tensor) -> bool:
    """Whether a step gives state to a parameter that has none."""
    return p.requires_grad or p.grad is not None


def init_states(optimizer: OptimizerContract) -> bool:
    """Gives state to every parameter that lacks it, or, if anything is refused, to none.

    All trainable parameters get theirs at the first step, with a gradient or without: then no
    checkpoint is partial, and a first gradient that comes late meets nothing new.

    Returns:
        Whether a parameter lacked its state.
    """
    fresh: list[tuple[Tensor, Layout]] = []
    for group in optimizer.param_groups:
        check_params(group["params"], group["stochastic_rounding"])
    for group in optimizer.param_groups:
        wake(optimizer, group)
        states_of_group = optimizer._states_of(group)
        for p in group["params"]:
            if p.grad is not None:
                check_grad(optimizer, p)
            if has_state(optimizer.state.get(p)):
                check_layout(optimizer, group, p, states_of_group)
                check_rule_takes(optimizer, group, p)
            elif gets_state(p):
                check_rule_takes(optimizer, group, p)
                if sharding.local(p).is_meta and p.grad is not None:
                    raise RuntimeError(meta_message(optimizer, p))
                _warn_of_cut_row(optimizer, group, p)
                fresh.append((p, layout_of(optimizer, group, p, states_of_group)))
    with normal_tensors():
        states = paging.new_states(fresh)
    for (p, _), state in zip(fresh, states, strict=True):
        mine = optimizer.state[p]  # the dict stays: others may hold it
        others = dict(mine)
        mine.clear()
        mine.update({**state, **others})
    return bool(fresh)


def wake(optimizer: OptimizerContract, group: Group) -> None:
    """Gives an empty state to the parameters that lack one whose option was 0 so far.

    Dampening is for a buffer that has begun: torch's first one is undampened, and where there is
    some the missing state is refused later.
    """
    resting = optimizer._resting
    if not resting or group.get("dampening", 0) != 0:
        return
    states = [s for s in optimizer._states(group) if s.name in resting.values()]
    for p in group["params"]:
        mine = optimizer.state.get(p, {})
        if not has_state(mine):
            continue
        missing = [s for s in states if not holds(s.name, mine)]
        if not missing:
            return  # all parameters of a group have the same
        layout = layout_of(optimizer, group, p, tuple(missing))
        with normal_tensors():
            new = {key: spec for key, spec in layout.items() if key not in mine}
            (state,) = paging.new_states([(p, new)])
        mine.update(state)


def _warn_of_cut_row(optimizer: OptimizerContract, group: Group, p: Tensor) -> None:
    """Says which parameter keeps 32 bits for the way it is sharded, and what to do."""
    if is_dtensor(p) and why_kept(group, p) == CUT_ROWS:
        message = sharding.cut_row_message(p, group["block_size"])
        warn_caller(f"{type(optimizer).__name__}: {describe(optimizer, p)} {message}")
