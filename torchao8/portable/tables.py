"""What the portable codec looks up: the codebook, thresholds and lines of the dynamic map.

From the arithmetic of csrc/codec/dynamic_map.h, where it is derived; to the bit as there.
"""

from __future__ import annotations

import functools
import itertools
import math
import struct

DECADES = 7
BIAS = 2.0**-31  # part of every y that is rounded stochastically
GAP_SLOPE = 5.0 / 3.0
CELLS = 0x3F81  # of the top 16 bits of a float32, up to those of 1.0
LOW_BITS = 17  # of a word of the nearest cells: the threshold
LINES = 32  # two for each of 16 cells of two binades


def _f32(x: float) -> float:
    """The nearest float32."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _bits(x: float) -> int:
    return int(struct.unpack("I", struct.pack("f", x))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("f", struct.pack("I", bits))[0])


def _first_kk(signed: bool, decade: int) -> int:
    return 1 << decade if signed else 2 << decade


def _value_of_kk(signed: bool, kk: int) -> float:
    """The kk-th magnitude: a * kk + b in its decade, 0 below the first one, 1 at the end."""
    if kk == _first_kk(signed, DECADES):
        return 1.0
    decades = [i for i in range(DECADES) if kk >= _first_kk(signed, i)]
    if not decades:
        return 0.0
    n, unit = _first_kk(signed, decades[-1]), (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)[decades[-1]]
    a, b = unit * 0.9 / n, unit * (0.1 + 0.9 * (0.5 - n) / n)
    return _f32(_f32(a) * kk + _f32(b))


@functools.cache
def codebook(signed: bool) -> tuple[float, ...]:
    """The values of the 256 codes."""
    ks = range(-127, 129) if signed else range(1, 257)
    return tuple(math.copysign(_value_of_kk(signed, abs(k)), k) if k else 0.0 for k in ks)


@functools.cache
def nearest_cells(signed: bool) -> tuple[int, ...]:
    """For each cell of magnitudes, its first number's place among the codes (of those that a number
    above 0 may get) and, in the low bits, where the next one begins; no cell has two of them."""
    values = codebook(signed)[127:] if signed else codebook(signed)[1:]
    starts = []
    for below, above in itertools.pairwise(values):
        middle = (below + above) / 2
        bits = _bits(_f32(middle))
        starts.append(bits + 1 if _f32(middle) < middle else bits)
    cells, place = [], 0
    for cell in range(CELLS):
        low, first = 1 << 16, place
        if place < len(starts) and starts[place] >> 16 == cell:
            low = starts[place] & 0xFFFF
            place += 1
        cells.append(first << LOW_BITS | low)
    return tuple(cells)


@functools.cache
def position_lines(signed: bool) -> tuple[tuple[float, ...], ...]:
    """Where a y lies between the codes, as a line for each of 32 ranges: their starts, a, b and c.

    line = y * a + b; position = min(line, line * 5/3 + c).
    """
    shift = 1 if signed else 2
    lines, starts = [], []
    for d in range(DECADES):
        first = _first_kk(signed, d)
        last = 2 * first - 1
        low = (_value_of_kk(signed, first), first - shift) if first < last else (0.0, -1)
        slope = (last - shift - low[1]) / (_value_of_kk(signed, last) - low[0])
        b = low[1] - slope * (low[0] + BIAS)
        c = (first - shift) * (1 - GAP_SLOPE) if d else float(signed)
        lines.append((_f32(slope), _f32(b), _f32(c)))
        starts.append(_f32(_value_of_kk(signed, first - 1) + BIAS))
    starts[0] = position_floor(signed)
    end = _first_kk(signed, DECADES)
    starts += [_value_of_kk(signed, end - 1), math.inf]
    slope = _f32(1 / (1 - starts[DECADES]))
    lines.append((slope, _f32(end - shift - (0.5 if signed else 1.1) / 65536 - slope), 0.0))
    cells, upper, lower = [], [], []
    for j in range(LINES // 2):
        begin = _float((2 * j + 96) << 23)
        d = max((d for d in range(DECADES + 1) if starts[d] <= begin), default=-1)
        inside = starts[d + 1] < 4 * begin
        cells.append(starts[d + 1] if inside else math.inf)
        lower.append(lines[d] if d >= 0 else (0.0, 0.0, 0.0))
        upper.append(lines[d + 1] if inside else lower[-1])
    of_lines = zip(*(upper + lower), strict=True)
    return (tuple(cells), *(tuple(numbers) for numbers in of_lines))


@functools.cache
def position_floor(signed: bool) -> float:
    """The first number of which a second moment's position is not below that of code 1."""
    if signed:
        return 0.0
    first, last = 2, 3
    slope = (last - first) / (_value_of_kk(False, last) - _value_of_kk(False, first))
    a, b = _f32(slope), _f32(-slope * (_value_of_kk(False, first) + BIAS))
    floor = _value_of_kk(False, first)
    while floor * a + b < 0:
        floor = _float(_bits(floor) + 1)
    return floor
