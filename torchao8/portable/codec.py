"""What the formats of state have in common: extreme elements, and random numbers.

Tensors have a block in their last dimension, and one number a block has 1 there. Where csrc/codec
has the reasons for what is computed, this only says how. No operation depends on the values but by
`where`, and none waits for the device.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

MIN_SCALE = 2.0**-126  # the smallest normal float32; a smaller scale counts as zero
OVERFLOW = 2.0**126
LARGEST = 2.0**126 - 2.0**102  # the largest float32 below
NO_EXTREME = 0xFFFFFFFF
PARAM_STREAM = 3
MASK23, MASK32 = (1 << 23) - 1, (1 << 32) - 1

_GOLDEN = 0x9E3779B97F4A7C15
_LANE_FACTORS = tuple(
    (0xA54B3C6ABB616A08 if lane < 4 else 0x5BE71F869B05510C) >> 16 * (lane % 4) & 0xFFFF
    for lane in range(8)
)
_MASK64 = (1 << 64) - 1


def look_up(table: Tensor, index: Tensor) -> Tensor:
    return table.index_select(0, index.reshape(-1)).view(index.shape)


# -- extreme elements ----------------------------------------------------------------------------


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


def key_of(extreme: Tensor, signed: bool) -> Tensor:
    """An extreme element as an int64, so that those of parts are compared by one maximum."""
    bits = _unsigned(extreme)
    key = (bits << 1) & MASK32 | (bits >> 31 ^ 1) if signed else bits
    key = torch.where(extreme == 0, 0, key)
    return torch.where(in_range(extreme, signed), key, NO_EXTREME)


def extreme_of_key(key: Tensor, signed: bool) -> Tensor:
    bits = key >> 1 | (key & 1 ^ 1) << 31 if signed else key
    return (bits - ((bits >> 31) << 32)).to(torch.int32).view(torch.float32)


def _unsigned(x: Tensor) -> Tensor:
    """The bits of a float32, int64 from 0 to 2^32 - 1."""
    return x.view(torch.int32).to(torch.int64) & MASK32


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
    return z & MASK32, _shifted(z, 32), w & MASK32, _shifted(w, 32)


def lane_draws(key: Tensor, first: Tensor, mask: int = MASK23) -> tuple[Tensor, Tensor]:
    """Of each of the 8 lanes of a block, the hash of its first element and what one adds from one
    element of the lane to the next; of the shape (*first.shape, 8)."""
    c0, c1, c2, c3 = (c.unsqueeze(-1) for c in _coefficients(key, first))
    lanes = _lane_factors(first.device)
    return (c0 + c1 * lanes) & mask, (c2 + c3 * lanes) & mask


def draws_of(key: Tensor, first: Tensor, bits: int) -> tuple[Tensor, ...]:
    """What draws of the hashes' highest bits are made of. In two parts, so that no product of int32
    overflows: those bits, and the bits below, whose sums carry into them."""
    low, pair = 32 - bits, lane_draws(key, first, MASK32)
    return tuple(part.to(torch.int32) for t in pair for part in (t >> low, t & (1 << low) - 1))


def drawn(parts: tuple[Tensor, ...], width: int, bits: int) -> Tensor:
    """So many random bits for each element of blocks of a width."""
    high, low, high_stride, low_stride = parts
    carry = along(low, low_stride, width) >> (32 - bits)
    return along(high, high_stride, width) + carry & (1 << bits) - 1


def round_up_to_bits(x: Tensor, bits: int) -> Tensor:
    """The least number with so many bits behind the point that is not below x, but for 64 units in
    the last place of x."""
    dropped = (1 << 23 - bits) - 1
    return (x.view(torch.int32) + (dropped - 64) & ~dropped).view(torch.float32)


def along(start: Tensor, stride: Tensor, width: int) -> Tensor:
    groups = -(-width // 8)
    j = torch.arange(groups, dtype=start.dtype, device=start.device).unsqueeze(-1)
    hashes = start.unsqueeze(-2) + stride.unsqueeze(-2) * j
    return hashes.flatten(-2)[..., :width]


def param_hashes(key: Tensor, first: Tensor, width: int) -> Tensor:
    """The 16 bits that a parameter is rounded by, int32, for blocks of a width."""
    return (along(*lane_draws(key, first, MASK32), width) >> 16 & 0xFFFF).to(torch.int32)


def element_hashes(key: Tensor, element: Tensor) -> Tensor:
    """The same where there are no blocks, by the global indices of the elements."""
    i = element & 255
    c0, c1, c2, c3 = _coefficients(key, element - i)
    lanes = look_up(_lane_factors(element.device), i & 7)
    return ((c0 + c1 * lanes + ((c2 + c3 * lanes) & MASK32) * (i >> 3)) >> 16 & 0xFFFF).to(
        torch.int32
    )


def round_stochastically(x: Tensor, hashes: Tensor) -> Tensor:
    """float32 to bfloat16, away from zero with a chance of exactly what is cut off."""
    bits = x.view(torch.int32)
    rounded = ((bits + hashes) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(x.isnan(), x.to(torch.bfloat16), rounded)
