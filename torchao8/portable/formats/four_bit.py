"""The 4-bit format: second moments as floats of 4 bits, first moments in units of their roots.

csrc/formats/four_bit.h has the reasons. Two codes share a byte of a row, the first one in its low
half. What is left over at the end of a row holds the code of 0, or 0 where there is none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao8._families import FamilyState
from torchao8.portable import codec
from torchao8.portable.form import Changes, Form, Format, FormState, Made, Tensors
from torchao8.portable.rules import RULES, Numbers, Old

SHIFT = 22  # bits of the float that are dropped of a second moment
FIRST = 240  # the rest of the first code
HALF = 1 << SHIFT - 1
TOP = 1.5  # the last code's value at scale 1
LARGEST_SCALE = 2.0**125  # of second moments
ZERO = 7  # the code of 0, of first moments
FINE = 16  # random bits that a first moment is rounded by
FINE_UNIT = 192.0  # a step added to this float has as many bits behind the point
FINE_UNIT_BITS = 0x43400000
LEAST = 2.0**-123  # the inverse of a smaller extreme element may be infinite
LARGEST_OF_LEVELS = 2.0**126 - 2.0**105  # scale of 20 bits behind the point
ROUNDINGS = 1 + 2.0**-20  # more than a stored number goes through


def unpack(codes: Tensor) -> Tensor:
    """Int32, one code for each element, and for what is left over at the end of a row."""
    shifts = torch.arange(0, 8, 4, dtype=torch.int32, device=codes.device)
    return (codes.to(torch.int32).unsqueeze(-1) >> shifts & 15).flatten(-2)


def pack(codes: Tensor, signed: bool) -> Tensor:
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1), value=ZERO if signed else 0)
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    return (low | high << 4).to(torch.uint8)


# -- values --------------------------------------------------------------------------------------


def _square(code: Tensor) -> Tensor:
    return (FIRST + code << SHIFT).view(torch.float32)


def _level(code: Tensor) -> Tensor:
    return (code - ZERO).to(torch.float32) * 0.125


def values(codes: Tensor, signed: bool, tables: object) -> Tensor:
    """Of codes at scale 1; of a signed state at a root of 1, too."""
    code = unpack(codes)
    return _level(code) if signed else _square(code)


def roots_of(code: Tensor, scale: Tensor) -> Tensor:
    """Of stored second moments; 1 in a block without a scale, whose codes are 0."""
    return (_square(code) * torch.where(scale >= codec.MIN_SCALE, scale, 128.0)).sqrt()


def decode(form: Form, x: Tensors) -> list[Old]:
    """A scale that is none is NaN, and so are the new states then."""
    width, roots = x.param.shape[-1], RULES[form.rule].roots
    codes, scales = {}, {}
    for state, packed, stored in zip(form.states, x.values, x.scales, strict=True):
        codes[state.name] = unpack(packed)[..., :width]
        scales[state.name] = torch.where(codec.in_range(stored, state.signed), stored, torch.nan)
    found = []
    for state in form.states:
        code = codes[state.name]
        value = _level(code) if state.signed else _square(code)
        if (square := roots.get(state.name)) is not None:
            value = roots_of(codes[square], scales[square]) * value
        found.append(Old(value, scales[state.name]))
    return found


# -- scales and codes ----------------------------------------------------------------------------


def scale_of_squares(largest: Tensor, unit: Tensor) -> Tensor:
    """For the largest one in units, rounded up to a power of two: 0 where it counts as zero, NaN
    where it is none."""
    usable = codec.in_range(largest, False)
    exact = torch.where(usable, largest, 0.0) * unit * (1 / TOP)
    scale = codec.round_up_to_bits(exact.clamp_max(LARGEST_SCALE), 0)
    return torch.where(usable, torch.where(exact < codec.MIN_SCALE, 0.0, scale), torch.nan)


def scale_of_levels(highest: Tensor, lowest: Tensor, unit: Tensor) -> Tensor:
    """The least one, in units, at which neither is cut: that of the one of larger magnitude, or 8/7
    of the other one, rounded to 20 bits behind the point. 0 and NaN as above."""
    is_positive = highest >= -lowest
    extreme = torch.where(is_positive, highest, lowest)
    other = torch.where(is_positive, -lowest, highest)
    scale, needed = extreme * unit, other * (8 / 7)
    usable = codec.in_range(highest, True) & codec.in_range(lowest, True)
    usable = usable & codec.in_range(scale, True)
    rounded = ((needed * unit).view(torch.int32) + 4 & ~7).view(torch.float32)
    rounded = rounded.clamp_max(LARGEST_OF_LEVELS)
    rounded = torch.where(is_positive, rounded, -rounded)
    scale = torch.where(needed > extreme.abs() * ROUNDINGS, rounded, scale)
    small = (extreme.abs() < LEAST) | (scale.abs() < codec.MIN_SCALE)
    return torch.where(usable, torch.where(small, 0.0, scale), torch.nan)


def encode_squares(x: Tensor, scale: Tensor, unit: Tensor, added: Tensor | int) -> Tensor:
    """Int32, by what is added before bits are dropped."""
    inverse = torch.where(scale > 0, unit / scale, 0.0)
    rest = (x * inverse).view(torch.int32) + added >> SHIFT
    return torch.where(scale.isnan(), 0, rest.clamp(FIRST, FIRST + 15) - FIRST)


def encode_levels(x: Tensor, scale: Tensor, unit: Tensor, drawn: Tensor | None = None) -> Tensor:
    """Int32, to nearest or by random bits."""
    steps = x * torch.where(scale.abs() > 0, (1.0 / scale) * (8.0 * unit), 0.0)
    if drawn is None:
        steps = steps.round().to(torch.int32)
    else:
        steps = (steps + FINE_UNIT).view(torch.int32) - FINE_UNIT_BITS + drawn >> FINE
    return torch.where(scale.isnan(), ZERO, steps.clamp(-7, 8) + ZERO)


def is_stochastic(rule: str, state: FamilyState) -> bool:
    """First moments without roots, too: to nearest, small ones would become 0 at every step."""
    return state.stochastic or (state.signed and state.name not in RULES[rule].roots)


def draws(key: Tensor, first: Tensor) -> tuple[Tensor, ...]:
    return codec.draws_of(key, first, SHIFT)


def encode(form: Form, x: Tensors, c: Numbers, made: Made) -> list[Changes]:
    """Second moments first: first moments are divided by the roots of what is stored of them."""
    roots, pending = RULES[form.rule].roots, iter(x.draws)
    parts = {s.name: next(pending) for s in form.states if s.stochastic}
    codes: dict[str, Tensor] = {}
    scales: dict[str, Tensor] = {}
    for i, state in sorted(enumerate(form.states), key=lambda each: each[1].signed):
        new, name, unit = made.new[i], state.name, c[f"{state.name}.unit"]
        if (square := roots.get(name)) is not None:
            new = new * (1.0 / roots_of(codes[square], scales[square]))
        usable = codec.in_range(x.scales[i], state.signed)
        scales[name] = torch.where(usable, scale_of_block(new, unit, state.signed), torch.nan)
        drawn = codec.drawn(parts[name], new.shape[-1], SHIFT) if state.stochastic else None
        if state.signed:
            drawn = None if drawn is None else drawn >> SHIFT - FINE
            codes[name] = encode_levels(new, scales[name], unit, drawn)
        else:
            added = HALF if drawn is None else drawn
            codes[name] = encode_squares(new, scales[name], unit, added)
    return [
        [(x.values[i], pack(codes[s.name], s.signed)), (x.scales[i], scales[s.name])]
        for i, s in enumerate(form.states)
    ]


def scale_of_block(x: Tensor, unit: Tensor, signed: bool) -> Tensor:
    if signed:
        return scale_of_levels(x.amax(-1, keepdim=True), x.amin(-1, keepdim=True), unit)
    return scale_of_squares(codec.extreme_of(x, signed), unit)


def quantize(x: Tensor, signed: bool, tables: object) -> tuple[Tensor, Tensor]:
    """Also numbers of 2^126 and more, which no step leaves."""
    factor = torch.where(x.abs().amax(-1, keepdim=True) < codec.OVERFLOW, 1.0, 4.0)
    one, x = torch.ones_like(factor), x / factor
    scale = scale_of_block(x, one, signed)
    if signed:
        codes = encode_levels(x, scale, one)
    else:
        codes = encode_squares(x, scale, one, HALF)
    return pack(codes, signed), scale * factor


def _no_scale(extreme: Tensor, unit: Tensor, state: FormState) -> Tensor:
    raise NotImplementedError("4 bits: each block has a scale, the ops refuse one for a tensor")


FORMAT = Format(
    lambda signed, device: None, decode, draws, encode, _no_scale, quantize, values, is_stochastic,
    codec.LARGEST,
)  # fmt: skip
