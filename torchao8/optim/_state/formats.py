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
from torchao8.block_layout import Scales, codes_shape
from torchao8.optim._state import blocks
from torchao8.optim._state.blocks import Portion
from torchao8.optim._state.spec import BESIDE_STATES, Layout, State, TensorSpec
from torchao8.shard_layout import ShardRows


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
        local_shape: of the parameter on this rank; None where it is no DTensor.
        rows: of a DTensor whose state is quantized, where its shard lies.
        pages: the folder of paged state, see :class:`TensorSpec`.
    """

    local_shape: tuple[int, ...] | None = None
    rows: ShardRows | None = None
    pages: str | None = None

    def local_scale(self, scales: Scales) -> tuple[int, ...] | None:
        """The shape of the scales on this rank; None where it has all of them."""
        return None if self.rows is None or not scales.block_wise else self.rows.scale_shape


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
        first = next(each for each in FORMATS.values() if each.bits == self.bits)
        return "" if self is first else f" ({self.name})"

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

    def codes_shape(self, shape: Sequence[int], block_size: int) -> tuple[int, ...]:
        """The shape of the first of its tensors, for a parameter of this shape."""
        return tuple(shape)

    def packed(self, row: int) -> int:
        """Entries of that tensor for a row of so many elements."""
        return row

    def nbytes(self, codes: int, scales: int) -> int:
        """Bytes of a state that is no scalar, with so many entries in the first of its tensors and
        so many scales."""
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

    def nbytes(self, codes: int, scales: int) -> int:
        return codes * torch.float32.itemsize

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
    """Bytes and scales: the formats that quantize_blockwise has."""

    def fill(self, state: State) -> int:
        """The byte of fresh state, whose scale is the initial number."""
        raise NotImplementedError

    def nbytes(self, codes: int, scales: int) -> int:
        return codes + scales * torch.float32.itemsize

    def _specs(
        self, state: State, shape: tuple[int, ...], scales: Scales, place: Place
    ) -> tuple[TensorSpec, ...]:
        pages = place.pages if scales.block_wise else None  # one number is not worth a page
        whole = self.codes_shape(shape, scales.block_size)
        part = place.local_shape if place.rows is None else place.rows.codes_shape(self.bits)
        codes = TensorSpec(torch.uint8, whole, self.fill(state), part, pages=place.pages)
        where = (place.local_scale(scales), self._has_signed_scale(state), pages)
        return codes, TensorSpec(
            torch.float32, scales.shape(shape), state.initial, *where, is_scale=True
        )

    def _has_signed_scale(self, state: State) -> bool:
        return state.signed


class _Bytes(_Codes):
    """A byte for each number, which stands for itself alone."""

    bits = 8

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


class _Dynamic(_Bytes):
    """Codes of the dynamic map and their scales (csrc/codec/dynamic_map.h)."""

    name = "dynamic"
    parts = (Part("_codes", "moments_8bit"), Part("_scale", "scales"))

    def fill(self, state: State) -> int:
        return 255 if state.initial else 127 if state.signed else 0  # 1.0 or 0.0


class _Mulaw(_Bytes):
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
            _check_mantissas(f"{scale_key} of {label}", scale, 7 if state.signed else 0, state)
            # No second moment above 0 is rounded to 0, and all of a block without a scale are.
            if not state.signed and blocks.some_zeros_are_wrong(portion, codes, scale):
                raise ValueError(
                    f"{key} of {label}: expected codes of 0 in all blocks of scale 0 and in no "
                    "others, got some that are not so"
                )


class _FourBit(_Codes):
    """Two numbers a byte, and scales (csrc/formats/four_bit.h).

    An average of squares is one of 16 powers of two and their halves between, none of them 0. An
    average of gradients is some eighths of its scale, from -7 to 8 of them, times the root of the
    stored average of its squares where the rule has one; without a scale of those, this root is 1.
    A block has its own scales always.
    """

    name = "4bit"
    bits = 4
    parts = (Part("_4bit", "moments_4bit"), Part("_4bit_scale", "scales"))

    def fill(self, state: State) -> int:
        assert not state.initial  # no rule with 4 bits starts elsewhere
        return 0x77 if state.signed else 0

    def codes_shape(self, shape: Sequence[int], block_size: int) -> tuple[int, ...]:
        return codes_shape(shape, block_size, bits=4)

    def packed(self, row: int) -> int:
        return -(-row // 2)

    def _specs(
        self, state: State, shape: tuple[int, ...], scales: Scales, place: Place
    ) -> tuple[TensorSpec, ...]:
        return super()._specs(state, shape, scales._replace(block_wise=True), place)

    def decode(
        self, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        moments: dict[str, Tensor] = {}
        for state in _squares_first(states):
            codes, scale = (values[key] for key in self.keys(state))
            moment = blocks.dequantize_packed(portion, codes, scale, state.signed, self.name)
            if state.squares:
                moment *= _roots(moments[state.squares])
            moments[state.name] = moment
        return {state.name: moments[state.name] for state in states}

    def encode(
        self, states: Sequence[State], moments: Mapping[str, Tensor], portion: Portion
    ) -> dict[str, Tensor]:
        made: dict[str, tuple[Tensor, Tensor]] = {}
        for state in _squares_first(states):
            moment = moments[state.name]
            if state.squares:  # in units of the root of what will be stored
                stored = blocks.dequantize_packed(
                    portion, *made[state.squares], signed=False, state_format=self.name
                )
                moment = (moment * (1 / _roots(stored))).clamp(-_LARGEST, _LARGEST)
            made[state.name] = blocks.quantize_packed(portion, moment, state.signed, self.name)
        return {
            key: value
            for state in states
            for key, value in zip(self.keys(state), made[state.name], strict=True)
        }

    def check(
        self, label: str, states: Sequence[State], values: Mapping[str, Tensor], portion: Portion
    ) -> None:
        is_odd = blocks.packed_row(portion) % 2 == 1
        for state in states:
            key, scale_key = self.keys(state)
            if not state.signed:
                _check_mantissas(f"{scale_key} of {label}", values[scale_key], 0, state)
            empty = self.fill(state) >> 4
            if is_odd and values[key].numel():
                found = values[key][..., -1] >> 4
                if bool((found != empty).any()):
                    raise ValueError(
                        f"{key} of {label}: expected the half byte {empty} behind each row, which "
                        "is of no element, got another one"
                    )
            if blocks.some_without_scale(portion, values[key], values[scale_key], empty):
                raise ValueError(
                    f"{key} of {label}: expected codes of {empty} in all blocks of scale 0, got "
                    "some that are not so"
                )


# What a scale may be: a larger one counts as not finite.
_LARGEST = 2.0**125


def _roots(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.sqrt(), 1.0)


def _squares_first(states: Sequence[State]) -> list[State]:
    """The states in an order in which each stands behind that of its squares."""
    return sorted(states, key=lambda state: bool(state.squares))


def _check_mantissas(what: str, scale: Tensor, bits: int, state: State) -> None:
    """Raises ValueError unless scales have at most so many bits behind the point, as steps leave
    them, or are those of fresh state."""
    dropped = (1 << (23 - bits)) - 1
    wrong = (scale.view(torch.int32) & dropped != 0) & (scale != state.initial)
    if bool(wrong.any()):
        expected = f"numbers of {bits} mantissa bits" if bits else "powers of two"
        raise ValueError(
            f"{what}: expected {expected}, as steps leave them, got {float(scale[wrong][0])}"
        )


FLOAT32: Format = _Float32()
DYNAMIC: Format = _Dynamic()
MULAW: Format = _Mulaw()
FOUR_BIT: Format = _FourBit()
# Every format, by its name.
FORMATS = {each.name: each for each in (FLOAT32, DYNAMIC, MULAW, FOUR_BIT)}


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


def form_of(
    layout: Layout, shape: Sequence[int], states: Sequence[State], found: Format, scales: Scales
) -> Layout:
    """The layout of the same state in another format; without what this rank has of it.

    Args:
        shape: of the whole parameter.
    """
    form = {key: layout[key] for key in BESIDE_STATES if key in layout}
    shape = tuple(shape)
    for state in states:
        form.update(zip(found.keys(state), found.specs(state, shape, scales), strict=True))
    return form
