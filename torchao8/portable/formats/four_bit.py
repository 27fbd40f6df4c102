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


def scale_of(extreme: Tensor, unit: Tensor, signed: bool) -> Tensor:
    """For an extreme element in units: 0 where it counts as zero, NaN where it is none. That of
    second moments is rounded up to a power of two."""
    usable = codec.in_range(extreme, signed)
    if signed:
        scale = extreme * unit
        small = (extreme.abs() < LEAST) | (scale.abs() < codec.MIN_SCALE)
        usable = usable & codec.in_range(scale, True)
    else:
        exact = torch.where(usable, extreme, 0.0) * unit * (1 / TOP)
        small = exact < codec.MIN_SCALE
        scale = codec.round_up_to_bits(exact.clamp_max(LARGEST_SCALE), 0)
    return torch.where(usable, torch.where(small, 0.0, scale), torch.nan)


def encode_squares(x: Tensor, scale: Tensor, unit: Tensor, added: Tensor | int) -> Tensor:
    """Int32, by what is added before bits are dropped."""
    inverse = torch.where(scale > 0, unit / scale, 0.0)
    rest = (x * inverse).view(torch.int32) + added >> SHIFT
    return torch.where(scale.isnan(), 0, rest.clamp(FIRST, FIRST + 15) - FIRST)


def encode_levels(x: Tensor, scale: Tensor, extreme: Tensor, drawn: Tensor | None = None) -> Tensor:
    """Int32, to nearest or by random bits."""
    steps = x * torch.where(scale.abs() > 0, 8.0 / extreme, 0.0)
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
        extreme = torch.where(usable, codec.extreme_of(new, state.signed), torch.nan)
        scales[name] = scale_of(extreme, unit, state.signed)
        drawn = codec.drawn(parts[name], new.shape[-1], SHIFT) if state.stochastic else None
        if state.signed:
            drawn = None if drawn is None else drawn >> SHIFT - FINE
            codes[name] = encode_levels(new, scales[name], extreme, drawn)
        else:
            added = HALF if drawn is None else drawn
            codes[name] = encode_squares(new, scales[name], unit, added)
    return [
        [(x.values[i], pack(codes[s.name], s.signed)), (x.scales[i], scales[s.name])]
        for i, s in enumerate(form.states)
    ]


def quantize(x: Tensor, signed: bool, tables: object) -> tuple[Tensor, Tensor]:
    """Also numbers of 2^126 and more, which no step leaves."""
    extreme = codec.extreme_of(x, signed)
    factor = torch.where(extreme.abs() < codec.OVERFLOW, 1.0, 4.0)
    one, extreme, x = torch.ones_like(factor), extreme / factor, x / factor
    scale = scale_of(extreme, one, signed)
    if signed:
        codes = encode_levels(x, scale, extreme)
    else:
        codes = encode_squares(x, scale, one, HALF)
    return pack(codes, signed), scale * factor


def _no_scale(extreme: Tensor, unit: Tensor, state: FormState) -> Tensor:
    raise NotImplementedError("4 bits: each block has a scale, the ops refuse one for a tensor")


FORMAT = Format(
    lambda signed, device: None, decode, draws, encode, _no_scale, quantize, values, is_stochastic
)
