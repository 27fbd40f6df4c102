"""State in another precision or in other blocks, through float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.block_layout import MAX_BLOCK_SIZE, Scales
from torchao8.optim._state.sealed import check_values, part_of, scalar_tensor
from torchao8.optim._state.spec import (
    BESIDE_STATES,
    NORMS,
    Layout,
    State,
    form_of,
    is_8bit,
    is_own,
    keys_of,
)
from torchao8.sharding import is_dtensor, is_placed_as, largest_over_shards, like, local, shard_rows


def convert(
    label: str,
    p: Tensor,
    layout: Layout,
    states: Sequence[State],
    saved: dict[str, Any],
    scales: Scales,
    saved_scales: Scales,
) -> dict[str, Tensor]:
    """What this rank holds of saved state after its conversion, through float32.

    8 bits become 32 without loss, 32 become 8 rounded to nearest, and other blocks both. Sharded
    state is converted where it lies if it is placed as ``p`` and in whole blocks; if not, it is
    gathered, a collective, a parameter at a time. One scale for all of a sharded parameter is a
    collective as well.

    Args:
        saved: of a form that :func:`check_form` has let pass.

    Raises:
        ValueError: a number that no step could have left; after the collectives.
    """
    in_8bit, saved_in_8bit = is_8bit(states, layout), is_8bit(states, saved)
    form = form_of(layout, states, saved_in_8bit, saved_scales)
    keys = [key for key in form if key not in BESIDE_STATES and not form[key].is_scalar]
    sharded_keys = [k for k in keys if saved_scales.block_wise or not k.endswith("_scale")]
    here = is_dtensor(p) and all(
        is_dtensor(saved[key]) and is_placed_as(p, saved[key]) for key in sharded_keys
    )
    if here and is_dtensor(p):
        used = ((scales, in_8bit), (saved_scales, saved_in_8bit))
        here = all(
            shard_rows(p, each.block_size) is not None
            for each, is_used in used
            if is_used and each.block_wise
        )
    scalars = {key: scalar_tensor(key, saved[key]) for key in form if form[key].is_scalar}
    values = {
        key: local(saved[key]) if here and key in sharded_keys else _whole(saved[key]).detach()
        for key in keys
    }
    parts, sharded = {"step": scalars["step"]}, p if here else None
    if NORMS in form:
        parts[NORMS] = _whole(saved[NORMS]).detach()
    quantized = [state for state in states if not state.is_scalar]
    moments: list[Tensor] = []
    extremes = [torch.zeros(1, dtype=torch.float32, device="cpu") for _ in quantized]
    refusal: ValueError | None = None
    try:
        for key, value in values.items():
            check_values(label, key, form[key], value)
        for state in quantized:
            first, *others = (values[key] for key in keys_of(state, saved_in_8bit))
            for scale in others:
                first = _dequantize(sharded, first, scale, saved_scales, state.signed)
            moments.append(first)
    except ValueError as error:
        # Raised after the collective below; else the other ranks would wait for this one.
        refusal = error
    if in_8bit and not scales.block_wise:
        extremes = _extreme_elements(sharded, moments, len(quantized), local(p).device)
    if refusal is not None:
        raise refusal
    for state, moment, extreme in zip(quantized, moments, extremes, strict=True):
        new: tuple[Tensor, ...] = (moment,)
        if in_8bit:
            new = _quantize(sharded, moment, scales, state.signed, extreme)
        for key, value in zip(keys_of(state, in_8bit), new, strict=True):
            parts[key] = value if here else part_of(p, layout[key], value)
    return {key: scalars[key] if key in scalars else parts[key] for key in layout}


def in_32bit(
    p: Tensor, states: Sequence[State], saved: dict[str, Any], scales: Scales
) -> dict[str, Any]:
    """The state of a parameter in 32 bits, sharded as it is; ``saved`` itself where it is so."""
    if not is_8bit(states, saved):
        return saved
    converted = {k: v for k, v in saved.items() if k in BESIDE_STATES or not is_own(k)}
    for state in states:
        if state.is_scalar:
            converted[state.name] = saved[state.name]
            continue
        codes, scale = (local(saved[key]) for key in keys_of(state, True))
        converted[state.name] = like(p, _dequantize(p, codes, scale, scales, state.signed), p.shape)
    return converted


def _dequantize(
    p: Tensor | None, codes: Tensor, scale: Tensor, scales: Scales, signed: bool
) -> Tensor:
    """The numbers that codes stand for: all of them, or what this rank holds of those of ``p``."""
    shape, block_size = codes.shape, scales.block_size
    if codes.numel() == 0:
        return torch.empty(shape, dtype=torch.float32, device=codes.device)
    if not scales.block_wise:
        codes, scale = codes.reshape(-1), scale.to(codes.device)
        scale = scale.expand(-(-len(codes) // block_size)).contiguous()
    elif is_dtensor(p):  # as matrices, whose rows are those of the whole
        where = shard_rows(p, block_size)
        assert where is not None  # or it would have no codes
        codes, scale = codes.reshape(-1, where.row), scale.reshape(-1, where.blocks)
    return ops.dequantize_blockwise(codes, scale, block_size=block_size, signed=signed).view(shape)


def _quantize(
    p: Tensor | None, moment: Tensor, scales: Scales, signed: bool, extreme: Tensor
) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`_dequantize`; the extreme is that of one scale for the tensor."""
    block_size = scales.block_size
    if not scales.block_wise:
        return _quantize_with(moment, extreme, signed)
    if not is_dtensor(p):
        return ops.quantize_blockwise(moment, block_size=block_size, signed=signed)
    where = shard_rows(p, block_size)
    assert where is not None
    rows = moment.reshape(-1, where.row) if moment.numel() else moment.new_empty(0, 1)
    codes, scale = ops.quantize_blockwise(rows, block_size=block_size, signed=signed)
    return codes.view(moment.shape), scale.view(where.scale_shape)


def _extreme_elements(
    p: Tensor | None, moments: Sequence[Tensor], count: int, device: torch.device
) -> list[Tensor]:
    """The element of largest magnitude of each of so many moments, with its sign, as of blocks.

    A collective where these are what this rank holds of those of ``p``. One that was refused, and
    is missing, counts as nothing.
    """
    # The largest, and the largest of the negated.
    ends = torch.zeros(count, 2, dtype=torch.float32, device=device)
    for i, moment in enumerate(moments):
        if moment.numel():
            ends[i] = torch.stack((moment.max(), -moment.min()))
    ends = ends.nan_to_num().clamp_min(0)
    if is_dtensor(p):
        ends = largest_over_shards(p, ends)
    return list(torch.where(ends[:, 0] >= ends[:, 1], ends[:, 0], -ends[:, 1])[:, None])


def _quantize_with(moment: Tensor, extreme: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes at one scale, the extreme element of the whole tensor.

    Each block gets the extreme as an extra first element, which becomes its scale; its code is
    dropped.
    """
    others = MAX_BLOCK_SIZE - 1
    rows = max(1, -(-moment.numel() // others))
    values = moment.new_zeros(rows * others)
    values[: moment.numel()] = moment.reshape(-1)
    blocks = torch.cat((extreme.to(moment.device).expand(rows, 1), values.view(rows, others)), 1)
    codes, scale = ops.quantize_blockwise(blocks, block_size=MAX_BLOCK_SIZE, signed=signed)
    codes = codes[:, 1:].reshape(-1)[: moment.numel()]
    return codes.view(moment.shape).contiguous(), scale[0].clone()


def _whole(value: Any) -> Any:
    return value.full_tensor() if is_dtensor(value) else value
