"""The codec by itself: blocks of any tensor to codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from torchao8.block_layout import row_length, scale_shape
from torchao8.portable import codec
from torchao8.portable.pieces import Entry, block_pieces


def quantize_blockwise(input: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """As :func:`torchao8.ops.quantize_blockwise`."""
    x = input.detach().contiguous()
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(scale_shape(x.shape, block_size), dtype=torch.float32, device=x.device)
    t = codec.Tables.of(signed, x.device)
    one = torch.ones((), dtype=torch.float32, device=x.device)
    stride = row_length(x.shape, block_size)
    for piece in block_pieces(Entry(x, x, [codes], [scale], 0, stride), block_size):
        values = piece.grad.to(torch.float32)
        if not signed:
            values = torch.where(values.isfinite(), values.clamp_min(0), values)
        extreme = codec.extreme_of(values, signed)
        large = extreme.isfinite() & ~codec.in_range(extreme, signed)
        # Of a large one the inverse would be subnormal.
        factor = torch.where(large, 0.25, torch.ones_like(extreme))
        inverse = codec.inverse_of(extreme * factor, signed)
        encoded = codec.encode_nearest(values * factor, inverse, signed, t)
        if not signed:
            encoded = torch.where((values > 0) & (encoded == 0), 1, encoded)
        valid = codec.has_scale(extreme * factor, one, signed)
        piece.values[0].copy_(codec.with_extremes(encoded, values, extreme, valid, signed))
        stored = codec.scale_of(extreme * factor, one, signed)
        piece.scales[0].copy_(torch.where(large, extreme, stored))
    return codes, scale


def dequantize_blockwise(
    codes: Tensor, scale: Tensor, block_size: int, signed: bool, dtype: torch.dtype
) -> Tensor:
    """As :func:`torchao8.ops.dequantize_blockwise`."""
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    t = codec.Tables.of(signed, codes.device)
    stride = row_length(codes.shape, block_size)
    for piece in block_pieces(Entry(result, result, [codes], [scale], 0, stride), block_size):
        piece.param.copy_(codec.decode(piece.values[0], t) * piece.scales[0])
    return result
