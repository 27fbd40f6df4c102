"""What was true when a plan was made: options, state and properties, to be compared later.

Nothing here keeps a parameter, a gradient or a tensor of state alive.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor

from torchao8 import sharding
from torchao8._numbers import one_number, plain_numbers
from torchao8.optim._step.place import Columns
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import Group, clips, known_options

State = dict[str, Tensor]


def _getter(name: str) -> Callable[[Tensor], Any]:
    getter: Callable[[Tensor], Any] = getattr(Tensor, name).__get__
    return getter


# Properties as functions: map() calls them without a frame of Python for each tensor.
_dtype = _getter("dtype")
_layout = _getter("layout")
_shape = _getter("shape")
_device = _getter("device")


class Tensors:
    """Dtype, shape and device of the parameters of a group that have a gradient, or of what this
    rank holds of them; and the dtypes of their gradients."""

    def __init__(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        self.dtypes = list(map(_dtype, params))
        self.shapes = list(map(_shape, params))
        self.devices = list(map(_device, params))
        self.grad_dtypes = list(map(_dtype, grads))

    def hold(self, params: Sequence[Tensor], grads: Sequence[Tensor]) -> bool:
        """Whether these have the same properties."""
        return (
            list(map(_dtype, grads)) == self.grad_dtypes
            and all(layout is torch.strided for layout in set(map(_layout, grads)))
            and list(map(_dtype, params)) == self.dtypes
            and list(map(_shape, params)) == self.shapes
            and list(map(_device, params)) == self.devices
        )


class StateSnapshot:
    """The state of the parameters of an op call.

    An ``id`` may be that of a newer tensor: the shapes of the first state are compared as well, and
    the op checks the rest.

    Args:
        at: the numbers of the parameters in ``optimizer.state``.
        states: theirs.
        count: of all states of the optimizer.
        own: the keys that the step reads.
        shaped: those of them whose shapes are compared.
    """

    def __init__(
        self,
        at: list[int],
        states: Sequence[State],
        count: int,
        own: Sequence[str],
        shaped: Sequence[str],
    ) -> None:
        self.at = at if at != list(range(count)) else None
        alike = {tuple(state) for state in states}
        self.keys = alike.pop() if len(alike) == 1 else ()
        self.is_uniform = bool(self.keys) or not states
        self.all_keys = [self.keys] * len(at)
        self.ids = {key: [id(state[key]) for state in states] for key in own}
        self.parts_of = {key: _parts_of([state[key] for state in states]) for key in own}
        self.shapes = {
            key: list(map(_shape, self.parts_of[key]([state[key] for state in states])))
            for key in shaped
        }

    def columns(self, states: list[State]) -> Columns | None:
        """What this rank holds of the state, for each key; None if a tensor is another than it was.

        Args:
            states: all those of the optimizer, in their order.
        """
        mine = states if self.at is None else [states[i] for i in self.at]
        # Others' keys may differ from parameter to parameter: then there are no columns.
        if not self.is_uniform or list(map(tuple, mine)) != self.all_keys:
            return None
        tensors = list(chain.from_iterable([state.values() for state in mine]))
        width = len(self.keys)
        columns = {k: tensors[i::width] for i, k in enumerate(self.keys) if k in self.ids}
        for key, ids in self.ids.items():
            if list(map(id, columns[key])) != ids:
                return None
            columns[key] = self.parts_of[key](columns[key])
        for key, shapes in self.shapes.items():
            if list(map(_shape, columns[key])) != shapes:
                return None
        return columns


def _parts_of(tensors: list[Tensor]) -> Callable[[list[Tensor]], list[Tensor]]:
    """What finds the parts on this rank of these very tensors, the fastest way."""
    if not any(map(sharding.is_dtensor, tensors)):
        return _as_they_are
    local = sharding.local_tensors(tensors)
    try:
        are_plain = all(map(is_, sharding.parts_of(tensors), local))
    except AttributeError:  # plain ones among them
        are_plain = False
    return sharding.parts_of if are_plain else sharding.local_tensors


def _as_they_are(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


class Options:
    """The options of a group when they were checked, and the numbers that the ops take.

    Attributes:
        layout: what decides which state there is, and how a parameter is placed.
        lr: 0-d, see :func:`torchao8.ops.step_`.
        numbers: those of the rule, by the device of the parameters; filled as they are wanted.
    """

    def __init__(self, optimizer: OptimizerContract, group: Group) -> None:
        self.layout = (
            *(group[name] for name in optimizer._own_options),
            group["stochastic_rounding"],
            clips(group),
            optimizer._states_of(group),
        )
        self.lr = one_number(group["lr"])
        self.numbers: dict[torch.device, Tensor] = {}
        if torch.compiler.is_compiling():
            return  # a traced step compares none
        self.names = list(group)
        # Neither list is an option; the parameters are compared by themselves.
        lists = [i for i, name in enumerate(self.names) if name in ("params", "param_names")]
        self.lists = lists[::-1]
        self.values = self._values_of(group)
        self.at_lr = [name for name in self.names if name not in ("params", "param_names")].index(
            "lr"
        )
        # Tensors and lists may change and stay the same objects.
        self.may_change = any(map(_may_change, self.values))

    def refreshed(self, optimizer: OptimizerContract, group: Group) -> Options:
        """These, if no option has changed since; else the options as they are.

        Raises:
            ValueError: an option is out of range.
        """
        if not self.may_change and list(group) == self.names:
            values = self._values_of(group)
            lr, values[self.at_lr] = values[self.at_lr], self.values[self.at_lr]
            if _same(values, self.values):
                if lr is self.values[self.at_lr]:
                    return self
                if type(lr) is float and math.isfinite(lr):
                    return self._with_lr(lr)  # what a schedule changes at every step
        plain_numbers(group)
        optimizer._check_options(known_options(group))
        return Options(optimizer, group)

    def _values_of(self, group: Group) -> list[Any]:
        values = list(group.values())
        for i in self.lists:
            del values[i]
        return values

    def _with_lr(self, lr: float) -> Options:
        """The same with another learning rate. Any finite number is one, see
        :func:`torchao8.optim.options.check_common_options`."""
        options = copy.copy(self)
        options.lr = one_number(lr)
        options.values = list(self.values)
        options.values[self.at_lr] = lr
        return options


def _may_change(value: object) -> bool:
    if isinstance(value, tuple):
        return any(map(_may_change, value))
    return value is not None and not isinstance(value, (int, float, str))


def _same(now: Iterable[Any], before: list[Any]) -> bool:
    """Whether these are the very objects."""
    now = list(now)
    return len(now) == len(before) and all(map(is_, now, before))
