"""Which implementation of the ops a device gets: the library's kernels, or plain PyTorch operators.

The environment variables TORCHAO8_CPU=portable and TORCHAO8_CUDA=portable choose the second one
where there are kernels, too.
"""

from __future__ import annotations

import os

import torch

# Devices that have kernels here; their variable of the environment.
_VARIABLES = {"cpu": "TORCHAO8_CPU", "cuda": "TORCHAO8_CUDA"}
_portable: set[str] = set()
_kernels: set[str] = {"cpu", "meta"}  # meta: the ops have fakes, and steps refuse it by name


def add_kernels(device_type: str) -> None:
    """To be called when the kernels of a device have been loaded."""
    _kernels.add(device_type)


def is_portable(device: torch.device) -> bool:
    """Whether the ops on a device are those of :mod:`torchao8.portable`."""
    return device.type not in _kernels or device.type in _portable


def choose_portable(device_type: str, chosen: bool = True) -> None:
    """Chooses an implementation for a device that has kernels; for tests and comparisons."""
    (_portable.add if chosen else _portable.discard)(device_type)


def number_dtype(device: torch.device) -> torch.dtype:
    """Of numbers that are computed on a device: not every device has float64."""
    return torch.float32 if is_portable(device) else torch.float64


def _read_environment() -> None:
    for device_type, variable in _VARIABLES.items():
        value = os.environ.get(variable, "")
        if value == "portable":
            _portable.add(device_type)
        elif value and device_type == "cuda" and value != "kernels":
            raise ImportError(f"{variable} must be portable or kernels, got {value}")


_read_environment()
