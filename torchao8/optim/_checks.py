"""Checks of options, parameters and gradients: what is wrong, what was expected, what came."""

import math
import sys
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import ops
from torchao8.sharding import is_dtensor, local

PARAM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_DTYPE_NAMES = "float32, bfloat16 or float16"
_TIED = (
    "Tied weights, as those of an embedding that is the output layer too, come up under two names "
    "where modules are listed one by one; model.parameters() has them once"
)
NO_FLOAT16 = (
    "expected bfloat16 or float32 under stochastic_rounding=True, which rounds the one and has "
    "nothing to do for the other, got torch.float16. Make it bfloat16, or give it a group without "
    "stochastic_rounding"
)


def is_int(value: object) -> bool:
    """An int in the sense of an option: True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, *, below: float | None = None, signed: bool = False
) -> None:
    """Raises ValueError unless ``value`` is a finite number >= 0, and less than ``below`` if given.

    A tensor of one element will do.

    Args:
        signed: whether any finite number will.
    """
    limit = "a finite number >= 0" if below is None else f"a number in [0, {below:g})"
    if signed:
        limit = "a finite number"
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name}: expected {limit}, got a tensor of {value.dtype}")
        if value.numel() != 1:
            raise ValueError(
                f"{name}: expected one element, got a tensor of shape {list(value.shape)}"
            )
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name}: expected {limit}, got {value!r}")
    in_range = value > -math.inf if signed else value >= 0
    if not (in_range and value < (math.inf if below is None else below)):
        raise ValueError(f"{name}: expected {limit}, got {value}")


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's, also in tuples and lists; anything else as it is.

    Torch takes them for options, but a file that holds some does not load with weights_only=True.
    """
    if isinstance(value, (tuple, list)):
        if any(_is_of_numpy(v) for v in value):
            plain_values = [plain(v) for v in value]
            return plain_values if isinstance(value, list) else tuple(plain_values)
        return value
    return value.item() if _is_of_numpy(value) else value


def _is_of_numpy(value: Any) -> bool:
    """Whether this is a scalar of numpy, which need not be installed."""
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()


def plain_numbers(group: dict[str, Any]) -> None:
    """The same for the options of a group, in place."""
    for name, value in group.items():
        if name != "params" and (number := plain(value)) is not value:
            group[name] = number


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_betas(betas: Any, number: int) -> None:
    """Raises ValueError unless this is a tuple or list of so many decay rates, each in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != number:
        expected = {2: "two", 3: "three"}[number]
        raise ValueError(f"betas: expected {expected} numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, below=1)


def check_momentum(group: dict[str, Any]) -> None:
    """Raises ValueError unless momentum, dampening and nesterov are in range."""
    check_number("momentum", group["momentum"])
    check_number("dampening", group["dampening"])
    check_flag("nesterov", group["nesterov"])


# The option that a schedule may set to 0 for a while, and the state that stays as it is then.
MOMENTUM = {"momentum": "momentum_buffer"}


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether a group keeps a buffer: a tensor may come to be above 0."""
    return isinstance(group["momentum"], Tensor) or group["momentum"] != 0


def check_nesterov(group: dict[str, Any]) -> None:
    """Raises ValueError unless Nesterov's momentum comes with what torch.optim asks for with it, in
    a new group: later a schedule may have set the momentum to 0 for a while."""
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            "nesterov: expected a momentum above 0 and a dampening of 0 with it, got "
            f"momentum={group['momentum']!r}, dampening={group['dampening']!r}"
        )


def check_params(params: Iterable[Any], stochastic_rounding: bool) -> None:
    """Refuses parameters that no step could update; an entry may be a (name, parameter) pair.

    What is not a tensor is left for torch to refuse, and so is everything about a parameter that is
    frozen: quantized weights of any dtype may stand in a group.

    Args:
        stochastic_rounding: the option of their group.

    Raises:
        ValueError: a parameter given twice, of an unsupported dtype or layout, or with elements
            that share memory.
        RuntimeError: on a GPU, without the CUDA kernels.
    """
    seen: set[int] = set()
    for index, entry in enumerate(params):
        p = entry[1] if isinstance(entry, tuple) else entry
        if not isinstance(p, Tensor):
            continue
        if id(p) in seen:
            raise ValueError(
                f"params[{index}]: expected each parameter once, got this one again, of shape "
                f"{list(p.shape)}. {_TIED}"
            )
        seen.add(id(p))
        if p.requires_grad or p.grad is not None:
            _check_trainable(index, p, stochastic_rounding)


def check_new_params(optimizer: Optimizer, params: Iterable[Any]) -> None:
    """Raises ValueError for a parameter that another group has: torch would not say which."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for index, entry in enumerate(params):
        p = entry[1] if isinstance(entry, tuple) else entry
        if isinstance(p, Tensor) and id(p) in known:
            raise ValueError(
                "some parameters appear in more than one parameter group: params"
                f"[{index}], of shape {list(p.shape)}, is {describe(optimizer, p)}. {_TIED}"
            )


def check_device(index: int, device: torch.device) -> None:
    """Raises RuntimeError where the kernels for a device are missing."""
    if device.type == "cuda" and ops.CUDA_EXTENSION_FILE is None:
        raise RuntimeError(
            f"params[{index}] is on {device}, and torchao8 has no CUDA kernels here: "
            f"{ops.CUDA_MISSING}. `python -m torchao8` prints what was found."
        )


def _check_trainable(index: int, p: Tensor, stochastic_rounding: bool) -> None:
    if is_dtensor(p):
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(
                f"params[{index}]: expected a DTensor of shards and replicas, got the placements "
                f"{p.placements}"
            )
        p = local(p)
    check_device(index, p.device)
    if p.dtype not in PARAM_DTYPES or p.layout is not torch.strided:
        raise ValueError(
            f"params[{index}]: expected a dense tensor of {_DTYPE_NAMES}, got {kind(p)}"
        )
    if stochastic_rounding and p.dtype is torch.float16:
        raise ValueError(f"params[{index}]: {NO_FLOAT16}")
    if torch._debug_has_internal_overlap(p) == 1:
        raise ValueError(
            f"params[{index}]: expected elements that do not share memory, "
            f"got shape {list(p.shape)} with strides {list(p.stride())}"
        )


def check_grad(optimizer: Optimizer, p: Tensor) -> None:
    """Raises RuntimeError, as torch.optim does, unless a step can read the gradient of ``p``."""
    grad = p.grad
    if grad is None or is_readable_grad(p, grad):
        return
    if is_dtensor(p) != is_dtensor(grad):
        raise RuntimeError(
            f"{type(optimizer).__name__}: gradient of {describe(optimizer, p)}: expected a "
            f"{type(p.data).__name__}, as the parameter is, got a {type(grad).__name__}"
        )
    raise RuntimeError(
        f"{type(optimizer).__name__}: gradient of {describe(optimizer, p)}: "
        f"expected a dense tensor of {_DTYPE_NAMES}, got {kind(grad)}"
        + ("" if grad.layout is torch.strided else ". torch.optim.SparseAdam takes sparse ones.")
    )


def is_readable_grad(p: Tensor, grad: Tensor) -> bool:
    """Whether a step can read this gradient of ``p``."""
    return (
        grad.layout is torch.strided
        and grad.dtype in PARAM_DTYPES
        and is_dtensor(grad) == is_dtensor(p)
    )


def describe(optimizer: Optimizer, p: Tensor) -> str:
    """``parameter 3 (layer.weight)``: its number in the state dict, and its name if it has one."""
    number = 0
    for group in optimizer.param_groups:
        for i, q in enumerate(group["params"]):
            if q is p:
                name = f" ({group['param_names'][i]})" if "param_names" in group else ""
                return f"parameter {number}{name}"
            number += 1
    raise ValueError("the parameter is not in the optimizer")


def with_shape(optimizer: Optimizer, p: Tensor) -> str:
    """The same, with the shape of one that has no name: ``parameter 3 (of shape [40, 70])``."""
    label = describe(optimizer, p)
    return label if label.endswith(")") else f"{label} (of shape {list(p.shape)})"


def meta_message(optimizer: Optimizer, p: Tensor) -> str:
    """Why a step is refused, as torch.optim refuses it with fused=True."""
    return (
        f"{type(optimizer).__name__}: {describe(optimizer, p)}, of shape {list(p.shape)}, is on "
        "the device meta: expected a parameter with values. Materialize the model before the "
        "first step (model.to_empty(device=...), then load or initialize its weights)"
    )


def warn_caller(message: str) -> None:
    """Warns, pointing at the line outside of torch and torchao8 that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


_LIBRARIES = ("torch.", "torchao8.", "contextlib")  # whose decorators are ours


def kind(t: Tensor) -> str:
    """The dtype of a tensor, and its layout if that is not the dense one."""
    return f"{t.dtype}" if t.layout is torch.strided else f"{t.dtype} in layout {t.layout}"
