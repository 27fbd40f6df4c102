"""What the state of a parameter is made of, and its way through ``load_state_dict``."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8.optim._checks import is_dtensor, kind


class TensorSpec(NamedTuple):
    """A tensor of ``optimizer.state[p]``: what it must be, and what it is full of at the start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: int = 0

    def empty(self, device: torch.device) -> Tensor:
        """The tensor of a parameter that has made no step yet."""
        return torch.full(self.shape, self.fill, dtype=self.dtype, device=device)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {list(self.shape)}"


class Sealed:
    """A checked state tensor on its way through ``Optimizer.load_state_dict``.

    Torch would cast it to the dtype of the parameter, which destroys codes and rounds moments. What
    is neither a tensor nor iterable passes untouched.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def seal(index: int, layout: dict[str, TensorSpec], saved: dict[str, Any]) -> dict[str, Sealed]:
    """Checks the saved state of one parameter and makes it ready to be loaded.

    Args:
        index: the parameter's number in the state dict, for messages.
        layout: what the state must be.

    Raises:
        ValueError: other keys; a value that is no tensor or of another dtype or shape; a step or a
            scale that no step could have left.
    """
    if set(saved) != set(layout):
        raise ValueError(
            f"state of parameter {index}: expected the keys {list(layout)}, got {list(saved)}"
            + _remedy(layout, saved)
        )
    return {key: Sealed(_checked(index, key, spec, saved[key])) for key, spec in layout.items()}


def _remedy(layout: dict[str, TensorSpec], saved: dict[str, Any]) -> str:
    """What to do about a checkpoint of another format, where it can be told."""
    if {"state1", "qmap1"} & set(saved):
        return ". This is a checkpoint of bitsandbytes, which is not read yet."
    if "exp_avg" in saved and "exp_avg_codes" in layout:
        return (
            ". This is 32-bit state, torch.optim's or ours: load it into Adam, AdamW or a group "
            "with optim_bits=32; it is not converted to 8 bits yet. If an 8-bit optimizer saved "
            "it, its min_8bit_size was larger."
        )
    if "exp_avg_codes" in saved and "exp_avg" in layout:
        return (
            ". This is 8-bit state of a parameter that has 32-bit state here: by optim_bits or "
            "min_8bit_size of its group, which must be those that it was saved with."
        )
    return ""


def _other_blocks(key: str, spec: TensorSpec, scale: Tensor) -> bool:
    return key.endswith("_scale") and scale.dtype == spec.dtype and scale.shape != spec.shape


def _checked(index: int, key: str, spec: TensorSpec, value: Any) -> Tensor:
    if key == "step":
        value = _step_tensor(value)
    if not isinstance(value, Tensor) or is_dtensor(value):
        raise ValueError(f"{key} of parameter {index}: expected {spec}, got {type(value).__name__}")
    dense = value.layout is torch.strided
    if not dense or (value.dtype, tuple(value.shape)) != (spec.dtype, spec.shape):
        raise ValueError(
            f"{key} of parameter {index}: expected {spec}, "
            f"got {kind(value)} of shape {list(value.shape)}"
            + (". Was it saved with another block_size?" if _other_blocks(key, spec, value) else "")
        )
    wrong = _wrong_value(key, value)
    if wrong:
        raise ValueError(f"{key} of parameter {index}: expected {wrong}")
    return value.detach().contiguous()


def _wrong_value(key: str, value: Tensor) -> str:
    """What a step and scales must be, where these are not; codes and moments may be anything."""
    if key == "step" and not 0 <= float(value) == float(value) // 1 < 2**24:
        return f"a whole number from 0 to 2^24 - 1, got {float(value)}"
    if key.endswith("_scale"):
        if not bool(value.isfinite().all()):
            return "finite numbers, got some that are not"
        if key != "exp_avg_scale" and bool(value.signbit().any()):
            return f"numbers >= 0, got {float(value[value.signbit()][0])}"
    return ""


def _step_tensor(value: Any) -> Any:
    """Steps also come as numbers, as tensors of other dtypes, and as one tensor for all."""
    if isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1):
        return torch.as_tensor(value, dtype=torch.float32).reshape(()).clone()
    return value


def unseal(state: dict[Any, Any]) -> None:
    """Takes the tensors out of their seals, in place, on the device of their parameter."""
    for p, tensors in state.items():
        if isinstance(p, Tensor):
            for key, value in tensors.items():
                if isinstance(value, Sealed):
                    tensors[key] = value.tensor.to(p.device)
