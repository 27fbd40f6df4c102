"""The records of the formats of state: their keys, tensors and conversions, each against another.

What optimizers do with them is in the tests of states, checkpoints and conversions.
"""

import math

import format_reference
import pytest
import torch
from helpers import bits
from optim_table import OF_8_BITS

from torchao8.block_layout import Scales, codes_shape, row_start
from torchao8.optim._state.blocks import Portion
from torchao8.optim._state.formats import FLOAT32, FORMATS, FOUR_BIT, MULAW, Format, format_in
from torchao8.optim._state.spec import BESIDE_STATES, State
from torchao8.optim.contract import states_under

EVERY_FORMAT = pytest.mark.parametrize("found", FORMATS.values(), ids=list(FORMATS))
SHAPES = [(3, 300), (64, 3, 3, 3), (4097,), (8, 256), (64, 3, 1, 1)]
STATES = (
    State("exp_avg", True, squares="exp_avg_sq"),
    State("exp_avg_sq", False),
    State("sum", False, initial=0.5),
)


def states_of(found: Format) -> tuple[State, ...]:
    """No rule with 4 bits has a state that begins elsewhere than at 0."""
    return STATES[:2] if found is FOUR_BIT else STATES


def portion_of(shape: tuple[int, ...], scales: Scales) -> Portion:
    return Portion(None, shape, scales)


def test_no_key_belongs_to_two_formats() -> None:
    """A checkpoint of one format must not load as another."""
    names = {
        state.name
        for case in OF_8_BITS
        for state in states_under(case.cls, {**case.base, **case.full})
        if not state.is_scalar
    }
    assert len(names) > 8
    keys = [key for each in FORMATS.values() for name in names for key in each.keys_of(name)]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set(BESIDE_STATES)


@EVERY_FORMAT
def test_the_keys_tell_the_format(found: Format) -> None:
    states = (State("mu_product", False, 1.0, is_scalar=True), *STATES)
    keys = [key for state in states for key in found.keys(state)]
    assert format_in(states, keys) is found
    assert format_in(states, ["step", "mu_product"]) is FLOAT32


@EVERY_FORMAT
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_kinds_are_those_of_the_tensors(found: Format, shape: tuple[int, ...]) -> None:
    scales = Scales(64)
    for state in states_of(found):
        specs = found.specs(state, shape, scales)
        assert len(specs) == len(found.keys(state)) == len(found.kinds(state))
        codes = math.prod(found.codes_shape(shape, 64))
        total = found.nbytes(codes, math.prod(scales.shape(shape)))
        assert sum(spec.nbytes for spec in specs) == total
        assert [spec.is_scale for spec in specs] == [
            kind == "scales" for kind in found.kinds(state)
        ]
    assert found.is_quantized == (found.bits < 32)


@EVERY_FORMAT
@pytest.mark.parametrize("block_wise", [True, False])
def test_fresh_state_is_what_a_rule_starts_from(found: Format, block_wise: bool) -> None:
    p, scales, states = torch.ones(3, 300), Scales(64, block_wise), states_of(found)
    values = {
        key: spec.empty(p)
        for state in states
        for key, spec in zip(found.keys(state), found.specs(state, (3, 300), scales), strict=True)
    }
    moments = found.decode(states, values, Portion.whole(p, scales))
    for state in states:
        assert bits(moments[state.name]) == bits(torch.full((3, 300), state.initial))


@EVERY_FORMAT
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_format_can_hold_comes_back(found: Format, shape: tuple[int, ...]) -> None:
    """Numbers that were rounded once are not rounded again, where the scale is the extreme element.
    A mulaw scale is rounded up itself, and another one may do for the rounded element."""
    generator = torch.Generator().manual_seed(1)
    portion, states = portion_of(shape, Scales(64)), states_of(found)
    moments = {
        state.name: torch.randn(shape, generator=generator).abs() * (-1 if state.signed else 1)
        for state in states
    }
    first = found.encode(states, moments, portion)
    found.check("p", states, first, portion)
    specs = {
        key: spec
        for state in states
        for key, spec in zip(found.keys(state), found.specs(state, shape, Scales(64)), strict=True)
    }
    assert {k: (v.dtype, tuple(v.shape)) for k, v in first.items()} == {
        key: (spec.dtype, spec.shape) for key, spec in specs.items()
    }
    once = found.decode(states, first, portion)
    second = found.encode(states, once, portion)
    if found is FOUR_BIT:  # the product with the root and the quotient by it are both rounded
        twice = found.decode(states, second, portion)
        assert bits(once["exp_avg_sq"]) == bits(twice["exp_avg_sq"])
        assert torch.allclose(once["exp_avg"], twice["exp_avg"], rtol=1e-6, atol=0)
    elif found is MULAW:
        twice = found.decode(states, second, portion)
        for name, value in once.items():
            gap = 2.0**-4 * (value.abs() + value.abs().max() / 247)
            assert ((twice[name] - value).abs() <= 0.51 * gap).all()
    else:
        assert {k: bits(v) for k, v in first.items()} == {k: bits(v) for k, v in second.items()}


# -- four bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 301), (64, 3, 3, 3), (4097,), (2, 130), (64, 3, 1, 1)])
def test_4_bits_are_those_of_the_oracle(shape: tuple[int, ...]) -> None:
    """Codes, scales and what is behind a row of odd length, block by block."""
    generator = torch.Generator().manual_seed(2)
    states, portion = STATES[:2], portion_of(shape, Scales(64))
    m = torch.randn(shape, generator=generator)
    v = m.square() * torch.rand(shape, generator=generator) ** 4 * 10
    values = FOUR_BIT.encode(states, {"exp_avg": m, "exp_avg_sq": v}, portion)
    k = row_start(shape, 64)
    rows = math.prod(shape[:k])
    nibbles = {"exp_avg": [], "exp_avg_sq": []}
    scales = {"exp_avg": [], "exp_avg_sq": []}
    for m_row, v_row in zip(m.reshape(rows, -1), v.reshape(rows, -1), strict=True):
        for m_block, v_block in zip(m_row.split(64), v_row.split(64), strict=True):
            scale = format_reference.scale_of_squares(float(v_block.max()))
            codes = format_reference.nearest_square(v_block.double() / scale)
            roots = format_reference.roots(codes, scale)
            quotients = m_block * (1 / roots.float())
            ends = float(quotients.max()), float(quotients.min())
            signed_scale = format_reference.scale_of_levels(*ends)
            levels = format_reference.nearest_level(quotients, signed_scale)
            for name, code, size in (
                ("exp_avg", levels, signed_scale),
                ("exp_avg_sq", codes, scale),
            ):
                nibbles[name].append(code)
                scales[name].append(size)
    for name, zero in (("exp_avg", 7), ("exp_avg_sq", 0)):
        want = format_reference.pack(torch.cat(nibbles[name]).view(shape), k, zero)
        assert tuple(want.shape) == codes_shape(shape, 64, 4)
        assert torch.equal(values[f"{name}_4bit"], want)
        assert values[f"{name}_4bit_scale"].flatten().tolist() == scales[name]


def test_a_first_moment_of_a_block_without_second_ones_is_kept() -> None:
    """Squares of gradients of 1e-25 are below the smallest scale."""
    portion = portion_of((1, 128), Scales(64))
    m = torch.linspace(-7e-26, 8e-26, 128).view(1, 128)
    moments = {"exp_avg": m, "exp_avg_sq": torch.full((1, 128), 1e-50)}
    found = FOUR_BIT.decode(STATES[:2], FOUR_BIT.encode(STATES[:2], moments, portion), portion)
    assert not found["exp_avg_sq"].any()
    assert ((found["exp_avg"] - m).abs() <= 0.51e-26).all()


def test_a_quotient_beyond_all_scales_becomes_the_largest() -> None:
    """Which no step leaves, but what others saved may."""
    portion = portion_of((64,), Scales(64))
    moments = {"exp_avg": torch.full((64,), 1e30), "exp_avg_sq": torch.full((64,), 1e-36)}
    values = FOUR_BIT.encode(STATES[:2], moments, portion)
    assert float(values["exp_avg_4bit_scale"]) == 2.0**125
