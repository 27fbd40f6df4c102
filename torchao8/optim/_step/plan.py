"""The plan of a step: which parameters go into which op calls, kept from one step to the next.

A plan is made in three parts: collect the parameters that have a gradient, check each of them with
its gradient and its state, place them into the op calls. The next step keeps the plan if all that
the checks have read is as it was.

Why this is safe. A plan holds no parameter, gradient or state: every step takes them from the
optimizer, so that no op gets a tensor that is out of date, and a plan keeps nothing alive. It only
remembers what was checked (:mod:`torchao8.optim._step.snapshot`), and each step compares that with
what is there: the values of options, by identity; parameters, groups and tensors of state, by
``id``; the keys of the state; dtype, device and shape of each parameter, and the shape of its first
state; type, dtype and layout of each gradient; of DTensors their placements, and the properties of
their local tensors. At the first difference another plan is made, with all checks. The ops read
addresses at every call, and check dtypes, shapes and devices again. Threads may share a plan: what
changes in it is the snapshot of a group's options, which is exchanged as a whole. Copies and
pickles of an optimizer carry none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from torchao8 import matrix_shape, sharding
from torchao8._messages import describe, meta_message
from torchao8._numbers import plain_numbers
from torchao8.matrix_shape import MatrixShape
from torchao8.optim._params import NO_FLOAT16, check_grad, is_readable_grad
from torchao8.optim._state import paging
from torchao8.optim._state.formats import FLOAT32, FORMATS, Format, first_keys
from torchao8.optim._state.layout import (
    check_device,
    check_format,
    check_rule_takes,
    rounds_param,
    rows_of,
    wake,
)
from torchao8.optim._state.spec import NORMS, has_state, is_own
from torchao8.optim._step import pages
from torchao8.optim._step.bucket import Work
from torchao8.optim._step.place import Calls, Columns, Kind
from torchao8.optim._step.snapshot import Options, State, StateSnapshot, Tensors
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import Group, clips, known_options
from torchao8.shard_layout import ShardRows

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


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
    for group in optimizer.param_groups:
        wake(optimizer, group)
    return make_plan(optimizer)


def make_plan(optimizer: OptimizerContract) -> tuple[Plan, list[Work]]:
    """A plan, and the works of the step that makes it."""
    groups = optimizer.param_groups
    plans = [GroupPlan(optimizer, number, group) for number, group in enumerate(groups)]
    made = []
    for plan, group in zip(plans, groups, strict=True):
        entries = plan.collect(optimizer, group)
        for entry in entries:
            plan.check(optimizer, group, entry)
        plan.place(optimizer, group, entries)
        made.append(entries)
    if not torch.compiler.is_compiling():
        _check_counts(optimizer, [entry for entries in made for entry in entries])
        numbers = {id(p): i for i, p in enumerate(optimizer.state)}
        for plan, group, entries in zip(plans, groups, made, strict=True):
            plan.remember(group, entries, numbers)
    works = [
        plan.first_work(optimizer, group, entries)
        for plan, group, entries in zip(plans, groups, made, strict=True)
    ]
    return Plan(optimizer, plans), works


def _check_counts(optimizer: OptimizerContract, entries: Sequence[Entry]) -> None:
    """Raises RuntimeError if two parameters share the tensor that counts their steps: an op sees
    only the parameters of its own call, and each call would count the step once more."""
    owners: dict[int, Tensor] = {}
    for entry in entries:
        first = owners.setdefault(id(entry.state["step"]), entry.param)
        if first is not entry.param:
            both = f"{describe(optimizer, first)} and {describe(optimizer, entry.param)}"
            raise RuntimeError(
                f"{type(optimizer).__name__}: 'step' of {both}: expected a tensor for each "
                "parameter, got one tensor for both. Give each a copy (tensor.clone())"
            )


class Entry:
    """A parameter that has a gradient, with all that a check looks at. No plan keeps it."""

    def __init__(self, index: int, p: Tensor, grad: Tensor, state: State) -> None:
        self.index = index  # in its group
        self.param = p
        self.grad = grad
        self.state = state
        self.tensors: list[Tensor] = []  # of the state, in the order of the keys
        self.is_sharded = sharding.is_dtensor(p)
        self.found = FLOAT32  # the format of the state
        self.rows: ShardRows | None = None  # of a DTensor, where it matters where its shard lies


class Plan:
    """What a step does in all groups, as long as nothing but gradients and numbers changes."""

    def __init__(self, optimizer: OptimizerContract, plans: list[GroupPlan]) -> None:
        self.plans = plans
        if not torch.compiler.is_compiling():
            self.groups = list(map(id, optimizer.param_groups))
            self.owners = list(map(id, optimizer.state))

    def works(self, optimizer: OptimizerContract) -> list[Work] | None:
        """The works of another step; None if the plan does not hold any more.

        Raises:
            ValueError: an option is out of range.
            RuntimeError: paged state is not in its pages any more.
        """
        groups, state = optimizer.param_groups, optimizer.state
        if list(map(id, groups)) != self.groups or list(map(id, state)) != self.owners:
            return None
        states = list(state.values())
        works = []
        for plan, group in zip(self.plans, groups, strict=True):
            work = plan.work(optimizer, group, states)
            if work is None:
                return None
            works.append(work)
        return works


class GroupPlan:
    """What a step does in a parameter group.

    Attributes:
        indices: of the parameters that have a gradient, in the group.
        sharded: of those that are DTensors, among these.
        calls: the op calls.
        matrices: what each parameter is, where the rule orthogonalizes them.
    """

    def __init__(self, optimizer: OptimizerContract, number: int, group: Group) -> None:
        self.number = number
        self.states = optimizer._states_of(group)
        self.has_scalars = any(state.is_scalar for state in self.states)
        self.clips = clips(group)
        # By the names of the formats, which can be traced.
        self.keys = {name: self._keys(each) for name, each in FORMATS.items()}
        self.first_keys = {name: first_keys(self.states, each) for name, each in FORMATS.items()}
        self.told_by = [
            (keys[0], FORMATS[name])
            for name, keys in self.first_keys.items()
            if keys and FORMATS[name] is not FLOAT32
        ]
        self.options = Options(optimizer, group)
        self.layout = self.options.layout
        self.indices: list[int] = []
        self.sharded: list[int] = []
        self.calls: list[Calls] = []
        self.matrices: list[MatrixShape] | None = None

    def _keys(self, found: Format) -> list[str]:
        """Of the state of a parameter: first those beside the states, at last the scales."""
        beside = ["step", NORMS] if self.clips else ["step"]
        parts = [found.keys(state) for state in self.states]
        return [*beside, *(keys[0] for keys in parts), *(k for keys in parts for k in keys[1:])]

    # -- making it -----------------------------------------------------------------------------

    def collect(self, optimizer: OptimizerContract, group: Group) -> list[Entry]:
        """The parameters that have a gradient, with the states that they may have got just now."""
        entries = []
        for i, p in enumerate(group["params"]):
            grad, state = p.grad, optimizer.state.get(p)
            if not state or "step" not in state:
                if grad is None and not p.requires_grad:
                    continue
                optimizer._init_states()
                state = optimizer.state[p]
            if grad is not None:
                entries.append(Entry(i, p, grad, state))
        return entries

    def check(self, optimizer: OptimizerContract, group: Group, entry: Entry) -> None:
        """Raises unless a step can read the gradient and step all of the state."""
        p, state = entry.param, entry.state
        if not is_readable_grad(p, entry.grad):
            check_grad(optimizer, p)
        if group["stochastic_rounding"] and p.dtype == torch.float16:
            name = type(optimizer).__name__
            raise ValueError(f"{name}: {describe(optimizer, p)}: {NO_FLOAT16}")
        for key, each in self.told_by:
            if key in state:
                entry.found = each
        keys = self.keys[entry.found.name]
        try:
            entry.tensors = [state[key] for key in keys]
        except KeyError:
            raise RuntimeError(_keys_message(optimizer, p, keys)) from None
        # A state that no step would move, and no checkpoint could have; others' keys are no such.
        if len(state) > len(keys) and any(is_own(k) for k in state if k not in keys):
            raise RuntimeError(_keys_message(optimizer, p, keys))
        if torch.compiler.is_compiling():
            # init_states() has checked it when the trace began. These are read so that
            # torch.compile guards on them, and traces anew when they change.
            is_small = p.numel() < group["min_8bit_size"]
            if group["optim_bits"] == 8 and not is_small:
                pass
            if group["state_format"] == "dynamic":
                pass
            return
        if first := self.first_keys[entry.found.name]:
            check_format(optimizer, group, p, [state[key] for key in first], entry.found)
        check_rule_takes(optimizer, group, p)

    def place(self, optimizer: OptimizerContract, group: Group, entries: Sequence[Entry]) -> None:
        """Finds the op calls that the parameters go into."""
        self.indices = [entry.index for entry in entries]
        self.sharded = [i for i, entry in enumerate(entries) if entry.is_sharded]
        made: dict[Kind, Calls] = {}
        one_scale = not group["block_wise"]
        if optimizer._is_of_matrices(group):
            shapes = [tuple(entry.param.shape) for entry in entries]
            self.matrices = [matrix_shape.of(shape, group["higher_dims"]) for shape in shapes]
        for member, entry in enumerate(entries):
            p, is_sharded = entry.param, entry.is_sharded
            in_blocks = entry.found.is_quantized
            if is_sharded and (in_blocks or rounds_param(group, p)):
                entry.rows = self._rows(optimizer, group, entry)
            part = sharding.local(p) if is_sharded else p
            # Every rank steps what is one number of a parameter, also where no element lies.
            has_number = self.has_scalars or (is_sharded and in_blocks and one_scale)
            is_empty = part.numel() == 0 and not has_number
            kind = Kind(
                entry.found.name,
                part.device,
                p.dtype,
                entry.grad.dtype,
                is_sharded,
                entry.rows is not None,
                is_empty,
            )
            calls = made.get(kind)
            if calls is None:
                if kind.device.type == "meta" and not is_empty:
                    raise RuntimeError(meta_message(optimizer, p))
                if not torch.compiler.is_compiling():
                    check_device(optimizer, group, p, entry.found)
                calls = made[kind] = Calls(kind, self.states, not one_scale)
            calls.add(member, entry.rows)
        for calls in made.values():
            calls.finish()
        self.calls = list(made.values())

    def _rows(self, optimizer: OptimizerContract, group: Group, entry: Entry) -> ShardRows | None:
        if torch.compiler.is_compiling():
            return optimizer._shard_rows(self.number, entry.index, entry.found.bits)
        param = cast("DTensor", entry.param)
        return rows_of(optimizer, group, param, entry.found.bits)

    def first_work(
        self, optimizer: OptimizerContract, group: Group, entries: Sequence[Entry]
    ) -> Work:
        """The work of the step that has made the plan."""
        params, grads = [e.param for e in entries], [e.grad for e in entries]
        columns: list[Columns] = []
        for calls in self.calls:
            members = [entries[i] for i in calls.members]
            keys = self.keys[calls.kind.state_format]
            lists = {key: [e.tensors[k] for e in members] for k, key in enumerate(keys)}
            if calls.kind.is_sharded:
                lists = {key: sharding.local_tensors(tensors) for key, tensors in lists.items()}
            columns.append(lists)
        parts = self._local(params)
        if self.sharded:
            own = sharding.local_grads(_pick(params, self.sharded), _pick(grads, self.sharded))
            grads = _replaced(grads, self.sharded, own)
        return self._work(group, self.options, params, parts, grads, columns)

    def _local(self, tensors: list[Any]) -> list[Any]:
        """What this rank holds of parameters, or of gradients that are placed as they are."""
        if not self.sharded:
            return tensors
        own = sharding.local_tensors(_pick(tensors, self.sharded))
        return _replaced(tensors, self.sharded, own)

    def _work(
        self,
        group: Group,
        options: Options,
        params: list[Tensor],
        parts: list[Tensor],
        grads: list[Tensor],
        columns: Sequence[Columns],
    ) -> Work:
        """The work with these tensors.

        Args:
            parts, grads: what this rank holds of the parameters and of their gradients.
            columns: for each op call and each key, what this rank holds of the state.
        """
        buckets = [
            calls.bucket(_pick(parts, calls.members), _pick(grads, calls.members), tensors)
            for calls, tensors in zip(self.calls, columns, strict=True)
            if not calls.kind.is_empty
        ]
        counts = [
            (calls.kind.device, tensors["step"])
            for calls, tensors in zip(self.calls, columns, strict=True)
            if not calls.counts
        ]
        steps = self._in_order([tensors["step"] for tensors in columns])
        histories = self._in_order([tensors[NORMS] for tensors in columns] if self.clips else [])
        work = Work(
            self.number,
            group,
            buckets,
            self.indices,
            params,
            grads,
            steps,
            histories,
            counts,
            _pick(params, self.sharded),
            self.matrices,
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

    def remember(self, group: Group, entries: Sequence[Entry], numbers: dict[int, int]) -> None:
        """Records what :meth:`work` compares.

        Args:
            numbers: of the parameters in ``optimizer.state``, by their ids.
        """
        params = group["params"]
        self.params = list(map(id, params))
        with_grad = set(self.indices)
        self.without_grad = [i for i in range(len(params)) if i not in with_grad]
        self.grad_types = [type(p.grad) for p in params]
        own = [entry.param for entry in entries]
        self.tensors = Tensors(self._local(own), self._local([entry.grad for entry in entries]))
        self.placements = sharding.Placements(_pick(own, self.sharded))
        self.snapshots = []
        for calls in self.calls:
            members = [entries[i] for i in calls.members]
            self.snapshots.append(
                StateSnapshot(
                    [numbers[id(entry.param)] for entry in members],
                    [entry.state for entry in members],
                    len(numbers),
                    self.keys[calls.kind.state_format],
                    self.first_keys[calls.kind.state_format],
                )
            )

    def work(self, optimizer: OptimizerContract, group: Group, states: list[State]) -> Work | None:
        """The work of another step; None if the plan does not hold any more.

        Args:
            states: all those of the optimizer, in their order.
        """
        params = group["params"]
        if list(map(id, params)) != self.params:
            return None
        options = self.options = self.options.refreshed(optimizer, group)
        if options.layout != self.layout:
            return None
        grads: list[Any] = sharding.grads_of(params) if self.sharded else [p.grad for p in params]
        if list(map(type, grads)) != self.grad_types:
            return None
        for i in self.without_grad:  # they get state as soon as they are trainable
            if params[i].requires_grad and not has_state(optimizer.state.get(params[i])):
                return None
        params, grads = _pick(params, self.indices), _pick(grads, self.indices)
        if self.sharded and not self.placements.hold(
            _pick(params, self.sharded), _pick(grads, self.sharded)
        ):
            return None
        parts, grads = self._local(params), self._local(grads)
        if not self.tensors.hold(parts, grads):
            return None
        columns = []
        for snapshot in self.snapshots:
            tensors = snapshot.columns(states)
            if tensors is None:
                return None
            columns.append(tensors)
        if group["is_paged"]:
            self._check_memory(optimizer, group, params, columns)
        return self._work(group, options, params, parts, grads, columns)

    def _check_memory(
        self,
        optimizer: OptimizerContract,
        group: Group,
        params: list[Tensor],
        columns: Sequence[Columns],
    ) -> None:
        """Raises RuntimeError where state has left its pages."""
        for calls, tensors in zip(self.calls, columns, strict=True):
            for key in self.first_keys[calls.kind.state_format][:1]:
                for i, t in zip(calls.members, tensors[key], strict=True):
                    paging.check_memory(optimizer, group, params[i], t)


def _pick(values: list[Any], indices: list[int]) -> list[Any]:
    """Those of the indices, which ascend; all of them as they are."""
    return values if len(indices) == len(values) else [values[i] for i in indices]


def _replaced(values: list[Any], indices: list[int], new: list[Any]) -> list[Any]:
    """The values, with new ones at the indices."""
    if len(indices) == len(values):
        return new
    values = list(values)
    for i, value in zip(indices, new, strict=True):
        values[i] = value
    return values


def _keys_message(optimizer: OptimizerContract, p: Tensor, keys: list[str]) -> str:
    return (
        f"{type(optimizer).__name__}: state of {describe(optimizer, p)}: expected the keys {keys}, "
        f"got {list(optimizer.state[p])}. An option that decides which state there is, such as "
        "amsgrad, centered, percentile_clipping or use_muon, must be set before the first step."
    )
