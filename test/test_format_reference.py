"""The oracles of mu-law and of 4-bit codes are what the formats promise.

Codecs are compared with them by bits; so they are held to closed formulas, to searches over all
values, and to the properties that training needs: no second moment is rounded to zero, stochastic
rounding has no bias, a state at rest keeps its scale and its codes.
"""

import math

import format_reference as formats
import pytest
import reference
import torch

LAWS = pytest.mark.parametrize("law", [formats.COARSE, formats.FINE], ids=["coarse", "fine"])
SIGNS = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


@LAWS
@SIGNS
def test_values_follow_the_formula(law: formats.MuLaw, signed: bool) -> None:
    m = law.mantissa(signed)
    codes = range(128 if signed else 256)
    want = [2.0 ** (c // 2**m) * (1 + c % 2**m / 2**m) - 1 for c in codes]
    assert formats.magnitudes(law, signed).tolist() == want
    # The bits of the float32 1 + value are the code, then zeros.
    bits = (1 + formats.magnitudes(law, signed)).float().view(torch.int32)
    assert (((bits - (127 << 23)) >> (23 - m)) == torch.arange(len(codes))).all()
    assert ((bits & ((1 << (23 - m)) - 1)) == 0).all()


def test_ranges() -> None:
    tops = [formats.top(law, s) for law in (formats.COARSE, formats.FINE) for s in (True, False)]
    assert tops == [247, 63487, 14.75, 251]


@LAWS
@SIGNS
def test_every_code_comes_back(law: formats.MuLaw, signed: bool) -> None:
    values, codes = formats.codebook(law, signed), torch.arange(256, dtype=torch.uint8)
    first = 0 if signed else 1  # a live block has no code 0 of a second moment
    assert (formats.nearest_code(law, values, signed)[first:] == codes[first:]).all()
    for draw in (0, 2 ** (23 - law.mantissa(signed)) - 1):
        drawn = formats.drawn_code(law, values, signed, torch.full((256,), draw))
        assert (drawn[first:] == codes[first:]).all()


@LAWS
@SIGNS
def test_nearest_is_nearest(law: formats.MuLaw, signed: bool) -> None:
    """By a search over all values; a number may lie on the other side of a midpoint by no more than
    the rounding of 1 + y to float32."""
    generator = torch.Generator().manual_seed(1)
    y = torch.rand(20_000, generator=generator).double() ** 4 * formats.top(law, signed)
    y[::2] *= -1 if signed else 1
    distance = (y[:, None] - formats.codebook(law, signed)).abs()
    if not signed:
        distance[:, 0] = math.inf
    chosen = distance.gather(1, formats.nearest_code(law, y, signed).long()[:, None]).squeeze(1)
    assert (chosen <= distance.amin(1) + (1 + y.abs()) * 2.0**-24).all()


@LAWS
def test_no_second_moment_becomes_zero(law: formats.MuLaw) -> None:
    y = torch.tensor([2.0**-k for k in range(149)] + [0.0])
    bits = 23 - law.unsigned
    assert (formats.nearest_code(law, y, False) >= 1).all()
    assert (formats.drawn_code(law, y, False, torch.zeros(150)) >= 1).all()
    assert (formats.drawn_code(law, y, False, torch.full((150,), 2**bits - 1)) >= 1).all()
    assert (formats.nearest_code(law, torch.zeros(3), False, live=False) == 0).all()


@LAWS
@SIGNS
def test_stochastic_rounding_has_no_bias(law: formats.MuLaw, signed: bool) -> None:
    """Over all draws the mean is the number itself, up to the rounding of 1 + y to float32."""
    m = law.mantissa(signed)
    draws = torch.arange(2 ** (23 - m))
    values, least = formats.codebook(law, signed), 2.0**-m
    sign = -1 if signed else 1
    for y in (1.3 * least, 3.141, 14.6):
        codes = formats.drawn_code(law, torch.full(draws.shape, sign * y), signed, draws)
        mean = float(values[codes.long()].mean())
        # y itself is a float32, too.
        assert abs(mean - sign * y) <= 2 * (1 + y) * 2.0**-24
    small = formats.drawn_code(law, torch.full(draws.shape, least / 3), signed, draws)
    mean = float(values[small.long()].mean())
    assert mean == pytest.approx(least / 3 if signed else least, rel=2.0**-15)


@pytest.mark.parametrize("bits", [0, 7])
def test_scales_are_rounded_up(bits: int) -> None:
    for mantissa in range(1, 2**bits + 1):
        scale = 1 + (mantissa - 1) / 2**bits
        for exponent in (-100, -1, 0, 40):
            exact = math.ldexp(scale, exponent)
            next_one = exact + math.ldexp(1.0, exponent - bits)
            assert formats.round_up(exact, bits) == exact
            assert formats.round_up(exact * (1 + 2.0**-18), bits) == exact
            assert formats.round_up(exact * (1 + 2.0**-14), bits) == next_one
            assert formats.round_up(next_one * (1 - 2.0**-20), bits) == next_one


@LAWS
@SIGNS
@pytest.mark.parametrize("still", [True, False])
@pytest.mark.parametrize("unit", [1.0, 0.1, 1 - 0.95, 1 - 0.999, 1 - 0.9999])
def test_a_state_at_rest_keeps_its_scale(
    law: formats.MuLaw, signed: bool, still: bool, unit: float
) -> None:
    """Stored numbers times the decay of a state that rests, 1 / unit, rounded as a step does."""
    f32, top = formats.float32, formats.top(law, signed)
    for mantissa in range(1 if still else 128):
        scale = 1 + mantissa / 128
        extreme = f32(top * f32(f32(1 / f32(unit)) * scale))
        assert formats.mulaw_scale(law, extreme, unit, signed, still) == scale


@LAWS
@SIGNS
@pytest.mark.parametrize("still", [True, False])
def test_a_scale_reaches_the_extreme(law: formats.MuLaw, signed: bool, still: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    for extreme in torch.rand(500, generator=generator).mul(60).sub(30).exp().tolist():
        scale = formats.mulaw_scale(law, extreme, 0.1, signed, still)
        reached = scale * formats.top(law, signed) / (extreme * formats.float32(0.1))
        assert 1 - 2.0**-16 <= reached <= (2 if still else 1 + 2.0**-6)
    assert formats.mulaw_scale(law, 0.0, 0.1, signed, still) == 0
    assert formats.mulaw_scale(law, 1e-38, 1e-3, signed, still) == 0


def test_codes_of_squares_in_4_bits() -> None:
    values = formats.squares_of_4bit()
    bits = ((torch.arange(16) << 22) + (120 << 23)).to(torch.int32)
    assert (bits.view(torch.float32).double() == values).all()
    assert (formats.nearest_square(values) == torch.arange(16)).all()
    for draw in (0, 2**22 - 1):
        assert (formats.drawn_square(values, torch.full((16,), draw)) == torch.arange(16)).all()
    tiny = torch.tensor([0.0, 1e-30, values[0].item() / 2])
    assert (formats.drawn_square(tiny, torch.full((3,), 2**22 - 1)) == 0).all()
    draws = torch.arange(2**22)
    for y in (0.011, 1.4):
        codes = formats.drawn_square(torch.full(draws.shape, y, dtype=torch.float64), draws)
        assert float(values[codes.long()].mean()) == pytest.approx(y, rel=2.0**-20)


def test_scales_of_squares_in_4_bits() -> None:
    for extreme in (1e-30, 0.01, 0.74, 0.75, 0.76, 1.0, 1.5, 1.51, 3e20):
        scale = formats.scale_of_squares(extreme)
        assert math.frexp(scale)[0] == 0.5
        assert 0.75 < extreme / scale <= 1.5 * (1 + 2.0**-16)
    assert formats.scale_of_squares(1e-40) == formats.scale_of_squares(0.0) == 0


@pytest.mark.parametrize(
    ("highest", "lowest", "scale"),
    [(3.0, -2.5, 3.0), (0.1, -0.2, -0.2), (3.0, -3.0, 24 / 7), (2.7, -3.0, -21.6 / 7)],
)
def test_levels_in_4_bits(highest: float, lowest: float, scale: float) -> None:
    """All numbers are off by half a step at most. Zero is exact, and so are the highest and the
    lowest one where the scale is made of them."""
    highest, lowest = formats.float32(highest), formats.float32(lowest)
    found = formats.scale_of_levels(highest, lowest)
    assert found == pytest.approx(scale, rel=2.0**-20)
    y = torch.linspace(lowest, highest, 10_001, dtype=torch.float64)
    nibbles = formats.nearest_level(y, found)
    back = formats.levels_of_4bit()[nibbles.long()] * found
    assert ((back - y).abs() <= abs(found) / 16 * (1 + 1e-5)).all()
    ends = torch.tensor([highest, lowest, 0.0], dtype=torch.float64)
    codes = formats.nearest_level(ends, found)
    assert codes[2] == 7
    assert 15 in codes if abs(found) in ends.abs() else 0 in codes
    assert formats.nearest_level(y, 0.0).unique().tolist() == [7]


def test_roots_in_4_bits() -> None:
    """A root scales with every second power of two, so that a table of two rows has them all."""
    nibbles = torch.arange(16, dtype=torch.uint8)
    for exponent in (-120, -7, 0, 8, 61):
        even = 2.0 ** (exponent // 2)
        want = formats.roots(nibbles, 2.0 ** (exponent % 2)) * even
        assert (formats.roots(nibbles, 2.0**exponent) == want).all()


@pytest.mark.parametrize(
    "shape", [(3, 300), (5, 257), (2, 3, 77), (64, 3, 1, 1), (4097,), (4, 0), (0, 5), (7, 1000)]
)
def test_packing(shape: tuple[int, ...]) -> None:
    """Rows are packed by themselves, so that any of them can be cut off."""
    k = reference.row_dims(shape, 64)
    generator = torch.Generator().manual_seed(3)
    nibbles = torch.randint(16, shape, dtype=torch.uint8, generator=generator)
    packed = formats.pack(nibbles, k, 7)
    assert tuple(packed.shape) == formats.packed_shape(shape, k)
    assert (formats.unpack(packed, shape, k) == nibbles).all()
    if k > 0 and shape[0] > 1:
        parts = [formats.pack(part, k, 7) for part in nibbles.split(1)]
        assert (torch.cat(parts) == packed).all()
    length = math.prod(shape[k:])
    if length % 2 and packed.numel():
        assert (packed[..., -1] // 16 == 7).all()
