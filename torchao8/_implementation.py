"""Which implementation of the ops a device gets: the library's kernels, or plain PyTorch operators.

The environment variables TORCHAO8_CPU=portable and TORCHAO8_CUDA=portable choose the second one
where there are kernels, too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch

from torchao8._families import Family
from torchao8.portable.register import implement

# Devices that have kernels here; their variable of the environment.
_VARIABLES = {"cpu": "TORCHAO8_CPU", "cuda": "TORCHAO8_CUDA"}
_kernels: set[str] = {"cpu", "meta"}  # meta: the ops have fakes, and steps refuse it by name
# What stands before the kernels of a device, for as long as it is held here.
_chosen: dict[str, torch.library.Library] = {}


def set_up(families: Sequence[Family], has_cuda_kernels: bool) -> None:
    """Registers the portable ops, when the kernels have been loaded.

    Raises:
        ImportError: a variable has another value than those that it takes; nothing is registered.
    """
    chosen = [device_type for device_type in _VARIABLES if _asks_for_portable(device_type)]
    _families[:] = families
    if has_cuda_kernels:
        _kernels.add("cuda")
    implement(_everywhere, families, "CompositeExplicitAutograd")
    for device_type in chosen:
        choose_portable(device_type)


def _asks_for_portable(device_type: str) -> bool:
    variable = _VARIABLES[device_type]
    value = os.environ.get(variable, "")
    if value in ("", "portable"):
        return value == "portable"
    if device_type == "cuda":
        raise ImportError(f"{variable} must be portable, or not be set, got {value}")
    try:
        torch.ops.torchao8.cpu_capability.default()  # the kernels for the CPU know the other values
    except RuntimeError as error:
        raise ImportError(str(error).partition("\n")[0]) from None
    return False


_families: list[Family] = []
_everywhere = torch.library.Library("torchao8", "IMPL")


def is_portable(device: torch.device) -> bool:
    """Whether the ops on a device are those of :mod:`torchao8.portable`."""
    return device.type not in _kernels or device.type in _chosen


def choose_portable(device_type: str, chosen: bool = True) -> None:
    """Chooses an implementation for a device that has kernels; for tests and comparisons."""
    if not chosen and device_type in _chosen:
        _chosen.pop(device_type)._destroy()
    if not chosen or is_portable(torch.device(device_type)):
        return
    library = _chosen[device_type] = torch.library.Library("torchao8", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that a kernel is overridden
        implement(library, _families, torch._C._dispatch_key_for_device(device_type))
