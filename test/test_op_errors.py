"""Bad arguments of adam_step_: the message names them, and no byte of any argument changes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import bits, report
from torch import Tensor


def call_arguments(quantized: bool) -> dict[str, Any]:
    """Arguments of adam_step_ that fit each other, for two parameters."""
    params = [torch.randn(3, 300), torch.randn(700)]
    lists: dict[str, Any] = {
        "params": params,
        "grads": [torch.randn_like(p) for p in params],
        "steps": [torch.tensor(4.0) for _ in params],
        "factors": [torch.ones(2, dtype=torch.float64) for _ in params],
        "extremes": [],
    }
    for name, zero in (("exp_avg", 127), ("exp_avg_sq", 0)):
        if quantized:
            lists[f"{name}s"] = [torch.full(p.shape, zero, dtype=torch.uint8) for p in params]
            lists[f"{name}_scales"] = scales_of_blocks()
        else:
            lists[f"{name}s"] = [torch.zeros(p.shape) for p in params]
            lists[f"{name}_scales"] = []
    options = {"decoupled_weight_decay": True, "maximize": False}
    numbers = torch.tensor(NUMBERS, dtype=torch.float64)
    return {**lists, "max_exp_avg_sqs": [], "max_exp_avg_sq_scales": [], "lr": torch.tensor(0.1),
            "numbers": numbers, "grad_scale": None, "found_inf": None, **options}  # fmt: skip


# beta1, beta2, eps and weight_decay
NUMBERS = (0.9, 0.999, 1e-8, 0.1)


def scales_of_blocks() -> list[Tensor]:
    return [torch.zeros(s) for s in ((3, 2), (3,))]


def one_scale(arguments: dict[str, Any]) -> list[Tensor]:
    """Gives the states one scale each, and returns extremes that fit."""
    for name in ("exp_avg_scales", "exp_avg_sq_scales"):
        arguments[name] = [torch.zeros(1) for _ in arguments[name]]
    return [torch.ones(2, dtype=torch.int64) for _ in arguments["params"]]


def put(
    name: str, make: Callable[[], Any], index: int | None = 1
) -> Callable[[dict[str, Any]], None]:
    """Replaces an argument, or the last element of a list."""

    def apply(arguments: dict[str, Any]) -> None:
        if index is None:
            arguments[name] = make()
        else:
            arguments[name][index] = make()

    return apply


def put_number(index: int, value: float) -> Callable[[dict[str, Any]], None]:
    """Replaces a number of the rule; on the CPU, where a number is looked at."""
    numbers = [*NUMBERS[:index], value, *NUMBERS[index + 1 :]]
    return put("numbers", lambda: torch.tensor(numbers, dtype=torch.float64, device="cpu"), None)


BAD_CALLS: dict[str, Callable[[dict[str, Any]], None]] = {
    "grads shorter": lambda a: a["grads"].pop(),
    "steps shorter": lambda a: a["steps"].pop(),
    "exp_avgs longer": lambda a: a["exp_avgs"].append(a["exp_avgs"][0]),
    "exp_avg_sqs empty": lambda a: a["exp_avg_sqs"].clear(),
    "scales missing": lambda a: a["exp_avg_sq_scales"].clear(),
    "scales shorter": lambda a: a["exp_avg_scales"].pop(),
    "max of one": lambda a: a["max_exp_avg_sqs"].append(a["exp_avg_sqs"][0]),
    "codes int8": put("exp_avg_sqs", lambda: torch.zeros(700, dtype=torch.int8)),
    "codes of the other format": put("exp_avgs", lambda: torch.zeros(700)),
    "codes of another shape": put("exp_avgs", lambda: torch.zeros(699, dtype=torch.uint8)),
    "codes not contiguous": put("exp_avgs", lambda: torch.zeros(1400, dtype=torch.uint8)[::2]),
    "scale in double": put("exp_avg_scales", lambda: torch.zeros(3, dtype=torch.float64)),
    "scale of another shape": put("exp_avg_scales", lambda: torch.zeros(1, 3)),
    "scale not contiguous": put("exp_avg_sq_scales", lambda: torch.zeros(6)[::2]),
    "param in double": put("params", lambda: torch.zeros(700, dtype=torch.float64)),
    "param overlapping": put("params", lambda: torch.zeros(1).expand(700)),
    "param sparse": put("params", lambda: torch.zeros(700).to_sparse()),
    "grad complex": put("grads", lambda: torch.zeros(700, dtype=torch.complex64)),
    "grad of another shape": put("grads", lambda: torch.zeros(7, 100)),
    "grad on meta": put("grads", lambda: torch.zeros(700, device="meta")),
    "grad sparse": put("grads", lambda: torch.zeros(700).to_sparse()),
    "codes on meta": put("exp_avgs", lambda: torch.zeros(700, dtype=torch.uint8, device="meta")),
    "step an integer": put("steps", lambda: torch.tensor(4)),
    "step of two": put("steps", lambda: torch.zeros(2)),
    "factors shorter": lambda a: a["factors"].pop(),
    "factors in float": put("factors", lambda: torch.ones(2)),
    "factor of one": put("factors", lambda: torch.ones(1, dtype=torch.float64)),
    "factors not contiguous": put("factors", lambda: torch.ones(4, dtype=torch.float64)[::2]),
    "extremes shorter": lambda a: a.update(extremes=one_scale(a)[:1]),
    "extremes in int32": lambda a: a.update(extremes=[t.int() for t in one_scale(a)]),
    "extremes of one state": lambda a: a.update(extremes=[t[:1] for t in one_scale(a)]),
    "extremes not contiguous": lambda a: a.update(
        extremes=[t.repeat_interleave(2)[::2] for t in one_scale(a)]
    ),
    "extremes above 32 bits": lambda a: a.update(extremes=[t + 2**32 for t in one_scale(a)]),
    "extremes and a scale a block": lambda a: a.update(
        extremes=one_scale(a), exp_avg_scales=scales_of_blocks()
    ),
    "one scale without extremes": lambda a: (one_scale(a), None)[1],
    "lr of two": put("lr", lambda: torch.zeros(2), None),
    "lr an integer": put("lr", lambda: torch.tensor(1), None),
    "lr NaN": put("lr", lambda: torch.tensor(torch.nan, device="cpu"), None),
    "lr infinite": put("lr", lambda: torch.tensor(torch.inf, device="cpu"), None),
    "numbers in float": put("numbers", lambda: torch.tensor(NUMBERS), None),
    "numbers of three": put("numbers", lambda: torch.zeros(3, dtype=torch.float64), None),
    "numbers not contiguous": put(
        "numbers", lambda: torch.zeros(8, dtype=torch.float64)[::2], None
    ),
    "beta1 of one": put_number(0, 1.0),
    "beta2 below zero": put_number(1, -0.5),
    "eps below zero": put_number(2, -1.0),
    "weight_decay below zero": put_number(3, -1.0),
    "block size": put("block_size", lambda: 100, None),
}


def spoiled_call(name: str, device: str) -> dict[str, Any]:
    with torch.device(device):
        arguments = call_arguments(quantized=True)
        BAD_CALLS[name](arguments)
    return arguments


def argument_bits(arguments: dict[str, Any]) -> dict[str, Any]:
    def one(value: Any) -> Any:
        if isinstance(value, Tensor):
            return bits(value) if value.layout is torch.strided and not value.is_meta else None
        return [one(v) for v in value] if isinstance(value, list) else value

    return {name: one(value) for name, value in arguments.items()}


# These get to the checks of torchao8/portable, whatever the device: the kernels are for dense ones.
BY_DISPATCHER = ("param sparse", "grad sparse")
# On a GPU these are taken: its kernels check no number.
ON_THE_CPU = ("extremes above 32 bits",)


def refusal(name: str, device: str = "cpu") -> str:
    """The message, which starts with the op, without the stack that torch may add to it."""
    arguments = spoiled_call(name, device)
    with pytest.raises(RuntimeError) as info:
        torch.ops.torchao8.adam_step_(**arguments)
    text = str(info.value).split("\n")[0]
    assert text.startswith("adam_step_: ")
    return text


def test_messages_of_the_op(assert_expected_inline: Callable[[str, str], None]) -> None:
    """On the CPU. Those of a GPU are compared with them in test_cuda.py."""
    lines = [f"{name}: {refusal(name)}" for name in BAD_CALLS]
    assert_expected_inline(
        report(lines),
        """\
grads shorter: adam_step_: grads must have 2 elements (one per parameter), got 1
steps shorter: adam_step_: steps must have 2 elements (one per parameter), got 1
exp_avgs longer: adam_step_: exp_avgs must have 2 elements (one per parameter), got 3
exp_avg_sqs empty: adam_step_: exp_avg_sqs must have 2 elements (one per parameter), got 0
scales missing: adam_step_: exp_avg_sq_scales must have 2 elements (one per parameter,
    exp_avgs[0] being uint8), got 0
scales shorter: adam_step_: exp_avg_scales must have 2 elements (one per parameter,
    exp_avgs[0] being uint8), got 1
max of one: adam_step_: max_exp_avg_sqs must have 2 elements (one per parameter), got 1
codes int8: adam_step_: exp_avg_sqs[1] must be uint8, got int8
codes of the other format: adam_step_: exp_avgs[1] must be uint8, got float32
codes of another shape: adam_step_: exp_avgs[1] must have shape [700] (that of the parameter),
    got [699]
codes not contiguous: adam_step_: exp_avgs[1] must be contiguous, got strides [2] for shape
    [700]
scale in double: adam_step_: exp_avg_scales[1] must be float32, got float64
scale of another shape: adam_step_: exp_avg_scales[1] must have shape [3] (one scale per block
    of a row), got [1, 3]
scale not contiguous: adam_step_: exp_avg_sq_scales[1] must be contiguous, got strides [2] for
    shape [3]
param in double: adam_step_: params[1] must be float32, bfloat16 or float16, got float64
param overlapping: adam_step_: params[1] is updated in place and must not overlap itself, as
    it may with strides [0] for shape [700]
param sparse: adam_step_: params[1] must be dense, got layout torch.sparse_coo
grad complex: adam_step_: grads[1] must be float32, bfloat16 or float16, got complex64
grad of another shape: adam_step_: grads[1] must have shape [700] (that of the parameter), got
    [7, 100]
grad on meta: adam_step_: expected all tensors on cpu, as params[0], got one on meta
grad sparse: adam_step_: grads[1] must be dense, got layout torch.sparse_coo
codes on meta: adam_step_: expected all tensors on cpu, as params[0], got one on meta
step an integer: adam_step_: steps[1] must be float32, got int64
step of two: adam_step_: steps[1] must have one element, got shape [2]
factors shorter: adam_step_: factors must have 2 elements (none, or one per parameter), got 1
factors in float: adam_step_: factors[1] must be float64, got float32
factor of one: adam_step_: factors[1] must have shape [2] (of the gradient and of the learning
    rate), got [1]
factors not contiguous: adam_step_: factors[1] must be contiguous, got strides [2] for shape
    [2]
extremes shorter: adam_step_: extremes must have 2 elements (none, or one per parameter), got
    1
extremes in int32: adam_step_: extremes[0] must be int64, got int32
extremes of one state: adam_step_: extremes[0] must have shape [2] (one for each state), got
    [1]
extremes not contiguous: adam_step_: extremes[0] must be contiguous, got strides [2] for shape
    [2]
extremes above 32 bits: adam_step_: extremes[0] must hold numbers from 0 to 2^32 - 1, got
    4294967297
extremes and a scale a block: adam_step_: exp_avg_scales[0] must have shape [1] (one scale for
    the tensor), got [3, 2]
one scale without extremes: adam_step_: exp_avg_scales[0] must have shape [3, 2] (one scale
    per block of a row), got [1]
lr of two: adam_step_: lr must have one element, got shape [2]
lr an integer: adam_step_: lr must be float32 or float64, got int64
lr NaN: adam_step_: lr must be finite, got nan
lr infinite: adam_step_: lr must be finite, got inf
numbers in float: adam_step_: numbers must be float64, got float32
numbers of three: adam_step_: numbers must have shape [4] (one for each number of the rule),
    got [3]
numbers not contiguous: adam_step_: numbers must be contiguous, got strides [2] for shape [4]
beta1 of one: adam_step_: beta1 must be in [0, 1), got 1
beta2 below zero: adam_step_: beta2 must be in [0, 1), got -0.5
eps below zero: adam_step_: eps must not be negative, got -1
weight_decay below zero: adam_step_: weight_decay must not be negative, got -1
block size: adam_step_: block_size must be a power of two from 64 to 2048, got 100""",
    )


@pytest.mark.parametrize("name", list(BAD_CALLS))
def test_a_refused_call_changes_nothing(name: str, device: str) -> None:
    """The first parameter of each list is a good one: it too must stay as it is."""
    if name in ON_THE_CPU and device != "cpu":
        pytest.skip("nobody reads these numbers on a GPU")
    arguments = spoiled_call(name, device)
    before = argument_bits(arguments)
    with pytest.raises(RuntimeError):
        torch.ops.torchao8.adam_step_(**arguments)
    assert argument_bits(arguments) == before


@pytest.mark.parametrize("quantized", [True, False])
def test_the_call_that_the_others_spoil_is_good(quantized: bool, device: str) -> None:
    with torch.device(device):
        arguments = call_arguments(quantized)
    before = argument_bits(arguments)
    torch.ops.torchao8.adam_step_(**arguments)
    after = argument_bits(arguments)
    changed = {name for name in before if after[name] != before[name]}
    scales = {"exp_avg_scales", "exp_avg_sq_scales"} if quantized else set()
    assert changed == {"params", "exp_avgs", "exp_avg_sqs"} | scales
