"""Moments as codes and scales, and back: of whole tensors, or of what this rank holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.block_layout import MAX_BLOCK_SIZE, Scales
from torchao8.sharding import is_dtensor, largest_over_shards, shard_rows


class Portion(NamedTuple):
    """What tensors of state hold of a parameter, and which of its elements share a scale.

    Attributes:
        p: the DTensor of which they are what this rank holds; None where they are whole.
        extremes: for one scale a tensor, the elements of :func:`extreme_elements`, by the names of
            the states.
    """

    p: Tensor | None
    scales: Scales
    extremes: Mapping[str, Tensor] = {}


def dequantize(portion: Portion, codes: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """The numbers that codes stand for."""
    p, scales = portion.p, portion.scales
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


def quantize(portion: Portion, name: str, moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and scales of the moment of this name, rounded to nearest."""
    p, block_size = portion.p, portion.scales.block_size
    if not portion.scales.block_wise:
        return _quantize_with(moment, portion.extremes[name], signed)
    if not is_dtensor(p):
        return ops.quantize_blockwise(moment, block_size=block_size, signed=signed)
    where = shard_rows(p, block_size)
    assert where is not None
    rows = moment.reshape(-1, where.row) if moment.numel() else moment.new_empty(0, 1)
    codes, scale = ops.quantize_blockwise(rows, block_size=block_size, signed=signed)
    return codes.view(moment.shape), scale.view(where.scale_shape)


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
