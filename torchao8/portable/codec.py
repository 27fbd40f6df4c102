"""The codec of 8-bit state in plain operators: values of codes, scales, codes, random numbers.

Tensors have a block in their last dimension, and one number a block has 1 there. Where csrc/codec
has the reasons for what is computed, this only says how. No operation depends on the values but by
`where`, and none waits for the device.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import torchao8._C as _C

MIN_SCALE = 2.0**-126  # the smallest normal float32; a smaller scale counts as zero
OVERFLOW = 2.0**126
NO_EXTREME = 0xFFFFFFFF
PARAM_STREAM = 3

_GOLDEN = 0x9E3779B97F4A7C15
_LANE_FACTORS = tuple(
    (0xA54B3C6ABB616A08 if lane < 4 else 0x5BE71F869B05510C) >> 16 * (lane % 4) & 0xFFFF
    for lane in range(8)
)
_MASK23, _MASK32, _MASK64 = (1 << 23) - 1, (1 << 32) - 1, (1 << 64) - 1
_RANDOM_MASK, _ONE_BITS = 0x007FFE00, 0x3F800100


def zero_code(signed: bool) -> int:
    return 127 if signed else 0


# -- what is looked up ---------------------------------------------------------------------------

BIAS = 2.0**-31  # part of every y that is rounded stochastically
GAP_SLOPE = 5.0 / 3.0
CELLS = 0x3F81  # of the top 16 bits of a float32, up to those of 1.0
LOW_BITS = 17  # of a word of the nearest cells: the threshold


class Tables(NamedTuple):
    """What the codec looks up of one map, on one device.

    ``codebook``: the values of the codes. ``nearest``: of each cell of magnitudes, its first
    number's place among the codes (of those that a number above 0 may get) and, in the low bits,
    where the next one begins; no cell has two of them. ``start``: of each two binades, where other
    lines begin, and ``a``, ``b``, ``c`` the lines: position = min(line, line * 5/3 + c) between the
    codes, where line = y * a + b.
    """

    codebook: Tensor
    nearest: Tensor
    start: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    @staticmethod
    @functools.cache
    def of(signed: bool, device: torch.device) -> Tables:
        """Of the numbers that csrc/codec/dynamic_map.h derives."""
        with torch.inference_mode(False):
            data = torch.frombuffer(bytearray(_C.DYNAMIC_MAPS[signed]), dtype=torch.float32)
            codebook, *lines = data.split([256, 16, 32, 32, 32])
            tables = (codebook, _nearest(codebook, signed), *lines)
            return Tables(*(t.to(device, copy=True) for t in tables))


def _nearest(codebook: Tensor, signed: bool) -> Tensor:
    places = codebook[127:] if signed else codebook[1:]
    middle = (places[:-1].double() + places[1:].double()) / 2
    begins = middle.float()
    below = begins.double() < middle
    bits = begins.view(torch.int32) + below.int()  # the first float32 that is not below the middle
    cells = bits >> 16
    numbers = torch.arange(CELLS, dtype=torch.int32, device="cpu")
    first = torch.searchsorted(cells, numbers, out_int32=True)
    low = torch.full_like(first, 1 << 16)
    low[cells] = bits & 0xFFFF
    return first << LOW_BITS | low


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).view(index.shape)


# -- values and scales ---------------------------------------------------------------------------


def decode(codes: Tensor, t: Tables) -> Tensor:
    """The values of codes at scale 1."""
    return _look_up(t.codebook, codes.to(torch.int32))


def in_range(x: Tensor, signed: bool) -> Tensor:
    """Below 2^126 in magnitude, so neither NaN nor infinite; unsigned: and not negative."""
    return x.abs() < OVERFLOW if signed else (x >= 0) & (x < OVERFLOW)


def extreme_of(x: Tensor, signed: bool) -> Tensor:
    """The element of largest magnitude of each block, the positive one in a tie; NaN where there is
    one that no scale is made of."""
    high, low = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    if not signed:
        return torch.where(low < 0, torch.nan, high)
    return torch.where(high >= -low, high, low)


def has_scale(extreme: Tensor, unit: Tensor, signed: bool) -> Tensor:
    scale = extreme * unit
    return (
        in_range(extreme, signed)
        & (extreme.abs() >= MIN_SCALE)
        & in_range(scale, True)
        & (scale.abs() >= MIN_SCALE)
    )


def scale_of(extreme: Tensor, unit: Tensor, signed: bool) -> Tensor:
    """The scale to store: zero where it counts as zero, NaN where it is none."""
    scale = extreme * unit
    usable = in_range(extreme, signed) & in_range(scale, True)
    none = torch.where(usable, torch.zeros_like(scale), torch.nan)
    return torch.where(has_scale(extreme, unit, signed), scale, none)


def inverse_of(extreme: Tensor, signed: bool) -> Tensor:
    usable = in_range(extreme, signed) & (extreme.abs() >= MIN_SCALE)
    return torch.where(usable, 1.0 / extreme, 0.0)


def key_of(extreme: Tensor, signed: bool) -> Tensor:
    """An extreme element as an int64, so that those of parts are compared by one maximum."""
    bits = _unsigned(extreme)
    key = (bits << 1) & _MASK32 | (bits >> 31 ^ 1) if signed else bits
    key = torch.where(extreme == 0, 0, key)
    return torch.where(in_range(extreme, signed), key, NO_EXTREME)


def extreme_of_key(key: Tensor, signed: bool) -> Tensor:
    bits = key >> 1 | (key & 1 ^ 1) << 31 if signed else key
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


def _unsigned(x: Tensor) -> Tensor:
    """The bits of a float32, int64 from 0 to 2^32 - 1."""
    return x.view(torch.int32).to(torch.int64) & _MASK32


# -- codes ---------------------------------------------------------------------------------------


def encode_nearest(x: Tensor, inverse: Tensor, signed: bool, t: Tables) -> Tensor:
    """Uint8. No number above 0 gets the code of 0 in the unsigned map."""
    y = x * inverse
    bits = y.abs().view(torch.int32)
    word = _look_up(t.nearest, (bits >> 16).clamp_max(CELLS - 1))
    threshold = word & ((1 << LOW_BITS) - 1)
    place = (word >> LOW_BITS) + ((bits & 0xFFFF) >= threshold).to(torch.int32)
    if signed:
        # There is no -1.0: what rounds to it gets the code above it.
        return (127 + torch.where(y < 0, -place.clamp_max(127), place)).to(torch.uint8)
    return torch.where(x == 0, 0, place + 1).to(torch.uint8)


def encode_stochastic(
    x: Tensor, inverse: Tensor, between: Tensor, signed: bool, t: Tables
) -> Tensor:
    """Uint8: one of the two codes around each number, by random numbers from 1 to 2."""
    y = x.abs() * inverse.abs() + BIAS
    cell = (y.view(torch.int32) >> 24) & 15
    line = torch.where(y < _look_up(t.start, cell), cell + 16, cell)
    straight = y * _look_up(t.a, line) + _look_up(t.b, line)
    position = torch.minimum(straight, straight * GAP_SLOPE + _look_up(t.c, line))
    kk = (position + between).to(torch.int32)
    if signed:
        negative = (x < 0) ^ (inverse < 0)
        kk = torch.where(negative, -kk.clamp_max(127), kk.clamp_max(128))
        return (127 + kk).to(torch.uint8)
    return torch.where(x == 0, 0, kk.clamp(1, 255)).to(torch.uint8)


def with_extremes(codes: Tensor, x: Tensor, extreme: Tensor, valid: Tensor, signed: bool) -> Tensor:
    """The extreme element is 1.0, exactly, and a block without a scale is zero."""
    codes = torch.where(x == extreme, 255, codes)
    return torch.where(valid, codes, zero_code(signed)).to(torch.uint8)


# -- random numbers ------------------------------------------------------------------------------


def _signed64(x: int) -> int:
    x &= _MASK64
    return x - (1 << 64) if x >> 63 else x


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by, of 64 bits without a sign."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def mix_bits(z: Tensor) -> Tensor:
    """Int64, whose products wrap around."""
    z = (z ^ _shifted(z, 30)) * _signed64(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed64(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def random_keys(seed: int, t: Tensor, streams: int) -> list[Tensor]:
    """The keys of some streams, int64 of the shape of t: of the states, and the parameter's."""
    of_seed = mix_bits(torch.full_like(t, _signed64(seed + _GOLDEN), dtype=torch.int64))
    step = 4 * t.to(torch.int64)
    return [
        mix_bits(mix_bits(step + stream) ^ of_seed) for stream in (*range(streams), PARAM_STREAM)
    ]


@functools.cache
def _lane_factors(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(_LANE_FACTORS, dtype=torch.int64, device=device)


def _coefficients(key: Tensor, first: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four of each block, by the global index of its first element."""
    z = mix_bits(key + first * _signed64(_GOLDEN))
    w = mix_bits(z + _signed64(_GOLDEN))
    return z & _MASK32, _shifted(z, 32), w & _MASK32, _shifted(w, 32)


def lane_draws(key: Tensor, first: Tensor, mask: int = _MASK23) -> tuple[Tensor, Tensor]:
    """Of each of the 8 lanes of a block, the hash of its first element and what one adds from one
    element of the lane to the next; of the shape (*first.shape, 8)."""
    c0, c1, c2, c3 = (c.unsqueeze(-1) for c in _coefficients(key, first))
    lanes = _lane_factors(first.device)
    return (c0 + c1 * lanes) & mask, (c2 + c3 * lanes) & mask


def state_draws(key: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    start, stride = lane_draws(key, first)
    return start.to(torch.int32), stride.to(torch.int32)


def one_to_two(start: Tensor, stride: Tensor, width: int) -> Tensor:
    """Random numbers between 1 and 2, of 14 bits, for blocks of a width. Hashes of 23 bits: below
    2^31 with up to 255 strides."""
    hashes = _along(start, stride, width)
    return ((hashes & _RANDOM_MASK) | _ONE_BITS).view(torch.float32)


def _along(start: Tensor, stride: Tensor, width: int) -> Tensor:
    groups = -(-width // 8)
    j = torch.arange(groups, dtype=start.dtype, device=start.device).unsqueeze(-1)
    hashes = start.unsqueeze(-2) + stride.unsqueeze(-2) * j
    return hashes.flatten(-2)[..., :width]


def param_hashes(key: Tensor, first: Tensor, width: int) -> Tensor:
    """The 16 bits that a parameter is rounded by, int32, for blocks of a width."""
    return (_along(*lane_draws(key, first, _MASK32), width) >> 16 & 0xFFFF).to(torch.int32)


def element_hashes(key: Tensor, element: Tensor) -> Tensor:
    """The same where there are no blocks, by the global indices of the elements."""
    i = element & 255
    c0, c1, c2, c3 = _coefficients(key, element - i)
    lanes = _look_up(_lane_factors(element.device), i & 7)
    return ((c0 + c1 * lanes + ((c2 + c3 * lanes) & _MASK32) * (i >> 3)) >> 16 & 0xFFFF).to(
        torch.int32
    )


def round_stochastically(x: Tensor, hashes: Tensor) -> Tensor:
    """float32 to bfloat16, away from zero with a chance of exactly what is cut off."""
    bits = x.view(torch.int32)
    rounded = ((bits + hashes) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), rounded)
