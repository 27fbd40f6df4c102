"""The ops of the library on devices that have no kernels: their implementation in this folder.

torch takes it where an op has no kernel for a device. A graph holds the same ops for all devices: a
compiler does not see what a step is made of, which would be its code repeated for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchao8._families import Family
from torchao8.portable import quantize, step, sums


def implement(library: torch.library.Library, families: Sequence[Family], key: str) -> None:
    """Registers the ops for a dispatch key."""
    functions: dict[str, Callable[..., Any]] = {
        "quantize_blockwise": quantize.quantize_blockwise,
        "dequantize_blockwise": quantize.dequantize_blockwise,
        "count_step_": step.count_step_,
        "sum_squares": sums.sum_squares,
        "norms": sums.norms,
    }
    for family in families:
        functions[family.step_op] = partial(step.step_, family)
        functions[family.extremes_op] = partial(step.extremes, family)
        if family.name == "adam":
            functions["lamb_update_sums"] = partial(step.lamb_update_sums, family)
    for op, function in functions.items():
        library.impl(op, partial(_run, op, function), key, allow_override=True)
    # State is paged on devices with kernels only.
    library.impl("prefetch_pages_", lambda pages, now: None, key, allow_override=True)


def _run(op: str, function: Callable[..., Any], *positional: Any, **named: Any) -> Any:
    """Checks the arguments of an op, and calls its function with all of them by their names."""
    schema = getattr(torch.ops.torchao8, op).default._schema
    # torch keeps a default dtype, which is float32 here, as a number.
    arguments = {
        a.name: torch.float32 if a.name == "dtype" else a.default_value for a in schema.arguments
    }
    arguments.update(zip(arguments, positional, strict=False))
    arguments.update(named)
    _check(op, arguments)
    if arguments.get("params", True) == []:
        return None
    # In inference mode the tensors that were made in it may be written to, as the kernels do.
    with torch.no_grad() if schema.returns else torch.inference_mode():
        return function(**arguments)


def _check(op: str, arguments: dict[str, Any]) -> None:
    """Refuses what the kernels refuse, in their words (csrc/check.cpp)."""
    # What is not dense comes here on devices with kernels, too: these are for dense tensors.
    for name, argument in arguments.items():
        is_list = isinstance(argument, (list, tuple))
        for i, t in enumerate(argument if is_list else (argument,)):
            if isinstance(t, Tensor) and (t.layout is not torch.strided or t.is_quantized):
                kind = t.dtype if t.is_quantized else f"layout {t.layout}"
                where = f"{name}[{i}]" if is_list else name
                raise RuntimeError(f"{op}: {where} must be dense, got {kind}")
    check = getattr(torch.ops.torchao8, f"check_{op}").default
    check(**{a.name: arguments[a.name] for a in check._schema.arguments})
