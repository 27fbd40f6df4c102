"""The 4-bit codec of csrc/formats gives the codes, values, scales and roots of its oracle.

It is compiled as a library of its own.
"""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import format_reference as formats
import pytest
import torch
from compilers import CSRC, EMULATION, built, cpp_command
from torch import Tensor

LAST_DRAW = 2**22 - 1


class Codec:
    """The compiled codec; of a changed copy of the sources, in a folder of its own."""

    def __init__(self, copy: Path | None = None) -> None:
        command = cpp_command(
            copy or CSRC, "-O2", "-shared", "-fPIC", EMULATION / "four_bit_codec.cpp"
        )
        if copy is None:
            library = built("four_bit_codec.so", command, [CSRC, EMULATION])
        else:
            library = copy / "four_bit_codec.so"
            subprocess.run([*command, library], check=True)
        self.library = ctypes.CDLL(str(library))

    def values(self, signed: bool) -> Tensor:
        codes, values = torch.arange(16, dtype=torch.uint8), torch.empty(16)
        decode = self.library.decode_levels if signed else self.library.decode_squares
        decode(_at(codes), ctypes.c_int64(16), _at(values))
        return values

    def squares(self, x: Tensor, draws: Tensor | None = None, inverse: float = 1.0) -> Tensor:
        """Codes, rounded to nearest or by draws of 22 bits."""
        codes = torch.empty(x.shape, dtype=torch.uint8)
        hashes = None if draws is None else (draws << 10).to(torch.uint32)
        where = None if hashes is None else _at(hashes)
        numbers = ctypes.c_int64(x.numel()), ctypes.c_float(inverse)
        self.library.encode_squares(_at(x), where, *numbers, _at(codes))
        return codes

    def levels(self, x: Tensor, inverse: float, draws: Tensor | None = None) -> Tensor:
        """Codes, rounded to nearest or by draws of 16 bits."""
        codes = torch.empty(x.shape, dtype=torch.uint8)
        hashes = None if draws is None else (draws << 16).to(torch.uint32)
        where = None if hashes is None else _at(hashes)
        numbers = ctypes.c_int64(x.numel()), ctypes.c_float(inverse)
        self.library.encode_levels(_at(x), where, *numbers, _at(codes))
        return codes

    def scales(self, largest: Tensor, unit: float) -> tuple[Tensor, Tensor]:
        """Of second moments, and what these are multiplied by."""
        return self._scales(self.library.scales_of_squares, unit, largest)

    def level_scales(
        self, highest: Tensor, lowest: Tensor, unit: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Of first moments."""
        return self._scales(self.library.scales_of_levels, unit, highest, lowest)

    def _scales(self, function: Any, unit: float, *ends: Tensor) -> tuple[Tensor, Tensor]:
        scale, inverse = torch.empty(ends[0].shape), torch.empty(ends[0].shape)
        numbers = ctypes.c_int64(len(ends[0])), ctypes.c_float(unit)
        function(*map(_at, ends), *numbers, _at(scale), _at(inverse))
        return scale, inverse

    def roots(self, scale: float) -> tuple[Tensor, Tensor]:
        root, reciprocal = torch.empty(16), torch.empty(16)
        self.library.roots(ctypes.c_float(scale), _at(root), _at(reciprocal))
        return root, reciprocal


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture
def codec() -> Codec:
    return Codec()


def midpoints(values: Tensor) -> Tensor:
    return (values[1:] + values[:-1]) / 2


def around(x: Tensor) -> Tensor:
    """Float32 numbers, and 40 floats on each side of them."""
    bits = x.float().view(torch.int32)
    return (bits[:, None] + torch.arange(-40, 41, dtype=torch.int32)).flatten().view(torch.float32)


def some_squares() -> Tensor:
    """Every value and midpoint, 40 floats on each side of them, and floats from 0 to 1.5."""
    values = formats.squares_of_4bit()
    top = int(torch.tensor(1.5).view(torch.int32))
    spread = torch.arange(0, top + 1, 9_973, dtype=torch.int32).view(torch.float32)
    return torch.cat((around(torch.cat((values, midpoints(values)))), spread)).clamp_max(1.5)


def test_values(codec: Codec) -> None:
    assert codec.values(False).tolist() == formats.squares_of_4bit().tolist()
    assert codec.values(True).tolist() == formats.levels_of_4bit().tolist()


def test_nearest_squares(codec: Codec) -> None:
    x = some_squares()
    assert torch.equal(codec.squares(x), formats.nearest_square(x))


def test_drawn_squares(codec: Codec) -> None:
    """Around the draw at which each number is rounded up, and at the first and the last one."""
    x, values = some_squares(), formats.squares_of_4bit()
    below = (x.double()[:, None] >= values).sum(1).sub(1).clamp_min(0)
    gap = (values[(below + 1).clamp_max(15)] - values[below]).clamp_min(2.0**-126)
    turn = (2**22 - ((x.double() - values[below]) / gap * 2**22)).long()
    for draws in (turn - 1, turn, torch.zeros_like(turn), torch.full_like(turn, LAST_DRAW)):
        draws = draws.clamp(0, LAST_DRAW)
        assert torch.equal(codec.squares(x, draws), formats.drawn_square(x, draws))


def test_levels(codec: Codec) -> None:
    """Around each tie, and all over the range, for scales of both signs."""
    levels = formats.levels_of_4bit()
    positive = torch.arange(0, int(torch.tensor(1.0).view(torch.int32)) + 1, 9_973)
    spread = positive.to(torch.int32).view(torch.float32)
    x = torch.cat((around(midpoints(levels)), around(levels[levels != 0]), spread, -spread))
    x = torch.cat((x.clamp(-1, 1), torch.tensor([0.0, -0.0, 2.0**-149])))
    for extreme in (1.0, -1.0, 0.25):
        inverse = 8 / extreme
        want = formats.nearest_level(x * extreme, extreme)
        assert torch.equal(codec.levels(x * extreme, inverse), want)
    assert (codec.levels(x, 0.0) == 7).all()


def test_drawn_levels(codec: Codec) -> None:
    """Around the draw at which each number is rounded up, and at the first and the last one."""
    levels, last = formats.levels_of_4bit(), 2**16 - 1
    spread = torch.linspace(-1, 1, 20_001)
    x = torch.cat((around(levels[levels != 0]), around(midpoints(levels)), spread)).clamp(-1, 1)
    x = torch.cat((x, torch.tensor([0.0, -0.0, 2.0**-149, 2.0**-20, -(2.0**-20)])))
    for extreme in (1.0, -1.0, 0.3):
        inverse = float(8 / torch.tensor(extreme))
        y = x * extreme
        steps = (y.double() * inverse * 2**16).round()
        turn = 2**16 - (steps - (steps / 2**16).floor() * 2**16)
        for draws in (turn - 1, turn, torch.zeros_like(turn), torch.full_like(turn, last)):
            draws = draws.clamp(0, last).long()
            want = formats.drawn_level(y, inverse, draws)
            assert torch.equal(codec.levels(y, inverse, draws), want)
        ends = torch.tensor([extreme, 0.0, -extreme])
        for draws in (torch.zeros(3), torch.full((3,), last)):
            assert codec.levels(ends, inverse, draws.long()).tolist() == [15, 7, 0]


def some_ends() -> tuple[Tensor, Tensor]:
    """The highest and the lowest number of blocks: of all sizes and ratios; about equal ones, and
    some at which the other side begins to tell; those of one sign only."""
    generator = torch.Generator().manual_seed(1)
    size = torch.rand(6000, generator=generator).mul(240).sub(121).exp2()
    ratio = torch.rand(6000, generator=generator)
    ratio[1000:4000] = ratio[1000:4000] / 4 + 0.75
    ratio[4000:4500] = 1.0
    ratio[4500:5000] = 7 / 8 * (1 + ratio[4500:5000] * 2.0**-18)
    other = size * ratio
    other[5000:] = 0.0
    return torch.cat((size, other)), -torch.cat((other, size))


def test_scales_of_levels(codec: Codec) -> None:
    for unit in (1.0, formats.float32(0.1), 3.0):
        highest, lowest = some_ends()
        scale, inverse = codec.level_scales(highest, lowest, unit)
        numbers = (t.tolist() for t in (highest, lowest, scale, inverse))
        for high, low, s, i in zip(*numbers, strict=True):
            assert s == formats.scale_of_levels(high, low, unit)
            by_s = formats.float32(1 / s) if s else 0.0
            assert i == formats.float32(by_s * formats.float32(8 * unit))
    tiny, large, nan = 2.0**-123, 2.0**126 - 2.0**102, math.nan
    found = [
        codec.level_scales(torch.tensor([high]), torch.tensor([low]), unit)
        for high, low, unit in [
            (tiny, 0.0, 0.5), (0.0, -tiny, 0.5), (tiny / 2, -tiny / 4, 1.0), (0.0, -0.0, 1.0),
            (tiny, 0.0, 1e-3), (large, -large, 1.0), (2.0**126, 0.0, 1.0), (1.0, -math.inf, 1.0),
            (nan, 0.0, 1.0), (0.0, nan, 1.0), (2.0**125, 0.0, 2.0),
        ]
    ]  # fmt: skip
    largest = 2.0**126 - 2.0**105
    assert [float(scale) for scale, _ in found[:6]] == [tiny / 2, -tiny / 2, 0, 0, 0, largest]
    assert all(scale.isnan().all() for scale, _ in found[6:])
    inverses = torch.cat([inverse for _, inverse in found])
    assert inverses.isfinite().all()
    assert (inverses[[2, 3, 4, *range(6, 11)]] == 0).all()


def test_no_quotient_is_cut(codec: Codec) -> None:
    """The largest in both directions are stored as what is close to them, whatever is drawn."""
    highest, lowest = some_ends()
    scale, inverse = codec.level_scales(highest, lowest)
    steps = torch.stack((highest, lowest)).double() / scale * 8
    assert (steps > -7 * (1 + 2.0**-19)).all()
    assert (steps < 8 * (1 + 2.0**-22)).all()
    exact = scale.abs() == torch.maximum(highest, -lowest)
    assert exact[5000:6000].all()
    assert exact[11_000:].all()
    for draws in (None, 0, 2**16 - 1):
        codes = level_codes(codec, torch.stack((highest, lowest), 1), inverse, draws)
        off = (codes.double() - 7) - steps.T
        assert (off.abs() <= (0.5 if draws is None else 1.0) + 1e-4).all()
        assert (codes.amax(1)[exact] == 15).all()
        assert (codes.amin(1)[~exact] == 0).all()  # -7, in the other direction


def level_codes(codec: Codec, x: Tensor, inverse: Tensor, draw: int | None) -> Tensor:
    """Of rows of numbers with inverses of their own, by what is drawn for all."""
    draws = None if draw is None else torch.full(x.shape[1:], draw, dtype=torch.int64)
    rows = zip(x, inverse.tolist(), strict=True)
    return torch.stack([codec.levels(row.contiguous(), one, draws) for row, one in rows])


@pytest.mark.parametrize("unit", [1.0, 0.1, 1 - 0.98])
def test_stored_levels_stay(codec: Codec, unit: float) -> None:
    """Values of codes are encoded to the same values again, all 16 of them.

    In units: to the same codes, and where the scale is that of an extreme, it may differ in its
    last place. A scale may change its sign if the levels are those that both signs have.
    """
    unit = formats.float32(unit)
    highest, lowest = some_ends()
    some = highest.abs().maximum(lowest.abs()) > 2.0**-116
    highest, lowest = highest[some], lowest[some]
    scale, inverse = codec.level_scales(highest, lowest, unit)
    levels = formats.levels_of_4bit().float()
    for draws in (0, 2**16 - 1):
        codes = level_codes(codec, torch.stack((highest, lowest), 1), inverse, draws).long()
        ends = levels[codes].sort(1).values  # in eighths of the scale
        values = levels.expand(len(ends), 16).clamp(ends[:, :1], ends[:, 1:])
        stored = values * (scale / unit)[:, None]
        again, inverse_of_again = codec.level_scales(stored.amax(1), stored.amin(1), unit)
        found = levels[level_codes(codec, stored, inverse_of_again, draws).long()]
        flipped = scale.sign() != again.sign()
        assert flipped.any() == (draws == 0)  # else one of them has got 8
        assert (ends[flipped] == torch.tensor([-7 / 8, 7 / 8])).all()
        assert torch.equal(found, torch.where(flipped[:, None], -values, values))
        if unit == 1:
            assert torch.equal(again.abs(), scale.abs())
        else:
            assert (again.abs() / scale.abs() - 1).abs().max() <= 2.0**-23
            rounded = (ends.abs() == 7 / 8).all(1)
            assert torch.equal(again.abs()[rounded], scale.abs()[rounded])


@pytest.mark.parametrize("unit", [1.0, 0.1, 1 - 0.999])
def test_scales_of_squares(codec: Codec, unit: float) -> None:
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(2000, generator=generator).mul(160).sub(80).exp2()
    borders = torch.tensor([2.0**k * 1.5 / unit for k in range(-100, 100)])
    near = borders.view(torch.int32)[:, None] + torch.tensor([-300, -64, 0, 60, 70, 3000])
    near = near.to(torch.int32).flatten().view(torch.float32)
    extremes = torch.cat((some, near, torch.tensor([0.0, 1e-45, 1e-38])))
    scale, inverse = codec.scales(extremes, unit)
    for x, s, i in zip(extremes.tolist(), scale.tolist(), inverse.tolist(), strict=True):
        assert s == formats.scale_of_squares(formats.float32(x * formats.float32(unit)))
        assert i == (formats.float32(unit) / s if s else 0.0)
    broken = torch.tensor([math.nan, math.inf, 2.0**126, -1.0])
    assert codec.scales(broken, unit)[0].isnan().all()
    largest = torch.tensor([2.0**126]).view(torch.int32).sub(1).view(torch.float32)
    assert codec.scales(largest, 1.0)[0].tolist() == [2.0**125]


def test_an_extreme_square_gets_the_last_codes(codec: Codec) -> None:
    """It has a code, also where the tolerance of the scale has left it above the last value."""
    extremes = torch.tensor([0.76, 1.0, 1.5, 1.5 * (1 + 2.0**-18), 1.5 * (1 + 2.0**-23)])
    scale, _ = codec.scales(extremes, 1.0)
    assert (scale == 1).all()
    for draws in (None, torch.full((5,), LAST_DRAW)):
        codes = codec.squares(extremes, draws)
        assert codes[2:].tolist() == [15] * 3
        assert (codes >= 13).all()


def test_roots(codec: Codec) -> None:
    nibbles = torch.arange(16, dtype=torch.uint8)
    for exponent in range(-126, 126):
        root, reciprocal = codec.roots(2.0**exponent)
        assert root.double().tolist() == formats.roots(nibbles, 2.0**exponent).tolist()
        assert reciprocal.tolist() == (1 / root).tolist()
    assert float(codec.roots(0.0)[0][0]) == float(codec.roots(0.0)[1][0]) == 1.0


@pytest.mark.slow
def test_every_float(codec: Codec) -> None:
    values, levels = formats.squares_of_4bit(), formats.levels_of_4bit()
    ties = midpoints(levels).float()
    for first in range(0, int(torch.tensor(1.5).view(torch.int32)) + 1, 1 << 24):
        x = torch.arange(first, first + (1 << 24), dtype=torch.int32).view(torch.float32)
        x = x[x <= 1.5]
        want = torch.bucketize(x.double(), midpoints(values), right=True).to(torch.uint8)
        assert torch.equal(codec.squares(x), want)
        for y in (x[x <= 1], -x[x <= 1]):
            want = torch.bucketize(y, ties).to(torch.uint8)  # a tie gets the lower one,
            is_tie = y == ties[want.long().clamp_max(14)]
            want += (is_tie & (want % 2 == 0)).to(torch.uint8)  # but an even number of steps
            assert torch.equal(codec.levels(y, 8.0), want)


# Each breaks one thing that the codec must do.
MUTANTS = {
    "truncated": ("kHalf = 1u << (kShift - 1)", "kHalf = 0"),
    "rarely rounded up": ("hash >> (32 - kShift)", "hash >> (33 - kShift)"),
    "no last code": ("rounded > kLast ? kLast : rounded", "rounded"),
    "no first code": ("rounded < kFirst ? kFirst :", ""),
    "units forgotten": ("unit / scale", "1.0f / scale"),
    "a scale of any size": ("exact < 0x1p125f ? round_up_to_bits<0>(exact) : 0x1p125f",
                            "round_up_to_bits<0>(exact)"),
    "a scale that is no power of two": ("round_up_to_bits<0>", "round_up_to_bits<7>"),
    "minus eight": ("steps < -7 ? 0u : ", ""),
    "cut at seven eighths": ("if (needed > ", "if (1e30f * needed < "),
    "a scale that moves": ("1.0f + 0x1p-20f", "1.0f"),
    "a scale of 24 bits": ("+ 4u) & ~7u", "+ 0u)"),
    "a scale of 16 bits": ("+ 4u) & ~7u", "+ 64u) & ~127u"),
    "the wrong sign": ("if (!is_positive)", "if (is_positive)"),
    "steps of a coarse grid": ("kFine = 0x1.8p7f", "kFine = 0x1.8p8f"),
    "levels rarely rounded up": ("hash >> 16", "hash >> 17"),
    "an infinite inverse": ("kLeast = 0x1p-123f", "kLeast = 0x1p-126f"),
    "a wrong root": ("0x401cc471u", "0x401cc470u"),
    "a rounded reciprocal of the exact root": ("0x3ed105ebu", "0x3ed105ecu"),
    "no root without a scale": ("127 + 7", "127"),
}  # fmt: skip


# In the common run: that a test can fail.
COMMON_MUTANTS = ("truncated", "cut at seven eighths", "a wrong root")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COMMON_MUTANTS else pytest.mark.thorough)
        for name in MUTANTS
    ],
)
def test_the_tests_fail_for_a_mutant(name: str, tmp_path: Path) -> None:
    old, new = MUTANTS[name]
    csrc = tmp_path / "csrc"
    for folder in ("formats", "codec", "rules"):
        shutil.copytree(CSRC / folder, csrc / folder)
    shutil.copy(CSRC / "macros.h", csrc)
    header = csrc / "formats/four_bit.h"
    text = header.read_text()
    assert old in text, f"{name}: the source has changed"
    header.write_text(text.replace(old, new))
    codec = Codec(csrc)
    with pytest.raises(AssertionError):
        check_all(codec)


def check_all(codec: Codec) -> None:
    test_values(codec)
    test_nearest_squares(codec)
    test_drawn_squares(codec)
    test_levels(codec)
    test_drawn_levels(codec)
    test_scales_of_levels(codec)
    test_no_quotient_is_cut(codec)
    test_stored_levels_stay(codec, 0.1)
    test_scales_of_squares(codec, 0.1)
    test_an_extreme_square_gets_the_last_codes(codec)
    test_roots(codec)
