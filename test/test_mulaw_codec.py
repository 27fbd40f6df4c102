"""The mu-law codec of csrc/formats gives the codes, values and scales of its oracle.

It is compiled as a library of its own, with each kind of codes and each number of mantissa bits.
"""

import ctypes
import math
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import format_reference as formats
import pytest
import torch
from compilers import CSRC, EMULATION, built, cpp_command
from torch import Tensor

ONE = 0x3F800000  # the bits of 1.0


class Codec:
    """The compiled codec of one kind; of a changed copy of the sources, in a folder of its own."""

    def __init__(self, law: formats.MuLaw, signed: bool, copy: Path | None = None) -> None:
        self.law = law
        self.signed = signed
        self.mantissa = law.mantissa(signed)
        flags = (f"-DSIGNED={int(signed)}", f"-DMANTISSA={self.mantissa}", "-shared", "-fPIC")
        command = cpp_command(copy or CSRC, "-O2", *flags, EMULATION / "mulaw_codec.cpp")
        if copy is None:
            library = built("mulaw_codec.so", command, [CSRC, EMULATION])
        else:
            library = copy / f"mulaw_codec_{int(signed)}.so"
            subprocess.run([*command, library], check=True)
        self.library = ctypes.CDLL(str(library))
        self.library.top.restype = ctypes.c_float

    def decode(self, codes: Tensor) -> Tensor:
        values = torch.empty(codes.shape)
        self.library.decode(_at(codes), ctypes.c_int64(len(codes)), _at(values))
        return values

    def encode(
        self, x: Tensor, draws: Tensor | None = None, inverse: float = 1.0, scale: float = 1.0
    ) -> Tensor:
        """Codes, rounded to nearest or by draws of 23 - M bits."""
        codes = torch.empty(x.shape, dtype=torch.uint8)
        hashes = None if draws is None else (draws << (9 + self.mantissa)).to(torch.uint32)
        where = None if hashes is None else _at(hashes)
        numbers = ctypes.c_float(inverse), ctypes.c_float(scale)
        self.library.encode(_at(x), where, ctypes.c_int64(x.numel()), *numbers, _at(codes))
        return codes

    def scales(self, extremes: Tensor, unit: float, still: bool) -> tuple[Tensor, Tensor]:
        scale, inverse = torch.empty(extremes.shape), torch.empty(extremes.shape)
        count, unit_ = ctypes.c_int64(len(extremes)), ctypes.c_float(unit)
        still_ = ctypes.c_bool(still)
        self.library.scales(_at(extremes), count, unit_, still_, _at(scale), _at(inverse))
        return scale, inverse


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.fixture(params=[formats.COARSE, formats.FINE], ids=["coarse", "fine"])
def law(request: pytest.FixtureRequest) -> formats.MuLaw:
    law: formats.MuLaw = request.param
    return law


@pytest.fixture(params=[True, False], ids=["signed", "unsigned"])
def codec(law: formats.MuLaw, request: pytest.FixtureRequest) -> Codec:
    return Codec(law, request.param)


def floats_from(first: int, last: int) -> Tensor:
    """All float32 numbers from these bits to those."""
    return torch.arange(first, last + 1, dtype=torch.int32).view(torch.float32)


def with_signs(codec: Codec, x: Tensor) -> Iterator[Tensor]:
    yield x
    if codec.signed:
        yield -x


def around_thresholds(codec: Codec) -> Tensor:
    """Every threshold and every value as a float32, and 40 floats on each side of it."""
    both = (formats.thresholds(codec.law, codec.signed),)
    both += (formats.magnitudes(codec.law, codec.signed)[1:],)
    bits = torch.cat(both).float().view(torch.int32)
    near = (bits[:, None] + torch.arange(-40, 41, dtype=torch.int32)).flatten().view(torch.float32)
    return near[near <= codec.library.top()]


def test_values(codec: Codec) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    want = formats.codebook(codec.law, codec.signed).float()
    assert codec.decode(codes).view(torch.int32).tolist() == want.view(torch.int32).tolist()
    assert codec.library.top() == formats.top(codec.law, codec.signed)


def test_nearest_codes_around_each_threshold(codec: Codec) -> None:
    for x in with_signs(codec, around_thresholds(codec)):
        assert (codec.encode(x) == formats.nearest_code(codec.law, x, codec.signed)).all()


def test_nearest_codes_of_all_magnitudes(codec: Codec) -> None:
    top = int(torch.tensor(codec.library.top()).view(torch.int32))
    some = torch.arange(0, top + 1, 4999, dtype=torch.int32).view(torch.float32)
    for x in with_signs(codec, some):
        assert (codec.encode(x) == formats.nearest_code(codec.law, x, codec.signed)).all()


@pytest.mark.slow
def test_nearest_codes_of_every_float(codec: Codec) -> None:
    top = int(torch.tensor(codec.library.top()).view(torch.int32))
    thresholds = formats.thresholds(codec.law, codec.signed)
    for first in range(0, top + 1, 1 << 24):
        x = floats_from(first, min(top, first + (1 << 24) - 1))
        want = torch.bucketize(x.double(), thresholds, right=True)
        want = want.clamp_min(0 if codec.signed else 1).to(torch.uint8)
        assert torch.equal(codec.encode(x), want)
        if codec.signed:
            assert torch.equal(codec.encode(-x), want + 128)


def test_drawn_codes(codec: Codec) -> None:
    """Around the draw at which each number is rounded up, and at the first and the last one."""
    generator = torch.Generator().manual_seed(1)
    bits, top = 23 - codec.mantissa, codec.library.top()
    x = torch.cat((torch.rand(3000, generator=generator).pow(6) * top, around_thresholds(codec)))
    _, fraction = formats.neighbours(codec.law, (1 + x).double() - 1, codec.signed)
    turn = (2**bits - fraction * 2**bits).long()
    for signed_x in with_signs(codec, x):
        for draws in (turn - 1, turn, torch.zeros_like(turn), torch.full_like(turn, 2**bits - 1)):
            draws = draws.clamp(0, 2**bits - 1)
            want = formats.drawn_code(codec.law, signed_x, codec.signed, draws)
            assert (codec.encode(signed_x, draws) == want).all()


def test_no_second_moment_becomes_zero(law: formats.MuLaw) -> None:
    codec = Codec(law, False)
    x = torch.tensor([0.0, 2.0**-149, 1e-30, 1e-8, 2.0**-9])
    for draws in (None, torch.zeros(5, dtype=torch.int64)):
        assert (codec.encode(x, draws) == 1).all()
        assert (codec.encode(x, draws, inverse=0.0, scale=0.0) == 0).all()


@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("unit", [1.0, 0.1, 1 - 0.999])
def test_scales(codec: Codec, still: bool, unit: float) -> None:
    generator = torch.Generator().manual_seed(2)
    some = torch.rand(2000, generator=generator).mul(160).sub(80).exp2()
    borders = torch.tensor([2.0**k * codec.library.top() / unit for k in range(-100, 100)])
    near = borders.view(torch.int32)[:, None] + torch.tensor([-300, -64, 0, 60, 70, 3000])
    near = near.to(torch.int32).flatten().view(torch.float32)
    extremes = torch.cat((some, near, torch.tensor([0.0, 1e-45, 1e-38])))
    scale, inverse = codec.scales(extremes, unit, still)
    for x, s, i in zip(extremes.tolist(), scale.tolist(), inverse.tolist(), strict=True):
        assert s == formats.mulaw_scale(codec.law, x, unit, codec.signed, still)
        assert i == (formats.float32(formats.float32(unit) / s) if s else 0.0)
    broken = torch.tensor([math.nan, math.inf, 2.0**126, -1.0])
    assert codec.scales(broken, unit, still)[0].isnan().all()


@pytest.mark.parametrize("still", [True, False])
def test_an_extreme_gets_the_last_codes(codec: Codec, still: bool) -> None:
    """It has a code, also where the tolerance of the scale has left it above the last value."""
    generator = torch.Generator().manual_seed(3)
    extremes = torch.rand(2000, generator=generator).mul(160).sub(80).exp2()
    top = torch.full((8,), codec.library.top()) * 2.0 ** torch.arange(8)
    extremes = torch.cat((extremes, top * (1 + 2.0**-18), top * (1 + 2.0**-23)))
    scale, inverse = codec.scales(extremes, 1.0, still)
    draws = torch.tensor([2 ** (23 - codec.mantissa) - 1])
    for x, s, i in zip(extremes.split(1), scale.tolist(), inverse.tolist(), strict=True):
        for codes in (codec.encode(x, None, i, s), codec.encode(x, draws, i, s)):
            value = float(codec.decode(codes)) * s
            step = 2.0**-codec.mantissa * (value + s)
            assert abs(value - float(x)) <= step * (1 + 2.0**-10)
            # A power of two may be twice as large as it would have to be: a binade.
            binade = 2**codec.mantissa if still else 2
            assert int(codes) >= (127 if codec.signed else 255) - binade


# Each breaks one thing that the codec must do.
MUTANTS = {
    "no last code": ("rounded < kLast ? rounded : kLast", "rounded"),
    "rounded to zero": ("!kSigned && scale > 0.0f", "0"),
    "truncated": ("kHalf = 1u << (kShift - 1)", "kHalf = 0"),
    "rarely rounded up": ("hash >> (32 - kShift)", "hash >> (33 - kShift)"),
    "no sign": ("float_bits(x) >> 31 << 7", "0u"),
    "a decoded sign lost": ("byte >> 7 << 31", "0u"),
    "a scale without tolerance": ("kTolerance = 64", "kTolerance = 0"),
    "a grid that moves": ("kStill ? 0 : 7", "7"),
    "units forgotten": ("unit / scale", "1.0f / scale"),
}


def check_all(csrc: Path) -> None:
    for signed in (True, False):
        codec = Codec(formats.COARSE, signed, csrc)
        test_values(codec)
        test_nearest_codes_around_each_threshold(codec)
        test_drawn_codes(codec)
        test_scales(codec, True, 0.1)
        test_an_extreme_gets_the_last_codes(codec, True)


# In the common run: that a test can fail.
COMMON_MUTANTS = ("truncated", "rounded to zero")


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
    shutil.copytree(CSRC, csrc)
    header = csrc / "formats/mulaw.h"
    text = header.read_text()
    assert old in text, f"{name}: the source has changed"
    header.write_text(text.replace(old, new))
    with pytest.raises(AssertionError):
        check_all(csrc)
