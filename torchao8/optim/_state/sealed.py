"""Saved state on its way through ``Optimizer.load_state_dict``: checked, and safe from casts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao8._messages import kind
from torchao8._modes import normal_tensors
from torchao8._numbers import plain
from torchao8.block_layout import Scales
from torchao8.optim._state.formats import FORMATS, form_of, format_in, own_keys
from torchao8.optim._state.spec import NO_NORM, NORMS, Layout, State, TensorSpec, is_own
from torchao8.sharding import cut_out, is_dtensor, like, local, same_placement


class Sealed:
    """A checked state tensor on its way through ``Optimizer.load_state_dict``.

    Torch would cast it to the dtype of the parameter, which destroys codes and rounds moments. What
    is neither a tensor nor iterable passes untouched.
    """

    def __init__(self, spec: TensorSpec, part: Tensor) -> None:
        self.spec = spec
        self.part = part


class Kept:
    """What others keep for a parameter, on the same way: with its bytes, containers included."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def of_param(self, p: Tensor, value: Any) -> Any:
        """The value for ``p``: tensors on its device, and sharded as it is if they have its
        shape."""
        if isinstance(value, Tensor):
            if is_dtensor(p) and not is_dtensor(value) and value.dim() and value.shape == p.shape:
                return like(p, cut_out(p, value, value.shape).to(local(p).device), value.shape)
            return value.to(local(p).device)
        if type(value) is dict:
            return {key: self.of_param(p, item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.of_param(p, item) for item in value])
        return value


def unseal(state: dict[Any, Any]) -> None:
    """Takes the tensors out of their seals, in place, on the device of their parameter."""
    for p, tensors in state.items():
        if isinstance(p, Tensor):
            for key, value in tensors.items():
                if isinstance(value, Sealed):
                    tensors[key] = value.spec.of_param(p, value.part)
                elif isinstance(value, Kept):
                    tensors[key] = value.of_param(p, value.value)


def make_normal(state: dict[Any, Any]) -> None:
    """Replaces tensors that were copied in inference mode, which no step outside of it could
    change."""
    for tensors in state.values():
        for key, value in tensors.items() if isinstance(tensors, dict) else ():
            if is_own(key) and isinstance(value, Tensor) and value.is_inference():
                with normal_tensors():
                    tensors[key] = value.clone()


def check_form(
    label: str,
    p: Tensor,
    layout: Layout,
    states: Sequence[State],
    saved: dict[str, Any],
    saved_scales: Scales,
    others: Collection[Any],
    added: Mapping[str, str],
) -> bool:
    """Whether saved state of ``p`` needs a conversion, after all checks that look at no value.

    Not a collective: what one rank refuses here, no rank has begun to move.

    Args:
        label: names the parameter in messages.
        layout: what the state is to be.
        saved: plain tensors of the whole, or DTensors where ``p`` is one.
        saved_scales: of the state, if it is quantized.
        others: keys that are not of this library, for messages.
        added: the states that an option adds, by the option, for messages.

    Raises:
        ValueError: other keys; a value that is no tensor or of another dtype or shape.
    """
    form = form_of(layout, p.shape, states, format_in(states, saved), saved_scales)
    if set(saved) != set(form):
        raise ValueError(
            f"state of {label}: expected the keys {list(layout)}, got {[*saved, *others]}"
            + _remedy(states, saved, added)
        )
    for key, value in saved.items():
        if form[key].is_scalar and (
            _is_one_number(value) if isinstance(value, Tensor) else _is_number(value)
        ):
            continue
        _check_kind(label, key, form[key], value)
        if is_dtensor(value) and not is_dtensor(p):
            raise ValueError(
                f"{key} of {label}: expected {form[key]}, got a DTensor, as the parameter is none; "
                "gather the state first (StateDictOptions(full_state_dict=True))"
            )
    return any(
        (spec.dtype, spec.shape) != (form[key].dtype, form[key].shape) if key in form else True
        for key, spec in layout.items()
    )


def parts_of(p: Tensor, layout: Layout, saved: dict[str, Any]) -> dict[str, Tensor]:
    """What this rank holds of saved state that has the form of the layout.

    A collective where the state is sharded otherwise than ``p``; it looks at no value.
    """
    return {
        key: part_of(p, spec, scalar_tensor(key, saved[key]) if spec.is_scalar else saved[key])
        for key, spec in layout.items()
    }


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
        check_values(label, key, layout[key], part)
    return {key: Sealed(layout[key], part.contiguous()) for key, part in parts.items()}


def _remedy(states: Sequence[State], saved: dict[str, Any], added: Mapping[str, str]) -> str:
    """What to do about a checkpoint of another kind, where it can be told."""
    complete = [
        [each for each in FORMATS.values() if all(key in saved for key in each.keys(state))]
        for state in states
        if not state.is_scalar
    ]
    mixed = next((found for found in complete if len(found) > 1), [])
    if mixed:
        kinds = " and of ".join(f"{each.bits}-bit{each.told_apart}" for each in reversed(mixed))
        return (
            f". These are the keys of {kinds} state: torch's set_optimizer_state_dict "
            "mixes what the checkpoint has with what the optimizer has, so that none of it can be "
            "trusted. To convert, give the full state dict to optimizer.load_state_dict on every "
            "rank, or load the folder with torchao8.checkpoint.load_dcp"
        )
    names = [state.name for state in states]
    for option, name in added.items():
        if name not in names and saved.keys() & set(own_keys([name])):
            return f". It was saved with {option}=True."
    return ""


def _check_kind(label: str, key: str, spec: TensorSpec, value: Any) -> None:
    if not isinstance(value, Tensor):
        remedy = ""
        if isinstance(value, dict):  # torch's unflattening leaves one where nothing was
            remedy = (
                ". A flattened state dict has no such key, or is of another precision. "
                "torchao8.checkpoint.load_dcp(model, optimizer, folder) reads folders of any "
                "precision"
            )
        raise ValueError(f"{key} of {label}: expected {spec}, got {type(value).__name__}{remedy}")
    if value.is_meta:
        raise ValueError(
            f"{key} of {label}: expected {spec}, got one on the device meta: no values"
        )
    dense = value.layout is torch.strided
    if not dense or (value.dtype, tuple(value.shape)) != (spec.dtype, spec.shape):
        raise ValueError(
            f"{key} of {label}: expected {spec}, got {kind(value)} of shape {list(value.shape)}"
        )


# A step takes a scale of this size or more for one that is not finite (csrc/codec/block_scale.h).
SCALE_LIMIT = 2.0**126


def check_values(label: str, key: str, spec: TensorSpec, value: Tensor) -> None:
    wrong = ""
    if value.dtype == torch.uint8:
        return  # Format.check knows what codes there are
    if not bool(value.isfinite().all()):
        wrong = "finite numbers, got some that are not"
    elif key == "step" and not 0 <= float(value) == float(value) // 1 < 2**24:
        wrong = f"a whole number from 0 to 2^24 - 1, got {float(value)}"
    elif key == NORMS:
        wrong_norms = (value < 0) & (value != NO_NORM)
        if bool(wrong_norms.any()):
            wrong = f"norms, or {NO_NORM} for none, got {float(value[wrong_norms][0])}"
    elif not spec.signed:
        # A scale of -0.0 would give the codes a sign.
        negative = value.signbit() if spec.is_scale else value < 0
        if bool(negative.any()):
            wrong = f"numbers >= 0, got {float(value[negative][0])}"
    if spec.is_scale and not wrong:
        large = value.abs() >= SCALE_LIMIT
        if bool(large.any()):
            wrong = f"scales below 2^126, as steps leave them, got {float(value[large][0])}"
    if wrong:
        raise ValueError(f"{key} of {label}: expected {wrong}")


def part_of(p: Tensor, spec: TensorSpec, value: Tensor) -> Tensor:
    value = value.detach()
    if spec.local_shape is None or not is_dtensor(p):
        return value
    if not is_dtensor(value):
        return cut_out(p, value, spec.shape)
    return local(same_placement(p, value))


def _is_number(value: Any) -> bool:
    return isinstance(plain(value), (int, float)) and not isinstance(value, bool)


def _is_one_number(value: Tensor) -> bool:
    return value.numel() == 1 and not (value.is_complex() or value.dtype == torch.bool)


def is_step(value: Any) -> bool:
    """Whether this is a number of steps: a number or a tensor of one element."""
    if isinstance(value, Tensor):
        return not is_dtensor(value) and _is_one_number(value) and is_step(value.item())
    return _is_number(value) and 0 <= value < 2**24 and value == value // 1


def scalar_tensor(key: str, value: Any) -> Tensor:
    """One number of a parameter, 0-d float32; they also come as Python's numbers, as tensors of
    other dtypes, and as one tensor for all."""
    if is_dtensor(value):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32).reshape(()).clone()
    # What is out of range is refused later, with the other values.
    most = 2**24 if key == "step" else 2**128
    return torch.tensor(float(max(-most, min(value, most))), dtype=torch.float32, device="cpu")
