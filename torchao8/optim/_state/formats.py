"""The formats of state: which tensors hold a state, under which keys, and what their bytes mean.

A format is to a state what a rule is to an optimizer. Layout, checkpoints, conversions and tables
of memory ask the record of a format, so that a new one changes none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchao8.block_layout import Scales
from torchao8.optim._state import blocks
from torchao8.optim._state.blocks import Portion
from torchao8.optim._state.spec import BESIDE_STATES, Layout, State, TensorSpec


class Part(NamedTuple):
    """One of the tensors that hold a state.

    Attributes:
        suffix: of its key, behind the name of the state.
        kind: the field of :class:`torchao8.optim._state.memory.Memory` that counts its bytes.
    """

    suffix: str
    kind: str


class Place(NamedTuple):
    """Where the state of a parameter lies.

    Attributes:
        local_shape, local_scale: of the parameter and of its scales on this rank; None where the
            parameter is no DTensor, or where every rank has all scales.
        pages: the folder of paged state, see :class:`TensorSpec`.
    """

    local_shape: tuple[int, ...] | None = None
    local_scale: tuple[int, ...] | None = None
    pages: str | None = None


WHOLE = Place()


class Format:
    """A format of state.

    Attributes:
        name: in options and messages.
        bits: of a number, without its share of a scale.
        parts: the tensors that hold a state, those with an element for each number first.
    """

    name: ClassVar[str]
    bits: ClassVar[int]
    parts: ClassVar[tuple[Part, ...]]

    @property
    def is_quantized(self) -> bool:
        """Whether numbers share scales."""
        return len(self.parts) > 1

    @property
    def described(self) -> str:
        """For messages: state was saved "in 8 bits"."""
        return f"{self.bits} bits"

    def keys_of(self, name: str) -> tuple[str, ...]:
        """The keys of a state that is no scalar, by its name."""
        return tuple(name + part.suffix for part in self.parts)

    def keys(self, state: State) -> tuple[str, ...]:
        """The keys of a state; a scalar one has its name in every format."""
        return (state.name,) if state.is_scalar else self.keys_of(state.name)

    def kinds(self, state: State) -> tuple[str, ...]:
        """What the tensors under these keys count as."""
        return ("numbers",) if state.is_scalar else tuple(part.kind for part in self.parts)

    def nbytes(self, elements: int, scales: int) -> int:
        """Bytes of a state of so many elements that is no scalar, with so many scales."""
        raise NotImplementedError

    def specs(
        self, state: State, shape: tuple[int, ...], scales: Scales, place: Place = WHOLE
    ) -> tuple[TensorSpec, ...]:
        """What stands under these keys for a parameter of this global shape, at the start."""
        if state.is_scalar:
            signed, initial = state.signed, state.initial
            return (TensorSpec(torch.float32, (), initial, signed=signed, is_scalar=True),)
        return self._specs(state, shape, scales, place)

    def _specs(
        self, state: State, shape: tuple[int, ...], scales: Scales, place: Place
    ) -> tuple[TensorSpec, ...]:
        raise NotImplementedError

    def decode(
        self, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        """The numbers of states that are no scalars, float32, by the names of the states.

        Args:
            values: by their keys.
        """
        raise NotImplementedError

    def encode(
        self, states: Sequence[State], moments: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        """The reverse of :meth:`decode`, rounded to nearest."""
        raise NotImplementedError


class _Float32(Format):
    """The numbers themselves."""

    name = "float32"
    bits = 32
    parts = (Part("", "moments_32bit"),)

    def nbytes(self, elements: int, scales: int) -> int:
        return elements * torch.float32.itemsize

    def _specs(
        self, state: State, shape: tuple[int, ...], scales: Scales, place: Place
    ) -> tuple[TensorSpec, ...]:
        where = (place.local_shape, state.signed, place.pages)
        return (TensorSpec(torch.float32, shape, state.initial, *where),)

    def decode(
        self, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        return {state.name: values[state.name] for state in states}

    def encode(
        self, states: Sequence[State], moments: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        return dict(moments)


class _Dynamic(Format):
    """Codes of the dynamic map and their scales (csrc/codec/dynamic_map.h)."""

    name = "dynamic"
    bits = 8
    parts = (Part("_codes", "moments_8bit"), Part("_scale", "scales"))

    def nbytes(self, elements: int, scales: int) -> int:
        return elements + scales * torch.float32.itemsize

    def _specs(
        self, state: State, shape: tuple[int, ...], scales: Scales, place: Place
    ) -> tuple[TensorSpec, ...]:
        code = 255 if state.initial else 127 if state.signed else 0  # 1.0 or 0.0, times the scale
        pages = place.pages if scales.block_wise else None  # one number is not worth a page
        codes = TensorSpec(torch.uint8, shape, code, place.local_shape, pages=place.pages)
        where = (place.local_scale, state.signed, pages)
        return codes, TensorSpec(
            torch.float32, scales.shape(shape), state.initial, *where, is_scale=True
        )

    def decode(
        self, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        moments = {}
        for state in states:
            codes, scale = (values[key] for key in self.keys(state))
            moments[state.name] = blocks.dequantize(portion, codes, scale, state.signed)
        return moments

    def encode(
        self, states: Sequence[State], moments: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for state in states:
            new = blocks.quantize(portion, state.name, moments[state.name], state.signed)
            values.update(zip(self.keys(state), new, strict=True))
        return values


FLOAT32: Format = _Float32()
DYNAMIC: Format = _Dynamic()
# Every format, by its name.
FORMATS = {each.name: each for each in (FLOAT32, DYNAMIC)}


def own_keys(names: Iterable[str]) -> list[str]:
    """The keys that states of these names have in any format."""
    return [key for name in names for each in FORMATS.values() for key in each.keys_of(name)]


def holds(name: str, keys: Collection[str]) -> bool:
    """Whether there is a state of this name, in any format, that is no scalar."""
    return any(each.keys_of(name)[0] in keys for each in FORMATS.values())


def format_in(states: Sequence[State], keys: Collection[str]) -> Format:
    """The format of a state that has these keys; float32 where none of them tells another."""
    tensors = [state for state in states if not state.is_scalar]
    for each in FORMATS.values():
        if each.is_quantized and any(each.keys(state)[0] in keys for state in tensors):
            return each
    return FLOAT32


def first_keys(states: Sequence[State], found: Format) -> tuple[str, ...]:
    """The keys of the first state that is no scalar, which tell the format; none without one."""
    return next((found.keys(state) for state in states if not state.is_scalar), ())


def form_of(layout: Layout, states: Sequence[State], found: Format, scales: Scales) -> Layout:
    """The layout of the same state in another format; without what this rank has of it."""
    form = {key: layout[key] for key in BESIDE_STATES if key in layout}
    own = format_in(states, layout)
    for state in states:
        shape = layout[own.keys(state)[0]].shape  # the codes of both formats have this one
        form.update(zip(found.keys(state), found.specs(state, shape, scales), strict=True))
    return form
