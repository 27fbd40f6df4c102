"""A gradient that is NaN, infinite or too large to square changes nothing but what is beside it."""

import math
from typing import Any

import pytest
import reference
import torch
from adam_call import (
    DTYPES,
    FLOATS,
    MOMENTS,
    Call,
    assert_same_bits,
    copy_call,
    is_signed,
    live_state,
    moment,
    moved,
    new_call,
    run,
    sample_call,
    set_moment,
    tensors,
)
from codec_reference import encoded_range
from helpers import bits
from torch import Tensor

both_formats = pytest.mark.parametrize("state_bits", [8, 32])
both_decays = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])

BAD = [math.nan, -math.nan, math.inf, -math.inf, 1e25, -3e38]
PLACES = [(0, 0), (0, 15), (0, 255), (0, 256), (1, 16), (2, 299), (2, 100)]


def bad_and_zero(
    bad: float, dtype: torch.dtype, grad_dtype: torch.dtype, **options: Any
) -> tuple[Call, Call, Call]:
    """A call with the bad gradient at PLACES, before and after; and one with a gradient of 0 there.

    The moments at PLACES are small beside those of their block, so that no scale depends on them.
    Run on the device of the options, and given on the CPU.
    """
    call = new_call(tensors(dtype, [(3, 300)]), tensors(grad_dtype, [(3, 300)]), **options)
    live_state(call)
    for name in MOMENTS[: 3 if call["max_exp_avg_sqs"] else 2]:
        value = moment(call, name, 0).float()
        for k, place in enumerate(PLACES):
            value[place] = 1e-3 * value.abs().max() * (1 + k / 10)
        set_moment(call, name, 0, value)
    zero = copy_call(call)
    for place in PLACES:
        call["grads"][0][place] = bad
        zero["grads"][0][place] = 0.0
    before = moved(call, "cpu")
    return before, moved(run(call), "cpu"), moved(run(zero), "cpu")


def bad_mask() -> Tensor:
    mask = torch.zeros(3, 300, dtype=torch.bool)
    for place in PLACES:
        mask[place] = True
    return mask


@both_decays
@pytest.mark.parametrize("bad", BAD, ids=str)
@both_formats
def test_a_bad_gradient_stays_where_it_is(
    state_bits: int, bad: float, decoupled: bool, device: str
) -> None:
    """Its parameter keeps its bits, its moments their value; all else is as if it were 0."""
    there = bad_mask()
    for dtype, grad_dtype in DTYPES:
        if grad_dtype == torch.float16 and math.isfinite(bad):
            continue  # float16 has no such number
        for amsgrad in (False, True):
            before, after, zero = bad_and_zero(
                bad, dtype, grad_dtype, state_bits=state_bits, amsgrad=amsgrad, weight_decay=0.3,
                decoupled_weight_decay=decoupled, stochastic_rounding=amsgrad, device=device,
            )  # fmt: skip
            assert bits(after["params"][0][there]) == bits(before["params"][0][there])
            assert bits(after["params"][0][~there]) == bits(zero["params"][0][~there])
            assert not torch.equal(after["params"][0], before["params"][0])
            for name in MOMENTS[: 3 if amsgrad else 2]:
                same = after[f"{name}s"][0], zero[f"{name}s"][0]
                assert bits(same[0][~there]) == bits(same[1][~there])
                if state_bits == 32:
                    assert bits(same[0][there]) == bits(before[f"{name}s"][0][there])
                    continue
                assert bits(after[f"{name}_scales"][0]) == bits(zero[f"{name}_scales"][0])
                want = moment(before, name, 0)
                error = torch.where(there, 2.0**-22 * want.abs(), math.inf)
                assert_kept(after, name, want, there, error)


def assert_kept(call: Call, name: str, want: Tensor, there: Tensor, error: Tensor) -> None:
    """Moments that were kept are stored as the codec stores that value in the new block."""
    codes, scale = call[f"{name}s"][0].long(), call[f"{name}_scales"][0].double()
    per_element = reference.expand_scale(scale, tuple(codes.shape), call["block_size"])
    low, high = encoded_range(is_signed(name), call["stochastic_rounding"] and not is_signed(name))
    first, last = low[codes] * per_element, high[codes] * per_element
    first, last = torch.minimum(first, last), torch.maximum(first, last)
    assert ((first - error <= want) & (want <= last + error))[there].all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("at_extreme", [True, False])
def test_neighbours_of_a_bad_gradient_in_all_bits(
    at_extreme: bool, dtype: torch.dtype, device: str
) -> None:
    """As if its gradient had left its moments where they are, even where it holds the scales.

    With m = 2, v = 4, a gradient of 2 and both betas 1/2 all of this is exact in float32, so a run
    with that gradient has the same codes and scales, of the bad element too.
    """
    place = (1, 40)
    grad = torch.rand(3, 300) - 0.5
    m, v = torch.rand(3, 300) - 0.5, torch.rand(3, 300)
    m[place], v[place] = 2.0, 4.0
    if not at_extreme:
        m[1, 41], v[1, 41], grad[1, 41] = -9.0, 100.0, 9.0
        m[place], v[place] = 0.0, 0.0
    param = torch.randn(3, 300).to(dtype)
    call = new_call([param], [grad.to(dtype)], beta1=0.5, beta2=0.5, device=device)
    set_moment(call, "exp_avg", 0, m)
    set_moment(call, "exp_avg_sq", 0, v)
    quiet = copy_call(call)
    quiet["grads"][0][place] = 2.0 if at_extreme else 0.0
    run(quiet)
    for bad in (math.nan, math.inf, -math.inf):
        noisy = copy_call(call)
        noisy["grads"][0][place] = bad
        old = noisy["params"][0][place].item()
        run(noisy)
        assert noisy["params"][0][place] == old
        noisy["params"][0][place] = quiet["params"][0][place]
        assert_same_bits(noisy, quiet)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@both_formats
def test_nothing_but_bad_gradients(state_bits: int, dtype: torch.dtype, device: str) -> None:
    """Whole tensors of them, many times over: parameters keep their bits, and moments their value,
    up to requantization. That costs the scales at most a rounding each way, 2^-23, at each step."""
    times = 50
    call = sample_call(dtype, state_bits=state_bits, weight_decay=0.5, stochastic_rounding=False,
                       device=device)  # fmt: skip
    before = copy_call(call)
    for g in call["grads"]:
        g.fill_(math.nan)
    for _ in range(times):
        run(call)
    assert [bits(p) for p in call["params"]] == [bits(p) for p in before["params"]]
    for name in ("exp_avg", "exp_avg_sq"):
        for i in range(len(call["params"])):
            got, want = moment(call, name, i), moment(before, name, i)
            torch.testing.assert_close(got, want, rtol=times * 2.0**-23, atol=0)


def test_gradients_up_to_where_their_square_overflows(device: str) -> None:
    """2^62 is used as it is. From 2^63 on it depends on the format, which multiplies the square by
    1 - beta2 before or after; from 2^68 on the square is out of range in both."""
    for grad, moves in [(2.0**62, True), (-(2.0**62), True), (2.0**68, False), (-3e38, False)]:
        for state_bits in (8, 32):
            g = torch.full((2, 256), grad)
            call = new_call([torch.zeros(2, 256)], [g], state_bits=state_bits, lr=1.0, eps=0.0,
                            device=device)  # fmt: skip
            run(call)
            # The first step of Adam is lr in the direction of the gradient.
            want = torch.full((2, 256), -math.copysign(1.0, grad) if moves else 0.0)
            torch.testing.assert_close(call["params"][0].cpu(), want, rtol=1e-6, atol=0)
