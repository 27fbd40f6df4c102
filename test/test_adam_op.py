"""The op adam_step_: its arithmetic against float64, its arguments, strides, torch's opcheck."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import reference
import reference_rules
import torch
from adam_call import (
    DTYPES,
    FLOATS,
    MOMENTS,
    Call,
    assert_same_bits,
    call_bits,
    copy_call,
    is_signed,
    live_state,
    moment,
    moved,
    new_call,
    one_by_one,
    op_arguments,
    run,
    run_op,
    sample_call,
    tensors,
)
from codec_reference import ZERO_CODE, encoded_range
from helpers import bits
from torch import Tensor

from torchao8 import ops

both_formats = pytest.mark.parametrize("state_bits", [8, 32])
both_decays = pytest.mark.parametrize("decoupled", [True, False], ids=["decoupled", "coupled"])


# -- against the oracle ------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decoupled decay": {"weight_decay": 0.3, "lr": 0.5},
    "coupled decay": {"weight_decay": 0.3, "decoupled_weight_decay": False},
    "amsgrad": {"amsgrad": True, "beta2": 0.9, "weight_decay": 0.1},
    "amsgrad coupled": {"amsgrad": True, "weight_decay": 0.1, "decoupled_weight_decay": False},
    "maximize": {"maximize": True, "weight_decay": 0.3},
    "maximize coupled": {"maximize": True, "weight_decay": 0.3, "decoupled_weight_decay": False},
    "scaled": {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)},
    "scaled coupled": {
        "grad_scale": torch.tensor(0.3), "weight_decay": 0.3, "decoupled_weight_decay": False,
        "maximize": True,
    },
    "no momentum": {"beta1": 0.0, "eps": 0.1},
    "no memory": {"beta1": 0.0, "beta2": 0.0},
    "no eps": {"eps": 0.0},
    "small blocks": {"block_size": 64},
    "large blocks": {"block_size": 1024, "amsgrad": True},
    "nearest": {"stochastic_rounding": False},
    "nearest amsgrad": {"stochastic_rounding": False, "amsgrad": True, "beta1": 0.99},
    "large lr": {"lr": 1e4},
    "decay beyond zero": {"lr": 3.0, "weight_decay": 0.6},
    "small lr": {"lr": 1e-12, "lr_dtype": torch.float64},
}  # fmt: skip


def oracle_step(call: Call, i: int) -> reference_rules.Result:
    """Of a call on the CPU."""
    scale = call["grad_scale"]
    options = {name: call[name] for name in ("eps", "weight_decay", "decoupled_weight_decay")}
    options |= {"lr": call["lr"].item(), "betas": (call["beta1"], call["beta2"])}
    options |= {"amsgrad": bool(call["max_exp_avg_sqs"]), "maximize": call["maximize"]}
    states = {name: moment(call, name, i) for name in names_of(call)}
    grad = call["grads"][i].double() / (1.0 if scale is None else scale.double().item())
    step = int(call["steps"][i]) + 1
    return reference_rules.adam(call["params"][i].double(), grad, states, step, options, False)


def names_of(call: Call) -> Sequence[str]:
    return MOMENTS[: 3 if call["max_exp_avg_sqs"] else 2]


def assert_close(got: Tensor, want: Tensor, error: Tensor) -> None:
    """The float32 result is rounded once more to the dtype, by half a unit in the last place."""
    info = torch.finfo(got.dtype)
    limit = error + info.smallest_normal * info.eps
    if got.dtype != torch.float32:
        limit = limit + info.eps / 2 * want.abs()
    assert ((got.double() - want).abs() <= limit).all()


def assert_stored(call: Call, name: str, i: int, want: Tensor, error: Tensor) -> None:
    """A stored moment is the oracle's but for float32 rounding, and for that of its format."""
    if not call[f"{name}_scales"]:
        assert ((call[f"{name}s"][i].double() - want).abs() <= error + 2.0**-149).all()
        return
    signed, block_size = is_signed(name), call["block_size"]
    codes, scale = call[f"{name}s"][i].long(), call[f"{name}_scales"][i].double()
    block_error = reference.block_scale(error, block_size) + 2.0**-126
    # Which of two elements that differ by rounding alone is the extreme one, and so the sign of the
    # scale, is open: the magnitudes must agree, and what each code stands for.
    extreme = reference.block_scale(want, block_size)
    assert ((scale.abs() - extreme.abs()).abs() <= block_error).all()
    per_element = reference.expand_scale(scale, tuple(codes.shape), block_size)
    live = per_element != 0
    assert (codes[~live] == ZERO_CODE[signed]).all()
    y, slack = (want / per_element)[live], (error / per_element.abs())[live] + 2.0**-22
    low, high = encoded_range(signed, stochastic=call["stochastic_rounding"] and not signed)
    code = codes[live]
    assert (low[code] - slack * (y.abs() + 1) <= y).all()
    assert (y <= high[code] + slack * (y.abs() + 1)).all()
    if not signed:
        assert (code[want[live] > error[live]] > 0).all()
    has_extreme = torch.zeros(scale.numel(), dtype=torch.bool)
    block = reference.block_of_element(tuple(codes.shape), block_size)
    has_extreme[block[codes == 255]] = True
    assert torch.equal(has_extreme, scale.flatten() != 0)


def assert_step_is_the_oracles(call: Call) -> None:
    """Runs a call on any device. The oracle computes on the CPU."""
    before = moved(call, "cpu")
    after = moved(run(call), "cpu")
    for i in range(len(before["params"])):
        want = oracle_step(before, i)
        assert_close(after["params"][i], want.param, want.param_error)
        assert after["steps"][i] == before["steps"][i] + 1
        for name in names_of(after):
            assert_stored(after, name, i, want.states[name], want.errors[name])
    assert [bits(g) for g in after["grads"]] == [bits(g) for g in before["grads"]]


@both_formats
@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_step_is_that_of_the_oracle(name: str, state_bits: int, device: str) -> None:
    call = sample_call(state_bits=state_bits, device=device, **OPTIONS[name])
    assert_step_is_the_oracles(call)


@both_formats
@both_decays
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_dtypes(
    dtype: torch.dtype, grad_dtype: torch.dtype, decoupled: bool, state_bits: int, device: str
) -> None:
    call = sample_call(dtype, grad_dtype, state_bits=state_bits, weight_decay=0.3,
                       decoupled_weight_decay=decoupled, device=device)  # fmt: skip
    assert_step_is_the_oracles(call)


@both_formats
def test_dtypes_mixed_in_a_call(state_bits: int, device: str) -> None:
    params = [tensors(p, [(3, 300)])[0] for p, _ in DTYPES]
    grads = [tensors(g, [(3, 300)])[0] for _, g in DTYPES]
    call = new_call(params, grads, state_bits=state_bits, weight_decay=0.1, device=device)
    live_state(call)
    separate = copy_call(call)
    assert_step_is_the_oracles(call)
    for single in one_by_one(separate):
        run(single)
    assert_same_bits(separate, call)


@pytest.mark.parametrize("name", ["decoupled decay", "amsgrad coupled", "no momentum"])
def test_steps_from_the_beginning(name: str, device: str) -> None:
    """Each step is held against float64 from the state before it, so no error adds up."""
    for state_bits in (8, 32):
        call = new_call(tensors(), tensors(), state_bits=state_bits, device=device, **OPTIONS[name])
        for _ in range(5):
            assert_step_is_the_oracles(call)
            call["grads"] = [g.to(device) for g in tensors()]
        assert all(step == 5 for step in call["steps"])


# -- arguments that are tensors ----------------------------------------------------------------


@both_formats
@pytest.mark.parametrize("name", ["decoupled decay", "maximize coupled", "amsgrad"])
@pytest.mark.parametrize("exponent", [16, -5])
def test_gradients_times_a_power_of_two_give_the_same_bits(
    exponent: int, name: str, state_bits: int, device: str
) -> None:
    plain = sample_call(state_bits=state_bits, device=device, **OPTIONS[name])
    for dtype in (torch.float32, torch.float64):
        scaled = copy_call(plain)
        scaled["grads"] = [g * 2.0**exponent for g in scaled["grads"]]
        scaled["grad_scale"] = torch.tensor(2.0**exponent, dtype=dtype, device=device)
        assert_same_bits(run(scaled), run(copy_call(plain)))


@both_formats
@pytest.mark.parametrize("found_inf", [1.0, 3.0, math.inf, math.nan])
def test_found_inf_changes_nothing(found_inf: float, state_bits: int, device: str) -> None:
    call = sample_call(state_bits=state_bits, amsgrad=True, weight_decay=0.5, device=device)
    before = call_bits(call)
    call["found_inf"] = torch.tensor(found_inf, device=device)
    assert call_bits(run(call)) == before
    call["found_inf"].zero_()
    after = call_bits(run(call))
    assert all(after[name] != before[name] for name in ("params", "exp_avgs", "steps"))


@both_formats
def test_the_op_counts_its_steps(state_bits: int, device: str) -> None:
    """As count_step_ does behind it; and nothing where found_inf forbids the step."""
    call = sample_call(state_bits=state_bits, device=device)
    counted = copy_call(call)
    run_op(counted, count_steps=True)
    assert_same_bits(counted, run(call))
    before = call_bits(counted)
    counted["found_inf"] = torch.ones((), device=device)
    run_op(counted, count_steps=True)
    assert call_bits(counted) == before


def test_a_step_count_that_two_entries_share_is_not_counted_twice(device: str) -> None:
    call = sample_call(device=device)
    call["steps"] = [call["steps"][0]] * len(call["steps"])
    before = call_bits(call)
    with pytest.raises(RuntimeError, match=r"steps\[0\] and steps\[1\] must be different tensors"):
        run_op(call, count_steps=True)
    assert call_bits(call) == before
    run_op(call)


@both_formats
def test_found_inf_of_zero_is_none(state_bits: int, device: str) -> None:
    call = sample_call(state_bits=state_bits, device=device)
    zero = copy_call(call) | {"found_inf": torch.zeros(1, device=device)}
    assert_same_bits(run(zero), run(call))


@both_formats
def test_lr_is_float32_or_float64(state_bits: int, device: str) -> None:
    """The same number, the same bits; and 0.1 is taken as the float64 that it is."""
    options = {"state_bits": state_bits, "weight_decay": 0.1, "device": device}
    call = sample_call(lr=0.0625, **options)
    double = copy_call(call) | {"lr": call["lr"].double()}
    assert_same_bits(run(double), run(call))
    for dtype in (torch.float32, torch.float64):
        assert_step_is_the_oracles(sample_call(lr=0.1, lr_dtype=dtype, **options))


@both_formats
@both_decays
def test_lr_of_zero_leaves_parameters_alone(decoupled: bool, state_bits: int, device: str) -> None:
    call = sample_call(state_bits=state_bits, lr=0.0, weight_decay=0.5, eps=0.0,
                       decoupled_weight_decay=decoupled, device=device)  # fmt: skip
    before = copy_call(call)
    run(call)
    assert all(torch.equal(a, b) for a, b in zip(call["params"], before["params"], strict=True))
    assert bits(call["exp_avgs"][0]) != bits(before["exp_avgs"][0])


@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("amsgrad", [True, False])
@both_formats
def test_zero_gradients_from_the_beginning(
    state_bits: int, amsgrad: bool, eps: float, device: str
) -> None:
    """State initialization by a step with zero gradients and lr 0; then the same with an lr."""
    params = tensors()
    call = new_call(params, [torch.zeros_like(p) for p in params], state_bits=state_bits, lr=0.0,
                    amsgrad=amsgrad, eps=eps, device=device)  # fmt: skip
    for lr in (0.0, 0.1):
        before = call_bits(call)
        call["lr"].fill_(lr)
        after = call_bits(run(call))
        assert after.pop("steps") != before.pop("steps")
        assert after == before
    assert all(step == 2 for step in call["steps"])


@both_formats
def test_each_tensor_has_its_step(state_bits: int, device: str) -> None:
    """The first bias correction differs from the thousandth, in one call as in two."""
    p, g = torch.randn(3, 300), torch.randn(3, 300)
    call = new_call([p.clone(), p.clone()], [g, g], state_bits=state_bits, step=[0, 999],
                    device=device)  # fmt: skip
    live_state(call)
    assert_step_is_the_oracles(call)
    assert [s.item() for s in call["steps"]] == [1, 1000]
    assert not torch.equal(*call["params"])


def test_no_tensors_at_all(device: str) -> None:
    run(new_call([], [], device=device))


# -- strides -----------------------------------------------------------------------------------

# Views of (40, 300), as (base, view).
VIEWS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "contiguous": ((40, 300), lambda b: b),
    "odd offset": ((12001,), lambda b: b[1:].view(40, 300)),
    "transposed": ((300, 40), lambda b: b.t()),
    "column slice": ((40, 700), lambda b: b[:, 3:303]),
    "every third": ((40, 900), lambda b: b[:, ::3]),
    "every other row": ((80, 300), lambda b: b[1::2]),
}
EXPANDED: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "expanded rows": ((1, 300), lambda b: b.expand(40, 300)),
    "expanded columns": ((40, 1), lambda b: b.expand(40, 300)),
    "one number": ((), lambda b: b.expand(40, 300)),
}


def strided_call(
    param_view: str, grad_view: str, dtype: torch.dtype, device: str, **options: Any
) -> Call:
    """A call on views."""
    base, view = VIEWS[param_view]
    grad_base, grad_view_of = {**VIEWS, **EXPANDED}[grad_view]
    params = [view(torch.randn(base).to(device, dtype))]
    grads = [grad_view_of(torch.randn(grad_base).to(device, dtype))]
    return live_state(new_call(params, grads, device=device, **options))


def assert_strides_do_not_matter(call: Call) -> None:
    dense = copy_call(call)
    for name in ("params", "grads"):
        dense[name] = [t.clone(memory_format=torch.contiguous_format) for t in call[name]]
    base = call["params"][0]._base
    whole = None if base is None else base.clone()
    strides = call["params"][0].stride()
    run(call)
    assert_same_bits(call, run(dense))
    assert call["params"][0].stride() == strides
    if base is None or whole is None:
        return
    # What lies between the elements of the view stays as it was.
    seen = torch.zeros_like(base, dtype=torch.bool)
    seen.as_strided(call["params"][0].shape, strides, call["params"][0].storage_offset()).fill_(
        True
    )
    assert torch.equal(base[~seen], whole[~seen])


@both_formats
@pytest.mark.parametrize("param_view", list(VIEWS))
def test_strided_params(param_view: str, state_bits: int, device: str) -> None:
    for dtype in FLOATS:
        for grad_view in ("contiguous", "transposed", "odd offset"):
            call = strided_call(param_view, grad_view, dtype, device, state_bits=state_bits,
                                weight_decay=0.1)  # fmt: skip
            assert_strides_do_not_matter(call)


@both_formats
@pytest.mark.parametrize("grad_view", [*VIEWS, *EXPANDED])
def test_strided_grads(grad_view: str, state_bits: int, device: str) -> None:
    for dtype in FLOATS:
        call = strided_call("contiguous", grad_view, dtype, device, state_bits=state_bits,
                            amsgrad=True, decoupled_weight_decay=False,
                            weight_decay=0.1)  # fmt: skip
        assert_strides_do_not_matter(call)


@both_formats
def test_channels_last(state_bits: int, device: str) -> None:
    param = torch.randn(4, 6, 9, 5).to(memory_format=torch.channels_last)
    grad = torch.randn(4, 6, 9, 5).permute(0, 1, 2, 3)
    for g in (grad, grad.to(memory_format=torch.channels_last)):
        call = new_call([param.clone()], [g], state_bits=state_bits, weight_decay=0.1,
                        device=device)  # fmt: skip
        live_state(call)
        assert not call["params"][0].is_contiguous()
        assert_strides_do_not_matter(call)


# -- what torch asks of an op ------------------------------------------------------------------

ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor",
              "test_aot_dispatch_dynamic")  # fmt: skip


@both_formats
@pytest.mark.parametrize("name", ["plain", "amsgrad coupled", "scaled", "nearest"])
def test_opcheck_adam_step(name: str, state_bits: int, device: str) -> None:
    params = tensors(torch.bfloat16, [(3, 300), (64,)])
    call = new_call(params, tensors(shapes=[(3, 300), (64,)]), state_bits=state_bits,
                    shard_offsets=[600, 0], shard_row_strides=[300, 64], device=device,
                    **OPTIONS[name])  # fmt: skip
    live_state(call)
    op = torch.ops.torchao8.adam_step_.default
    positional = [a.name for a in op._schema.arguments if not a.kwarg_only]
    arguments = op_arguments(call)
    args = tuple(arguments[n] for n in positional)
    kwargs = {n: v for n, v in arguments.items() if n not in positional}
    torch.library.opcheck(op, args, kwargs, test_utils=ALL_CHECKS)


@pytest.mark.parametrize("shape", [(3, 300), (0, 4), (), (2, 3, 70)], ids=str)
@pytest.mark.parametrize("signed", [True, False])
def test_opcheck_codec(shape: tuple[int, ...], signed: bool, device: str) -> None:
    for dtype in FLOATS:
        x = torch.rand(shape).to(device, dtype)
        options = {"block_size": 64, "signed": signed}
        op = torch.ops.torchao8.quantize_blockwise.default
        torch.library.opcheck(op, (x,), options, test_utils=ALL_CHECKS)
        op = torch.ops.torchao8.dequantize_blockwise.default
        quantized = ops.quantize_blockwise(x, block_size=64, signed=signed)
        torch.library.opcheck(op, quantized, {**options, "dtype": dtype}, test_utils=ALL_CHECKS)


def test_opcheck_cpu_capability() -> None:
    """It has no tensor to be dispatched by, so of the checks the schema's alone applies."""
    op = torch.ops.torchao8.cpu_capability.default
    torch.library.opcheck(op, (), test_utils="test_schema")
    assert ops.cpu_capability() in ("scalar", "avx2", "avx512", "portable")
