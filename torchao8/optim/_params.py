"""Checks of parameters and gradients: what is wrong, what was expected, what came."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchao8._messages import describe, kind
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


def check_params(params: Iterable[Any], stochastic_rounding: bool) -> None:
    """Refuses parameters that no step could update; an entry may be a (name, parameter) pair.

    What is not a tensor is left for torch to refuse, and so is everything about a parameter that is
    frozen: quantized weights of any dtype may stand in a group.

    Args:
        stochastic_rounding: the option of their group.

    Raises:
        ValueError: a parameter given twice, of an unsupported dtype or layout, or with elements
            that share memory.
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


def _check_trainable(index: int, p: Tensor, stochastic_rounding: bool) -> None:
    if is_dtensor(p):
        if any(placement.is_partial() for placement in p.placements):
            raise ValueError(
                f"params[{index}]: expected a DTensor of shards and replicas, got the placements "
                f"{p.placements}"
            )
        p = local(p)
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
