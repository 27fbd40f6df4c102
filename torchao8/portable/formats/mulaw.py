"""The mu-law format: codes are bits of the float 1 + x / scale, and scales come from bounds.

csrc/formats/mulaw.h has the reasons. No magnitude of a block's new states exceeds what its rule
makes of the largest magnitudes in it. Rounding is monotone, so this holds to the bit; where a
compiler rounds the two in other ways, encoding gives what is a bit too large the last code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao8.portable import codec
from torchao8.portable.form import Changes, Form, Format, FormState, Made, Tensors
from torchao8.portable.rules import RULES, Numbers, Old

SHIFT = 19  # bits of the float that are dropped: codes have 4 of the 23 behind the point
ONE_BITS = 0x3F800000
HALF = 1 << SHIFT - 1
LAST = {False: 255, True: 127}  # the largest code, by whether the state is signed
TOP = {False: 63487.0, True: 247.0}  # its value at scale 1
MOST = 132.0 * 2.0**113  # the largest scale of signed codes at which all values are finite


def values(codes: Tensor, signed: bool, tables: object) -> Tensor:
    """Of codes at scale 1. The high bit of a signed one is its sign."""
    magnitude = codes.to(torch.int32) & LAST[signed]
    value = ((magnitude << SHIFT) + ONE_BITS).view(torch.float32) - 1.0
    return torch.where(codes > 127, -value, value) if signed else value


def decode(form: Form, x: Tensors) -> list[Old]:
    """A scale that is none is NaN, and so are the new states then."""
    scales = [torch.where(codec.in_range(s, False), s, torch.nan) for s in x.scales]
    found = [values(codes, s.signed, None) for s, codes in zip(form.states, x.values, strict=True)]
    return [Old(value, scale) for value, scale in zip(found, scales, strict=True)]


# -- scales --------------------------------------------------------------------------------------


def scale_of(extreme: Tensor, unit: Tensor, state: FormState) -> Tensor:
    """For an extreme in units: rounded up to a power of two, or, of a state that is not still, to 7
    bits behind the point."""
    usable = codec.in_range(extreme.abs(), False)
    exact = torch.where(usable, extreme.abs(), 0.0) * unit * (1 / TOP[state.signed])
    rounded = codec.round_up_to_bits(exact, 0 if state.still else 7)
    scale = torch.where(exact < codec.MIN_SCALE, 0.0, rounded)
    return torch.where(usable, scale, torch.nan)


def extremes_of(form: Form, x: Tensors, c: Numbers, made: Made) -> list[Tensor]:
    """What the new states of each block do not exceed, in units. Good elements count with their
    gradients and parameters, all with their states: those that are not good keep them."""

    def largest(t: Tensor) -> Tensor:
        return torch.where(made.good, t.to(torch.float32).abs(), 0.0).amax(-1, keepdim=True)

    old = [Old(o.value.abs().amax(-1, keepdim=True), o.scale) for o in made.old]
    rule, names = RULES[form.rule], [s.name for s in form.states]
    magnitudes = dict(zip(form.numbers, x.numbers.abs().unbind(), strict=True))
    grad = largest(x.grad)
    param = largest(x.param) if "penalty" in c else grad  # else no new state depends on it
    _, bounds = rule.update(param, grad, dict(zip(names, old, strict=True)), magnitudes)
    good = made.good.to(torch.float32)  # compiled for a CPU, any() and all() are no vector code
    any_good, all_good = good.amax(-1, keepdim=True) > 0, good.amin(-1, keepdim=True) > 0
    divides = rule.quotients in names
    extremes = []
    for state, o, new in zip(form.states, old, made.new, strict=True):
        bound = bounds[state.name]
        bound = torch.where(codec.in_range(bound, False), bound, codec.LARGEST)
        bound = torch.where(any_good, bound, 0.0)
        kept = torch.maximum(bound, o.kept(c[f"{state.name}.unit"], codec.LARGEST))
        bound = torch.where(all_good, bound, kept)
        if divides:
            rests = c[f"{rule.quotients}.rests"] != 0
            bound = torch.where(rests, bound, new.abs().amax(-1, keepdim=True))
        extremes.append(bound)
    return extremes


# -- codes ---------------------------------------------------------------------------------------


def draws(key: Tensor, first: Tensor) -> tuple[Tensor, ...]:
    return codec.draws_of(key, first, SHIFT)


def encode_numbers(
    x: Tensor, scale: Tensor, unit: Tensor, added: Tensor | int, signed: bool
) -> Tensor:
    """Uint8, by what is added before bits are dropped. Where a block has a scale, no second moment
    gets the code of 0."""
    inverse = torch.where(scale > 0, unit / scale, 0.0)
    bits = (x.abs() * inverse + 1.0).view(torch.int32) - ONE_BITS
    code = (bits + added >> SHIFT).clamp_max(LAST[signed])
    if signed:
        code = torch.where(x.view(torch.int32) < 0, code | 128, code)
    else:
        code = torch.maximum(code, (scale > 0).to(torch.int32))
    return torch.where(scale.isnan(), 0, code).to(torch.uint8)


def encode(form: Form, x: Tensors, c: Numbers, made: Made) -> list[Changes]:
    changes, pending = [], iter(x.draws)
    extremes = x.extremes or extremes_of(form, x, c, made)
    for i, (state, extreme) in enumerate(zip(form.states, extremes, strict=True)):
        new, unit = made.new[i], c[f"{state.name}.unit"]
        usable = codec.in_range(x.scales[i], False)
        scale = scale_of(torch.where(usable, extreme, torch.nan), unit, state)
        added = codec.drawn(next(pending), new.shape[-1], SHIFT) if state.stochastic else HALF
        codes = encode_numbers(new, scale, unit, added, state.signed)
        changes.append([(x.values[i], codes), *([] if x.extremes else [(x.scales[i], scale)])])
    return changes


def quantize(x: Tensor, signed: bool, tables: object) -> tuple[Tensor, Tensor]:
    """Also numbers of 2^126 and more, which no step leaves. Unsigned ones are taken for still."""
    largest = x.abs().amax(-1, keepdim=True)
    factor = torch.where(largest < codec.OVERFLOW, 1.0, 4.0)
    one, state = torch.ones_like(factor), FormState("", signed, not signed, False)
    scale = scale_of(largest / factor, one, state)
    if signed:
        most = MOST / factor
        scale = torch.where(scale > most, most, scale)
    return encode_numbers(x / factor, scale, one, HALF, signed), scale * factor


def _no_tables(signed: bool, device: torch.device) -> None:
    return None


FORMAT = Format(
    _no_tables, decode, draws, encode, scale_of, quantize, values, most_kept=codec.LARGEST
)
