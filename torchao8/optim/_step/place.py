"""Placing parameters into op calls: what lies on this rank, as lists that an op takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao8.optim._state.formats import FORMATS
from torchao8.optim._state.spec import State
from torchao8.optim._step.bucket import Bucket
from torchao8.shard_layout import Run, ShardRows

Columns = dict[str, list[Tensor]]


class Kind(NamedTuple):
    """What parameters that share an op call have in common.

    Attributes:
        state_format: the name of the format of their state.
        device, param_dtype, grad_dtype: of what lies on this rank.
        is_sharded: whether they are DTensors.
        has_rows: whether it matters where their shards lie: in blocks, and for random numbers.
        is_empty: whether nothing of them lies on this rank, and no call is made.
    """

    state_format: str
    device: torch.device
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    is_sharded: bool
    has_rows: bool
    is_empty: bool


class Calls:
    """The parameters of a group that go into one op call.

    Attributes:
        members: their numbers in the work of the group.
        rows: where their shards lie, if that matters.
        offsets, strides: of their first rows, where none of them is cut.
        is_cut: whether one of them is in several pieces.
        counts: whether the op counts the step, see :class:`Bucket`.
    """

    def __init__(self, kind: Kind, states: Sequence[State], block_wise: bool) -> None:
        self.kind = kind
        found = FORMATS[kind.state_format]
        self.keys = {state.name: found.keys(state) for state in states}
        self.op_number = found.op_number
        self.packed = found.packed
        self.scalars = {state.name for state in states if state.is_scalar}
        self.block_wise = block_wise
        self.members: list[int] = []
        self.rows: list[ShardRows] = []
        self.offsets: list[int] = []
        self.strides: list[int] = []
        self.is_cut = False
        self.counts = False

    def add(self, member: int, rows: ShardRows | None) -> None:
        """Adds a parameter."""
        self.members.append(member)
        if rows is not None:
            self.rows.append(rows)

    def finish(self) -> None:
        """To be called when all parameters are there."""
        self.is_cut = not all(rows.whole and len(rows.runs) == 1 for rows in self.rows)
        if not self.is_cut:
            self.offsets = [rows.runs[0].offset for rows in self.rows]
            self.strides = [rows.runs[0].stride for rows in self.rows]
        self.counts = not self.is_cut and not self.kind.is_empty

    def bucket(self, params: list[Tensor], grads: list[Tensor], columns: Columns) -> Bucket:
        """The tensors of the call.

        Args:
            params, grads: what lies on this rank, of the members.
            columns: for each key of the state, what lies on this rank, of the members.
        """
        values = {name: columns[keys[0]] for name, keys in self.keys.items()}
        scales = {name: columns[keys[1]] if keys[1:] else [] for name, keys in self.keys.items()}
        bucket = Bucket(
            params,
            grads,
            columns["step"],
            values,
            scales,
            self.offsets,
            self.strides,
            self.members,
            self.counts,
            self.op_number,
        )
        return self._pieces(bucket) if self.is_cut else bucket

    def _pieces(self, bucket: Bucket) -> Bucket:
        """The same call, of runs of rows that lie at equal distances in their global tensor."""
        values_of: Columns = {n: [] for n in self.keys}
        scales_of: Columns = {n: [] for n in self.keys}
        made = Bucket([], [], [], values_of, scales_of, [], [], [], self.counts, self.op_number)
        for i, rows in enumerate(self.rows):
            p, grad = bucket.params[i], bucket.grads[i]
            values = {n: tensors[i] for n, tensors in bucket.values.items()}
            scales = {n: tensors[i] for n, tensors in bucket.scales.items() if tensors}
            cut = {n: t for n, t in values.items() if n not in self.scalars}
            cut_scales = scales if self.block_wise else {}
            runs: tuple[Run, ...] = rows.runs
            if not runs:
                # Nothing lies here, but every rank steps what is one number of the parameter.
                p, grad = p.reshape(0), grad.reshape(0)
                values.update({n: t.reshape(0) for n, t in cut.items()})
                scales.update({n: t.reshape(0) for n, t in cut_scales.items()})
                runs = (Run(0, 0, 0, 0),)
            elif not rows.whole:
                # As matrices, whose rows are those of the global tensor whatever the local shape.
                p, grad = p.view(-1, rows.row), grad.reshape(-1, rows.row)
                row = self.packed(rows.row)
                values.update({n: t.view(-1, row) for n, t in cut.items()})
                scales.update({n: t.view(-1, rows.blocks) for n, t in cut_scales.items()})
            for number, run in enumerate(runs):
                if number > 0:  # the first piece changes the number that stays, the others copies
                    values.update({n: values[n].clone() for n in self.scalars})
                part = slice(run.first, run.last)
                is_cut = bool(rows.runs) and not rows.whole
                made.params.append(p[part] if is_cut else p)
                made.grads.append(grad[part] if is_cut else grad)
                made.steps.append(bucket.steps[i])
                for n, t in values.items():
                    made.values[n].append(t[part] if is_cut and n in cut else t)
                for n, t in scales.items():
                    made.scales[n].append(t[part] if is_cut and n in cut_scales else t)
                made.shard_offsets.append(run.offset)
                made.shard_row_strides.append(run.stride)
                made.numbers.append(self.members[i])
        return made
