"""What a reader of another library's state hands over, and the checks that readers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8._messages import kind
from torchao8._numbers import plain
from torchao8.sharding import is_dtensor

SHARDED = (
    "expected a whole tensor, got a shard (a DTensor): the blocks of a shard are not those of the "
    "parameter. Gather a full state dict with the library that saved it."
)


# The states that an optimizer keeps: whether numbers may be negative, by the name of the state.
States = Mapping[str, bool]


class Quantized(NamedTuple):
    """A moment in 8 bits: ``map[codes] * scale``, a number of ``scale`` for each ``block_size``
    elements of the flattened tensor, the last block may be short."""

    codes: Tensor
    scale: Tensor
    map: Tensor
    block_size: int

    def dequantize(self) -> Tensor:
        """float32, one rounding an element, as in both libraries."""
        values = self.map[self.codes.reshape(-1).int()]
        whole = values.numel() // self.block_size
        split = whole * self.block_size
        values[:split].view(whole, self.block_size).mul_(self.scale[:whole, None])
        values[split:].mul_(self.scale[whole:])
        return values.view(self.codes.shape)


Moments = dict[str, "Quantized | Tensor"]


def checked_tensor(
    label: str, key: str, value: Any, shape: tuple[int, ...] | None, dtypes: Sequence[torch.dtype]
) -> Tensor:
    """The value, if it is a dense tensor of one of the dtypes, and of the shape if one is given."""
    if is_dtensor(value):
        raise ValueError(f"{key} of {label}: {SHARDED}")
    expected = " or ".join(str(dtype) for dtype in dtypes)
    expected += f" of shape {list(shape)}" if shape is not None else " in one dimension"
    if not isinstance(value, Tensor):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{key} of {label}: expected {expected}, got {got}")
    fits = tuple(value.shape) == shape if shape is not None else value.dim() == 1
    if value.layout is not torch.strided or value.dtype not in dtypes or not fits:
        raise ValueError(
            f"{key} of {label}: expected {expected}, got {kind(value)} of shape {list(value.shape)}"
        )
    return value.detach()


def checked_scale(label: str, key: str, value: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """The largest magnitude of each block: finite, and with no sign."""
    scale = checked_tensor(label, key, value, shape, (torch.float32,)).contiguous()
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{key} of {label}: expected finite numbers, got some that are not")
    if bool(scale.signbit().any()):
        raise ValueError(
            f"{key} of {label}: expected numbers >= 0, got {float(scale[scale.signbit()][0])}"
        )
    return scale


def checked_map(label: str, key: str, value: Any, signed: bool) -> Tensor:
    """The value of each code. Any map will do, but not one for the other kind of moment."""
    table = checked_tensor(label, key, value, (256,), (torch.float32,))
    if not bool(table.isfinite().all()):
        raise ValueError(f"{key} of {label}: expected finite numbers, got some that are not")
    if bool((table < 0).any()) != signed:
        kinds = ("numbers >= 0, for a second moment", "numbers of both signs, for a first moment")
        raise ValueError(
            f"{key} of {label}: expected {kinds[signed]}, got {kinds[not signed].split(',')[0]}"
        )
    return table


def checked_step(label: str, saved: Mapping[str, Any]) -> Tensor:
    """An int of bitsandbytes, a 0-d tensor of torchao."""
    value = plain(saved.get("step"))
    single = isinstance(value, Tensor) and value.numel() == 1 and not is_dtensor(value)
    if not (single or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"step of {label}: expected a number, got {got}")
    number = float(value)
    if not 0 <= number < 2**24 or number != int(number):
        raise ValueError(
            f"step of {label}: expected a whole number from 0 to 2^24 - 1, got {number}"
        )
    return torch.tensor(number, dtype=torch.float32, device="cpu")
