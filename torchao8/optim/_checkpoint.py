"""What the state of a parameter is made of, and its way through ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.block_layout import scale_shape
from torchao8.optim._checks import kind
from torchao8.sharding import cut_out, is_dtensor, like, local, place, same_placement

# Of the state as it is saved: the keys, what they hold and how blocks lie. It stands in every
# parameter group, as what stands beside the groups gets lost on some roads.
STATE_VERSION = 1


class State(NamedTuple):
    """A state of a parameter: ``name`` in 32 bits, ``name_codes`` and ``name_scale`` in 8."""

    name: str
    signed: bool


class TensorSpec(NamedTuple):
    """A tensor of ``optimizer.state[p]``: what it must be, and what it is full of at the start.

    Attributes:
        shape: of the whole tensor.
        local_shape: of the part on this rank, where ``p`` is a DTensor and this is to be one.
        signed: whether its numbers may be negative.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: int = 0
    local_shape: tuple[int, ...] | None = None
    signed: bool = True

    def empty(self, p: Tensor) -> Tensor:
        """The tensor of a parameter that has made no step yet."""
        shape = self.shape if self.local_shape is None else self.local_shape
        device = local(p).device
        return self.place(p, torch.full(shape, self.fill, dtype=self.dtype, device=device))

    def place(self, p: Tensor, part: Tensor) -> Tensor:
        """The state tensor of ``p`` whose part on this rank is given."""
        part = part.to(local(p).device)
        return part if self.local_shape is None else like(p, part, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {list(self.shape)}"


Layout = dict[str, TensorSpec]


class Sealed:
    """A checked state tensor on its way through ``Optimizer.load_state_dict``.

    Torch would cast it to the dtype of the parameter, which destroys codes and rounds moments. What
    is neither a tensor nor iterable passes untouched.
    """

    def __init__(self, spec: TensorSpec, part: Tensor) -> None:
        self.spec = spec
        self.part = part


def unseal(state: dict[Any, Any]) -> None:
    """Takes the tensors out of their seals, in place, on the device of their parameter."""
    for p, tensors in state.items():
        if isinstance(p, Tensor):
            for key, value in tensors.items():
                if isinstance(value, Sealed):
                    tensors[key] = value.spec.place(p, value.part)


def parts_of(label: str, p: Tensor, layout: Layout, saved: dict[str, Any]) -> dict[str, Tensor]:
    """What this rank holds of the saved state of one parameter.

    A collective where the state is sharded otherwise than ``p``. So it looks at no value: all ranks
    raise, or none.

    Args:
        label: names the parameter in messages.
        layout: what the state must be.
        saved: plain tensors of the whole, or DTensors where ``p`` is one.

    Raises:
        ValueError: other keys; a value that is no tensor or of another dtype or shape.
    """
    if set(saved) != set(layout):
        raise ValueError(
            f"state of {label}: expected the keys {list(layout)}, got {list(saved)}"
            + _remedy(saved)
        )
    return {key: _part(label, key, p, spec, saved[key]) for key, spec in layout.items()}


def seal(label: str, layout: Layout, parts: dict[str, Tensor]) -> dict[str, Sealed]:
    """Checks the values on this rank and makes them ready to be loaded.

    Raises:
        ValueError: a number that no step could have left.
    """
    for key, part in parts.items():
        expected = layout[key].local_shape
        if expected is not None and tuple(part.shape) != expected:
            raise ValueError(
                f"{key} of {label}: expected a local shape of {list(expected)} on this rank, got "
                f"{list(part.shape)}"
            )
        _check_values(label, key, layout[key], part)
    return {key: Sealed(layout[key], part.contiguous()) for key, part in parts.items()}


def _remedy(saved: dict[str, Any]) -> str:
    """What to do about a checkpoint of another kind, where it can be told."""
    if any(str(key).startswith("max_exp_avg_sq") for key in saved):
        return ". It was saved with amsgrad=True."
    return ""


def _part(label: str, key: str, p: Tensor, spec: TensorSpec, value: Any) -> Tensor:
    if key == "step":
        value = _step_tensor(value)
    _check_kind(label, key, spec, value)
    value = value.detach()
    if spec.local_shape is None or not is_dtensor(p):
        if is_dtensor(value):
            raise ValueError(
                f"{key} of {label}: expected {spec}, got a DTensor, as the parameter is none; "
                "gather the state first (StateDictOptions(full_state_dict=True))"
            )
        return value
    if not is_dtensor(value):
        return cut_out(p, value, spec.shape)
    return local(same_placement(p, value))


def _check_kind(label: str, key: str, spec: TensorSpec, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{key} of {label}: expected {spec}, got {type(value).__name__}")
    if value.is_meta:
        raise ValueError(
            f"{key} of {label}: expected {spec}, got one on the device meta: no values"
        )
    dense = value.layout is torch.strided
    if not dense or (value.dtype, tuple(value.shape)) != (spec.dtype, spec.shape):
        raise ValueError(
            f"{key} of {label}: expected {spec}, got {kind(value)} of shape {list(value.shape)}"
        )


def _check_values(label: str, key: str, spec: TensorSpec, value: Tensor) -> None:
    wrong = ""
    if value.dtype == torch.uint8:
        return  # every code is one
    if not bool(value.isfinite().all()):
        wrong = "finite numbers, got some that are not"
    elif key == "step" and not 0 <= float(value) == float(value) // 1 < 2**24:
        wrong = f"a whole number from 0 to 2^24 - 1, got {float(value)}"
    elif not spec.signed:
        # A scale of -0.0 would give the codes a sign.
        negative = value.signbit() if key.endswith("_scale") else value < 0
        if bool(negative.any()):
            wrong = f"numbers >= 0, got {float(value[negative][0])}"
    if wrong:
        raise ValueError(f"{key} of {label}: expected {wrong}")


def _step_tensor(value: Any) -> Any:
    """Steps also come as numbers, as tensors of other dtypes, and as one tensor for all."""
    if is_dtensor(value):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        counts = value.numel() == 1 and not (value.is_complex() or value.dtype == torch.bool)
        return value.to(torch.float32).reshape(()).clone() if counts else value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(min(value, 2**24)), dtype=torch.float32)
    return value


# -- another precision -----------------------------------------------------------------------------


def convert(
    label: str,
    layout: Layout,
    states: Sequence[State],
    saved: dict[str, Any],
    block_size: int,
    saved_block_size: int,
) -> dict[str, Any]:
    """The saved state of a parameter in the format that the layout asks for, through float32.

    8 bits become 32 without loss, 32 become 8 rounded to nearest, and other blocks both. What is
    sharded is gathered first, a parameter at a time: another precision may lie in other places.

    Returns:
        ``saved`` itself where it has that format already, or none that this function knows.

    Raises:
        ValueError: state in 8 bits that is no codes and scales of the saved block size.
    """
    saved_in_8bit, in_8bit = (f"{states[0].name}_codes" in keys for keys in (saved, layout))
    if set(saved) != {"step"} | {key for state in states for key in _keys(state, saved_in_8bit)}:
        return saved
    if saved_in_8bit == in_8bit and not (in_8bit and saved_block_size != block_size):
        return saved
    converted = {"step": saved["step"]}
    for state in states:
        values = [_whole(saved[key]) for key in _keys(state, saved_in_8bit)]
        shape = next(layout[key].shape for key in _keys(state, in_8bit))
        if saved_in_8bit:
            codes, scale = values
            specs = (
                TensorSpec(torch.uint8, shape),
                TensorSpec(
                    torch.float32, scale_shape(shape, saved_block_size), signed=state.signed
                ),
            )
            for key, value, spec in zip(_keys(state, True), values, specs, strict=True):
                _check_kind(label, key, spec, value)
                _check_values(label, key, spec, value)
            moment = ops.dequantize_blockwise(
                codes, scale, block_size=saved_block_size, signed=state.signed
            )
        else:
            (moment,) = values
            spec = TensorSpec(torch.float32, shape, signed=state.signed)
            _check_kind(label, state.name, spec, moment)
            _check_values(label, state.name, spec, moment)
        new: tuple[Tensor, ...] = (moment,)
        if in_8bit:
            new = ops.quantize_blockwise(moment, block_size=block_size, signed=state.signed)
        converted.update(zip(_keys(state, in_8bit), new, strict=True))
    return converted


def in_32bit(
    p: Tensor, states: Sequence[State], saved: dict[str, Any], block_size: int
) -> dict[str, Any]:
    """The state of a parameter in 32 bits, sharded as it is; ``saved`` itself where it is so."""
    if f"{states[0].name}_codes" not in saved:
        return saved
    converted = {"step": saved["step"]}
    for state in states:
        codes, scale = (saved[key] for key in _keys(state, True))
        converted[state.name] = _dequantize(p, codes, scale, block_size, state.signed)
    return converted


def _dequantize(p: Tensor, codes: Tensor, scale: Tensor, block_size: int, signed: bool) -> Tensor:
    if not is_dtensor(p):
        return ops.dequantize_blockwise(codes, scale, block_size=block_size, signed=signed)
    part, where = local(codes), place(p, block_size)
    assert where is not None  # or it would have no codes
    moment = torch.empty(part.shape, dtype=torch.float32, device=part.device)
    if part.numel():  # as matrices, whose rows are those of the whole
        rows, scales = part.view(-1, where.row), local(scale).view(-1, where.blocks)
        values = ops.dequantize_blockwise(rows, scales, block_size=block_size, signed=signed)
        moment = values.view(part.shape)
    return like(p, moment, p.shape)


def _keys(state: State, in_8bit: bool) -> tuple[str, ...]:
    return (f"{state.name}_codes", f"{state.name}_scale") if in_8bit else (state.name,)


def _whole(value: Any) -> Any:
    return value.full_tensor() if is_dtensor(value) else value
