"""What ``optimizer.state[p]`` is made of: the keys, and what each of them holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8.sharding import like, local

# The norms of the last gradients of a parameter, which percentile_clipping keeps: float32, one for
# each of NORMS_KEPT steps, NO_NORM where there was no gradient yet.
NORMS = "grad_norms"
NORMS_KEPT = 100
NO_NORM = -1.0
# The keys beside the states of a rule, in all formats alike.
BESIDE_STATES = ("step", NORMS)


# Of what optimizer.state[p] holds, all that is of this library, whatever the class. Other keys are
# others': of an optimizer that wraps this one, or of a logger. They stay as they are.
_own_keys = set(BESIDE_STATES)


def add_own_keys(keys: Iterable[str]) -> None:
    """Makes known the keys of the states of a class, in all formats."""
    _own_keys.update(keys)


def is_own(key: Any) -> bool:
    """Whether a key of ``optimizer.state[p]`` is one of this library."""
    return key in _own_keys


def has_state(state: Mapping[str, Any] | None) -> bool:
    """Whether a parameter has state: others may have put something there before the first step."""
    return bool(state) and "step" in state  # type: ignore[operator]


class State(NamedTuple):
    """A state of a parameter. Its format (:mod:`torchao8.optim._state.formats`) says under which
    keys it is kept, as ``name`` in 32 bits.

    Attributes:
        signed: whether its numbers may be negative.
        initial: what all of them are before the first step; not negative.
        is_scalar: whether it is one number for the whole parameter, which the op of the rule
            changes. It is then a 0-d float32 tensor ``name`` in all formats, on the device of the
            parameter; it is never paged, and of a DTensor every rank has all of it, as of ``step``.
        squares: the state of average squares, if there is one, in units of whose root this one is
            of one magnitude throughout a block: 4 bits of it are such units.
    """

    name: str
    signed: bool
    initial: float = 0.0
    is_scalar: bool = False
    squares: str = ""


class TensorSpec(NamedTuple):
    """A tensor of ``optimizer.state[p]``: what it must be, and what it is full of at the start.

    Attributes:
        shape: of the whole tensor.
        local_shape: of the part on this rank, where ``p`` is a DTensor and this is to be one.
        signed: whether its numbers may be negative.
        pages: the folder of the file behind it where it is paged, "" for the temporary one.
        is_scalar: whether it is one number for the whole parameter, whatever the shape of that.
        is_scale: whether codes are multiplied by it.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    fill: float = 0
    local_shape: tuple[int, ...] | None = None
    signed: bool = True
    pages: str | None = None
    is_scalar: bool = False
    is_scale: bool = False

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
