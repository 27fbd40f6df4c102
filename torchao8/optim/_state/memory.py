"""``optimizer.memory()``: how many bytes the state takes, of which kind, and where they lie."""

from __future__ import annotations

import logging
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8 import _tables, sharding
from torchao8._messages import name_in
from torchao8.optim._state import paging
from torchao8.optim._state.formats import Format, format_in
from torchao8.optim._state.layout import gets_state, layout_of, why_kept
from torchao8.optim._state.spec import NORMS, State, has_state
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import Group
from torchao8.state_bits import OPTION

LOG = logging.getLogger("torchao8")
# As libraries do: nothing is printed for those who have set up no logging.
LOG.addHandler(logging.NullHandler())


@dataclass(frozen=True, repr=False)
class Memory:
    """The memory of an optimizer's state, in bytes; printed, it is a table.

    Where parameters are sharded, everything but ``tensors`` and the names is what lies on this
    rank. Parameters that have made no step yet count with what their first step makes.

    Attributes:
        optimizer: the name of the class.
        tensors: parameters that have state, or get it at the next step.
        tensors_8bit, tensors_4bit: those of them whose state has 8, or 4, bits.
        elements: of all these parameters.
        moments_8bit: one byte for each element of a moment, as of ``exp_avg``.
        moments_4bit: half a byte for each element of a moment; a row takes whole bytes.
        scales: the float32 numbers that these moments are multiplied by, one for each block.
        moments_32bit: of the parameters that keep 32-bit state.
        numbers: step counts, and other single numbers of a parameter.
        norms: the last norms of gradients, which ``percentile_clipping`` compares with.
        state_32bit: what all of this would take with ``optim_bits=32``.
        pending: what of ``total`` does not exist yet, as the next step makes it.
        paged: what of ``total`` is paged.
        places: the bytes that lie on each device, and in each folder of paged state.
        kept_32bit: the names of the parameters that keep 32-bit state, by reason; parameters that
            the optimizer was given without names have numbers.
        is_sharded: whether there are sharded parameters.
    """

    optimizer: str
    tensors: int
    tensors_8bit: int
    tensors_4bit: int
    elements: int
    moments_8bit: int
    moments_4bit: int
    scales: int
    moments_32bit: int
    numbers: int
    norms: int
    state_32bit: int
    pending: int
    paged: int
    places: dict[str, int]
    kept_32bit: dict[str, tuple[str, ...]]
    is_sharded: bool

    @property
    def total(self) -> int:
        """All bytes of state."""
        return sum(getattr(self, kind) for kind in _KINDS)

    def __repr__(self) -> str:  # what a notebook shows
        return str(self)

    def __str__(self) -> str:
        return "\n".join([_heading(self), *_tables.columns(_rows(self)), *_notes(self)])


def memory_of(optimizer: OptimizerContract) -> Memory:
    """What :meth:`LowPrecisionOptimizer.memory` returns."""
    parts = list(_parts(optimizer))
    kinds: Counter[str] = Counter()
    places: Counter[str] = Counter()
    kept: dict[str, list[str]] = {}
    for part in parts:
        for piece in part.pieces:
            kinds[piece.kind] += piece.nbytes
            places[piece.place] += piece.nbytes
        if part.reason is not None:
            kept.setdefault(part.reason, []).append(part.name)
    pieces = [piece for part in parts for piece in part.pieces]
    return Memory(
        optimizer=type(optimizer).__name__,
        tensors=len(parts),
        tensors_8bit=sum(part.found.bits == 8 for part in parts),
        tensors_4bit=sum(part.found.bits == 4 for part in parts),
        elements=sum(part.elements for part in parts),
        **{kind: kinds[kind] for kind in _KINDS},
        state_32bit=sum(part.nbytes_32bit for part in parts),
        pending=sum(piece.nbytes for part in parts if part.is_pending for piece in part.pieces),
        paged=sum(piece.nbytes for piece in pieces if piece.is_paged),
        places={place: nbytes for place, nbytes in places.items() if nbytes},
        kept_32bit={reason: tuple(names) for reason, names in kept.items()},
        is_sharded=any(part.is_sharded for part in parts),
    )


def log_new_state(optimizer: OptimizerContract) -> None:
    """One line for those who have set the logger ``torchao8`` to INFO."""
    if LOG.isEnabledFor(logging.INFO):
        LOG.info("%s", _heading(memory_of(optimizer)))


# -- what there is, and what the next step makes ---------------------------------------------------

# The fields of Memory that make up the total, and what the table says of them.
_KINDS = {
    "moments_8bit": "8-bit moments",
    "moments_4bit": "4-bit moments",
    "scales": "their scales",
    "moments_32bit": "32-bit moments",
    "numbers": "step counts and other numbers",
    "norms": "norms of gradients",
}


class _Piece(NamedTuple):
    """A tensor of state, or what there is of it on this rank."""

    kind: str
    nbytes: int
    place: str
    is_paged: bool


class _Part(NamedTuple):
    """The state of a parameter."""

    name: str
    elements: int
    found: Format
    nbytes_32bit: int
    is_pending: bool
    is_sharded: bool
    reason: str | None
    pieces: list[_Piece]


def _parts(optimizer: OptimizerContract) -> Iterator[_Part]:
    number = 0
    for group in optimizer.param_groups:
        states_of_group = optimizer._states_of(group)
        for i, p in enumerate(group["params"]):
            kept: dict[str, Any] = optimizer.state.get(p, {})
            name = name_in(group, i) or f"parameter {number}"
            number += 1
            if has_state(kept):
                yield _part(name, group, p, optimizer._states_in(group, kept), kept, False)
            elif gets_state(p):
                layout = layout_of(optimizer, group, p, states_of_group)
                yield _part(name, group, p, states_of_group, layout, True)


def _part(
    name: str,
    group: Group,
    p: Tensor,
    states: Sequence[State],
    kept: dict[str, Any],
    is_pending: bool,
) -> _Part:
    """Of a parameter.

    Args:
        kept: its state or, if that is pending, the layout of it.
    """
    here, found = sharding.local(p), format_in(states, kept)
    kinds = {"step": "numbers", NORMS: "norms"}
    moments = 0
    for state in states:
        keys = found.keys(state)
        kinds.update(zip(keys, found.kinds(state), strict=True))
        moments += not state.is_scalar and keys[0] in kept
    pieces = [
        _planned(kind, kept[key], here.device) if is_pending else _found(kind, kept[key])
        for key, kind in kinds.items()
        if key in kept
    ]
    beside = sum(piece.nbytes for piece in pieces if piece.kind in ("numbers", "norms"))
    return _Part(
        name,
        here.numel(),
        found,
        beside + moments * here.numel() * torch.float32.itemsize,
        is_pending,
        sharding.is_dtensor(p) or sharding.is_flattened(p),
        why_kept(group, p) if moments and not found.is_quantized else None,
        pieces,
    )


def _planned(kind: str, spec: Any, device: torch.device) -> _Piece:
    nbytes = math.prod(spec.part_shape) * spec.dtype.itemsize
    return _Piece(kind, nbytes, _place(spec.pages, device), spec.pages is not None)


def _found(kind: str, tensor: Tensor) -> _Piece:
    part = sharding.local(tensor)
    folder = paging.found_in(part)
    return _Piece(kind, part.nbytes, _place(folder, part.device), folder is not None)


def _place(folder: str | None, device: torch.device) -> str:
    """Where memory lies; a folder is that of paged state, "" the temporary one."""
    if folder is None:
        return str(device)
    if device.type == "cpu":
        return f"paged, in {folder or tempfile.gettempdir()}"
    return f"paged, {device}"


# -- the table -------------------------------------------------------------------------------------


def _heading(m: Memory) -> str:
    """All of it in a line."""
    what = f"state of {_tables.count(m.tensors, 'tensor')}, {_tables.count(m.elements, 'element')}"
    where = " on this rank" if m.is_sharded else ""
    size = _tables.size(m.total)
    if m.state_32bit != m.total:
        size += f", in 32 bits {_tables.size(m.state_32bit)}"
    return f"{m.optimizer}, {what}{where}: {size}"


def _rows(m: Memory) -> list[tuple[str, str]]:
    rows = [(label, getattr(m, kind)) for kind, label in _KINDS.items()]
    return [
        (label, _tables.size(nbytes)) for label, nbytes in [*rows, ("together", m.total)] if nbytes
    ]


def _notes(m: Memory) -> Iterator[str]:
    if m.pending:
        all_of_it = "all of it" if m.pending == m.total else _tables.size(m.pending)
        yield f"not there yet: {all_of_it}, which the next step makes"
    if m.paged:
        for place, nbytes in m.places.items():
            yield f"{place}: {_tables.size(nbytes)}"
    for reason, names in m.kept_32bit.items():
        if reason != OPTION or len(names) < m.tensors:  # not of a class of 32 bits
            yield f"32 bits: {_tables.kept(reason, names, m.tensors)}"
