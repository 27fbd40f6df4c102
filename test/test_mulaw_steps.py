"""Steps on state in the mu-law format, and its codec as an op.

That every path gives the same bits is in test_paths.py; the codec by itself in test_mulaw_codec.py.
"""

import math
from typing import Any

import format_reference as formats
import pytest
import torch
from adam_call import (
    DYNAMIC,
    FOUR_BIT,
    MULAW,
    Call,
    assert_unbiased,
    copy_call,
    live_state,
    means_over_seeds,
    moment,
    new_call,
    refused,
    run,
    tensors,
)
from cpu_paths import Workers, every_path
from helpers import bits
from torch import Tensor

from torchao8 import dequantize_blockwise, ops, quantize_blockwise

LAW = formats.MuLaw(signed=4, unsigned=4)
both_kinds = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def test_the_list_of_formats() -> None:
    assert [(each.name, each.bits) for each in ops.FORMATS] == [
        ("dynamic", 8),
        ("mulaw", 8),
        ("4bit", 4),
    ]
    assert ops.FORMAT_NUMBERS == {"dynamic": DYNAMIC, "mulaw": MULAW, "4bit": FOUR_BIT}
    assert (DYNAMIC, MULAW, FOUR_BIT) == (0, 1, 2)


# -- the codec's ops -------------------------------------------------------------------------------


def rows_of_scale_one(y: Tensor, signed: bool) -> Tensor:
    """Rows that begin with the value of the last code, then 255 numbers."""
    y = torch.cat((y, y.new_zeros(-len(y) % 255))).view(-1, 255)
    return torch.cat((torch.full((len(y), 1), formats.top(LAW, signed)), y), 1)


@every_path
@both_kinds
def test_nearest_codes(workers: Workers, path: str, signed: bool) -> None:
    """Around each threshold, and every 4999th float up to the largest value."""
    top = int(torch.tensor(formats.top(LAW, signed)).view(torch.int32))
    steps = torch.arange(-40, 41, dtype=torch.int32)
    near = formats.thresholds(LAW, signed).float().view(torch.int32)[:, None] + steps
    y = torch.cat((near.flatten(), torch.arange(0, top + 1, 4999, dtype=torch.int32)))
    y = y.clamp(0, top).view(torch.float32)
    for x in (y, -y) if signed else (y,):
        check_nearest(workers, path, x, signed)


@pytest.mark.slow
@every_path
@both_kinds
def test_nearest_codes_of_every_float(workers: Workers, path: str, signed: bool) -> None:
    top = int(torch.tensor(formats.top(LAW, signed)).view(torch.int32))
    for first in range(0, top + 1, 1 << 24):
        last = min(top, first + (1 << 24) - 1)
        x = torch.arange(first, last + 1, dtype=torch.int32).view(torch.float32)
        check_nearest(workers, path, x, signed)


def check_nearest(workers: Workers, path: str, y: Tensor, signed: bool) -> None:
    x = rows_of_scale_one(y, signed)
    options = {"signed": signed, "state_format": MULAW}
    codes, scale = workers.get(path)("quantize", x, options)
    assert torch.frombuffer(bytearray(scale), dtype=torch.float32).eq(1).all()
    reached = torch.bucketize(x.abs().double(), formats.thresholds(LAW, signed), right=True)
    want = reached + 128 * x.signbit() if signed else reached.clamp_min(1)
    got = torch.frombuffer(bytearray(codes), dtype=torch.uint8).view(x.shape)
    assert torch.equal(got, want.to(torch.uint8))


@both_kinds
@pytest.mark.parametrize("exponent", [-149, -130, -126, -110, -20, 0, 90, 125, 127])
def test_scales_of_blocks(exponent: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(exponent + 200)
    x = torch.ldexp(torch.rand(500, 64, generator=generator) + 0.5, torch.tensor(exponent))
    codes, scale = quantize_blockwise(x, block_size=64, signed=signed, state_format="mulaw")
    # The scale of a quarter, for a number that no step leaves.
    factor = 4.0 if exponent > 120 else 1.0
    for row, found in zip(x.tolist(), scale.flatten().tolist(), strict=True):
        want = formats.mulaw_scale(LAW, max(row) / factor, 1.0, signed, still=not signed)
        assert found == want * factor
    values = dequantize_blockwise(codes, scale, block_size=64, signed=signed, state_format="mulaw")
    step = 2.0**-4 * (x.double() + scale.double()) * (1 + 2.0**-10)
    assert ((values.double() - x.double()).abs() <= step).logical_or(scale == 0).all()
    assert (codes[(scale == 0).flatten()] == 0).all()


@every_path
@both_kinds
def test_the_largest_floats_stay_finite(workers: Workers, path: str, signed: bool) -> None:
    x = torch.tensor([torch.finfo(torch.float32).max, 3.4e38, 3.39e38, 2.0**127]).expand(64, 4)
    options: dict[str, Any] = {"signed": signed, "state_format": "mulaw", "block_size": 64}
    for each in (x.mT.contiguous(), x.contiguous().view(4, 64)):
        codes, scale = quantize_blockwise(each, **options)
        numbers = {**options, "state_format": MULAW}
        found = workers.get(path)("quantize", each, numbers)
        assert found == [bits(codes), bits(scale)]
        values = dequantize_blockwise(codes, scale, **options)
        assert (values / each - 1).abs().max() < 2.0**-5


@both_kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite(bad: float, signed: bool) -> None:
    x = torch.ones(3, 64)
    x[1, 5] = bad
    codes, scale = quantize_blockwise(x, block_size=64, signed=signed, state_format="mulaw")
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert (codes[1] == 0).all()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [-1, 3, 2**40])
def test_a_number_of_no_format_is_refused(number: int) -> None:
    call = new_call([torch.ones(64)], [torch.ones(64)])
    refused(
        {**call, "state_format": number},
        "adam_step_: state_format must be the number of a format of state: 0 (dynamic), "
        f"1 (mulaw), 2 (4bit); got {number}",
    )


def test_a_format_of_float32_state_is_refused() -> None:
    call = new_call([torch.ones(64)], [torch.ones(64)], state_bits=32)
    message = "adam_step_: state_format must be 0 where states are float32, got 1"
    refused({**call, "state_format": MULAW}, message)


def test_an_unknown_name_is_refused() -> None:
    message = (
        "quantize_blockwise: state_format must be one of 'dynamic', 'mulaw', '4bit', got 'log'"
    )
    with pytest.raises(ValueError, match=message):
        quantize_blockwise(torch.ones(64), state_format="log")
    codes, scale = quantize_blockwise(torch.ones(64))
    with pytest.raises(ValueError, match="dequantize_blockwise: state_format must be one of"):
        dequantize_blockwise(codes, scale, state_format="log")


# -- steps -----------------------------------------------------------------------------------------

BETA1, BETA2 = 0.9, 0.999


def live_call(**options: Any) -> Call:
    """Tensors of all shapes, in the middle of a run."""
    torch.manual_seed(1)
    options = {"beta1": BETA1, "beta2": BETA2, "state_format": MULAW, **options}
    return live_state(new_call(tensors(), tensors(), step=10, **options))


def new_moments(call: Call, index: int) -> dict[str, Tensor]:
    """What a step would make of the moments, in float64."""
    g = call["grads"][index].double()
    m, v = (moment(call, name, index) for name in ("exp_avg", "exp_avg_sq"))
    return {
        "exp_avg": BETA1 * m + (1 - BETA1) * g,
        "exp_avg_sq": BETA2 * v + (1 - BETA2) * g * g,
    }


def scale_of_each(call: Call, name: str, index: int) -> Tensor:
    codes, scale = call[f"{name}s"][index], call[f"{name}_scales"][index]
    ones = torch.full(codes.shape, 1 << LAW.mantissa(name == "exp_avg"), dtype=torch.uint8)
    return dequantize_blockwise(
        ones, scale, signed=name == "exp_avg", state_format="mulaw"
    ).double()  # the value of the code behind a binade is the scale itself


@pytest.mark.parametrize("stochastic", [True, False])
def test_new_codes_are_next_to_the_new_moments(stochastic: bool) -> None:
    call = live_call(stochastic_rounding=stochastic)
    for _ in range(4):
        want = [new_moments(call, i) for i in range(len(call["params"]))]
        run(call)
        for i, each in enumerate(want):
            for name, exact in each.items():
                stored, scale = moment(call, name, i), scale_of_each(call, name, i)
                gap = 2.0**-4 * (exact.abs() + scale)  # between the codes around it, at most
                share = 1.0 if stochastic and name == "exp_avg_sq" else 0.5
                smallest = torch.where(stored == 2.0**-4 * scale, gap, 0.0)  # never zero
                error = (stored - exact).abs()
                assert (error <= gap * (share + 2.0**-10) + smallest).all()


@pytest.mark.parametrize("length", [32, 96, 256])
def test_no_place_of_a_block_is_left_out_of_its_bound(length: int) -> None:
    """Where the bound of a block misses its largest element, this one gets the last code."""
    places = torch.arange(0, length, 31)
    grad = torch.full((len(places), length), 1e-3)
    grad[torch.arange(len(places)), places] = 1.0
    call = new_call([torch.ones_like(grad)], [grad], beta1=BETA1, beta2=BETA2, state_format=MULAW)
    want = new_moments(call, 0)
    run(call)
    for name, exact in want.items():
        stored = moment(call, name, 0)[torch.arange(len(places)), places]
        largest = exact.amax(dim=1)
        assert (stored - largest).abs().le(largest * 2.0**-4).all(), name


def test_rounding_has_no_bias() -> None:
    call = live_call(beta1=BETA1)
    want = [new_moments(call, i)["exp_avg_sq"] for i in range(len(call["params"]))]
    means, one = means_over_seeds(call, "exp_avg_sq", rounds=400)
    for i, exact in enumerate(want):
        scale = scale_of_each(one, "exp_avg_sq", i)
        gap = 2.0**-4 * (exact + scale)
        above = exact > 2.0**-4 * scale  # what is below the first code gets that one
        assert_unbiased(((means[i] - exact) / gap)[above], rounds=400)


def test_second_moments_never_become_zero() -> None:
    call = live_call()
    for _ in range(20):
        run(call)
        call["grads"] = [g * 0.1 for g in call["grads"]]
    for codes, scale in zip(call["exp_avg_sqs"], call["exp_avg_sq_scales"], strict=True):
        live = scale_of_each(call, "exp_avg_sq", 0).new_tensor(scale.flatten().tolist()) > 0
        assert bool(live.all())
        assert (codes >= 1).all()


def test_scales_have_few_bits() -> None:
    call = live_call()
    for _ in range(3):
        run(call)
        for scale in call["exp_avg_sq_scales"]:
            assert (scale.view(torch.int32) % (1 << 23) == 0).all()
        for scale in call["exp_avg_scales"]:
            assert (scale.view(torch.int32) % (1 << 16) == 0).all()


def test_a_step_of_fresh_state_without_gradient_changes_no_state() -> None:
    params = tensors()
    call = new_call(params, [torch.zeros_like(p) for p in params], state_format=MULAW)
    before = copy_call(call)
    run(call)
    for name in ("exp_avgs", "exp_avg_scales", "exp_avg_sqs", "exp_avg_sq_scales"):
        assert all(bits(a) == bits(b) for a, b in zip(call[name], before[name], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_bad_gradient_stays_alone(bad: float) -> None:
    call = live_call()
    other = copy_call(call)
    kept = [moment(call, name, 0)[1, 7] for name in ("exp_avg", "exp_avg_sq")]
    param = float(call["params"][0][1, 7])
    call["grads"][0][1, 7] = bad
    other["grads"][0][1, 7] = 0.0
    run(call)
    run(other)
    assert float(call["params"][0][1, 7]) == param
    for name, value in zip(("exp_avg", "exp_avg_sq"), kept, strict=True):
        gap = 2.0**-4 * (value.abs() + scale_of_each(call, name, 0)[1, 7])
        assert (moment(call, name, 0)[1, 7] - value).abs() <= gap * (1 + 2.0**-10)
    call["params"][0][1, 7] = other["params"][0][1, 7] = 0.0
    assert all(bits(p) == bits(q) for p, q in zip(call["params"], other["params"], strict=True))


@pytest.mark.parametrize("scale", [math.nan, -1.0, math.inf, 2.0**126])
def test_a_corrupt_scale_stays_visible(scale: float) -> None:
    call = live_call()
    call["exp_avg_scales"][0][1, 0] = scale
    before = call["params"][0].clone()
    run(call)
    assert call["exp_avg_scales"][0][1, 0].isnan()
    assert (call["exp_avgs"][0][1, :256] == 0).all()
    assert torch.equal(call["params"][0][1, :256], before[1, :256])
    assert (call["params"][0][0] != before[0]).any()


# -- every rule ------------------------------------------------------------------------------------


def family_call(family: Any, state_format: int, flag: bool, has_optional: bool) -> dict[str, Any]:
    """A step of any rule in the middle of a run, with each number at a third."""
    generator = torch.Generator().manual_seed(4)
    shapes = [(5, 320), (700,), (3, 17)]
    params, grads = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(2))
    params[1], grads[1] = params[1].bfloat16(), grads[1].bfloat16()
    grads[0][2, 7] = math.nan
    values: list[list[Tensor]] = []
    scales: list[list[Tensor]] = []
    for state in family.states:
        if state.scalar:
            values.append([torch.tensor(0.5) for _ in shapes])
            continue
        there = has_optional or not state.optional
        each = [
            quantize_blockwise(
                x if state.signed else x.square(),
                signed=state.signed,
                state_format=ops.FORMATS[state_format].name,
            )
            for x in (torch.randn(s, generator=generator) for s in shapes)
        ]
        values.append([codes for codes, _ in each] if there else [])
        scales.append([scale for _, scale in each] if there else [])
    numbers = torch.full((len(family.numbers),), 1 / 3, dtype=torch.float64)
    return {
        "positional": [
            family.step_op, params, grads, values, scales,
            [torch.tensor(5.0) for _ in shapes], torch.tensor(0.01), numbers, torch.tensor(4.0),
            [], [], None,
        ],
        "named": {"state_format": state_format, **dict.fromkeys(family.flags, flag)},
    }  # fmt: skip


@pytest.mark.parametrize("path", ["avx2", "avx512"])
@pytest.mark.parametrize("has_optional", [True, False])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("family", ops.FAMILIES, ids=lambda family: family.name)
def test_every_rule_on_every_path(
    workers: Workers, path: str, family: Any, flag: bool, has_optional: bool
) -> None:
    call = family_call(family, MULAW, flag, has_optional)
    want = workers.get("scalar")("step", call, 3)
    assert workers.get(path)("step", call, 3) == want
    assert want[0] != bytes(call["positional"][1][0].numpy().tobytes())  # it has been stepped


@every_path
def test_the_sums_of_lamb(workers: Workers, path: str) -> None:
    """Those of what 32-bit state of the same moments gives, but for the order of roundings."""
    (family,) = (family for family in ops.FAMILIES if family.name == "adam")
    call = family_call(family, MULAW, flag=False, has_optional=False)["positional"]
    _, params, grads, values, scales, steps, _, numbers, grad_scale, *_ = call
    arguments = [params, grads, values[:2], scales[:2], steps, numbers, grad_scale]
    options = {"state_format": MULAW}
    found = workers.get(path)("lamb", arguments, options)
    assert found == workers.get("scalar")("lamb", arguments, options)
    arguments[2] = [
        [
            dequantize_blockwise(codes, scale, signed=signed, state_format="mulaw")
            for codes, scale in zip(values[s], scales[s], strict=True)
        ]
        for s, signed in enumerate((True, False))
    ]
    arguments[3] = [[], []]
    want = ops.norms(ops.lamb_update_sums(*arguments))
    rows = torch.frombuffer(bytearray(found[0]), dtype=torch.int64).view(len(params), -1)
    assert (ops.norms(rows) / want - 1).abs().max() < 1e-5
