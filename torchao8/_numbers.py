"""Numbers as the ops take them: tensors, so that a step which was traced once reads what they are
now, and a CUDA graph what they are on the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# An option that is a number: it may change from step to step, in place where it is a tensor.
Number = float | Tensor


# Devices that surely have float64: not every GPU of Intel has it, and no Mac.
_HAVE_FLOAT64 = {"cpu", "cuda"}


def number_dtype(device: torch.device) -> torch.dtype:
    """Of numbers that are computed on a device."""
    return torch.float64 if device.type in _HAVE_FLOAT64 else torch.float32


def one_number(value: Number) -> Tensor:
    """A number as an op takes it: 0-d, float64 where it comes as a Python number."""
    if not isinstance(value, Tensor):
        if torch.compiler.is_compiling():
            # torch.compile makes a graph input of a float that changes if it meets it in arithmetic
            # with a tensor; torch.tensor(value) would burn its value into the graph.
            return torch.ones((), dtype=torch.float64, device="cpu") * value
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    if value.dtype not in (torch.float32, torch.float64):
        value = value.to(torch.float32)
    return value if value.dim() == 0 else value.reshape(())


def all_numbers(values: Sequence[Number], device: torch.device) -> Tensor:
    """The numbers of a rule in one tensor, of shape (n,).

    It lies on the CPU, or, if one of the numbers is a tensor on another device, on ``device``. It
    is float64; on a device that need not have that, float32.
    """
    elsewhere = any(isinstance(v, Tensor) and not v.is_cpu for v in values)
    where = device if elsewhere else torch.device("cpu")
    dtype = number_dtype(where) if elsewhere else torch.float64
    if torch.compiler.is_compiling():
        one = torch.ones((), dtype=dtype, device=where)
        return torch.stack(
            [v.reshape(()).to(where, dtype) if isinstance(v, Tensor) else one * v for v in values]
        )
    if not elsewhere:
        return torch.tensor([float(v) for v in values], dtype=torch.float64, device="cpu")
    # Nothing is copied from the host, which a captured stream could not do.
    return torch.stack(
        [
            v.reshape(()).to(where, dtype)
            if isinstance(v, Tensor) and not v.is_cpu
            else torch.full((), float(v), dtype=dtype, device=where)
            for v in values
        ]
    )


def known(value: object) -> object:
    """An option without its tensors on a GPU.

    These become 0.0: reading them would make the host wait.
    """
    if isinstance(value, Tensor) and not value.is_cpu:
        return 0.0
    if isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value):
        return tuple(known(v) for v in value)
    return value


def plain(value: Any) -> Any:
    """Numbers of numpy as Python's, also in tuples and lists; anything else as it is.

    Torch takes them for options, but a file that holds some does not load with weights_only=True.
    """
    if isinstance(value, (tuple, list)):
        plain_values = [plain(v) for v in value]
        if all(new is old for new, old in zip(plain_values, value, strict=True)):
            return value
        return plain_values if isinstance(value, list) else tuple(plain_values)
    return value.item() if _is_of_numpy(value) else value


def _is_of_numpy(value: Any) -> bool:
    """Whether this is a scalar of numpy, which need not be installed."""
    return type(value).__module__ == "numpy" and getattr(value, "shape", None) == ()


def plain_numbers(group: dict[str, Any]) -> None:
    """The same for the options of a group, in place."""
    for name, value in group.items():
        if name != "params" and (number := plain(value)) is not value:
            group[name] = number
