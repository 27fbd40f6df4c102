"""The dynamic format: codes of the dynamic map, and for the scale a block's extreme element."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import torchao8._C as _C
from torchao8.portable.codec import (
    MIN_SCALE,
    along,
    extreme_of,
    in_range,
    lane_draws,
    look_up,
)
from torchao8.portable.form import Changes, Form, Format, FormState, Made, Tensors
from torchao8.portable.rules import Numbers, Old

# -- what is looked up ---------------------------------------------------------------------------

_RANDOM_MASK, _ONE_BITS = 0x007FFE00, 0x3F800100
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


# -- scales -------------------------------------------------------------------------------------


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


# -- codes --------------------------------------------------------------------------------------


def zero_code(signed: bool) -> int:
    return 127 if signed else 0


def values(codes: Tensor, signed: bool, t: Tables) -> Tensor:
    """Of codes at scale 1."""
    return look_up(t.codebook, codes.to(torch.int32))


def decode(form: Form, x: Tensors) -> list[Old]:
    stored = zip(x.values, x.tables, x.scales, form.states, strict=True)
    return [Old(values(codes, s.signed, t), scale) for codes, t, scale, s in stored]


def encode_nearest(x: Tensor, inverse: Tensor, signed: bool, t: Tables) -> Tensor:
    """Uint8. No number above 0 gets the code of 0 in the unsigned map."""
    y = x * inverse
    bits = y.abs().view(torch.int32)
    word = look_up(t.nearest, (bits >> 16).clamp_max(CELLS - 1))
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
    line = torch.where(y < look_up(t.start, cell), cell + 16, cell)
    straight = y * look_up(t.a, line) + look_up(t.b, line)
    position = torch.minimum(straight, straight * GAP_SLOPE + look_up(t.c, line))
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


def state_draws(key: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    start, stride = lane_draws(key, first)
    return start.to(torch.int32), stride.to(torch.int32)


def one_to_two(start: Tensor, stride: Tensor, width: int) -> Tensor:
    """Random numbers between 1 and 2, of 14 bits, for blocks of a width. Hashes of 23 bits: below
    2^31 with up to 255 strides."""
    hashes = along(start, stride, width)
    return ((hashes & _RANDOM_MASK) | _ONE_BITS).view(torch.float32)


def encode(form: Form, x: Tensors, c: Numbers, made: Made) -> list[Changes]:
    changes, draws = [], iter(x.draws)
    for i, state in enumerate(form.states):
        new, signed, unit, t = made.new[i], state.signed, c[f"{state.name}.unit"], x.tables[i]
        extreme = x.extremes[i] if x.extremes else extreme_of(new, signed)
        inverse = inverse_of(extreme, signed)
        if state.stochastic:
            start, stride = next(draws)
            between = one_to_two(start, stride, new.shape[-1])
            codes = encode_stochastic(new, inverse, between, signed, t)
        else:
            codes = encode_nearest(new, inverse, signed, t)
        codes = with_extremes(codes, new, extreme, has_scale(extreme, unit, signed), signed)
        scale = [] if x.extremes else [(x.scales[i], scale_of(extreme, unit, signed))]
        changes.append([(x.values[i], codes), *scale])
    return changes


def quantize(x: Tensor, signed: bool, t: Tables) -> tuple[Tensor, Tensor]:
    extreme = extreme_of(x, signed)
    large = extreme.isfinite() & ~in_range(extreme, signed)
    # Of a large one the inverse would be subnormal.
    factor = torch.where(large, 0.25, torch.ones_like(extreme))
    one = torch.ones_like(extreme)
    codes = encode_nearest(x * factor, inverse_of(extreme * factor, signed), signed, t)
    if not signed:
        codes = torch.where((x > 0) & (codes == 0), 1, codes)
    valid = has_scale(extreme * factor, one, signed)
    scale = torch.where(large, extreme, scale_of(extreme * factor, one, signed))
    return with_extremes(codes, x, extreme, valid, signed), scale


def _scale_of_tensor(extreme: Tensor, unit: Tensor, state: FormState) -> Tensor:
    return scale_of(extreme, unit, state.signed)


FORMAT = Format(Tables.of, decode, state_draws, encode, _scale_of_tensor, quantize, values)
