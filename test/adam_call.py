"""Calls of the op adam_step_, as dictionaries of its arguments: made, copied, run, compared."""

import copy
from collections.abc import Sequence
from typing import Any

import format_reference as formats
import pytest
import reference
import torch
from helpers import bits
from torch import Tensor

import torchao8
from torchao8 import ops

Call = dict[str, Any]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
STATE_LISTS = tuple(f"{name}{part}" for name in MOMENTS for part in ("s", "_scales"))
NUMBERS = ops.NUMBERS["adam_step_"]
DYNAMIC, MULAW, FOUR_BIT = (ops.FORMAT_NUMBERS[name] for name in ("dynamic", "mulaw", "4bit"))
# A byte of codes of zero in fresh state, by the format: of signed states, and of unsigned ones.
ZEROS = {DYNAMIC: (127, 0), MULAW: (0, 0), FOUR_BIT: (0x77, 0)}
CHANGED = ("params", "steps", *STATE_LISTS)

# Rows around a block, a vector, rows of 17, one element, a scalar, nothing, rows of one element.
SHAPES = [(3, 300), (700,), (2, 3, 70), (5, 17), (1,), (), (2, 260), (0, 4), (300, 1)]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = [(p, g) for p in FLOATS for g in FLOATS if p == g or torch.float32 in (p, g)]

DEFAULTS: dict[str, Any] = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled_weight_decay": True,
    "maximize": False,
    "block_size": 256,
    "stochastic_rounding": True,
    "stochastic_params": False,
    "state_format": 0,
    "seed": 0,
    "factors": [],
    "extremes": [],
    "shard_offsets": [],
    "shard_row_strides": [],
}


def is_signed(name: str) -> bool:
    return name == "exp_avg"


def new_call(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    device: str = "cpu",
    state_bits: int = 8,
    amsgrad: bool = False,
    one_scale: bool = False,
    step: int | Sequence[int] = 0,
    lr: float = 0.01,
    lr_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Call:
    """Arguments with the state of parameters that have not been stepped, whatever ``step`` says.

    Parameters and gradients that lie on the device are taken as they are. With one scale for all of
    a tensor, ``extremes`` is None: found at each :func:`run`.
    """
    assert set(options) <= set(DEFAULTS) | {"grad_scale", "found_inf"}, options
    options = {**DEFAULTS, "grad_scale": None, "found_inf": None, **options}
    for name in ("grad_scale", "found_inf"):
        if options[name] is not None:
            options[name] = options[name].to(device)
    steps = [step] * len(params) if isinstance(step, int) else step
    call: Call = {
        "params": [p.to(device) for p in params],
        "grads": [g.to(device) for g in grads],
        "steps": [torch.tensor(float(s), device=device) for s in steps],
        "lr": torch.tensor(lr, dtype=lr_dtype, device=device),
        **{name: [] for name in STATE_LISTS},
        **options,
    }
    if one_scale and state_bits == 8:
        call["extremes"] = None
    for name in MOMENTS[: 3 if amsgrad else 2]:
        for p in params:
            if state_bits == 32:
                call[f"{name}s"].append(torch.zeros(p.shape, device=device))
                continue
            zero = ZEROS[options["state_format"]][0 if is_signed(name) else 1]
            shape = tuple(p.shape)
            if options["state_format"] == FOUR_BIT:
                shape = formats.packed_shape(
                    shape, reference.row_dims(shape, options["block_size"])
                )
            codes = torch.full(shape, zero, dtype=torch.uint8, device=device)
            shape = reference.scale_shape(tuple(p.shape), options["block_size"])
            shape = (1,) if one_scale else shape
            call[f"{name}s"].append(codes)
            call[f"{name}_scales"].append(torch.zeros(shape, device=device))
    return call


def set_moment(call: Call, name: str, index: int, value: Tensor) -> None:
    """Stores a moment, given on the CPU, in the format of the call. In 4 bits exp_avg is divided by
    the root of the exp_avg_sq that is there."""
    if not call[f"{name}_scales"]:
        call[f"{name}s"][index].copy_(value)
        return
    signed, shape = is_signed(name), value.shape
    if call["extremes"] is None:
        assert call["state_format"] == DYNAMIC
        codes, scale = reference.quantize(value.flatten(), max(value.numel(), 1), signed)
        codes, scale = codes.view(shape), scale if value.numel() else torch.zeros(1)
    else:
        if call["state_format"] == FOUR_BIT and signed:
            value = (value / roots(call, index)).float()
        codes, scale = torchao8.quantize_blockwise(
            value,
            block_size=call["block_size"],
            signed=signed,
            state_format=ops.FORMATS[call["state_format"]].name,
        )
    call[f"{name}s"][index].copy_(codes)
    call[f"{name}_scales"][index].copy_(scale)


def moment(call: Call, name: str, index: int) -> Tensor:
    """A stored moment, exactly, in float64 on the CPU."""
    if not call[f"{name}_scales"]:
        return call[f"{name}s"][index].cpu().double()
    codes, scale = call[f"{name}s"][index].cpu(), call[f"{name}_scales"][index].cpu()
    if call["state_format"] == FOUR_BIT:
        return _moment_of_4bit(call, name, index)
    every_code = torch.arange(256, dtype=torch.uint8)
    format_name = ops.FORMATS[call["state_format"]].name
    codebook = torchao8.dequantize_blockwise(
        every_code, torch.ones(1), signed=is_signed(name), state_format=format_name
    )
    values = codebook.double()[codes.long()]
    if scale.numel() == 1:
        return values * scale.double().reshape(())
    return values * reference.expand_scale(scale.double(), tuple(codes.shape), call["block_size"])


def nibbles(call: Call, name: str, index: int) -> Tensor:
    """The codes of a moment in 4 bits, one an element."""
    shape = tuple(call["params"][index].shape)
    codes = call[f"{name}s"][index].cpu()
    return formats.unpack(codes, shape, reference.row_dims(shape, call["block_size"]))


def scale_of_each(call: Call, name: str, index: int) -> Tensor:
    """The scale of each element, in float64 on the CPU."""
    shape = tuple(call["params"][index].shape)
    scale = call[f"{name}_scales"][index].cpu().double()
    return reference.expand_scale(scale, shape, call["block_size"])


def roots(call: Call, index: int) -> Tensor:
    """What exp_avg in 4 bits is divided by."""
    scale = scale_of_each(call, "exp_avg_sq", index)
    values = formats.squares_of_4bit()[nibbles(call, "exp_avg_sq", index).long()] * scale
    return torch.where(scale > 0, values.sqrt().float().double(), 1.0)


def _moment_of_4bit(call: Call, name: str, index: int) -> Tensor:
    codes, scale = nibbles(call, name, index).long(), scale_of_each(call, name, index)
    if is_signed(name):
        return formats.levels_of_4bit()[codes] * scale * roots(call, index)
    return formats.squares_of_4bit()[codes] * scale


def live_state(call: Call, seed: int = 0) -> Call:
    """Gives a call the moments of a run that has lasted: v of many magnitudes, |m| < sqrt(v)."""
    generator = torch.Generator().manual_seed(seed)
    for i, p in enumerate(call["params"]):
        root = 10.0 ** (-3 * torch.rand(p.shape, generator=generator))
        momentum = root * (2 * torch.rand(p.shape, generator=generator) - 1)
        set_moment(call, "exp_avg_sq", i, root**2)
        set_moment(call, "exp_avg", i, momentum)
        if call["max_exp_avg_sqs"]:
            larger = root**2 * (0.5 + torch.rand(p.shape, generator=generator))
            set_moment(call, "max_exp_avg_sq", i, larger)
    return call


def tensors(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Tensor]:
    """Numbers of three decades, one in 16 of them zero."""
    values = [torch.randn(s) * 10.0 ** (-3 * torch.rand(s)) for s in shapes]
    return [x.where(torch.rand(x.shape) > 1 / 16, 0.0).to(dtype) for x in values]


def sample_call(
    dtype: torch.dtype = torch.float32, grad_dtype: torch.dtype | None = None, **options: Any
) -> Call:
    """Tensors of all shapes, in the middle of a run, each at another step."""
    grads = tensors(grad_dtype or dtype)
    steps = [0, 1, 5, 10, 100, 1000, 3, 2, 40]
    return live_state(new_call(tensors(dtype), grads, step=steps, **options))


def copy_call(call: Call) -> Call:
    """A deep copy; strides, gaps and overlaps of the tensors stay."""
    return copy.deepcopy(call)


def moved_tensor(t: Tensor, device: str) -> Tensor:
    """A copy on a device, of the same strides, with what lies between the elements."""
    memory = t.as_strided((t.untyped_storage().nbytes() // t.itemsize,), (1,), 0)
    return memory.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


def moved(call: Call, device: str, numbers_too: bool = True) -> Call:
    """A copy on a device. Whether lr, grad_scale and found_inf go there, too."""
    numbers = ("lr", "grad_scale", "found_inf")

    def move(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [moved_tensor(t, device) if isinstance(t, Tensor) else t for t in value]
        stays = not isinstance(value, Tensor) or (name in numbers and not numbers_too)
        return value if stays else moved_tensor(value, device)

    return {name: move(name, value) for name, value in call.items()}


def op_arguments(call: Call) -> dict[str, Any]:
    """The arguments of the op, which takes the numbers of its rule in one tensor, on the CPU."""
    values = [call[name] for name in NUMBERS]
    others = {name: value for name, value in call.items() if name not in NUMBERS}
    return {**others, "numbers": torch.tensor(values, dtype=torch.float64)}


def extremes(call: Call) -> list[Tensor]:
    """What a step with one scale a tensor must know before."""
    names = ("params", "grads", "steps", "factors", "lr", "numbers", "grad_scale", *STATE_LISTS,
             "decoupled_weight_decay", "maximize", "state_format")  # fmt: skip
    arguments = op_arguments(call)
    found = torch.ops.torchao8.adam_extremes(**{name: arguments[name] for name in names})
    return list(found.unbind())


def run_op(call: Call, **options: bool) -> None:
    """The step alone, which counts nothing unless told to."""
    found = extremes(call) if call["extremes"] is None else call["extremes"]
    torch.ops.torchao8.adam_step_(**{**op_arguments(call), "extremes": found}, **options)


def run(call: Call) -> Call:
    run_op(call)
    ops.count_step_(call["steps"], call["found_inf"])
    return call


def one_by_one(call: Call) -> list[Call]:
    """A call for each parameter, on the same tensors."""
    lists = [name for name, value in call.items() if isinstance(value, list)]
    return [
        {**call, **{name: call[name][i : i + 1] for name in lists}}
        for i in range(len(call["params"]))
    ]


def call_bits(call: Call) -> dict[str, list[bytes]]:
    """The bytes of everything that a step may change."""
    return {name: [bits(t) for t in call[name]] for name in CHANGED}


def assert_same_bits(a: Call, b: Call) -> None:
    left, right = call_bits(a), call_bits(b)
    for name in CHANGED:
        assert left[name] == right[name], name


# -- what tests of a format have in common ---------------------------------------------------------


def refused(call: Call, message: str) -> None:
    """A step is refused in these words, and changes no parameter."""
    before = copy_call(call)
    with pytest.raises(RuntimeError) as error:
        run(call)
    assert str(error.value).split("\n")[0] == message
    assert all(bits(p) == bits(q) for p, q in zip(call["params"], before["params"], strict=True))


def means_over_seeds(call: Call, name: str, rounds: int) -> tuple[list[Tensor], Call]:
    """The means of a stored state after steps with as many seeds, and the call after the last."""
    total = [torch.zeros(p.shape, dtype=torch.float64) for p in call["params"]]
    for seed in range(rounds):
        one = copy_call({**call, "seed": seed})
        run(one)
        for i in range(len(total)):
            total[i] += moment(one, name, i)
    return [each / rounds for each in total], one


def assert_unbiased(deviation: Tensor, rounds: int) -> None:
    """Of means over seeds, in gaps between codes: at most half a gap by standard deviation, so 5 of
    its errors for each, and for the mean of all."""
    assert (deviation.abs() < 5 * 0.5 / rounds**0.5).all()
    if deviation.numel() > 100:
        assert deviation.mean().abs() < 5 * 0.5 / (rounds * deviation.numel()) ** 0.5
