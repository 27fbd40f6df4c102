"""The state of torchao's optimizers: tensor subclasses, known by their names and attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchao8.interop.moments import (
    SHARDED,
    Moments,
    Quantized,
    States,
    checked_map,
    checked_scale,
    checked_tensor,
)
from torchao8.sharding import is_dtensor

_TORCHAO_8BIT = "OptimState8bit"
_TORCHAO_OTHERS = ("OptimState4bit", "OptimStateFp8")


def is_torchao(saved: Mapping[str, Any]) -> bool:
    """Whether one of the values is a tensor subclass of torchao."""
    return any(_torchao_class(value) for value in saved.values())


def _torchao_class(value: Any) -> str | None:
    """The name of torchao's tensor subclass, also where a DTensor holds it."""
    local = getattr(value, "_local_tensor", value) if is_dtensor(value) else value
    name = type(local).__name__
    return name if name in (_TORCHAO_8BIT, *_TORCHAO_OTHERS) else None


def read_torchao(
    label: str, saved: Mapping[str, Any], shape: tuple[int, ...], states: States
) -> Moments:
    """exp_avg and exp_avg_sq as tensor subclasses: torchao/optim/subclass_8bit.py, 4bit and fp8."""
    wanted = ["step", *states]
    if set(saved) - {"step"} != set(wanted) - {"step"}:
        raise ValueError(
            f"state of {label}: expected the keys {wanted} of torchao, got {list(saved)}"
        )
    return {
        name: _torchao_moment(label, name, signed, saved[name], shape)
        for name, signed in states.items()
    }


def _torchao_moment(
    label: str, key: str, signed: bool, value: Any, shape: tuple[int, ...]
) -> Quantized | Tensor:
    name = _torchao_class(value)
    if is_dtensor(value):
        raise ValueError(f"{key} of {label}: {SHARDED}")
    if name is None:
        floats = (torch.float32, torch.bfloat16, torch.float16)
        return checked_tensor(label, key, value, shape, floats).to(torch.float32).contiguous()
    if name in _TORCHAO_OTHERS:
        return _dequantized(label, key, name, value, shape)
    for part in ("codes", "scale", "qmap", "signed"):
        if not hasattr(value, part):
            raise ValueError(f"{key} of {label}: expected a {name} with {part}, got one without")
    if bool(value.signed) != signed:
        raise ValueError(f"{key}.signed of {label}: expected {signed}, got {bool(value.signed)}")
    codes = checked_tensor(label, f"{key}.codes", value.codes, shape, (torch.uint8,)).contiguous()
    scale = checked_scale(label, f"{key}.scale", value.scale).to(codes.device)
    blocks = scale.numel()
    if blocks == 0 or codes.numel() == 0 or codes.numel() % blocks:
        raise ValueError(
            f"{key}.scale of {label}: expected a number of scales that divides the "
            f"{codes.numel()} elements, got {blocks}"
        )
    table = checked_map(label, f"{key}.qmap", value.qmap, signed).to(codes.device)
    return Quantized(codes, scale, table, codes.numel() // blocks)


def _dequantized(label: str, key: str, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """4-bit and fp8 have no format here to be copied into; the class knows its own values."""
    try:
        values = value.dequantize()
    except (AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{key} of {label}: {name} cannot be dequantized: {error}") from error
    values = checked_tensor(label, key, values, shape, (torch.float32,)).contiguous()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{key} of {label}: expected a {name} of finite numbers, got some not")
    return values
