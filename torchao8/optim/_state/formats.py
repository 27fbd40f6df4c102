"""The formats of state: which tensors hold a state, under which keys, and what their bytes mean.

A format is to a state what a rule is to an optimizer. Layout, checkpoints, conversions and tables
of memory ask the record of a format, so that a new one changes none of them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from torchao8 import ops
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
        return f"{self.bits} bits{self.told_apart}"

    @property
    def told_apart(self) -> str:
        """For messages, behind the number of bits, where that alone would mean another format."""
        return "" if self is DYNAMIC or self is FLOAT32 else f" ({self.name})"

    @property
    def op_number(self) -> int:
        """What the ops take as ``state_format``; they tell float32 by its dtype."""
        return ops.FORMAT_NUMBERS[self.name] if self.is_quantized else 0

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

    def check(
        self, label: str, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> None:
        """Checks what the values of single tensors do not tell, as a checkpoint is loaded.

        Args:
            label: names the parameter in messages.
            values: by their keys; finite ones.

        Raises:
            ValueError: numbers that no step could have left.
        """


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


class _Codes(Format):
    """One byte for each number, and scales: the formats that quantize_blockwise has."""

    bits = 8

    def fill(self, state: State) -> int:
        """The code of fresh state, whose scale is the initial number."""
        raise NotImplementedError

    def nbytes(self, elements: int, scales: int) -> int:
        return elements + scales * torch.float32.itemsize

    def _specs(
        self, state: State, shape: tuple[int, ...], scales: Scales, place: Place
    ) -> tuple[TensorSpec, ...]:
        pages = place.pages if scales.block_wise else None  # one number is not worth a page
        codes = TensorSpec(
            torch.uint8, shape, self.fill(state), place.local_shape, pages=place.pages
        )
        where = (place.local_scale, self._has_signed_scale(state), pages)
        return codes, TensorSpec(
            torch.float32, scales.shape(shape), state.initial, *where, is_scale=True
        )

    def _has_signed_scale(self, state: State) -> bool:
        raise NotImplementedError

    def decode(
        self, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        moments = {}
        for state in states:
            codes, scale = (values[key] for key in self.keys(state))
            moments[state.name] = blocks.dequantize(portion, codes, scale, state.signed, self.name)
        return moments

    def encode(
        self, states: Sequence[State], moments: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for state in states:
            moment = moments[state.name]
            new = blocks.quantize(portion, state.name, moment, state.signed, self.name)
            values.update(zip(self.keys(state), new, strict=True))
        return values


class _Dynamic(_Codes):
    """Codes of the dynamic map and their scales (csrc/codec/dynamic_map.h)."""

    name = "dynamic"
    parts = (Part("_codes", "moments_8bit"), Part("_scale", "scales"))

    def fill(self, state: State) -> int:
        return 255 if state.initial else 127 if state.signed else 0  # 1.0 or 0.0

    def _has_signed_scale(self, state: State) -> bool:
        return state.signed


class _Mulaw(_Codes):
    """Codes that are the leading bits of floats, and their scales (csrc/formats/mulaw.h)."""

    name = "mulaw"
    parts = (Part("_mulaw", "moments_8bit"), Part("_mulaw_scale", "scales"))

    def fill(self, state: State) -> int:
        return 16 if state.initial else 0  # 1.0 or 0.0

    def _has_signed_scale(self, state: State) -> bool:
        return False

    def check(
        self, label: str, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> None:
        for state in states:
            key, scale_key = self.keys(state)
            codes, scale = values[key], values[scale_key]
            # Of an unsigned state a power of two, else with 7 bits behind the point.
            dropped = (1 << (16 if state.signed else 23)) - 1
            wrong = (scale.view(torch.int32) & dropped != 0) & (scale != state.initial)
            if bool(wrong.any()):
                expected = "numbers of 7 mantissa bits" if state.signed else "powers of two"
                raise ValueError(
                    f"{scale_key} of {label}: expected {expected}, as steps leave them, got "
                    f"{float(scale[wrong][0])}"
                )
            # No second moment above 0 is rounded to 0, and all of a block without a scale are.
            if not state.signed and blocks.some_zeros_are_wrong(portion, codes, scale):
                raise ValueError(
                    f"{key} of {label}: expected codes of 0 in all blocks of scale 0 and in no "
                    "others, got some that are not so"
                )


FLOAT32: Format = _Float32()
DYNAMIC: Format = _Dynamic()
MULAW: Format = _Mulaw()
# Every format, by its name.
FORMATS = {each.name: each for each in (FLOAT32, DYNAMIC, MULAW)}


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
