"""The codec by itself: blocks of any tensor to codes and back."""

from __future__ import annotations

import torch
from torch import Tensor

from torchao8.block_layout import check_block_size, row_length, scale_shape
from torchao8.portable import codec
from torchao8.portable.pieces import Entry, block_pieces

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_float_dtype(argument: str, dtype: torch.dtype) -> None:
    """Raises RuntimeError, as the kernels do."""
    if dtype not in FLOAT_DTYPES:
        name = str(dtype).removeprefix("torch.")
        raise RuntimeError(f"{argument} must be float32, bfloat16 or float16, got {name}")


def _check_block_size(op: str, block_size: int) -> None:
    try:
        check_block_size(block_size)
    except ValueError as error:
        raise RuntimeError(f"{op}: {error}") from None


def quantize_blockwise(x: Tensor, *, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """As :func:`torchao8.ops.quantize_blockwise`."""
    check_float_dtype("quantize_blockwise: input", x.dtype)
    _check_block_size("quantize_blockwise", block_size)
    x = x.detach().contiguous()
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
    codes: Tensor, scale: Tensor, *, block_size: int, signed: bool, dtype: torch.dtype
) -> Tensor:
    """As :func:`torchao8.ops.dequantize_blockwise`."""
    check_float_dtype("dequantize_blockwise: dtype", dtype)
    _check_block_size("dequantize_blockwise", block_size)
    expected = scale_shape(codes.shape, block_size)
    for name, tensor, of_dtype, shape in (
        ("codes", codes, torch.uint8, tuple(codes.shape)),
        ("scale", scale, torch.float32, expected),
    ):
        if tensor.dtype != of_dtype or tensor.shape != shape or not tensor.is_contiguous():
            raise RuntimeError(
                f"dequantize_blockwise: {name} must be contiguous, {of_dtype}, of shape "
                f"{list(shape)}, got {tensor.dtype}, {list(tensor.shape)} of strides "
                f"{list(tensor.stride())}"
            )
        if tensor.device != codes.device:
            raise RuntimeError(
                f"dequantize_blockwise: {name} must be on {codes.device}, as codes, got one on "
                f"{tensor.device}"
            )
    result = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    t = codec.Tables.of(signed, codes.device)
    stride = row_length(codes.shape, block_size)
    for piece in block_pieces(Entry(result, result, [codes], [scale], 0, stride), block_size):
        piece.param.copy_(codec.decode(piece.values[0], t) * piece.scales[0])
    return result
