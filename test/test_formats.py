"""The records of the formats of state: their keys, tensors and conversions, each against another.

What optimizers do with them is in the tests of states, checkpoints and conversions.
"""

import math

import pytest
import torch
from helpers import bits
from optim_table import OF_8_BITS

from torchao8.block_layout import Scales
from torchao8.optim._state.blocks import Portion
from torchao8.optim._state.formats import FLOAT32, FORMATS, Format, format_in
from torchao8.optim._state.spec import BESIDE_STATES, State
from torchao8.optim.contract import states_under

EVERY_FORMAT = pytest.mark.parametrize("found", FORMATS.values(), ids=list(FORMATS))
SHAPES = [(3, 300), (64, 3, 3, 3), (4097,), (8, 256), (64, 3, 1, 1)]
STATES = (State("exp_avg", True), State("exp_avg_sq", False), State("sum", False, initial=0.5))


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
    for state in STATES:
        specs = found.specs(state, shape, scales)
        assert len(specs) == len(found.keys(state)) == len(found.kinds(state))
        total = found.nbytes(math.prod(shape), math.prod(scales.shape(shape)))
        assert sum(spec.nbytes for spec in specs) == total
        assert [spec.is_scale for spec in specs] == [
            kind == "scales" for kind in found.kinds(state)
        ]
    assert found.is_quantized == (found.bits < 32)


@EVERY_FORMAT
@pytest.mark.parametrize("block_wise", [True, False])
def test_fresh_state_is_what_a_rule_starts_from(found: Format, block_wise: bool) -> None:
    p, scales = torch.ones(3, 300), Scales(64, block_wise)
    values = {
        key: spec.empty(p)
        for state in STATES
        for key, spec in zip(found.keys(state), found.specs(state, (3, 300), scales), strict=True)
    }
    moments = found.decode(STATES, values, Portion(None, scales))
    for state in STATES:
        assert bits(moments[state.name]) == bits(torch.full((3, 300), state.initial))


@EVERY_FORMAT
@pytest.mark.parametrize("shape", SHAPES)
def test_what_a_format_can_hold_comes_back(found: Format, shape: tuple[int, ...]) -> None:
    """Numbers that were rounded once are not rounded again."""
    generator = torch.Generator().manual_seed(1)
    portion = Portion(None, Scales(64))
    moments = {
        state.name: torch.randn(shape, generator=generator).abs() * (-1 if state.signed else 1)
        for state in STATES
    }
    first = found.encode(STATES, moments, portion)
    specs = {
        key: spec
        for state in STATES
        for key, spec in zip(found.keys(state), found.specs(state, shape, Scales(64)), strict=True)
    }
    assert {k: (v.dtype, tuple(v.shape)) for k, v in first.items()} == {
        key: (spec.dtype, spec.shape) for key, spec in specs.items()
    }
    second = found.encode(STATES, found.decode(STATES, first, portion), portion)
    assert {key: bits(value) for key, value in first.items()} == {
        key: bits(value) for key, value in second.items()
    }
