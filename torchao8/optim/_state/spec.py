"""What ``optimizer.state[p]`` is made of: the keys, and what each of them holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8.block_layout import Scales
from torchao8.sharding import like, local

# The norms of the last gradients of a parameter, which percentile_clipping keeps: float32, one for
# each of NORMS_KEPT steps, NO_NORM where there was no gradient yet.
NORMS = "grad_norms"
NORMS_KEPT = 100
NO_NORM = -1.0
# The keys beside the states of a rule, in 8 and in 32 bits alike.
BESIDE_STATES = ("step", NORMS)


# Of what optimizer.state[p] holds, all that is of this library, whatever the class. Other keys are
# others': of an optimizer that wraps this one, or of a logger. They stay as they are.
_own_keys = set(BESIDE_STATES)


def add_own_keys(names: Iterable[str]) -> None:
    """Makes known the states of a class."""
    for name in names:
        _own_keys.update((name, *keys_of_8bit(name)))


def keys_of_8bit(name: str) -> tuple[str, str]:
    return f"{name}_codes", f"{name}_scale"


def is_own(key: Any) -> bool:
    """Whether a key of ``optimizer.state[p]`` is one of this library."""
    return key in _own_keys


def has_state(state: Mapping[str, Any] | None) -> bool:
    """Whether a parameter has state: others may have put something there before the first step."""
    return bool(state) and "step" in state  # type: ignore[operator]


class State(NamedTuple):
    """A state of a parameter: ``name`` in 32 bits, ``name_codes`` and ``name_scale`` in 8.

    Attributes:
        signed: whether its numbers may be negative.
        initial: what all of them are before the first step; not negative.
        is_scalar: whether it is one number for the whole parameter, which the op of the rule
            changes. It is then a 0-d float32 tensor ``name`` in both formats, on the device of the
            parameter; it is never paged, and of a DTensor every rank has all of it, as of ``step``.
    """

    name: str
    signed: bool
    initial: float = 0.0
    is_scalar: bool = False


class TensorSpec(NamedTuple):
    """A tensor of ``optimizer.state[p]``: what it must be, and what it is full of at the start.

    Attributes:
        shape: of the whole tensor.
        local_shape: of the part on this rank, where ``p`` is a DTensor and this is to be one.
        signed: whether its numbers may be negative.
        pages: the folder of the file behind it where it is paged, "" for the temporary one.
        is_scalar: whether it is one number for the whole parameter, whatever the shape of that.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: float = 0
    local_shape: tuple[int, ...] | None = None
    signed: bool = True
    pages: str | None = None
    is_scalar: bool = False

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Of what this rank holds."""
        return self.shape if self.local_shape is None else self.local_shape

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def empty(self, p: Tensor) -> Tensor:
        """The tensor of a parameter that has made no step yet; it is not paged."""
        device = local(p).device
        part = torch.full(self.part_shape, self.fill, dtype=self.dtype, device=device)
        return self.of_param(p, part)

    def of_param(self, p: Tensor, part: Tensor) -> Tensor:
        """The state tensor of ``p`` whose part on this rank is given."""
        part = part.to(local(p).device)
        return part if self.local_shape is None else like(p, part, self.shape)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {list(self.shape)}"


Layout = dict[str, TensorSpec]


def beside_states(clips: bool) -> Layout:
    """What a parameter has beside the states of a rule; ``clips``: whether norms are kept."""
    layout = {"step": TensorSpec(torch.float32, (), is_scalar=True)}
    if clips:
        layout[NORMS] = TensorSpec(torch.float32, (NORMS_KEPT,), NO_NORM)
    return layout


def is_8bit(states: Sequence[State], keys: Collection[str]) -> bool:
    """Whether a state with these keys is one of 8 bits."""
    return any(f"{state.name}_codes" in keys for state in states)


def form_of(layout: Layout, states: Sequence[State], in_8bit: bool, scales: Scales) -> Layout:
    """The layout of the same state in 8 or 32 bits; without what this rank has of it."""
    form = {key: layout[key] for key in BESIDE_STATES if key in layout}
    for state in states:
        if state.is_scalar:
            form[state.name] = layout[state.name]
            continue
        shape = next(layout[key].shape for key in keys_of(state, is_8bit(states, layout)))
        of_scales = scales.shape(shape)
        new = (
            (
                TensorSpec(torch.uint8, shape),
                TensorSpec(torch.float32, of_scales, signed=state.signed),
            )
            if in_8bit
            else (TensorSpec(torch.float32, shape, signed=state.signed),)
        )
        form.update(zip(keys_of(state, in_8bit), new, strict=True))
    return form


def keys_of(state: State, in_8bit: bool) -> tuple[str, ...]:
    return keys_of_8bit(state.name) if in_8bit and not state.is_scalar else (state.name,)


def format_key(states: Sequence[State], in_8bit: bool) -> str | None:
    """The key that tells the format of a parameter's state: of the first state that has two."""
    return next((keys_of(s, in_8bit)[0] for s in states if not s.is_scalar), None)
