"""The oracles of the formats of state beside the dynamic map: mu-law codes, and 4-bit codes.

Slow and obvious: values are counted up one by one, codes are found by comparing a number with all
values, nibbles are packed element by element. All in float64, in which every value, midpoint and
threshold here is exact. Nothing is shared with the library.

A mu-law code is a piecewise-linear logarithm: values begin at 0 in steps of 2^-M, and after each
2^M codes the step doubles. Number c is 2^e (1 + k / 2^M) - 1 with c = 2^M e + k. Both kinds have
it times their scale: unsigned codes of 8 bits, and signed ones of a sign and 7 bits.

A 4-bit code of a second moment has no zero: 2^(e - 7) (1 + k / 2), e = 0 .. 7, k = 0 or 1, times a
scale that is a power of two. That of a first moment is a number of steps of an eighth, -7 .. 8, of
a scale with the sign of the element of largest magnitude, the least at which all elements are
within these steps; the first moment is divided by the root of the stored second one before, where
the rule has one.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# A smaller scale counts as zero.
FLOAT32_TINY = 2.0**-126
# How far a number may lie above a scale that has few bits and still get it: 64 units of float32's
# last place, so that a state at rest keeps its scale whatever way its roundings went.
TOLERANCE = 64 * 2.0**-23


# -- mu-law: the codebook --------------------------------------------------------------------------


class MuLaw(NamedTuple):
    """Mantissa bits of the two kinds of codes."""

    signed: int
    unsigned: int

    def mantissa(self, signed: bool) -> int:
        return self.signed if signed else self.unsigned


COARSE = MuLaw(4, 4)  # wide ranges: 16 steps a binade
FINE = MuLaw(5, 5)  # half the binades, in half as large steps


@functools.cache
def magnitudes(law: MuLaw, signed: bool) -> Tensor:
    """The values of the codes without a sign, ascending: 128 of a signed state, else 256."""
    values, value, step = [], 0.0, 2.0 ** -law.mantissa(signed)
    for code in range(128 if signed else 256):
        if code and code % 2 ** law.mantissa(signed) == 0:
            step *= 2
        values.append(value)
        value += step
    return torch.tensor(values, dtype=torch.float64)


def top(law: MuLaw, signed: bool) -> float:
    """The largest value at scale 1."""
    return float(magnitudes(law, signed)[-1])


def codebook(law: MuLaw, signed: bool) -> Tensor:
    """The value of each of the 256 bytes at scale 1; the high bit of a signed one is its sign."""
    values = magnitudes(law, signed)
    return torch.cat((values, -values)) if signed else values


# -- mu-law: encoding --------------------------------------------------------------------------


def thresholds(law: MuLaw, signed: bool) -> Tensor:
    """The least number that gets each code but the first, rounded to nearest.

    A midpoint with the code below, less what the rounding of 1 + y to float32 can add: half a unit
    in its last place. (A tie goes to the midpoint, whose last bits are zeros.)
    """
    values = magnitudes(law, signed)
    midpoints = (values[1:] + values[:-1]) / 2
    half_units = torch.tensor([2.0 ** (math.frexp(1 + m)[1] - 1 - 24) for m in midpoints.tolist()])
    return midpoints - half_units.double()


def nearest_code(law: MuLaw, y: Tensor, signed: bool, live: bool = True) -> Tensor:
    """The byte of each number, in units of the scale, by comparing it with all thresholds.

    Args:
        live: whether the block has a scale; then no second moment gets code 0.
    """
    reached = y.double().abs().flatten()[:, None] >= thresholds(law, signed)
    return _byte(reached.sum(1).reshape(y.shape), y, signed, live)


def neighbours(law: MuLaw, y: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """The code without a sign at or below each magnitude, and the fraction of the way to the next:
    the chance of the next one, rounded stochastically."""
    values, size = magnitudes(law, signed), y.double().abs()
    below = (size.flatten()[:, None] >= values).sum(1).reshape(y.shape) - 1
    above = (below + 1).clamp_max(len(values) - 1)
    gap = values[above] - values[below]
    fraction = torch.where(gap > 0, (size - values[below]) / gap.where(gap > 0, 1.0), 0.0)
    return below, fraction


def drawn_code(law: MuLaw, y: Tensor, signed: bool, draw: Tensor, live: bool = True) -> Tensor:
    """The byte of each number, rounded stochastically: up where ``draw``, whole numbers of 23 - M
    random bits, reaches what is missing to the next code.

    The fraction is that of 1 + y in float32, whose last 23 - M bits it is.
    """
    bits = 23 - law.mantissa(signed)
    rounded = (1 + y.double().abs()).float().double() - 1
    below, fraction = neighbours(law, rounded, signed)
    up = fraction * 2**bits + draw >= 2**bits
    return _byte(below + up, y, signed, live)


def _byte(code: Tensor, y: Tensor, signed: bool, live: bool) -> Tensor:
    if signed:
        return (code.clamp_max(127) + 128 * y.signbit()).to(torch.uint8)
    return code.clamp(int(live), 255).to(torch.uint8)


# -- scales of few bits ----------------------------------------------------------------------------


def round_up(x: float, bits: int) -> float:
    """The least number of so many mantissa bits that is not below x, but for the tolerance."""
    fraction, exponent = math.frexp(x)
    beyond_one = math.ceil((2 * fraction - 1 - TOLERANCE) * 2**bits)
    return math.ldexp(1 + beyond_one / 2**bits, exponent - 1)


def float32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float())


def mulaw_scale(law: MuLaw, extreme: float, unit: float, signed: bool, still: bool) -> float:
    """The scale of a block none of whose elements, in units, is larger than ``extreme``.

    Args:
        still: whether a step moves the state by less than a code: a power of two then, so that the
            values do not move with the scale. Else 7 mantissa bits.
    """
    size = float32(float32(extreme * float32(unit)) * float32(1 / top(law, signed)))
    return round_up(size, 0 if still else 7) if size >= FLOAT32_TINY else 0.0


# -- four bits -------------------------------------------------------------------------------------


@functools.cache
def squares_of_4bit() -> Tensor:
    """The values of the 16 codes of a second moment at scale 1, from 1/128 to 1.5."""
    values = [2.0 ** (e - 7) * factor for e in range(8) for factor in (1.0, 1.5)]
    return torch.tensor(values, dtype=torch.float64)


@functools.cache
def levels_of_4bit() -> Tensor:
    """Those of a first moment: nibble 7 is 0, nibble 15 is the scale itself."""
    return torch.arange(-7, 9, dtype=torch.float64) / 8


def scale_of_squares(extreme: float) -> float:
    """The power of two at which the largest second moment of a block is no more than 1.5."""
    size = float32(extreme * float32(1 / 1.5))
    return round_up(size, 0) if size >= FLOAT32_TINY else 0.0


def nearest_square(y: Tensor) -> Tensor:
    """The nibble of each second moment, in units of the scale. A tie goes up."""
    values = squares_of_4bit()
    reached = y.double().flatten()[:, None] >= (values[1:] + values[:-1]) / 2
    return reached.sum(1).reshape(y.shape).to(torch.uint8)


def drawn_square(y: Tensor, draw: Tensor) -> Tensor:
    """The same rounded stochastically, by whole numbers of 22 random bits. What is below the
    smallest value gets that one."""
    values, size = squares_of_4bit(), y.double()
    below = ((size.flatten()[:, None] >= values).sum(1).reshape(y.shape) - 1).clamp_min(0)
    above = (below + 1).clamp_max(15)
    gap = (values[above] - values[below]).clamp_min(FLOAT32_TINY)
    fraction = ((size - values[below]) / gap).clamp_min(0.0)
    up = fraction * 2**22 + draw >= 2**22
    return (below + up).clamp_max(15).to(torch.uint8)


def scale_of_levels(highest: float, lowest: float, unit: float = 1.0) -> float:
    """The scale of a block whose first moments, in units, lie between these two: the one of larger
    magnitude, or 8/7 of the other one, rounded to 20 bits behind the point. A tie is positive.

    8/7 may exceed the larger one by 2^-20, so that roundings do not change the scale of stored
    values.

    Args:
        unit: a float32.
    """
    sign = 1.0 if highest >= -lowest else -1.0
    extreme, other = sorted((highest, -lowest), reverse=True)
    needed = float32(other * float32(8 / 7))
    scale = float32(extreme * unit)
    if needed > float32(extreme * (1 + 2.0**-20)):
        fraction, exponent = math.frexp(float32(needed * unit))
        scale = math.ldexp(math.floor(fraction * 2**21 + 0.5), exponent - 21)
        scale = min(scale, 2.0**126 - 2.0**105)
    return sign * scale if extreme >= 2.0**-123 and scale >= FLOAT32_TINY else 0.0


def nearest_level(y: Tensor, scale: float) -> Tensor:
    """The nibble of each first moment, y being divided by the root of the stored second moment. A
    tie goes to the even number of steps; there is no -1.0."""
    if scale == 0:
        return torch.full(y.shape, 7, dtype=torch.uint8)
    steps = torch.round(y.double() / scale * 8)
    return (steps.clamp(-7, 8) + 7).to(torch.uint8)


def drawn_level(y: Tensor, inverse: Tensor | float, draw: Tensor) -> Tensor:
    """The nibble of each number of a state without roots, rounded stochastically by 16 random bits.
    ``inverse`` is 8 divided by the scale; steps have 16 bits behind the point, to nearest."""
    fine = torch.round(y.double() * inverse * 2**16) + draw
    return ((fine / 2**16).floor().clamp(-7, 8) + 7).to(torch.uint8)


def roots(square_nibbles: Tensor, scale: float) -> Tensor:
    """The root of each stored second moment, rounded once to float32."""
    return (squares_of_4bit()[square_nibbles.long()] * scale).sqrt().float().double()


# -- packing ---------------------------------------------------------------------------------------


def packed_shape(shape: Sequence[int], row_dims: int) -> tuple[int, ...]:
    """Two elements a byte, in rows: the dimensions that count rows, and the bytes of a row."""
    return (*shape[:row_dims], math.ceil(math.prod(shape[row_dims:]) / 2))


def pack(nibbles: Tensor, row_dims: int, zero: int) -> Tensor:
    """Element 2i of a row is the low half of byte i. The half that a row of odd length leaves over
    holds ``zero``, the nibble of no element."""
    shape = tuple(nibbles.shape)
    rows, length = math.prod(shape[:row_dims]), math.prod(shape[row_dims:])
    packed = []
    for row in nibbles.reshape(rows, length).tolist():
        halves = [*row, zero] if length % 2 else row
        packed += [low + 16 * high for low, high in zip(halves[::2], halves[1::2], strict=True)]
    return torch.tensor(packed, dtype=torch.uint8).reshape(packed_shape(shape, row_dims))


def unpack(packed: Tensor, shape: Sequence[int], row_dims: int) -> Tensor:
    """The reverse of :func:`pack`."""
    rows, length = math.prod(shape[:row_dims]), math.prod(shape[row_dims:])
    nibbles = []
    for row in packed.reshape(rows, -1).tolist() if rows and length else []:
        halves = [half for byte in row for half in (byte % 16, byte // 16)]
        nibbles += halves[:length]
    return torch.tensor(nibbles, dtype=torch.uint8).reshape(tuple(shape))
