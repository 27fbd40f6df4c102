"""Tensors on memory that torch did not allocate, on any device, by way of DLPack.

A blob with a deleter would be the way of the stable ABI, which has it from torch 2.11 on; arrays of
CUDA's interface need numpy, which torch does not install.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

_DEVICES = {"cpu": 1, "cuda": 2}  # kDLCPU, kDLCUDA
_UNSIGNED = 1  # kDLUInt
_NAME = b"dltensor"
_DELETER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class _Exchange(ctypes.Structure):
    """``DLManagedTensor`` of dlpack.h, its inner structures written out."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", _DELETER),
    )


# What each living tensor stands on, by the address of its structure.
_held: dict[int, tuple[Any, ...]] = {}


@_DELETER
def _let_go(address: int) -> None:
    _held.pop(address, None)


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def tensor_on(memory: object, address: int, size: int, device: torch.device) -> Tensor:
    """A tensor of ``size`` bytes, uint8, at an address; it keeps ``memory`` until it is gone."""
    shape = (ctypes.c_int64 * 1)(size)
    exchange = _Exchange(
        address, _DEVICES[device.type], device.index or 0, 1, _UNSIGNED, 8, 1, shape, None, 0,
        None, _let_go,
    )  # fmt: skip
    place = ctypes.addressof(exchange)
    _held[place] = (exchange, shape, memory)
    tensor: Tensor = torch.from_dlpack(_new_capsule(place, _NAME, None))
    return tensor
