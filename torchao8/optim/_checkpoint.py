"""What the state of a parameter is made of, and its way through ``load_state_dict``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8 import ops
from torchao8._modes import normal_tensors
from torchao8.block_layout import MAX_BLOCK_SIZE, Scales
from torchao8.optim import _clipping
from torchao8.optim._checks import kind, plain
from torchao8.sharding import (
    cut_out,
    is_dtensor,
    is_placed_as,
    largest_over_shards,
    like,
    local,
    place,
    same_placement,
)

# The keys that stand beside the states of a rule, in 8 and in 32 bits alike.
BESIDE_STATES = ("step", _clipping.KEY)

# Of what optimizer.state[p] holds, all that is of this library, whatever the class. Other keys are
# others': of an optimizer that wraps this one, or of a logger. They stay as they are.
_own_keys = set(BESIDE_STATES)


def add_own_keys(names: Iterable[str]) -> None:
    """Makes known the states of a class."""
    for name in names:
        _own_keys.update((name, *_parts_of_8bit(name)))


def _parts_of_8bit(name: str) -> tuple[str, str]:
    return f"{name}_codes", f"{name}_scale"


def is_own(key: Any) -> bool:
    """Whether a key of ``optimizer.state[p]`` is one of this library."""
    return key in _own_keys


def has_state(state: Mapping[str, Any] | None) -> bool:
    """Whether a parameter has state: others may have put something there before the first step."""
    return bool(state) and "step" in state  # type: ignore[operator]


# Of the state as it is saved: the keys, what they hold and how blocks lie. It stands in every
# parameter group, as what stands beside the groups gets lost on some roads.
STATE_VERSION = 1


class State(NamedTuple):
    """A state of a parameter: ``name`` in 32 bits, ``name_codes`` and ``name_scale`` in 8.

    Attributes:
        signed: whether its numbers may be negative.
        initial: what all of them are before the first step; not negative.
    """

    name: str
    signed: bool
    initial: float = 0.0


class TensorSpec(NamedTuple):
    """A tensor of ``optimizer.state[p]``: what it must be, and what it is full of at the start.

    Attributes:
        shape: of the whole tensor.
        local_shape: of the part on this rank, where ``p`` is a DTensor and this is to be one.
        signed: whether its numbers may be negative.
        pages: the folder of the file behind it where it is paged, "" for the temporary one.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: float = 0
    local_shape: tuple[int, ...] | None = None
    signed: bool = True
    pages: str | None = None

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of what this rank holds."""
        return self.shape if self.local_shape is None else self.local_shape

    def empty(self, p: Tensor) -> Tensor:
        """The tensor of a parameter that has made no step yet; it is not paged."""
        device = local(p).device
        part = torch.full(self.part_shape, self.fill, dtype=self.dtype, device=device)
        return self.place(p, part)

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


class Kept:
    """What others keep for a parameter, on the same way: with its bytes, containers included."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def place(self, p: Tensor, value: Any) -> Any:
        """The value for ``p``: tensors on its device, and sharded as it is if they have its
        shape."""
        if isinstance(value, Tensor):
            if is_dtensor(p) and not is_dtensor(value) and value.dim() and value.shape == p.shape:
                return like(p, cut_out(p, value, value.shape).to(local(p).device), value.shape)
            return value.to(local(p).device)
        if type(value) is dict:
            return {key: self.place(p, item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)([self.place(p, item) for item in value])
        return value


def unseal(state: dict[Any, Any]) -> None:
    """Takes the tensors out of their seals, in place, on the device of their parameter."""
    for p, tensors in state.items():
        if isinstance(p, Tensor):
            for key, value in tensors.items():
                if isinstance(value, Sealed):
                    tensors[key] = value.spec.place(p, value.part)
                elif isinstance(value, Kept):
                    tensors[key] = value.place(p, value.value)


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
    others: Collection[Any] = (),
) -> bool:
    """Whether saved state of ``p`` needs a conversion, after all checks that look at no value.

    Not a collective: what one rank refuses here, no rank has begun to move.

    Args:
        label: names the parameter in messages.
        layout: what the state is to be.
        saved: plain tensors of the whole, or DTensors where ``p`` is one.
        saved_scales: of the state, if it is 8-bit state.
        others: keys that are not of this library, for messages.

    Raises:
        ValueError: other keys; a value that is no tensor or of another dtype or shape.
    """
    in_8bit = _is_8bit(states, saved)
    form = _form(layout, states, in_8bit, saved_scales)
    if set(saved) != set(form):
        raise ValueError(
            f"state of {label}: expected the keys {list(layout)}, got {[*saved, *others]}"
            + _remedy(states, saved)
        )
    for key, value in saved.items():
        if key == "step" and not isinstance(value, Tensor) and _is_number(value):
            continue
        if key == "step" and isinstance(value, Tensor) and _is_count(value):
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
        key: _part(p, spec, _step_tensor(saved[key]) if key == "step" else saved[key])
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
        _check_values(label, key, layout[key], part)
    return {key: Sealed(layout[key], part.contiguous()) for key, part in parts.items()}


def _is_8bit(states: Sequence[State], keys: Collection[str]) -> bool:
    return any(f"{state.name}_codes" in keys for state in states)


def _form(layout: Layout, states: Sequence[State], in_8bit: bool, scales: Scales) -> Layout:
    """The layout of the same state in 8 or 32 bits; without what this rank has of it."""
    form = {key: layout[key] for key in BESIDE_STATES if key in layout}
    for state in states:
        shape = next(layout[key].shape for key in _keys(state, _is_8bit(states, layout)))
        of_scales = scales.shape(shape)
        new = (
            (
                TensorSpec(torch.uint8, shape),
                TensorSpec(torch.float32, of_scales, signed=state.signed),
            )
            if in_8bit
            else (TensorSpec(torch.float32, shape, signed=state.signed),)
        )
        form.update(zip(_keys(state, in_8bit), new, strict=True))
    return form


def _remedy(states: Sequence[State], saved: dict[str, Any]) -> str:
    """What to do about a checkpoint of another kind, where it can be told."""
    if any(all(k in saved for b in (True, False) for k in _keys(s, b)) for s in states):
        return (
            ". These are the keys of 8-bit and of 32-bit state: torch's set_optimizer_state_dict "
            "mixes what the checkpoint has with what the optimizer has, so that none of it can be "
            "trusted. To convert, give the full state dict to optimizer.load_state_dict on every "
            "rank, or load the folder with torchao8.checkpoint.load_dcp"
        )
    if any(str(key).startswith("max_exp_avg_sq") for key in saved):
        return ". It was saved with amsgrad=True."
    return ""


def _part(p: Tensor, spec: TensorSpec, value: Tensor) -> Tensor:
    value = value.detach()
    if spec.local_shape is None or not is_dtensor(p):
        return value
    if not is_dtensor(value):
        return cut_out(p, value, spec.shape)
    return local(same_placement(p, value))


def _check_kind(label: str, key: str, spec: TensorSpec, value: Any) -> None:
    if not isinstance(value, Tensor):
        flat = isinstance(value, dict)  # torch's unflattening leaves one where nothing was
        raise ValueError(
            f"{key} of {label}: expected {spec}, got {type(value).__name__}"
            + (". A flattened state dict has no such key, or is of another precision." * flat)
        )
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
    elif key == _clipping.KEY:
        wrong_norms = (value < 0) & (value != _clipping.EMPTY)
        if bool(wrong_norms.any()):
            wrong = f"norms, or {_clipping.EMPTY} for none, got {float(value[wrong_norms][0])}"
    elif not spec.signed:
        # A scale of -0.0 would give the codes a sign.
        negative = value.signbit() if key.endswith("_scale") else value < 0
        if bool(negative.any()):
            wrong = f"numbers >= 0, got {float(value[negative][0])}"
    if wrong:
        raise ValueError(f"{key} of {label}: expected {wrong}")


def _is_number(value: Any) -> bool:
    return isinstance(plain(value), (int, float)) and not isinstance(value, bool)


def _is_count(value: Tensor) -> bool:
    return value.numel() == 1 and not (value.is_complex() or value.dtype == torch.bool)


def is_step(value: Any) -> bool:
    """Whether this is a number of steps: a number or a tensor of one element."""
    if isinstance(value, Tensor):
        return not is_dtensor(value) and _is_count(value) and is_step(value.item())
    return _is_number(value) and 0 <= value < 2**24 and value == value // 1


def _step_tensor(value: Any) -> Tensor:
    """Steps also come as numbers, as tensors of other dtypes, and as one tensor for all."""
    if is_dtensor(value):
        value = value.full_tensor()
    if isinstance(value, Tensor):
        return value.detach().to(torch.float32).reshape(()).clone()
    return torch.tensor(float(min(value, 2**24)), dtype=torch.float32, device="cpu")


# -- another precision -----------------------------------------------------------------------------


def convert(
    label: str,
    p: Tensor,
    layout: Layout,
    states: Sequence[State],
    saved: dict[str, Any],
    scales: Scales,
    saved_scales: Scales,
) -> dict[str, Tensor]:
    """What this rank holds of saved state after its conversion, through float32.

    8 bits become 32 without loss, 32 become 8 rounded to nearest, and other blocks both. Sharded
    state is converted where it lies if it is placed as ``p`` and in whole blocks; if not, it is
    gathered, a collective, a parameter at a time. One scale for all of a sharded parameter is a
    collective as well.

    Args:
        saved: of a form that :func:`check_form` has let pass.

    Raises:
        ValueError: a number that no step could have left; after the collectives.
    """
    in_8bit, saved_in_8bit = _is_8bit(states, layout), _is_8bit(states, saved)
    form = _form(layout, states, saved_in_8bit, saved_scales)
    keys = [key for key in form if key not in BESIDE_STATES]
    sharded_keys = [k for k in keys if saved_scales.block_wise or not k.endswith("_scale")]
    here = is_dtensor(p) and all(
        is_dtensor(saved[key]) and is_placed_as(p, saved[key]) for key in sharded_keys
    )
    if here and is_dtensor(p):
        used = ((scales, in_8bit), (saved_scales, saved_in_8bit))
        here = all(
            place(p, each.block_size) is not None
            for each, is_used in used
            if is_used and each.block_wise
        )
    step = _step_tensor(saved["step"])
    values = {
        key: local(saved[key]) if here and key in sharded_keys else _whole(saved[key]).detach()
        for key in keys
    }
    parts, sharded = {"step": step}, p if here else None
    if _clipping.KEY in form:
        parts[_clipping.KEY] = _whole(saved[_clipping.KEY]).detach()
    moments: list[Tensor] = []
    extremes = [torch.zeros(1, dtype=torch.float32, device="cpu") for _ in states]
    refusal: ValueError | None = None
    try:
        for key, value in values.items():
            _check_values(label, key, form[key], value)
        for state in states:
            first, *others = (values[key] for key in _keys(state, saved_in_8bit))
            for scale in others:
                first = _dequantize(sharded, first, scale, saved_scales, state.signed)
            moments.append(first)
    except ValueError as error:
        refusal = error  # not yet: the other ranks are about to talk
    if in_8bit and not scales.block_wise:
        extremes = _extreme_elements(sharded, moments, len(states), local(p).device)
    if refusal is not None:
        raise refusal
    for state, moment, extreme in zip(states, moments, extremes, strict=True):
        new: tuple[Tensor, ...] = (moment,)
        if in_8bit:
            new = _quantize(sharded, moment, scales, state.signed, extreme)
        for key, value in zip(_keys(state, in_8bit), new, strict=True):
            parts[key] = value if here else _part(p, layout[key], value)
    return parts


def in_32bit(
    p: Tensor, states: Sequence[State], saved: dict[str, Any], scales: Scales
) -> dict[str, Any]:
    """The state of a parameter in 32 bits, sharded as it is; ``saved`` itself where it is so."""
    if not _is_8bit(states, saved):
        return saved
    converted = {k: v for k, v in saved.items() if k in BESIDE_STATES or not is_own(k)}
    for state in states:
        codes, scale = (local(saved[key]) for key in _keys(state, True))
        converted[state.name] = like(p, _dequantize(p, codes, scale, scales, state.signed), p.shape)
    return converted


def _dequantize(
    p: Tensor | None, codes: Tensor, scale: Tensor, scales: Scales, signed: bool
) -> Tensor:
    """The numbers that codes stand for: all of them, or what this rank holds of those of ``p``."""
    shape, block_size = codes.shape, scales.block_size
    if codes.numel() == 0:
        return torch.empty(shape, dtype=torch.float32, device=codes.device)
    if not scales.block_wise:
        codes, scale = codes.reshape(-1), scale.to(codes.device)
        scale = scale.expand(-(-len(codes) // block_size)).contiguous()
    elif is_dtensor(p):  # as matrices, whose rows are those of the whole
        where = place(p, block_size)
        assert where is not None  # or it would have no codes
        codes, scale = codes.reshape(-1, where.row), scale.reshape(-1, where.blocks)
    return ops.dequantize_blockwise(codes, scale, block_size=block_size, signed=signed).view(shape)


def _quantize(
    p: Tensor | None, moment: Tensor, scales: Scales, signed: bool, extreme: Tensor
) -> tuple[Tensor, Tensor]:
    """The reverse of :func:`_dequantize`; the extreme is that of one scale for the tensor."""
    block_size = scales.block_size
    if not scales.block_wise:
        return _quantize_with(moment, extreme, signed)
    if not is_dtensor(p):
        return ops.quantize_blockwise(moment, block_size=block_size, signed=signed)
    where = place(p, block_size)
    assert where is not None
    rows = moment.reshape(-1, where.row) if moment.numel() else moment.new_empty(0, 1)
    codes, scale = ops.quantize_blockwise(rows, block_size=block_size, signed=signed)
    return codes.view(moment.shape), scale.view(where.scale_shape)


def _extreme_elements(
    p: Tensor | None, moments: Sequence[Tensor], count: int, device: torch.device
) -> list[Tensor]:
    """The element of largest magnitude of each of so many moments, with its sign, as of blocks.

    A collective where these are what this rank holds of those of ``p``. One that was refused, and
    is missing, counts as nothing.
    """
    # The largest, and the largest of the negated.
    ends = torch.zeros(count, 2, dtype=torch.float32, device=device)
    for i, moment in enumerate(moments):
        if moment.numel():
            ends[i] = torch.stack((moment.max(), -moment.min()))
    ends = ends.nan_to_num().clamp_min(0)
    if is_dtensor(p):
        ends = largest_over_shards(p, ends)
    return list(torch.where(ends[:, 0] >= ends[:, 1], ends[:, 0], -ends[:, 1])[:, None])


def _quantize_with(moment: Tensor, extreme: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes at one scale. No element is above it, so that any block of which it is the
    first element has it for its scale."""
    others = MAX_BLOCK_SIZE - 1
    rows = max(1, -(-moment.numel() // others))
    values = moment.new_zeros(rows * others)
    values[: moment.numel()] = moment.reshape(-1)
    blocks = torch.cat((extreme.to(moment.device).expand(rows, 1), values.view(rows, others)), 1)
    codes, scale = ops.quantize_blockwise(blocks, block_size=MAX_BLOCK_SIZE, signed=signed)
    codes = codes[:, 1:].reshape(-1)[: moment.numel()]
    return codes.view(moment.shape).contiguous(), scale[0].clone()


def _keys(state: State, in_8bit: bool) -> tuple[str, ...]:
    return _parts_of_8bit(state.name) if in_8bit else (state.name,)


def _whole(value: Any) -> Any:
    return value.full_tensor() if is_dtensor(value) else value
