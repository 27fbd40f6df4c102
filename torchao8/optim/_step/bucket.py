"""What one step does: the tensors of each op call, and the parameters that they belong to."""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from torchao8.matrix_shape import MatrixShape
from torchao8.optim.options import Group

_Value = TypeVar("_Value")

# A parameter, by the number of its group and its own there.
Number = tuple[int, int]
# A parameter, by the index of its work and its own there.
Member = tuple[int, int]


class Bucket(NamedTuple):
    """The tensors of one op call: one device, one dtype of parameters and of gradients, one format.

    They are plain tensors: of a DTensor, what lies on this rank. ``values`` and ``scales`` hold a
    list for each state, by its name: the codes and their scales, or the float32 values and an empty
    list; of a state that is one number of its parameter, 0-d tensors and an empty list.
    ``shard_offsets`` and ``shard_row_strides`` say where shards lie in their global tensors; both
    are empty where none is sharded, or where nothing depends on it. ``numbers`` are those of the
    parameters in their work. ``counts`` tells whether the op counts the step: it does where each
    parameter is one entry. ``state_format`` is what the op takes as such.
    """

    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    values: dict[str, list[Tensor]]
    scales: dict[str, list[Tensor]]
    shard_offsets: list[int]
    shard_row_strides: list[int]
    numbers: list[int]
    counts: bool
    state_format: int

    def states_of(self, i: int) -> list[Tensor]:
        """All tensors of state of its i-th parameter."""
        lists = (*self.values.values(), *self.scales.values())
        return [tensors[i] for tensors in lists if tensors]

    def take(self, numbers: Container[int]) -> Bucket:
        """A bucket of those of its entries that are of some parameters."""
        kept = [i for i, number in enumerate(self.numbers) if number in numbers]

        def of(values: list[_Value]) -> list[_Value]:
            return [values[i] for i in kept] if values else []

        return Bucket(
            of(self.params),
            of(self.grads),
            of(self.steps),
            {name: of(tensors) for name, tensors in self.values.items()},
            {name: of(tensors) for name, tensors in self.scales.items()},
            of(self.shard_offsets),
            of(self.shard_row_strides),
            of(self.numbers),
            self.counts,
            self.state_format,
        )

    def part(self, first: int, last: int) -> Bucket:
        """A bucket of some of its parameters, ``last`` not included."""
        return Bucket(
            self.params[first:last],
            self.grads[first:last],
            self.steps[first:last],
            {name: tensors[first:last] for name, tensors in self.values.items()},
            {name: tensors[first:last] for name, tensors in self.scales.items()},
            self.shard_offsets[first:last],
            self.shard_row_strides[first:last],
            self.numbers[first:last],
            self.counts,
            self.state_format,
        )


class Work(NamedTuple):
    """What a step does in a parameter group: the parameters that have a gradient, in their order.

    Attributes:
        number, group: of the parameter group.
        buckets: the op calls. A parameter whose shard on this rank is empty is in none of them
            (but for one with a single scale, which is there as an empty piece), and one may be
            there in several pieces.
        numbers: of the parameters in the group.
        params: as they are in the group.
        grads: what lies on this rank.
        steps: the counts of steps.
        histories: of the norms of gradients, where these are clipped.
        counts: those that no bucket counts, by their devices, each device once or more.
        sharded: the parameters that are DTensors.
        matrices: what each parameter is, the whole of it, where their rule orthogonalizes them.
        lr, rule_numbers: as the ops take them, the numbers by device; filled as they are wanted.
    """

    number: int
    group: Group
    buckets: list[Bucket]
    numbers: list[int]
    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    histories: list[Tensor]
    counts: list[tuple[torch.device, list[Tensor]]]
    sharded: list[Tensor]
    matrices: list[MatrixShape] | None
    lr: Tensor
    rule_numbers: dict[torch.device, Tensor]
