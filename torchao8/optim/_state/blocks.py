"""Moments as codes and scales, and back: of whole tensors, or of what this rank holds of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.block_layout import MAX_BLOCK_SIZE, Scales, codes_shape, row_length
from torchao8.sharding import is_dtensor, largest_over_shards, local, shard_rows


class Portion(NamedTuple):
    """What tensors of state hold of a parameter, and which of its elements share a scale.

    Attributes:
        p: the DTensor of which they are what this rank holds; None where they are whole.
        shape: of the part of the parameter that they are of.
        extremes: for one scale a tensor, the elements of :func:`extreme_elements`, by the names of
            the states.
    """

    p: Tensor | None
    shape: tuple[int, ...]
    scales: Scales
    extremes: Mapping[str, Tensor] = {}

    @staticmethod
    def of(p: Tensor, scales: Scales, extremes: Mapping[str, Tensor] | None = None) -> Portion:
        """What this rank holds of a parameter."""
        shape = tuple(local(p).shape)
        return Portion(p if is_dtensor(p) else None, shape, scales, extremes or {})

    @staticmethod
    def whole(p: Tensor, scales: Scales, extremes: Mapping[str, Tensor] | None = None) -> Portion:
        """All of a parameter."""
        return Portion(None, tuple(p.shape), scales, extremes or {})


def dequantize(
    portion: Portion, codes: Tensor, scale: Tensor, signed: bool, state_format: str
) -> Tensor:
    """The numbers that codes of one byte each stand for."""
    p, scales = portion.p, portion.scales
    shape, block_size = portion.shape, scales.block_size
    if codes.numel() == 0:
        return torch.empty(shape, dtype=torch.float32, device=codes.device)
    if not scales.block_wise:
        codes, scale = codes.reshape(-1), scale.to(codes.device)
        scale = scale.expand(-(-len(codes) // block_size)).contiguous()
    elif is_dtensor(p):  # as matrices, whose rows are those of the whole
        where = shard_rows(p, block_size, 8)
        assert where is not None  # or it would have no codes
        codes, scale = codes.reshape(-1, where.row), scale.reshape(-1, where.blocks)
    values = ops.dequantize_blockwise(
        codes, scale, block_size=block_size, signed=signed, state_format=state_format
    )
    return values.view(shape)


def quantize(
    portion: Portion, name: str, moment: Tensor, signed: bool, state_format: str
) -> tuple[Tensor, Tensor]:
    """Codes of one byte each, and scales, of the moment of this name, rounded to nearest."""
    p, block_size = portion.p, portion.scales.block_size
    encode = functools.partial(ops.quantize_blockwise, signed=signed, state_format=state_format)
    if not portion.scales.block_wise:
        return _quantize_with(moment, portion.extremes[name], encode)
    if not is_dtensor(p):
        return encode(moment, block_size=block_size)
    where = shard_rows(p, block_size, 8)
    assert where is not None
    rows = moment.reshape(-1, where.row) if moment.numel() else moment.new_empty(0, 1)
    codes, scale = encode(rows, block_size=block_size)
    return codes.view(moment.shape), scale.view(where.scale_shape)


def dequantize_packed(
    portion: Portion, codes: Tensor, scale: Tensor, signed: bool, state_format: str
) -> Tensor:
    """The numbers that codes of 4 bits stand for."""
    if not codes.numel():
        return torch.empty(portion.shape, dtype=torch.float32, device=codes.device)
    row = packed_row(portion)
    values = ops.dequantize_blockwise(
        codes.reshape(-1, -(-row // 2)),
        scale.reshape(-1, -(-row // portion.scales.block_size)),
        block_size=portion.scales.block_size,
        signed=signed,
        state_format=state_format,
    )
    return values[:, :row].reshape(portion.shape)  # without the half that is left over


def quantize_packed(
    portion: Portion, moment: Tensor, signed: bool, state_format: str
) -> tuple[Tensor, Tensor]:
    """Codes of 4 bits and scales of a moment, rounded to nearest."""
    p, block_size = portion.p, portion.scales.block_size
    if is_dtensor(p):
        where = shard_rows(p, block_size, 4)
        assert where is not None
        codes_of, scales_of = where.codes_shape(4), where.scale_shape
    else:
        codes_of = codes_shape(portion.shape, block_size, 4)
        scales_of = portion.scales.shape(portion.shape)
    if not moment.numel():
        return (
            torch.empty(codes_of, dtype=torch.uint8, device=moment.device),
            torch.empty(scales_of, dtype=torch.float32, device=moment.device),
        )
    codes, scale = ops.quantize_blockwise(
        moment.reshape(-1, packed_row(portion)),
        block_size=block_size,
        signed=signed,
        state_format=state_format,
    )
    return codes.view(codes_of), scale.view(scales_of)


def packed_row(portion: Portion) -> int:
    """Elements of a row of 4-bit state."""
    if is_dtensor(portion.p):
        where = shard_rows(portion.p, portion.scales.block_size, 4)
        assert where is not None
        return where.row
    return row_length(portion.shape, portion.scales.block_size)


def some_without_scale(portion: Portion, codes: Tensor, scale: Tensor, zero: int) -> bool:
    """Whether a block of 4-bit codes whose scale is 0 has another code than that of 0."""
    dead = scale == 0
    if not codes.numel() or not bool(dead.any()):
        return False
    row, block_size = packed_row(portion), portion.scales.block_size
    rows = codes.reshape(-1, -(-row // 2))
    is_dead = dead.to(codes.device).reshape(len(rows), -1).repeat_interleave(block_size // 2, 1)
    other = (rows & 15 != zero) | (rows >> 4 != zero)
    return bool((other & is_dead[:, : rows.shape[1]]).any())


def some_zeros_are_wrong(portion: Portion, codes: Tensor, scale: Tensor) -> bool:
    """Whether a block of scale 0 has a code that is not 0, or another block one that is."""
    if not codes.numel():
        return False
    is_zero = codes == 0
    row, block_size = codes.numel(), portion.scales.block_size
    if not portion.scales.block_wise:
        block_size = row
    elif is_dtensor(portion.p):
        where = shard_rows(portion.p, block_size, 8)
        assert where is not None
        row = where.row
    else:
        row = row_length(codes.shape, block_size)
    rows = is_zero.reshape(-1, row)
    whole = row // block_size * block_size
    parts = [rows[:, :whole].unflatten(1, (-1, block_size))] if whole else []
    parts += [rows[:, None, whole:]] if whole < row else []
    has_zero, has_others = (
        torch.cat([part.any(-1) for part in each], 1)
        for each in (parts, [part.logical_not() for part in parts])
    )
    live = scale.reshape(has_zero.shape).to(codes.device) != 0
    return bool(torch.where(live, has_zero, has_others).any())


def extreme_elements(
    p: Tensor | None, moments: Mapping[str, Tensor], names: Sequence[str], device: torch.device
) -> dict[str, Tensor]:
    """The element of largest magnitude of each moment, with its sign, of shape (1,).

    A collective where these are what this rank holds of those of ``p``. One that was refused, and
    is missing, counts as nothing.
    """
    # The largest, and the largest of the negated.
    ends = torch.zeros(len(names), 2, dtype=torch.float32, device=device)
    for i, name in enumerate(names):
        moment = moments.get(name)
        if moment is not None and moment.numel():
            ends[i] = torch.stack((moment.max(), -moment.min()))
    ends = ends.nan_to_num().clamp_min(0)
    if is_dtensor(p):
        ends = largest_over_shards(p, ends)
    found = torch.where(ends[:, 0] >= ends[:, 1], ends[:, 0], -ends[:, 1])[:, None]
    return dict(zip(names, found, strict=True))


def _quantize_with(
    moment: Tensor, extreme: Tensor, encode: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Nearest codes at one scale, the extreme element of the whole tensor.

    Each block gets the extreme as an extra first element, which becomes its scale; its code is
    dropped.
    """
    others = MAX_BLOCK_SIZE - 1
    rows = max(1, -(-moment.numel() // others))
    values = moment.new_zeros(rows * others)
    values[: moment.numel()] = moment.reshape(-1)
    blocks = torch.cat((extreme.to(moment.device).expand(rows, 1), values.view(rows, others)), 1)
    codes, scale = encode(blocks, block_size=MAX_BLOCK_SIZE)
    codes = codes[:, 1:].reshape(-1)[: moment.numel()]
    return codes.view(moment.shape).contiguous(), scale[0].clone()
