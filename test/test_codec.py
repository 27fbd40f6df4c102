"""quantize_blockwise, dequantize_blockwise, dynamic_map: the codebook, the encoder, the layout."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from codec_reference import (
    ZERO_CODE,
    assert_nearest,
    block_scale,
    codebook,
    codes_by_search,
    codes_by_threshold,
    magnitudes,
    thresholds,
)
from helpers import bits
from torch import Tensor

from torchao8 import dequantize_blockwise, dynamic_map, quantize_blockwise

ONE = 0x3F800000  # the bits of 1.0f
BLOCK_SIZES = (64, 128, 256, 512, 1024, 2048)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
both_maps = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])

# Around the vector width and the block sizes, in rows and as vectors; dims of 1; nothing at all.
SHAPES = (
    [(3, n) for n in (1, 15, 16, 17, 255, 256, 257, 1000)]
    + [(n,) for n in (1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 2047, 2048, 2049, 5000)]
    + [(2, 3, 70), (2, 5, 300), (4, 6, 9, 5), (2, 4, 64, 3, 3), (1, 1, 1, 700), (300, 1, 1)]
    + [(), (0,), (0, 300), (3, 0), (2, 0, 4), (0, 4, 300)]
)


def sample(shape: tuple[int, ...], dtype: torch.dtype, signed: bool) -> Tensor:
    """Numbers of six decades, about one in 16 of them zero."""
    x = torch.randn(shape) * 10.0 ** (-6 * torch.rand(shape))
    x = x.where(torch.rand(shape) > 1 / 16, 0.0)
    return (x if signed else x.abs()).to(dtype)


def quantize(x: Tensor, device: str, **options: Any) -> tuple[Tensor, Tensor]:
    """Codes and scales as the device makes them, on the CPU."""
    on_device = x.to(device)
    codes, scale = quantize_blockwise(on_device, **options)
    assert codes.device == scale.device == on_device.device
    assert codes.is_contiguous()
    assert scale.is_contiguous()
    return codes.cpu(), scale.cpu()


def dequantize(codes: Tensor, scale: Tensor, device: str, **options: Any) -> Tensor:
    """What the device makes of codes and scales, on the CPU."""
    on_device = codes.to(device)
    values = dequantize_blockwise(on_device, scale.to(device), **options)
    assert values.device == on_device.device
    assert values.is_contiguous()
    return values.cpu()


# -- the codebook ------------------------------------------------------------------------------


@both_maps
def test_codebook_is_the_published_one(signed: bool) -> None:
    values, published = dynamic_map(signed), reference.dynamic_map(signed)
    assert (values.dtype, values.shape) == (torch.float32, (256,))
    torch.testing.assert_close(values.double(), published, rtol=1e-6, atol=0)
    assert (values.diff() > 0).all()
    assert values[ZERO_CODE[signed]] == 0
    assert values[255] == 1


def test_signed_codebook_is_symmetric() -> None:
    """But for 1.0, which has no counterpart."""
    values = dynamic_map()
    assert torch.equal(values[:127].flip(0), -values[128:255])


# -- the encoder at scale 1 --------------------------------------------------------------------


def encode_at_scale_one(y: Tensor, signed: bool, device: str, extreme: float = 1.0) -> Tensor:
    """The codes of numbers in [-1, 1]: in front of each block stands the extreme, 1.0 or -1.0."""
    block_size = 2048
    rows = -(-y.numel() // (block_size - 1))
    padded = torch.full((rows * (block_size - 1),), extreme)
    padded[: y.numel()] = y
    blocks = torch.empty(rows, block_size)
    blocks[:, 0] = extreme
    blocks[:, 1:] = padded.view(rows, -1)
    codes, scale = quantize(blocks, device, block_size=block_size, signed=signed)
    assert (scale == extreme).all()
    assert (codes[:, 0] == 255).all()
    return codes[:, 1:].flatten()[: y.numel()]


def floats(first: int, last: int) -> Tensor:
    """All float32 whose bits are in [first, last)."""
    return torch.arange(first, last, dtype=torch.int32).view(torch.float32)


def assert_encodes(y: Tensor, signed: bool, device: str) -> None:
    want = codes_by_threshold(y, signed)
    assert torch.equal(encode_at_scale_one(y, signed, device).long(), want)


def around_thresholds(signed: bool) -> Tensor:
    """Each threshold and the two floats on either side of it."""
    steps = torch.arange(-2, 3, dtype=torch.int32)
    return (thresholds(signed).view(torch.int32)[:, None] + steps).view(torch.float32).flatten()


@both_maps
def test_encoder_at_every_threshold(signed: bool, device: str) -> None:
    """The oracle by thresholds agrees with the search through all 256 there, where it could err."""
    y = around_thresholds(signed)
    y = torch.cat([y, -y]) if signed else y
    assert torch.equal(codes_by_threshold(y, signed), codes_by_search(y, signed))
    assert_encodes(y, signed, device)


@both_maps
def test_ties_go_to_the_larger_magnitude(signed: bool, device: str) -> None:
    values = magnitudes(signed)
    midpoints = (values[:-1] + values[1:]) / 2
    ties = midpoints.float()
    exact = ties.double() == midpoints
    assert exact.sum() > 10  # these midpoints are float32 numbers
    upper = (128 if signed else 2) + torch.arange(len(ties))
    assert torch.equal(encode_at_scale_one(ties[exact], signed, device).long(), upper[exact])
    if signed:
        mirrored = (254 - upper).clamp_min(0)
        codes = encode_at_scale_one(-ties[exact], signed, device)
        assert torch.equal(codes.long(), mirrored[exact])


@both_maps
@pytest.mark.parametrize("exponent", [-1, -4, -7, -24, -100])
def test_encoder_over_all_floats_of_a_binade(signed: bool, exponent: int, device: str) -> None:
    """Those that hold a decade's end, the top one, and two below all codes."""
    first = (127 + exponent) << 23
    y = floats(first, first + (1 << 23))
    assert_encodes(y, signed, device)
    if signed:
        assert_encodes(-y, signed, device)


@both_maps
def test_encoder_over_subnormal_numbers(signed: bool, device: str) -> None:
    """Beside an element of 1.0 they are as good as zero, but a second moment is never zero."""
    y = torch.cat([floats(0, 1 << 16), floats((1 << 23) - (1 << 16), (1 << 23) + 1)])
    assert_encodes(y, signed, device)
    codes = encode_at_scale_one(y[1:], signed, device)
    assert (codes == (127 if signed else 1)).all()


@both_maps
@pytest.mark.slow
def test_encoder_over_every_float(signed: bool, device: str) -> None:
    """Every float32 in [-1, 1] or [0, 1]: the nearest of the codebook, ties away from zero."""
    chunk = 2047 * 2048
    for first in range(0, ONE + 1, chunk):
        y = floats(first, min(first + chunk, ONE + 1))
        assert_encodes(y, signed, device)
        if signed:
            assert_encodes(-y, signed, device)


def test_negative_extreme_mirrors(device: str) -> None:
    """At scale -1 the code is that of -y: the extreme itself is exact, whatever its sign."""
    y = torch.cat([around_thresholds(True), -around_thresholds(True)])
    codes = encode_at_scale_one(y, True, device, extreme=-1.0)
    assert torch.equal(codes, encode_at_scale_one(-y, True, device))


# -- blocks of any scale -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@both_maps
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...], signed: bool, dtype: torch.dtype, device: str) -> None:
    for block_size in (64, 256, 2048):
        x = sample(shape, dtype, signed)
        codes, scale = quantize(x, device, block_size=block_size, signed=signed)
        assert_nearest(codes, scale, x, block_size, signed)


@both_maps
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_block_sizes(block_size: int, signed: bool, device: str) -> None:
    for shape in [
        (3, block_size - 1),
        (2, block_size),
        (2, 2 * block_size + 1),
        (block_size // 2,),
    ]:
        x = sample(shape, torch.float32, signed)
        codes, scale = quantize(x, device, block_size=block_size, signed=signed)
        assert_nearest(codes, scale, x, block_size, signed)
        decoded = dequantize(codes, scale, device, block_size=block_size, signed=signed)
        want = codebook(signed)[codes.long()] * reference.expand_scale(scale, shape, block_size)
        assert torch.equal(decoded, want.float())


@both_maps
@pytest.mark.parametrize("exponent", [-126, -125, -110, -60, -24, -1, 0, 1, 60, 125, 126, 127])
def test_scales_of_every_magnitude(exponent: int, signed: bool, device: str) -> None:
    """From the smallest normal float to above 2^126, where 1 / scale is subnormal."""
    x = sample((64, 256), torch.float32, signed).clamp(-0.99, 0.99)
    x[:, 17] = 1 + torch.rand(64) * 0.99
    if signed:
        x[::2] *= -1
    x = torch.ldexp(x.double(), torch.tensor(exponent)).float()
    assert x.isfinite().all()
    codes, scale = quantize(x, device, signed=signed)
    assert_nearest(codes, scale, x, 256, signed)
    assert (codes[:, 17] == 255).all()
    assert (dequantize(codes, scale, device, signed=signed)[:, 17] == x[:, 17]).all()


def test_scale_carries_the_sign_of_the_extreme(device: str) -> None:
    x = torch.zeros(6, 256)
    x[0, 3], x[0, 200] = -2.0, 1.5
    x[1, 3], x[1, 200] = -1.5, 2.0
    x[2, 3], x[2, 200] = -2.0, 2.0  # a tie: positive, wherever it stands
    x[3, 3], x[3, 200] = 2.0, -2.0
    x[4, 255] = -torch.finfo(torch.float32).max
    x[5, 0] = -reference.FLOAT32_TINY
    codes, scale = quantize(x, device)
    assert scale.flatten().tolist() == [-2.0, 2.0, 2.0, 2.0, x[4, 255].item(), x[5, 0].item()]
    assert [
        codes[i, j].item() for i, j in [(0, 3), (1, 200), (2, 200), (3, 3), (4, 255), (5, 0)]
    ] == ([255] * 6)
    assert codes[2, 3] == codes[3, 200] == 0  # the codebook has no -1.0
    assert torch.equal(block_scale(x, 256), scale)


@both_maps
def test_scale_below_the_normal_floats_counts_as_zero(signed: bool, device: str) -> None:
    tiny = reference.FLOAT32_TINY
    x = torch.zeros(5, 300)
    x[1, 7] = 2.0**-149
    x[2, 7] = tiny - 2.0**-149  # the largest subnormal number
    x[3, 7] = tiny
    x[4, :] = torch.linspace(0, tiny, 300)
    codes, scale = quantize(x, device, signed=signed)
    assert scale.tolist() == [[0, 0], [0, 0], [0, 0], [tiny, 0], [0, tiny]]
    zero = ZERO_CODE[signed]
    assert (codes[:3] == zero).all()
    assert (codes[4, :256] == zero).all()
    assert codes[3, 7] == codes[4, 299] == 255
    assert_nearest(codes, scale, x, 256, signed)


@both_maps
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf], ids=str)
def test_block_with_a_number_that_is_not_finite(
    bad: float, dtype: torch.dtype, signed: bool, device: str
) -> None:
    """Its scale is NaN, so that what it decodes to shows it; other blocks are not affected."""
    for position in (0, 15, 255, 256, 260):
        x = sample((3, 600), torch.float32, signed).to(dtype)
        good = quantize(x, device, signed=signed)
        x[1, position] = -bad if signed else bad
        codes, scale = quantize(x, device, signed=signed)
        assert scale.isnan().nonzero().tolist() == [[1, position // 256]]
        decoded = dequantize(codes, scale, device, signed=signed)
        block = slice(position // 256 * 256, position // 256 * 256 + 256)
        assert decoded[1, block].isnan().all()
        assert (codes[1, block] == ZERO_CODE[signed]).all()
        codes[1, block] = good[0][1, block]
        assert torch.equal(codes, good[0])


def test_a_second_moment_is_never_rounded_to_zero(device: str) -> None:
    """Beside extremes of any size, down to the smallest float there is."""
    small = torch.tensor([2.0**-149, 2.0**-148, 2.0**-127, 2.0**-126, 1e-30, 1e-12, 1e-8, 2.7e-7])
    for largest in (2.0**-126, 1e-30, 1e-4, 1.0, 1e30, 2.0**125, 2.0**126, 3.4e38):
        x = torch.full((20,), float(largest))
        x[:8] = small.clamp_max(largest)
        codes, _ = quantize(x, device, signed=False)
        assert (codes > 0).all(), largest


def test_zeros_of_either_sign(device: str) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -0.0]).repeat(64)
    for extreme in (1.0, -1.0):
        codes, _ = quantize(x * extreme, device)
        assert (codes.view(64, 4) == torch.tensor([127, 127, 255, 127])).all()
    codes, _ = quantize(x, device, signed=False)
    assert (codes.view(64, 4) == torch.tensor([0, 0, 255, 0])).all()
    for signed in (True, False):
        codes, scale = quantize(torch.full((256,), -0.0), device, signed=signed)
        assert (codes == ZERO_CODE[signed]).all()
        assert scale.item() == 0


# -- strides -----------------------------------------------------------------------------------

# The shape of a base, and the view of it.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((300, 40), lambda b: b.t()),
    "column slice": ((9, 700), lambda b: b[:, 3:600]),
    "every other": ((1400,), lambda b: b[::2]),
    "odd offset": ((1001,), lambda b: b[1:]),
    "expanded rows": ((1, 300), lambda b: b.expand(7, 300)),
    "expanded columns": ((7, 1), lambda b: b.expand(7, 300)),
    "channels last": ((4, 6, 9, 5), lambda b: b.to(memory_format=torch.channels_last)),
    "permuted": ((5, 33, 4, 7), lambda b: b.permute(2, 0, 3, 1)),
    "empty": ((0, 40), lambda b: b.t()),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_strides_do_not_matter(name: str, dtype: torch.dtype, device: str) -> None:
    base, view = LAYOUTS[name]
    x = view(torch.randn(base).to(device, dtype))
    for block_size in (64, 256):
        got = quantize(x, device, block_size=block_size)
        dense = x.clone(memory_format=torch.contiguous_format)
        want = quantize(dense, device, block_size=block_size)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# -- the decoder -------------------------------------------------------------------------------


@both_maps
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decoder_is_the_codebook_times_the_scale(
    shape: tuple[int, ...], signed: bool, device: str
) -> None:
    for block_size in (64, 512):
        codes = torch.randint(0, 256, shape, dtype=torch.uint8)
        scale = torch.randn(reference.scale_shape(shape, block_size))
        got = dequantize(codes, scale, device, block_size=block_size, signed=signed)
        per_element = reference.expand_scale(scale, shape, block_size)
        want = dynamic_map(signed)[codes.long()] * per_element
        assert torch.equal(got, want)
        for dtype in (torch.bfloat16, torch.float16):
            rounded = dequantize(codes, scale, device, block_size=block_size, signed=signed,
                                 dtype=dtype)  # fmt: skip
            assert rounded.dtype == dtype
            assert torch.equal(rounded, want.to(dtype))


@both_maps
def test_decoder_at_the_ends_of_the_range(signed: bool, device: str) -> None:
    """Products that are subnormal, in float32 and in the halves, and that overflow."""
    codes = torch.arange(256, dtype=torch.uint8).expand(6, 256).contiguous()
    scale = torch.tensor([2.0**-126, 2.0**-120, -1e-7, 6e4, 3.4e38, math.nan])[:, None]
    want = dynamic_map(signed) * scale
    for dtype in FLOATS:
        got = dequantize(codes, scale, device, signed=signed, dtype=dtype)
        torch.testing.assert_close(got, want.to(dtype), rtol=0, atol=0, equal_nan=True)


@both_maps
def test_requantizing_gives_the_same_bits(signed: bool, device: str) -> None:
    """Where a block holds its extreme element; decoding and encoding lose nothing then."""
    for exponent in (-90, -3, 0, 40, 126, 127):
        codes = torch.randint(0, 256, (64, 700), dtype=torch.uint8)
        codes[:, ::50] = 255
        scale = torch.ldexp(1 + torch.rand(64, 3) * 0.99, torch.tensor(exponent))
        if signed:
            scale *= torch.randint(0, 2, scale.shape) * 2 - 1
        decoded = dequantize(codes, scale, device, signed=signed)
        again = quantize(decoded, device, signed=signed)
        assert torch.equal(again[0], codes)
        assert bits(again[1]) == bits(scale)
