"""The codec by itself: blocks of any tensor to codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from torchao8.block_layout import codes_shape, row_length, scale_shape
from torchao8.portable.formats import FORMATS, bits_of, name_of
from torchao8.portable.pieces import Entry, block_pieces


def quantize_blockwise(
    input: Tensor, block_size: int, signed: bool, state_format: int
) -> tuple[Tensor, Tensor]:
    """As :func:`torchao8.ops.quantize_blockwise`."""
    x, form = input.detach().contiguous(), FORMATS[name_of(state_format)]
    shape = codes_shape(x.shape, block_size, bits_of(state_format))
    codes = torch.empty(shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(scale_shape(x.shape, block_size), dtype=torch.float32, device=x.device)
    t = form.tables(signed, x.device)
    stride = row_length(x.shape, block_size)
    for piece in block_pieces(Entry(x, x, [codes], [scale], 0, stride), block_size):
        values = piece.grad.to(torch.float32)
        if not signed:
            values = torch.where(values.isfinite(), values.clamp_min(0), values)
        found = form.quantize(values, signed, t)
        for target, new in zip((*piece.values, *piece.scales), found, strict=True):
            target.copy_(new)
    return codes, scale


def dequantize_blockwise(
    codes: Tensor,
    scale: Tensor,
    block_size: int,
    signed: bool,
    dtype: torch.dtype,
    state_format: int,
) -> Tensor:
    """As :func:`torchao8.ops.dequantize_blockwise`."""
    shape = (*codes.shape[:-1], 8 // bits_of(state_format) * codes.shape[-1]) if codes.dim() else ()
    result = torch.empty(shape, dtype=dtype, device=codes.device)
    form = FORMATS[name_of(state_format)]
    t = form.tables(signed, codes.device)
    stride = row_length(shape, block_size)
    for piece in block_pieces(Entry(result, result, [codes], [scale], 0, stride), block_size):
        piece.param.copy_(form.values(piece.values[0], signed, t) * piece.scales[0])
    return result
