"""``load_state_dict``: checks of a whole checkpoint, and its conversion to what is kept here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import sharding
from torchao8._messages import describe, warn_caller, with_shape
from torchao8._numbers import plain_numbers
from torchao8.block_layout import Scales, check_block_size
from torchao8.interop import foreign
from torchao8.optim._params import check_params
from torchao8.optim._state import paging
from torchao8.optim._state.blocks import Portion
from torchao8.optim._state.convert import convert
from torchao8.optim._state.formats import format_in
from torchao8.optim._state.layout import layout_of
from torchao8.optim._state.sealed import Kept, check_form, is_step, parts_of, seal
from torchao8.optim._state.spec import NO_NORM, NORMS, NORMS_KEPT, Layout, State, is_own
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import Group, check_flag, clips


def seal_state_dict(optimizer: Optimizer, state_dict: Any) -> dict[str, Any] | None:
    """Load hook: checks a checkpoint against the optimizer and protects its tensors from a cast.

    Where parameters are sharded, all ranks refuse what one of them does.
    """
    agree = ranks_of(optimizer)
    loading = _Loading(cast(OptimizerContract, optimizer), state_dict)
    with all_or_none(agree):
        loading.check()
        loading.make_rooms()
    with all_or_none(agree):
        loading.convert()
        loading.seal()
    loading.tell()
    return {**state_dict, "state": loading.state, "param_groups": loading.groups}


@contextmanager
def all_or_none(agree: Callable[[bool], bool]) -> Iterator[None]:
    """A part of a load at whose end all ranks go on, or none: where one raises, all do.

    What stands in it may be a collective only if nothing before it raises on some ranks alone.

    Args:
        agree: tells the other ranks whether this one refuses, and returns whether any does.
    """
    refusal: Exception | None = None
    try:
        yield
    except Exception as error:
        refusal = error
    elsewhere = agree(refusal is not None)
    if refusal is not None:
        raise refusal
    if elsewhere:
        raise ValueError("another rank refused the checkpoint, and says why; nothing has changed")


def ranks_of(optimizer: Optimizer) -> Callable[[bool], bool]:
    """How the ranks that share a parameter of the optimizer agree."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return functools.partial(sharding.agree, params)


class _Plan(NamedTuple):
    """The saved state of one parameter, checked but for its values."""

    saved_id: Any
    label: str
    p: Tensor
    layout: Layout
    states: tuple[State, ...]
    values: dict[str, Any]
    scales: Scales
    saved_scales: Scales
    converts: bool


class _Loading:
    """A checkpoint on its way into an optimizer.

    In three parts. If one rank raised before a collective, the others would hang. So all checks
    that look at no value (:meth:`check`), and the memory that paged state needs
    (:meth:`make_rooms`), come first, then what may be a collective (:meth:`convert`), and last the
    look at values, which differ from rank to rank (:meth:`seal`).
    """

    def __init__(self, optimizer: OptimizerContract, state_dict: Any) -> None:
        self.optimizer = optimizer
        self.state_dict = state_dict
        self.saved_groups: list[Group] = []
        self.state: dict[Any, Any] = {}
        self.groups: list[Group] = []
        self.plans: list[_Plan] = []
        self.rooms: list[dict[str, Tensor]] = []
        self.parts: list[dict[str, Tensor]] = []
        # What others keep for parameters, by their numbers in the checkpoint.
        self.others: dict[Any, dict[Any, Any]] = {}
        # What to tell of: the parameters that were converted, by how, and who wrote their state.
        self.converted: dict[str, list[str]] = {}
        self.authors: set[str] = set()
        self.assumed_steps: set[int] = set()  # for state saved without "step"
        self.warnings: list[str] = []

    def check(self) -> None:
        """Brings options into the format of the optimizer, and finds out what to do with state."""
        _check_structure(self.state_dict)
        self.saved_groups = [dict(saved) for saved in self.state_dict["param_groups"]]
        for saved in self.saved_groups:
            plain_numbers(saved)
        self.state = dict(self.state_dict["state"])
        live_groups = self.optimizer.param_groups
        _check_sizes(live_groups, self.saved_groups)
        _check_names(live_groups, self.saved_groups)
        lost: list[tuple[Tensor, Any]] = []
        for live, saved in zip(live_groups, self.saved_groups, strict=True):
            kept = {name: live[name] for name in self.optimizer._own_options}
            missing = {name: live[name] for name in self.optimizer.defaults}
            for p, saved_id in zip(live["params"], saved["params"], strict=True):
                self._set_apart(saved, p, saved_id)
            has_state = any(map(self._has_state, saved["params"]))
            if has_state:
                self.optimizer._check_source(saved)
            options = self.optimizer._saved_options(self._own_options(saved))
            group = {**missing, **_in_form(self.optimizer._normalized(options), live), **kept}
            self.optimizer._check_options(group)
            if group["stochastic_rounding"]:
                check_params(live["params"], True)
            self.groups.append(group)
            # What another library wrote comes in the blocks of the optimizer.
            block_wise = "state_version" in saved or group["block_wise"]
            saved_scales = Scales(
                saved.get("block_size", group["block_size"]), saved.get("block_wise", block_wise)
            )
            check_block_size(saved_scales.block_size)
            check_flag("block_wise", saved_scales.block_wise)
            for p, saved_id in zip(live["params"], saved["params"], strict=True):
                if self._has_state(saved_id):
                    if "state_version" not in saved:
                        self._read_foreign(group, saved, p, saved_id)
                    self._plan(group, p, saved_id, saved_scales)
                elif saved_id in self.others:
                    self.state[saved_id] = self.others[saved_id]
                    if p.requires_grad:
                        lost.append((p, saved_id))
        self._check_readable()
        if lost and self.plans:  # the first step makes the states of all
            keys = list(self.plans[0].layout)
            p, saved_id = lost[0]
            got = list(self.others[saved_id])
            raise ValueError(
                f"state of {describe(self.optimizer, p)}: expected the keys {keys}, as of "
                f"other parameters of the checkpoint, got {got}"
            )
        known = {saved_id for group in self.saved_groups for saved_id in group["params"]}
        stray = [key for key in self.state if key not in known]
        if stray:
            raise ValueError(f"state of {stray[0]!r}: no parameter group of the checkpoint has it")

    def make_rooms(self) -> None:
        """Reserves paged memory: a disk that is full refuses the checkpoint."""
        wanted = [
            (plan.p, plan.layout, {} if plan.converts else plan.values) for plan in self.plans
        ]
        self.rooms = paging.rooms_for(wanted)

    def convert(self) -> None:
        """Brings the state into the format of the optimizer, as far as it lies on this rank.

        A parameter that is refused ends nothing here: the other ranks go on with the next one.
        """
        refusal: Exception | None = None
        for plan, rooms in zip(self.plans, self.rooms, strict=True):
            try:
                parts = self._converted(plan)
                paging.move_in(parts, rooms)
                self.parts.append(parts)
            except ValueError as error:
                refusal = refusal or error
        if refusal is not None:
            raise refusal

    def seal(self) -> None:
        """Checks the values on this rank."""
        seen: set[int] = set()
        for plan, parts in zip(self.plans, self.parts, strict=True):
            # A checkpoint may hold one tensor twice, which no step could write to, or paged memory
            # for what is not paged here.
            for key, part in parts.items():
                is_stray = plan.layout[key].pages is None and paging.found_in(part) is not None
                shared = part.numel() and (part.data_ptr() in seen or is_stray)
                if shared or part.is_inference():
                    parts[key] = part.clone()
                seen.add(part.data_ptr())
            sealed = seal(plan.label, plan.layout, parts)
            self._check_codes(plan, parts)
            self.state[plan.saved_id] = {**sealed, **self.others.get(plan.saved_id, {})}

    def _check_codes(self, plan: _Plan, parts: dict[str, Tensor]) -> None:
        """What the formats know of values on this rank; what was converted has been checked."""
        if not plan.converts:
            states = [state for state in plan.states if not state.is_scalar]
            portion = Portion.of(plan.p, plan.scales)
            format_in(states, parts).check(plan.label, states, parts, portion)

    def _check_readable(self) -> None:
        """Raises ValueError where all that a checkpoint of others has is of no use here."""
        for live, saved in zip(self.optimizer.param_groups, self.saved_groups, strict=True):
            for p, saved_id in zip(live["params"], saved["params"], strict=True):
                keys = list(self.others.get(saved_id, ()))
                is_strange = keys and not self.plans and "state_version" not in saved
                if is_strange and self.optimizer._states_of(live):
                    layout = layout_of(self.optimizer, live, p)
                    raise ValueError(
                        f"state of {describe(self.optimizer, p)}: expected the keys "
                        f"{list(layout)}, got {keys}. Another optimizer saved it"
                    )

    def _set_apart(self, saved: Group, p: Tensor, saved_id: Any) -> None:
        """Takes what others keep for a parameter out of what is read here."""
        values = self.state.get(saved_id, {})
        if not isinstance(values, dict):
            label = describe(self.optimizer, p)
            raise ValueError(f"state of {label}: expected a dict, got {type(values).__name__}")
        may_be_foreign = "state_version" not in saved
        others = {
            k: Kept(v)
            for k, v in values.items()
            if not (is_own(k) or (may_be_foreign and foreign.reads(k)))
        }
        if others:
            self.others[saved_id] = others
            self.state[saved_id] = {k: v for k, v in values.items() if k not in others}

    def _has_state(self, saved_id: Any) -> bool:
        return bool(self.state.get(saved_id))

    def _own_options(self, saved: Group) -> Group:
        """Those of a group of bitsandbytes under our names; all others are so already."""
        states = [self.state.get(saved_id) for saved_id in saved["params"]]
        if "state_version" in saved or not any(
            state and foreign.who_wrote(state) == "bitsandbytes" for state in states
        ):
            return saved
        name, known = type(self.optimizer).__name__, self.optimizer.defaults
        options, warning = foreign.own_options(name, saved, known)
        if warning is not None and warning not in self.warnings:
            self.warnings.append(warning)
        return options

    def _assume_steps(self, group: Group, saved: Group, saved_id: Any) -> None:
        """Where state comes without the number of its steps, takes that of its group, or the least
        with which the rule goes on."""
        if "step" in self.state[saved_id]:
            return
        told: Any = saved.get("step")
        steps = int(told) if is_step(told) else self.optimizer._assumed_steps(group)
        if steps is not None:  # if not, its keys are refused
            self.assumed_steps.add(steps)
            step = torch.tensor(float(steps), dtype=torch.float32, device="cpu")
            self.state[saved_id] = {"step": step, **self.state[saved_id]}

    def _read_foreign(self, group: Group, saved: Group, p: Tensor, saved_id: Any) -> None:
        values = self.state[saved_id]
        states, label = self.optimizer._states_in(group, values), describe(self.optimizer, p)
        # One number of a parameter is one in every library.
        signed = {state.name: state.signed for state in states if not state.is_scalar}
        own = foreign.to_own(label, values, p.shape, signed, *Scales.of(group))
        if own is not None:
            self.authors.add(foreign.who_wrote(values) or "torch.optim")
            self.state[saved_id] = own
        self._assume_steps(group, saved, saved_id)
        if clips(group) and NORMS not in values:
            history = foreign.norm_history(label, values)
            if history is None:
                history = torch.full((NORMS_KEPT,), NO_NORM, dtype=torch.float32, device="cpu")
            self.state[saved_id] = {**self.state[saved_id], NORMS: history}

    def _plan(self, group: Group, p: Tensor, saved_id: Any, saved_scales: Scales) -> None:
        values = self.state[saved_id]
        states, label = self.optimizer._states_in(group, values), describe(self.optimizer, p)
        layout = layout_of(self.optimizer, group, p, states)
        others, added = self.others.get(saved_id, ()), self.optimizer._added
        converts = check_form(label, p, layout, states, values, saved_scales, others, added)
        scales = Scales.of(group)
        if converts:
            was, now = (format_in(states, keys) for keys in (values, layout))
            how = (
                f"in {was.described}, and is kept in {now.bits} from here on"
                if not now.is_quantized
                else f"in {was.described}, and is rounded to {now.bits}{now.told_apart}"
                if not was.is_quantized
                else f"with state_format={was.name!r}, and is rounded to {now.name!r}"
                if was is not now and was.bits == now.bits
                else f"in {was.described}, and is rounded to {now.bits}{now.told_apart}"
                if was is not now
                else "with another block_size, and is rounded anew"
                if saved_scales.block_wise == scales.block_wise
                else "with another block_wise, and is rounded anew"
            )
            self.converted.setdefault(how, []).append(with_shape(self.optimizer, p))
        plan = _Plan(saved_id, label, p, layout, states, values, scales, saved_scales, converts)
        self.plans.append(plan)

    def _converted(self, plan: _Plan) -> dict[str, Tensor]:
        _, label, p, layout, states, values, scales, saved_scales, converts = plan
        if not converts:
            return parts_of(p, layout, values)
        parts = convert(label, p, layout, states, values, scales, saved_scales)
        self.optimizer._mend_decoded(parts)
        return parts

    def tell(self) -> None:
        """Warns of what was converted, once for each kind of conversion."""
        name = type(self.optimizer).__name__
        for warning in self.warnings:
            warn_caller(f"{name}: {warning}")
        if self.assumed_steps:
            steps = ", ".join(map(str, sorted(self.assumed_steps)))
            warn_caller(
                f"{name}: the checkpoint has state without 'step'; its steps are counted from "
                f"{steps} on, which is the 'step' of the group where it has one"
            )
        for how, labels in self.converted.items():
            others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
            warn_caller(
                f"{name}: the state of {labels[0]}{others} was saved {how}. "
                "The options of this optimizer (optim_bits, min_8bit_size, block_size, "
                "state_format, block_wise) or the sharding of its parameters decide that"
            )
        for warning in self.optimizer._warnings_of_load(
            self.groups, self.saved_groups, self.authors
        ):
            warn_caller(f"{name}: {warning}")


def _check_structure(state_dict: Any) -> None:
    """Raises ValueError unless this has the form of an optimizer's state dict."""
    if not isinstance(state_dict, dict):
        raise ValueError(f"state_dict: expected a dict, got {type(state_dict).__name__}")

    def expect(name: str, value: Any, *kinds: type) -> None:
        if not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name}: expected a {wanted}, got {type(value).__name__}")

    if "state" not in state_dict and any(str(k).startswith("param_groups.") for k in state_dict):
        raise ValueError(
            "state dict: expected the keys 'state' and 'param_groups', got a flat one "
            "(flatten_optimizer_state_dict=True). Give it to set_optimizer_state_dict of "
            "torch.distributed.checkpoint.state_dict with the same option, or read the folder with "
            "torchao8.checkpoint.load_dcp(model, optimizer, folder)"
        )
    for key, kind in (("state", dict), ("param_groups", list)):
        if key not in state_dict:
            raise ValueError(f"state dict: expected the key {key!r}, got {list(state_dict)}")
        expect(key, state_dict[key], kind)
    for i, group in enumerate(state_dict["param_groups"]):
        expect(f"param_groups[{i}]", group, dict)
        if "params" not in group:
            raise ValueError(f"param_groups[{i}]: expected the key 'params', got {list(group)}")
        expect(f"params of param_groups[{i}]", group["params"], list, tuple)
        for saved_id in group["params"]:
            expect(f"params of param_groups[{i}]: an element", saved_id, int, str)
        names = group.get("param_names", [""] * len(group["params"]))
        expect(f"param_names of param_groups[{i}]", names, list, tuple)
        if len(names) != len(group["params"]) or not all(isinstance(n, str) for n in names):
            raise ValueError(
                f"param_names of param_groups[{i}]: expected a name for each of "
                f"{len(group['params'])} parameters, got {names!r}"
            )


def _check_sizes(live: list[Group], saved: list[Group]) -> None:
    """Raises ValueError, as torch.optim does, unless groups and their sizes are the same."""
    ours, theirs = ([len(group["params"]) for group in groups] for groups in (live, saved))
    if len(ours) != len(theirs):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: expected "
            f"{len(ours)}, got {len(theirs)}"
        )
    if ours != theirs:
        raise ValueError(
            "loaded state dict contains a parameter group that doesn't match the size of "
            f"optimizer's group: expected groups of {ours} parameters, got {theirs}"
        )


def _check_names(live: list[Group], saved: list[Group]) -> None:
    """Names may differ, as wrappers of modules change them, but not be those of other parameters.

    Raises:
        ValueError: a name that both have, at different places.
    """
    if all("param_names" in group for group in (*live, *saved)):
        ours, theirs = (
            [name for g in groups for name in g["param_names"]] for groups in (live, saved)
        )
        if any(len(set(names)) < len(names) for names in (ours, theirs)):
            return  # they do not tell which is which
        places = {name: i for i, name in enumerate(ours)}
        for i, name in enumerate(theirs):
            if places.get(name, i) != i:
                raise ValueError(
                    f"param_names: the checkpoint has the parameters in another order: {name!r} "
                    f"where the optimizer has {ours[i]!r}"
                )


def _in_form(saved: Group, live: Group) -> Group:
    """The same options, as tensors where those of the live group are, as a compiled step wants."""

    def in_form(value: Any, live: Any) -> Any:
        if isinstance(live, Tensor) and isinstance(value, (int, float)):
            return torch.tensor(value, dtype=live.dtype, device=live.device)
        if isinstance(live, (tuple, list)) and isinstance(value, (tuple, list)):
            if len(live) == len(value):
                formed = [in_form(v, m) for v, m in zip(value, live, strict=True)]
                return formed if isinstance(value, list) else tuple(formed)
        return value

    return {
        name: value if name == "params" else in_form(value, live.get(name))
        for name, value in saved.items()
    }
