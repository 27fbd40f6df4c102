"""What every optimizer here shares: groups, the layout of the state, buckets and checkpoints.

An optimizer is a subclass that gives its options, declares its states (:class:`State`) and names
the op of its update rule. Nothing in this file knows a rule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from torchao8 import ops, sharding
from torchao8._modes import normal_tensors
from torchao8._numbers import known, one_number
from torchao8.block_layout import Scales, check_block_size, fits_8bit
from torchao8.optim import _clipping, _extremes, _factors, _paging
from torchao8.optim._buckets import (
    Bucket,
    Group,
    Work,
    check_layout,
    check_shard,
    place_of,
    rounds_param,
    sort_into_buckets,
)
from torchao8.optim._checkpoint import (
    STATE_VERSION,
    Layout,
    State,
    TensorSpec,
    add_own_keys,
    has_state,
    in_32bit,
    is_own,
    make_normal,
    unseal,
)
from torchao8.optim._checks import (
    check_flag,
    check_grad,
    check_new_params,
    check_number,
    check_params,
    describe,
    is_int,
    meta_message,
    plain_numbers,
    warn_caller,
)
from torchao8.optim._load import plain_hints, seal_state_dict
from torchao8.sharding import Place, is_dtensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Options of every optimizer that have one value so far, and what the others would be.
FIXED = {
    "differentiable": (False, "a step that autograd records"),
}

# Options that pickles of earlier versions lack, and what they meant there.
_NEWER = {"page_dir": "", "stochastic_rounding": False}

# What ops.step_ and ops.extremes begin with: the op, params, grads, values, scales, steps, lr,
# numbers, grad_scale and factors.
_Shared = tuple[
    str,
    list[Tensor],
    list[Tensor],
    list[list[Tensor]],
    list[list[Tensor]],
    list[Tensor],
    Tensor,
    Tensor,
    Tensor | None,
    list[Tensor],
]


class LowPrecisionOptimizer(Optimizer):
    """Base class: a ``torch.optim.Optimizer`` that keeps its state in 8 or 32 bits.

    A subclass names its op and all of its states, defines :meth:`_states`, and extends
    :meth:`_check_options` and :meth:`_op_flags`.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of a group's ``params`` and options.
        options: the default of every option of the class. All of them live in the parameter groups
            and may differ from group to group. They are read at every step; those that say how the
            state is laid out may not change after the first one, which raises.
    """

    # The options that a checkpoint does not replace: they say where the bytes of the state lie. A
    # checkpoint that was laid out otherwise is refused, not taken over.
    _own_options: tuple[str, ...] = (
        "optim_bits",
        "min_8bit_size",
        "block_size",
        "block_wise",
        "is_paged",
        "page_dir",
    )
    # Whether state is paged unless is_paged says otherwise.
    _paged = False
    _told_of_no_gradient = False
    # Of torchao8.ops.STEP_OPS, and the states in the order of its lists.
    _op: str
    _op_states: tuple[str, ...]
    # States that stay as they are while the option of this name is 0.
    _resting: dict[str, str] = {}  # noqa: RUF012 (nobody writes to it)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        add_own_keys(getattr(cls, "_op_states", ()))

    def __init__(self, params: ParamsT, options: Group) -> None:
        fixed = {name: value for name, (value, _) in FIXED.items()}
        defaults = plain_hints({**fixed, **options, "state_version": STATE_VERSION})
        if defaults["is_paged"] is None:
            defaults["is_paged"] = self._paged
        plain_numbers(defaults)
        self._check_new(defaults)
        super().__init__(params, defaults)
        _run_when_traced(type(self))
        self._step_supports_amp_scaling = bool(defaults["fused"])

    # -- what a subclass defines ---------------------------------------------------------------

    def _states(self, group: Group) -> tuple[State, ...]:
        """The states of a parameter under these options."""
        raise NotImplementedError

    def _op_flags(self, group: Group) -> dict[str, bool]:
        """The options of a group that the op of the rule has, and that are no numbers."""
        return {"maximize": group["maximize"]}

    def _check_new_group(self, group: Group) -> None:
        """Raises ValueError for options of a new group that do not go together; a schedule may
        change them later as it likes."""

    def _check_new(self, group: Group) -> None:
        """Raises ValueError or NotImplementedError for options that no group may begin with."""
        check_number("lr", group["lr"])
        self._check_options(group)
        self._check_new_group(group)

    def _steps_untold(self, group: Group) -> int | None:
        """The steps that state of another library counts as, which does not tell how many they
        were; None where the rule cannot do without."""
        return None

    def _has_trust_ratios(self, group: Group) -> bool:
        """Whether the learning rate of each parameter is multiplied by a ratio of norms."""
        return False

    def _trust_ratios(self, group: Group, param_norms: Tensor, norms: Tensor) -> Tensor:
        """That ratio; see :class:`torchao8.optim._factors.Rule` for this and the next one."""
        raise NotImplementedError

    def _check_source(self, saved: Group) -> None:
        """Raises ValueError where these options of a checkpoint tell that its state means something
        else than the state of the same name here."""

    def _mend_decoded(self, state: dict[str, Tensor]) -> None:
        """Changes, in place, what 32-bit states that were rounded to 8 bits apart may not be."""

    # A method of rules that compare parameters with updates.
    _update_sums: Callable[[Group, Bucket, list[Tensor], Tensor | None], Tensor] | None = None

    def _check_options(self, group: Group) -> None:
        """Raises ValueError or NotImplementedError for an option that is out of range."""
        for name, (value, other) in FIXED.items():
            if group[name] != value:
                raise NotImplementedError(
                    f"{name}={group[name]!r}: {other} is not implemented, it must be {value!r}"
                )
        check_flag("maximize", group["maximize"])
        _clipping.check_percentile(group["percentile_clipping"])
        _paging.check_options(group)
        # A schedule that ends at 0 may end at -5e-21, which a step takes, and so do checkpoints.
        check_number("lr", group["lr"], signed=True)
        if not is_int(group["optim_bits"]) or group["optim_bits"] not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {group['optim_bits']!r}")
        if not is_int(group["min_8bit_size"]) or group["min_8bit_size"] < 0:
            raise ValueError(f"min_8bit_size: expected an int >= 0, got {group['min_8bit_size']!r}")
        check_block_size(group["block_size"])
        check_flag("block_wise", group["block_wise"])
        rounding = group["state_rounding"]
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(
                f"state_rounding: expected 'stochastic' or 'nearest', got {rounding!r}"
            )
        check_flag("stochastic_rounding", group["stochastic_rounding"])
        if not is_int(group["seed"]) or not -(2**63) <= group["seed"] < 2**63:
            raise ValueError(f"seed: expected an int of 64 bits, got {group['seed']!r}")
        if not is_int(group["state_version"]) or group["state_version"] != STATE_VERSION:
            raise ValueError(
                f"state_version: this version of torchao8 reads and writes {STATE_VERSION}, got "
                f"{group['state_version']!r}. A newer one may have saved the checkpoint."
            )

    # -- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; nothing is added if one of its options or parameters is refused.

        Raises:
            TypeError: not a dict, or ``params`` not an ordered collection of tensors.
            ValueError: an option out of range; a parameter that is not a leaf, not of a supported
                dtype, or already in the optimizer.
            NotImplementedError: an option of a later version.
        """
        if isinstance(param_group, dict):
            given = param_group["params"]
            if not isinstance(given, (Tensor, list, set)):
                param_group["params"] = given = list(given)  # an iterator can be read only once
            _warn_of_misspelled(param_group, self.defaults)
            options = {**self.defaults, **plain_hints(param_group)}
            plain_numbers(options)
            self._check_new(options)
            _paging.check_folder(options)
            given = [given] if isinstance(given, Tensor) else given
            check_params(given, options["stochastic_rounding"])
            check_new_params(self, given)
        super().add_param_group(param_group)
        self.param_groups[-1].update(plain_hints(self.param_groups[-1]))
        plain_numbers(self.param_groups[-1])

    # -- state ---------------------------------------------------------------------------------

    def _states_in(self, group: Group, state: Collection[str]) -> tuple[State, ...]:
        """The states of a parameter whose state has these keys: those under the options of its
        group, and those that rest."""
        on = {k: 1.0 for k, n in self._resting.items() if n in state or f"{n}_codes" in state}
        return self._states({**group, **on} if on else group)

    def _states_of(self, group: Group) -> tuple[State, ...]:
        """The states of the parameters of a group."""
        if self._resting:
            for p in group["params"]:
                state = self.state.get(p, {})
                if has_state(state):
                    return self._states_in(group, state)
        return self._states(group)

    def _layout(self, group: Group, p: Tensor, states: tuple[State, ...] | None = None) -> Layout:
        """Every key of ``state[p]`` under the options of its group, and what stands there."""
        shape, block_size, scales = tuple(p.shape), group["block_size"], Scales.of(group)
        in_8bit = group["optim_bits"] == 8 and fits_8bit(shape, block_size, group["min_8bit_size"])
        place, local_shape, local_scale = None, None, None
        if is_dtensor(p):
            local_shape = tuple(sharding.local(p).shape)
            place = sharding.place(p, block_size)
            in_8bit = in_8bit and place is not None
            if place is not None and scales.block_wise:
                local_scale = place.scale_shape
            if in_8bit and place is not None:
                check_shard(self, p, place)
            elif rounds_param(group, p):
                check_shard(self, p, sharding.flat_place(p))
        layout = {"step": TensorSpec(torch.float32, ())}
        if _clipping.clips(group):
            layout[_clipping.KEY] = TensorSpec(torch.float32, (_clipping.HISTORY,), _clipping.EMPTY)
        if sharding.is_flattened(p) and self._needs_the_whole(group):
            raise ValueError(
                f"{type(self).__name__}: {describe(self, p)} was flattened by FSDP1, which does "
                "not tell where the shards of a parameter are; clipping by percentiles, trust "
                "ratios and block_wise=False need all of it. Shard with fully_shard (FSDP2)"
            )
        pages = _paging.folder_of(group, p)
        for name, signed, initial in self._states_of(group) if states is None else states:
            if in_8bit:
                code = 255 if initial else 127 if signed else 0  # 1.0 or 0.0, times the scale
                layout[f"{name}_codes"] = TensorSpec(
                    torch.uint8, shape, code, local_shape, pages=pages
                )
                of_scale = pages if scales.block_wise else None  # one number is not worth a page
                layout[f"{name}_scale"] = TensorSpec(
                    torch.float32, scales.shape(shape), initial, local_scale, signed, of_scale
                )
            else:
                layout[name] = TensorSpec(torch.float32, shape, initial, local_shape, signed, pages)
        return layout

    def _needs_the_whole(self, group: Group) -> bool:
        """Whether a step needs to know something of all of a parameter."""
        one_scale = group["optim_bits"] == 8 and not group["block_wise"]
        return one_scale or _clipping.clips(group) or self._has_trust_ratios(group)

    def _init_states(self) -> None:
        """Gives state to every parameter that lacks it, or, if anything is refused, to none.

        All trainable parameters get theirs at the first step, with a gradient or without: then no
        checkpoint is partial, and a first gradient that comes late meets nothing new.
        """
        fresh: list[tuple[Tensor, Layout]] = []
        for group in self.param_groups:
            check_params(group["params"], group["stochastic_rounding"])
            self._wake(group)
            states_of_group = self._states_of(group)
            for p in group["params"]:
                if p.grad is not None:
                    check_grad(self, p)
                if has_state(self.state.get(p)):
                    self._check_layout(group, p, states_of_group)
                elif p.requires_grad or p.grad is not None:
                    if sharding.local(p).is_meta and p.grad is not None:
                        raise RuntimeError(meta_message(self, p))
                    self._warn_of_cut_row(group, p)
                    fresh.append((p, self._layout(group, p, states_of_group)))
        with normal_tensors():
            states = _paging.new_states(fresh)
        for (p, _), state in zip(fresh, states, strict=True):
            mine = self.state[p]  # the dict stays: others may hold it
            others = dict(mine)
            mine.clear()
            mine.update({**state, **others})

    def _wake(self, group: Group) -> None:
        """Gives an empty state to the parameters that lack one whose option was 0 so far.

        Dampening is for a buffer that has begun: torch's first one is undampened, and where there
        is some the missing state is refused later.
        """
        if not self._resting or group.get("dampening", 0) != 0:
            return
        states = [s for s in self._states(group) if s.name in self._resting.values()]
        for p in group["params"]:
            mine = self.state.get(p, {})
            if not has_state(mine):
                continue
            missing = [s for s in states if not mine.keys() & {s.name, f"{s.name}_codes"}]
            if not missing:
                return  # all parameters of a group have the same
            layout = self._layout(group, p, tuple(missing))
            with normal_tensors():
                new = {key: spec for key, spec in layout.items() if key not in mine}
                (state,) = _paging.new_states([(p, new)])
            mine.update(state)

    def _warn_of_no_gradient(self) -> None:
        """Once: training that does nothing looks like training."""
        params = [p for group in self.param_groups for p in group["params"]]
        if self._told_of_no_gradient or not any(p.requires_grad for p in params):
            return
        self._told_of_no_gradient = True
        warn_caller(
            f"{type(self).__name__}: step() found no gradient on any of its {len(params)} "
            "parameters. If backward() has run, they are not those of the model any more: make the "
            "optimizer after fully_shard, and not behind a forward pass without gradients"
        )

    def _check_layout(self, group: Group, p: Tensor, states: tuple[State, ...]) -> None:
        """Raises RuntimeError if an option was changed after it had laid out the state of ``p``."""
        if states:  # what has none has no format either
            name = states[0].name
            scale = self.state[p].get(f"{name}_scale")
            keeps_blocks = not is_dtensor(p) or sharding.keeps_blocks(p, group["block_size"])
            first = self.state[p].get(name if scale is None else f"{name}_codes")
            check_layout(self, group, p, first, scale, keeps_blocks)
            if first is not None:
                _paging.check_place(self, group, p, sharding.local(first))

    def _warn_of_cut_row(self, group: Group, p: Tensor) -> None:
        """Says which parameter keeps 32 bits for the way it is sharded, and what to do."""
        block_size = group["block_size"]
        wanted = group["optim_bits"] == 8 and fits_8bit(p.shape, block_size, group["min_8bit_size"])
        if is_dtensor(p) and wanted:
            message = sharding.cut_row_message(p, block_size)
            if message is not None:
                warn_caller(f"{type(self).__name__}: {describe(self, p)} {message}")

    def _place(self, group: int, param: int, in_blocks: bool) -> Place | None:
        """Where the shard of a DTensor parameter lies; by its numbers, which can be traced."""
        options = self.param_groups[group]
        return place_of(self, options, options["params"][param], in_blocks)

    def _shard_groups(self, numbers: tuple[_factors.Number, ...]) -> list[sharding.ShardGroup]:
        """The process groups that share parameters; by their numbers, which can be traced."""
        return sharding.shard_groups([self.param_groups[g]["params"][i] for g, i in numbers])

    # -- the step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step on every parameter that has a gradient.

        Args:
            closure: reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: a gradient is sparse or of an unsupported dtype, or a state does not fit
                its parameter and options (``optim_bits`` was changed, for one, or the parameter was
                resized); a parameter with a gradient is on the device meta.
            ValueError: a parameter put into a group after construction is of an unsupported dtype;
                a float16 one under ``stochastic_rounding``; a shard that is not what it says.
            OSError: no space for paged state, at the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._init_states()  # at trace time: the traced step finds every state in place
        else:
            for group in self.param_groups:
                plain_numbers(group)
                self._check_options(_as_checked(group))
                self._wake(group)
        rates, works = [], []
        for number, group in enumerate(self.param_groups):
            rates.append(one_number(group["lr"]))
            works.append(self._work(number, group))
        # Only now: what is refused in one group leaves all of them as they were.
        grad_scale = _plain(getattr(self, "grad_scale", None))
        found_inf = _plain(getattr(self, "found_inf", None))
        if not torch.compiler.is_compiling():
            self._check_numbers(works, rates, grad_scale)
        rule = _factors.Rule(
            self._has_trust_ratios, self._trust_ratios, self._update_sums, self._shard_groups
        )
        factors = _factors.factors_of(rule, works, grad_scale, found_inf)
        self._call_ops(works, rates, factors, grad_scale, found_inf)
        steps: dict[torch.device, list[Tensor]] = {}
        for work in works:
            for step in work.steps:
                steps.setdefault(step.device, []).append(step)
        if not steps and not torch.compiler.is_compiling():
            self._warn_of_no_gradient()
        for device, made in steps.items():  # one kernel on a GPU, for all buckets
            ops.count_step_(made, _to_device(found_inf, device))
        self._mark_modified()
        return loss

    def _check_numbers(
        self, works: list[Work], rates: list[Tensor], grad_scale: Tensor | None
    ) -> None:
        """Raises RuntimeError for a number on the CPU that an op would refuse, after other calls
        had gone through and norms had been taken into histories."""
        name = type(self).__name__
        if not any(work.params for work in works):
            return
        for work, lr in zip(works, rates, strict=True):
            if work.params and lr.is_cpu and not math.isfinite(lr):
                raise RuntimeError(f"{name}: lr must be finite, got {float(lr)}")
        if grad_scale is not None and grad_scale.is_cpu and not 0 < float(grad_scale) < math.inf:
            raise RuntimeError(
                f"{name}: grad_scale must be positive and finite, got {float(grad_scale)}"
            )

    def _call_ops(
        self,
        works: list[Work],
        rates: list[Tensor],
        factors: list[list[Tensor]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Steps the tensors of all buckets."""

        numbers: dict[tuple[int, torch.device], Tensor] = {}

        def shared(i: int, bucket: Bucket) -> _Shared:
            device, lr = bucket.params[0].device, rates[i]
            if (i, device) not in numbers:
                numbers[i, device] = self._op_numbers(works[i].group, device)
            return (
                self._op,
                bucket.params,
                bucket.grads,
                [bucket.values.get(name, []) for name in self._op_states],
                [bucket.scales.get(name, []) for name in self._op_states],
                bucket.steps,
                lr if lr.is_cpu else _to_device(lr, device),  # a number on the CPU goes anywhere
                numbers[i, device],
                _to_device(grad_scale, device),
                [factors[i][k] for k in bucket.numbers] if factors[i] else [],
            )

        def find(i: int, bucket: Bucket) -> Tensor:
            return ops.extremes(*shared(i, bucket), **self._op_flags(works[i].group))

        extremes = _extremes.extremes_of(find, works, self._shard_groups)
        calls = [(i, work, bucket) for i, work in enumerate(works) for bucket in work.buckets]
        ahead = _paging.pages_ahead([(work, bucket) for _, work, bucket in calls])
        for (i, work, bucket), pages in zip(calls, ahead, strict=True):
            group = work.group
            ops.prefetch_pages_(pages, bucket.params[0])
            ops.step_(
                *shared(i, bucket),
                [extremes[i][k] for k in bucket.numbers if k in extremes[i]],
                _to_device(found_inf, bucket.params[0].device),
                block_size=group["block_size"],
                stochastic_rounding=group["state_rounding"] == "stochastic",
                stochastic_params=group["stochastic_rounding"],
                seed=group["seed"],
                shard_offsets=bucket.shard_offsets,
                shard_row_strides=bucket.shard_row_strides,
                **self._op_flags(group),
            )

    def _op_numbers(self, group: Group, device: torch.device) -> Tensor:
        """The numbers of a group as the op of the rule takes them."""
        betas = {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}
        return ops.rule_numbers(self._op, {**group, **betas}, device)

    def _work(self, number: int, group: Group) -> Work:
        """What a step does in a group."""
        names = [state.name for state in self._states_of(group)]

        def place(i: int, p: DTensor, in_blocks: bool) -> Place | None:
            if torch.compiler.is_compiling():
                return self._place(number, i, in_blocks)
            return place_of(self, group, p, in_blocks)

        return sort_into_buckets(self, number, names, self._init_states, place)

    def _mark_modified(self) -> None:
        """The ops tell autograd of plain parameters and of the local tensors of DTensors only."""
        if not torch.compiler.is_compiling():
            params = (p for group in self.param_groups for p in group["params"])
            ops.mark_modified([p for p in params if p.grad is not None and is_dtensor(p)])

    # -- checkpoints and copies ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in ``torch.optim``; state tensors are not copied.

        8-bit state stays codes and scales, but for parameters that FSDP1 has flattened: its
        ``optim_state_dict`` can gather moments only, so that these are given in 32 bits. Loaded at
        the same world size they become the same codes again. Empty shards of its parameters are
        left out where there are no moments, as of SGD without momentum.
        """
        result = super().state_dict()
        for group, packed in zip(self.param_groups, result["param_groups"], strict=True):
            plain_numbers(packed)
            states = self._states_of(group)
            for p, key in zip(group["params"], packed["params"], strict=True):
                if sharding.is_flattened(p) and key in result["state"]:
                    saved = result["state"][key]
                    if not states and not p.numel():
                        # FSDP1 skips the steps of empty shards, which it knows by their moments.
                        # Here are none, and without a gradient no step was counted on this rank.
                        others = {k: v for k, v in saved.items() if not is_own(k)}
                        result["state"].pop(key)
                        if others:
                            result["state"][key] = others
                        continue
                    result["state"][key] = in_32bit(p, states, saved, Scales.of(group))
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint, or raises and changes nothing.

        As in ``torch.optim``, the options of the checkpoint replace those of the groups, except
        those that lay out the state (``optim_bits``, ``min_8bit_size``, ``block_size``,
        ``block_wise``, ``is_paged``, ``page_dir``). State tensors keep their bytes. They move to
        the device of their parameter, and to paged memory where it is paged; those that are there
        already are taken over, not copied. State that was saved in another precision than the
        parameter keeps here, or in other blocks, is converted, and one warning says so.

        What others keep in the state of a parameter (a Lookahead, a logger) comes back as it was
        saved, on the device of the parameter. State of another library that does not tell how many
        steps it has made counts them from the ``step`` of its group or, where the rule allows it,
        from the start; one warning says so.

        Where parameters are DTensors this is a collective: all ranks load, or all raise. Their
        state may come as DTensors or, on every rank, as the whole plain tensors.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: groups of another number or size, an option out of range, a state_version
                that is not known, or a state whose keys, dtypes, shapes or values are not those of
                the parameter.
            OSError: no space for state that is to be paged.
        """
        if not isinstance(cast(object, state_dict), dict):
            seal_state_dict(self, state_dict)  # refuses it, and has the other ranks do so as well
        self._load(state_dict)

    @normal_tensors()
    def _load(self, state_dict: dict[str, Any]) -> None:
        # Registered for this call only: so it runs after the user's hooks, and copies and pickles
        # of the optimizer, which carry no hooks, load checkpoints as well.
        handle = self.register_load_state_dict_pre_hook(seal_state_dict)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        unseal(state["state"])
        make_normal(state["state"])
        super().__setstate__(state)
        for group in (self.defaults, *self.param_groups):
            for name, value in _NEWER.items():
                group.setdefault(name, value)
        _paging.move_states(self.param_groups, self.state)
        _run_when_traced(type(self))
        self.__dict__.setdefault("_step_supports_amp_scaling", bool(self.defaults["fused"]))


def _run_when_traced(cls: type[LowPrecisionOptimizer]) -> None:
    """Has torch.compile run three methods as they are, once, when it traces a call of them.

    ``torch.optim`` calls its method for this ``_init_group``, a name that torch.compile knows. But
    it refuses to run that one where the gradients come from the same graph, in a whole train step.
    Not a decorator: torch.compiler loads the compiler, as making an optimizer does but importing
    one should not.
    """
    torch.compiler.assume_constant_result(cls._init_states)
    torch.compiler.assume_constant_result(cls._place)
    torch.compiler.assume_constant_result(cls._shard_groups)


def _warn_of_misspelled(group: Group, options: Group) -> None:
    """Unknown keys of a group are tolerated, as in torch.optim; near misses are not."""
    for name in group:
        if name not in options and name not in ("params", "param_names"):
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.85)
            if near:
                warn_caller(
                    f"{name!r} is no option of a parameter group here and has no effect; "
                    f"did you mean {near[0]!r}?"
                )


def _as_checked(group: Group) -> Group:
    """The options as a step checks them: what lies on a device is not read, and a rate that is not
    finite is refused later, with the op's words."""
    options = {k: v if k == "params" else known(v) for k, v in group.items()}
    rate = options["lr"]
    is_one = isinstance(rate, float) or (isinstance(rate, Tensor) and rate.numel() == 1)
    if is_one and not math.isfinite(cast(float, rate)):
        options["lr"] = 0.0
    return options


_Scalar = TypeVar("_Scalar", Tensor, Tensor | None)


def _to_device(value: _Scalar, device: torch.device) -> _Scalar:
    """GradScaler keeps its tensors on one device; a model may lie on several."""
    return value if value is None else value.to(device)


def _plain(value: Tensor | None) -> Tensor | None:
    """What GradScaler found in sharded gradients comes as a DTensor."""
    return value.full_tensor() if is_dtensor(value) else value
