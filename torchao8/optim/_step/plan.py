"""The plan of a step: which parameters go into which op calls, kept from one step to the next.

A plan is made in three parts: collect the parameters that have a gradient, check each of them with
its gradient and its state, place them into the op calls. The next step keeps the plan if everything
that the checks have seen is still there.

Why this is safe. A plan holds no gradient and no state: every step takes both from the optimizer,
so that no op gets a tensor that is out of date, and nothing lives longer because of a plan. A plan
only remembers what was checked, and each step compares it with what is there now: the parameters,
options and state dicts, by identity; the keys of the state; the state tensors, by ``id``; dtype,
device and shape of each parameter; type, dtype and layout of each gradient; of DTensors their
placements, and the same of their local tensors. At the first difference the plan is thrown away and
another one is made, with all checks. Addresses are read by the ops, at every call. Threads may
share a plan: what changes in it is the snapshot of a group's options, which is exchanged as a
whole. Copies and pickles of an optimizer carry none.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from torchao8 import sharding
from torchao8._messages import describe, meta_message
from torchao8._numbers import one_number, plain_numbers
from torchao8.optim._params import NO_FLOAT16, check_grad, is_readable_grad
from torchao8.optim._state import paging
from torchao8.optim._state.layout import check_layout, rounds_param, rows_of, wake
from torchao8.optim._state.spec import NORMS, format_key, is_8bit, is_own, keys_of
from torchao8.optim._step import pages
from torchao8.optim._step.bucket import Work
from torchao8.optim._step.place import Calls, Columns, Kind
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import LAYOUT_OPTIONS, Group, clips, known_options
from torchao8.shard_layout import ShardRows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _getter(name: str) -> Callable[[Tensor], Any]:
    getter: Callable[[Tensor], Any] = getattr(Tensor, name).__get__
    return getter


# Properties as functions: map() calls them without a frame of Python for each tensor.
_dtype = _getter("dtype")
_layout = _getter("layout")
_shape = _getter("shape")
_device = _getter("device")


def plan_step(optimizer: OptimizerContract, plan: Plan | None) -> tuple[Plan, list[Work]]:
    """What a step does in each group, after all checks that look at no number on a GPU.

    Args:
        plan: that of the step before.

    Returns:
        The plan for the next step, and the work of this one.

    Raises:
        RuntimeError: a gradient that no step can read; a state that does not fit the options.
        ValueError: an option out of range; a float16 parameter that is to be rounded
            stochastically; a local tensor that is not the shard it should be.
    """
    if torch.compiler.is_compiling():
        optimizer._init_states()  # at trace time: the traced step finds every state in place
        return make_plan(optimizer)
    works = None if plan is None else plan.works(optimizer)
    if plan is not None and works is not None:
        return plan, works
    for group in optimizer.param_groups:
        plain_numbers(group)
        optimizer._check_options(known_options(group))
        wake(optimizer, group)
    plan, works = make_plan(optimizer)
    plan.remember(optimizer)
    return plan, works


def make_plan(optimizer: OptimizerContract) -> tuple[Plan, list[Work]]:
    """A plan, and the works of the step that makes it."""
    plans, works = [], []
    for number, group in enumerate(optimizer.param_groups):
        plan = GroupPlan(optimizer, number, group)
        entries = plan.collect(optimizer)
        for entry in entries:
            plan.check(optimizer, entry)
        plan.place(optimizer, entries)
        plans.append(plan)
        works.append(plan.first_work(optimizer, entries))
    return Plan(plans), works


class Entry:
    """A parameter that has a gradient, with all that a check looks at. No plan keeps it."""

    def __init__(self, index: int, p: Tensor, grad: Tensor, state: dict[str, Tensor]) -> None:
        self.index = index  # in its group
        self.param = p
        self.grad = grad
        self.state = state
        self.in_8bit = False
        self.rows: ShardRows | None = None  # of a DTensor, where it matters where its shard lies


class Plan:
    """What a step does in all groups, as long as nothing but gradients and numbers changes."""

    def __init__(self, plans: list[GroupPlan]) -> None:
        self.plans = plans
        self.groups = [plan.group for plan in plans]
        self.owners: list[Any] = []

    def remember(self, optimizer: OptimizerContract) -> None:
        """Takes down what :meth:`works` compares."""
        self.owners = list(optimizer.state)
        numbers = {id(p): i for i, p in enumerate(self.owners)}
        for plan in self.plans:
            plan.remember(optimizer, numbers)

    def works(self, optimizer: OptimizerContract) -> list[Work] | None:
        """The works of another step; None if the plan does not hold any more.

        Raises:
            ValueError: an option is out of range now.
        """
        state = optimizer.state
        if not (_same(optimizer.param_groups, self.groups) and _same(state, self.owners)):
            return None
        states = list(state.values())
        works = []
        for plan in self.plans:
            work = plan.work(optimizer, states)
            if work is None:
                return None
            works.append(work)
        return works


class GroupPlan:
    """What a step does in a parameter group."""

    def __init__(self, optimizer: OptimizerContract, number: int, group: Group) -> None:
        self.number = number
        self.group = group
        self.states = optimizer._states_of(group)
        self.has_scalars = any(state.is_scalar for state in self.states)
        self.clips = clips(group)
        self.indices: list[int] = []
        self.with_grad: list[Tensor] = []
        self.sharded: list[int] = []
        self.calls: list[Calls] = []

    # -- making it -----------------------------------------------------------------------------

    def collect(self, optimizer: OptimizerContract) -> list[Entry]:
        """The parameters that have a gradient, with the states that they may have got just now."""
        entries = []
        for i, p in enumerate(self.group["params"]):
            grad, state = p.grad, optimizer.state.get(p)
            if not state or "step" not in state:
                if grad is None and not p.requires_grad:
                    continue
                optimizer._init_states()
                state = optimizer.state[p]
            if grad is not None:
                entries.append(Entry(i, p, grad, state))
        return entries

    def check(self, optimizer: OptimizerContract, entry: Entry) -> None:
        """Raises unless a step can read the gradient and step all of the state."""
        group, p, state = self.group, entry.param, entry.state
        if not is_readable_grad(p, entry.grad):
            check_grad(optimizer, p)
        if group["stochastic_rounding"] and p.dtype == torch.float16:
            name = type(optimizer).__name__
            raise ValueError(f"{name}: {describe(optimizer, p)}: {NO_FLOAT16}")
        entry.in_8bit = is_8bit(self.states, state)
        keys = self._keys(entry.in_8bit)
        # A state that no step would move, and no checkpoint could have; others' keys are no such.
        if any(key not in state for key in keys) or (
            len(state) > len(keys) and any(is_own(k) for k in state if k not in keys)
        ):
            raise RuntimeError(_keys_message(optimizer, p, keys))
        if torch.compiler.is_compiling():
            # The check was made when the trace began. These are read so that a change of them
            # begins another one.
            if group["optim_bits"] == 8 and p.numel() >= group["min_8bit_size"]:
                pass
        else:
            check_layout(optimizer, group, p, self.states)

    def _keys(self, in_8bit: bool) -> list[str]:
        """Of the state of a parameter: first those beside the states, at last the scales."""
        beside = ["step", NORMS] if self.clips else ["step"]
        parts = [keys_of(state, in_8bit) for state in self.states]
        return [*beside, *(keys[0] for keys in parts), *(k for keys in parts for k in keys[1:])]

    def place(self, optimizer: OptimizerContract, entries: Sequence[Entry]) -> None:
        """Finds the op calls that the parameters go into."""
        self.indices = [entry.index for entry in entries]
        self.with_grad = [entry.param for entry in entries]
        self.sharded = [i for i, e in enumerate(entries) if sharding.is_dtensor(e.param)]
        made: dict[Kind, Calls] = {}
        one_scale = not self.group["block_wise"]
        for member, entry in enumerate(entries):
            p, grad, is_sharded = entry.param, entry.grad, sharding.is_dtensor(entry.param)
            if is_sharded and (entry.in_8bit or rounds_param(self.group, p)):
                entry.rows = self._rows(optimizer, entry)
            part = sharding.local(p)
            # Every rank steps what is one number of a parameter, also where no element lies.
            has_number = self.has_scalars or (is_sharded and entry.in_8bit and one_scale)
            is_empty = part.numel() == 0 and not has_number
            kind = Kind(
                entry.in_8bit,
                part.device,
                p.dtype,
                grad.dtype,
                is_sharded,
                entry.rows is not None,
                is_empty,
            )
            if part.device.type == "meta" and not is_empty:
                raise RuntimeError(meta_message(optimizer, p))
            if kind not in made:
                made[kind] = Calls(kind, self.states, not one_scale)
            made[kind].add(member, entry.rows)
        for calls in made.values():
            calls.finish()
        self.calls = list(made.values())

    def _rows(self, optimizer: OptimizerContract, entry: Entry) -> ShardRows | None:
        if torch.compiler.is_compiling():
            return optimizer._shard_rows(self.number, entry.index, entry.in_8bit)
        return rows_of(optimizer, self.group, cast("DTensor", entry.param), entry.in_8bit)

    def first_work(self, optimizer: OptimizerContract, entries: Sequence[Entry]) -> Work:
        """The work of the step that has made the plan."""
        grads = [entry.grad for entry in entries]
        states = [entry.state for entry in entries]
        keys = {in_8bit: self._keys(in_8bit) for in_8bit in (False, True)}
        columns = [
            {key: [states[i][key] for i in calls.members] for key in keys[calls.kind.in_8bit]}
            for calls in self.calls
        ]
        parts = self._local(self.with_grad)
        if self.sharded:
            own = [self.with_grad[i] for i in self.sharded], [grads[i] for i in self.sharded]
            for i, grad in zip(self.sharded, sharding.local_grads(*own), strict=True):
                grads[i] = grad
        return self._work(Options(optimizer, self.group), parts, grads, columns)

    def _local(self, tensors: list[Any]) -> list[Any]:
        """What this rank holds of parameters, or of gradients that are placed as they are."""
        return sharding.local_tensors(tensors) if self.sharded else tensors

    def _work(
        self,
        options: Options,
        parts: list[Tensor],
        grads: list[Tensor],
        columns: Sequence[Columns],
    ) -> Work:
        """The work with these tensors.

        Args:
            parts, grads: what this rank holds of the parameters and of their gradients.
            columns: for each op call and each key, the state.
        """
        params = self.with_grad
        buckets = [
            calls.bucket(_pick(parts, calls.members), _pick(grads, calls.members), tensors)
            for calls, tensors in zip(self.calls, columns, strict=True)
            if not calls.kind.is_empty
        ]
        counts = [
            (calls.kind.device, tensors["step"])
            for calls, tensors in zip(self.calls, columns, strict=True)
        ]
        steps = self._in_order([tensors["step"] for tensors in columns])
        histories = self._in_order([tensors[NORMS] for tensors in columns] if self.clips else [])
        work = Work(
            self.number,
            self.group,
            buckets,
            self.indices,
            params,
            grads,
            steps,
            histories,
            counts,
            _pick(params, self.sharded),
            options.lr,
            options.numbers,
        )
        return pages.pieces(work)

    def _in_order(self, lists: Sequence[list[Tensor]]) -> list[Tensor]:
        """What the members of the op calls have, in the order of the parameters."""
        if len(lists) < 2:
            return lists[0] if lists else []
        ordered: dict[int, Tensor] = {}
        for calls, tensors in zip(self.calls, lists, strict=True):
            ordered.update(zip(calls.members, tensors, strict=True))
        return [ordered[i] for i in range(len(ordered))]

    # -- keeping it ----------------------------------------------------------------------------

    def remember(self, optimizer: OptimizerContract, numbers: dict[int, int]) -> None:
        """Takes down what :meth:`work` compares.

        Args:
            numbers: of the parameters in ``optimizer.state``, by their ids.
        """
        group = self.group
        self.params = list(group["params"])
        self.stateless = [p for p in self.params if id(p) not in numbers]
        self.options = Options(optimizer, group)
        self.layout = self.options.layout
        grads = [p.grad for p in self.params]
        self.grad_types = list(map(type, grads))
        self.grad_dtypes = [g.dtype for g in grads if g is not None]
        parts = self._local(self.with_grad)
        self.dtypes = list(map(_dtype, parts))
        self.shapes = list(map(_shape, parts))
        self.devices = list(map(_device, parts))
        self.placements = sharding.Placements(_pick(self.with_grad, self.sharded))
        self.memories = [
            _Memory(
                [numbers[id(self.with_grad[i])] for i in calls.members],
                [optimizer.state[self.with_grad[i]] for i in calls.members],
                len(numbers),
            )
            for calls in self.calls
        ]

    def work(self, optimizer: OptimizerContract, states: list[dict[str, Tensor]]) -> Work | None:
        """The work of another step; None if the plan does not hold any more.

        Args:
            states: all those of the optimizer, in their order.
        """
        if not _same(self.group["params"], self.params):
            return None
        options = self.options = self.options.now(optimizer)
        if options.layout != self.layout:
            return None
        grads = [p.grad for p in self.params]
        if list(map(type, grads)) != self.grad_types:
            return None
        params, grads = self.with_grad, _pick(grads, self.indices)
        if self.sharded and not self.placements.hold(
            _pick(params, self.sharded), _pick(grads, self.sharded)
        ):
            return None
        parts, grads = self._local(params), self._local(grads)
        if (
            list(map(_dtype, grads)) != self.grad_dtypes
            or any(layout is not torch.strided for layout in set(map(_layout, grads)))
            or list(map(_dtype, parts)) != self.dtypes
            or list(map(_shape, parts)) != self.shapes
            or list(map(_device, parts)) != self.devices
            or any(p.requires_grad for p in self.stateless)
        ):
            return None
        columns = []
        for memory in self.memories:
            tensors = memory.columns(states)
            if tensors is None:
                return None
            columns.append(tensors)
        if self.group["is_paged"]:
            self._check_memory(optimizer, columns)
        return self._work(options, parts, grads, columns)

    def _check_memory(self, optimizer: OptimizerContract, columns: Sequence[Columns]) -> None:
        """Raises RuntimeError where state has left its pages."""
        for calls, tensors in zip(self.calls, columns, strict=True):
            key = format_key(self.states, calls.kind.in_8bit)
            if key is not None:
                for i, t in zip(calls.members, tensors[key], strict=True):
                    paging.check_memory(optimizer, self.group, self.with_grad[i], sharding.local(t))


class _Memory:
    """The state of the parameters of an op call, as it was when it was checked; none of it is kept.

    Attributes:
        at: the numbers of their states in ``optimizer.state``.
        keys: of each of them; None if they differ, as others' keys may: then no plan holds.
        ids: of all tensors of state, one parameter after the other.
    """

    def __init__(self, at: list[int], states: list[dict[str, Tensor]], count: int) -> None:
        self.at = at if at != list(range(count)) else None
        alike = {tuple(state) for state in states}
        self.keys = alike.pop() if len(alike) == 1 else None
        self.all_keys = [self.keys] * len(at)
        self.ids = list(map(id, chain.from_iterable(map(dict.values, states))))

    def columns(self, states: list[dict[str, Tensor]]) -> Columns | None:
        """The tensors of state for each key; None if one of them is another than before."""
        mine = states if self.at is None else [states[i] for i in self.at]
        if self.keys is None or list(map(tuple, mine)) != self.all_keys:
            return None
        tensors = list(chain.from_iterable(map(dict.values, mine)))
        if list(map(id, tensors)) != self.ids:
            return None
        width = len(self.keys)
        return {key: tensors[i::width] for i, key in enumerate(self.keys)}


class Options:
    """The options of a group when they were checked, and the numbers that the ops take.

    Attributes:
        layout: what decides which state there is, and how a parameter is placed.
        lr: 0-d, see :func:`torchao8.ops.step_`.
        numbers: those of the rule, by the device of the parameters; filled as they are wanted.
    """

    def __init__(self, optimizer: OptimizerContract, group: Group) -> None:
        self.group = group
        self.layout = (
            *(group[name] for name in LAYOUT_OPTIONS),
            group["stochastic_rounding"],
            clips(group),
            optimizer._states_of(group),
        )
        self.lr = one_number(group["lr"])
        self.numbers: dict[torch.device, Tensor] = {}
        if torch.compiler.is_compiling():
            return  # a traced step keeps none
        self.names = list(group)
        self.values = list(group.values())
        # Tensors and lists may change and stay the same objects. The parameters are compared apart.
        self.may_change = any(_may_change(v) for k, v in group.items() if k != "params")

    def now(self, optimizer: OptimizerContract) -> Options:
        """These, if no option has changed; else those of today.

        Raises:
            ValueError: an option is out of range now.
        """
        group = self.group
        if not self.may_change and list(group) == self.names:
            if _same(group.values(), self.values):
                return self
            lr, before = group["lr"], self.values[self.names.index("lr")]
            values = [before if v is lr else v for v in group.values()]
            if type(lr) is float and math.isfinite(lr) and _same(values, self.values):
                return self._with_lr(lr)  # what a schedule changes at every step, and no more
        plain_numbers(group)
        optimizer._check_options(known_options(group))
        return Options(optimizer, group)

    def _with_lr(self, lr: float) -> Options:
        """The same with another learning rate. Any finite number is one, see
        :func:`torchao8.optim.options.check_common_options`."""
        options = copy.copy(self)
        options.lr = one_number(lr)
        options.values = list(self.group.values())
        return options


def _may_change(value: object) -> bool:
    if isinstance(value, tuple):
        return any(map(_may_change, value))
    return value is not None and not isinstance(value, (int, float, str))


def _same(now: Iterable[Any], before: list[Any]) -> bool:
    """Whether these are the very objects."""
    now = list(now)
    return len(now) == len(before) and all(map(is_, now, before))


def _pick(values: list[Any], indices: list[int]) -> list[Any]:
    """Those of the indices, which ascend; all of them as they are."""
    return values if len(indices) == len(values) else [values[i] for i in indices]


def _keys_message(optimizer: OptimizerContract, p: Tensor, keys: list[str]) -> str:
    return (
        f"{type(optimizer).__name__}: state of {describe(optimizer, p)}: expected the keys {keys}, "
        f"got {list(optimizer.state[p])}. An option that decides which state there is, such as "
        "amsgrad, centered or percentile_clipping, must be set before the first step."
    )
