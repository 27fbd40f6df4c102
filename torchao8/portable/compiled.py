"""The code of a form: compiled once where torch.compile works, else run operator by operator.

TORCHAO8_COMPILE=0 in the environment says never to compile; 1 and no value are the same.
"""

from __future__ import annotations

import os
import types
import warnings
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

_choice = os.environ.get("TORCHAO8_COMPILE", "")
if _choice not in ("", "0", "1"):
    raise ImportError(f"TORCHAO8_COMPILE must be 0 or 1, or not be set, got {_choice}")
# Devices that inductor generates code for; those that it failed on are taken out.
devices = set() if _choice == "0" else {"cpu", "cuda", "xpu"}
_compiled: dict[Hashable, Callable[[Any], None]] = {}


def run(function: Callable[[Any, Any], None], form: Hashable, x: Any) -> None:
    """Calls ``function(form, x)``, which writes into tensors of x.

    x is a NamedTuple; its tensors have as many dimensions before the last one as there are kinds of
    blocks, and any sizes there.
    """
    if x.param.device.type not in devices or type(x.param) is not Tensor:
        return function(form, x)
    x = _flattened(x)
    if 1 in x.param.shape[: max(1, x.param.dim() - 1)]:  # a size of 1 would be code of its own
        return function(form, x)
    kind = (bool(x.extremes), x.skip is None, x.hashes is None, x.param.dtype, x.grad.dtype)
    width = x.param.dim() > 1 and x.param.shape[-1]
    key = (form, *kind, x.param.dim(), width, x.param.device)
    if key in _compiled:
        return _run_again(key, function, form, x)
    # What fails in its first run may have written some of its tensors already.
    before = [(t, t.clone()) for t in (x.param, *x.values, *x.scales)]
    try:
        _mark_dynamic(x)  # it imports the compiler, which may fail
        _compiled[key] = _compile(function, form, f"step_{len(_compiled)}")
        _compiled[key](x)
    except Exception as error:
        for tensor, value in before:
            tensor.copy_(value)
        if isinstance(error, torch.OutOfMemoryError):
            raise
        _give_up(x.param.device, error)
        function(form, x)


def _run_again(key: Hashable, function: Callable[[Any, Any], None], form: Hashable, x: Any) -> None:
    """It may be compiled once more, as for other strides, and that may fail before it runs."""
    from torch._dynamo.exc import TorchDynamoException

    _mark_dynamic(x)
    try:
        _compiled[key](x)
    except TorchDynamoException as error:
        _give_up(x.param.device, error)
        function(form, x)


def _compile(function: Callable[[Any, Any], None], form: Any, name: str) -> Callable[[Any], None]:
    def step(x: Any) -> None:
        function(form, x)

    # torch.compile counts what it makes of a code object. Beyond its limit it runs it as it is.
    code = step.__code__.replace(co_name=name)
    own = types.FunctionType(code, step.__globals__, name, None, step.__closure__)
    return torch.compile(own, dynamic=False)


def _give_up(device: torch.device, error: Exception) -> None:
    devices.discard(device.type)
    warnings.warn(
        f"torchao8: torch.compile failed on {device}, and steps there run operator by operator, "
        f"which is slower: {type(error).__name__}: {str(error).partition(chr(10))[0]}",
        stacklevel=2,
    )


def _leading(x: Any) -> list[Tensor]:
    draws = [t for parts in x.draws for t in parts]
    hashes = [] if x.hashes is None else [x.hashes]
    return [x.param, x.grad, *x.values, *x.scales, *draws, *hashes]


def _flattened(x: Any) -> Any:
    """With one dimension of blocks, where that is the same memory."""
    if x.param.dim() < 3 or not all(t.is_contiguous() for t in _leading(x)):
        return x

    def flat(t: Tensor) -> Tensor:
        return t if t.dim() < 3 else t.flatten(0, 1)  # a scale of the whole tensor has one

    return x._replace(
        param=flat(x.param),
        grad=flat(x.grad),
        values=[flat(t) for t in x.values],
        scales=[flat(t) for t in x.scales],
        draws=[tuple(map(flat, parts)) for parts in x.draws],
        hashes=None if x.hashes is None else flat(x.hashes),
    )


def _mark_dynamic(x: Any) -> None:
    dims = max(1, x.param.dim() - 1)
    for t in _leading(x):
        if t.dim() == x.param.dim():
            for dim in range(dims):
                torch._dynamo.maybe_mark_dynamic(t, dim)
