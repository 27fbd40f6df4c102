"""What every optimizer here does: groups, the step, checkpoints and copies.

An optimizer is a subclass that gives its options, declares its states and names the op of its
update rule, see :mod:`torchao8.optim.contract`. Nothing in this file knows a rule.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8 import ops, sharding
from torchao8._messages import warn_caller
from torchao8._modes import normal_tensors
from torchao8._numbers import plain_numbers
from torchao8.block_layout import Scales
from torchao8.optim._muon import exchange
from torchao8.optim._params import check_new_params, check_params
from torchao8.optim._state import paging
from torchao8.optim._state.convert import in_32bit
from torchao8.optim._state.layout import gets_state, init_states, rows_of
from torchao8.optim._state.load import seal_state_dict
from torchao8.optim._state.memory import Memory, log_new_state, memory_of
from torchao8.optim._state.moments import moments_of
from torchao8.optim._state.sealed import make_normal, unseal
from torchao8.optim._state.spec import is_own
from torchao8.optim._step.bucket import Number
from torchao8.optim._step.calls import call_ops
from torchao8.optim._step.plan import Plan, plan_step
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import ADDED_LATER, Group
from torchao8.sharding import is_dtensor


class LowPrecisionOptimizer(OptimizerContract):
    """Base class: a ``torch.optim.Optimizer`` that keeps its state in 4, 8 or 32 bits.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of a group's ``params`` and options.
        options: the default of every option of the class. All of them live in the parameter groups
            and may differ from group to group. They are read at every step; those that say how the
            state is laid out may not change after the first one, which raises.
    """

    _told_of_no_gradient = False
    _plan: Plan | None = None

    def __init__(self, params: ParamsT, options: Group) -> None:
        defaults = self._as_defaults(options)
        self._check_new(defaults)
        super().__init__(params, defaults)
        _run_when_traced(type(self))
        self._step_supports_amp_scaling = bool(defaults["fused"])

    # -- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; nothing is added if one of its options or parameters is refused.

        Raises:
            TypeError: not a dict, or ``params`` not an ordered collection of tensors.
            ValueError: an option out of range; a parameter that is not a leaf, not of a supported
                dtype, not one that the rule takes, or already in the optimizer.
            NotImplementedError: ``differentiable=True``.
        """
        if isinstance(param_group, dict):
            given = param_group["params"]
            if not isinstance(given, (Tensor, list, set)):
                param_group["params"] = given = list(given)  # an iterator can be read only once
            _warn_of_misspelled(param_group, self.defaults)
            if param_group.get("use_muon") is True and not self._is_of_matrices(param_group):
                name = type(self).__name__
                warn_caller(
                    f"{name}: a group has use_muon=True, which has no effect here: {name} trains "
                    "its parameters as all others. The classes MuonAdamW train them by Muon"
                )
            options = {**self.defaults, **self._normalized(param_group)}
            plain_numbers(options)
            self._check_new(options)
            paging.check_folder(options)
            given = [given] if isinstance(given, Tensor) else given
            check_params(given, options["stochastic_rounding"])
            self._check_rule_takes(options, given)
            check_new_params(self, given)
        super().add_param_group(param_group)
        self.param_groups[-1].update(self._normalized(self.param_groups[-1]))
        plain_numbers(self.param_groups[-1])

    def _check_rule_takes(self, group: Group, params: Iterable[Any]) -> None:
        """Raises ValueError for a trainable parameter that the rule of a new group does not take.

        Args:
            params: parameters, or (name, parameter) pairs.
        """
        for index, entry in enumerate(params):
            name, p = entry if isinstance(entry, tuple) else (None, entry)
            if isinstance(p, Tensor) and gets_state(p):
                why = self._why_refused(group, p)
                if why is not None:
                    label = f"params[{index}]" + (f" ({name})" if name else "")
                    raise ValueError(f"{type(self).__name__}: {label}: {why}")

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
            NotImplementedError: the device of a parameter does not have its ``state_format``.
            ValueError: a parameter put into a group after construction is of an unsupported dtype;
                a float16 one under ``stochastic_rounding``; a shard that is not what it says.
            OSError: no space for paged state, at the first step.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            _, works = plan_step(self, None)
        else:
            self._plan, works = plan_step(self, self._plan)
        grad_scale = _plain(getattr(self, "grad_scale", None))
        found_inf = _plain(getattr(self, "found_inf", None))
        # Only now, after all checks of all groups. What an op alone can find, as a step count that
        # is no whole number, it refuses later: then groups before it have made their step.
        call_ops(self, works, grad_scale, found_inf)
        if not torch.compiler.is_compiling():
            if not any(work.params for work in works):
                self._warn_of_no_gradient()
            # The ops tell autograd of plain parameters and of the local tensors of DTensors only.
            for work in works:
                ops.mark_modified(work.sharded)
        return loss

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

    # -- what can be asked -------------------------------------------------------------------------

    def memory(self) -> Memory:
        """How many bytes the state takes, of which kind, and which parameters keep 32 bits.

            >>> print(optimizer.memory())

        Before the first step it tells what that step will make. Where parameters are sharded, it
        tells of this rank. It looks at no values, and is no collective. What other code keeps in
        the state of a parameter is not counted.

        ``logging.getLogger("torchao8").setLevel("INFO")``, with a handler as of
        ``logging.basicConfig()``, prints one line of it when a step has made state.

        Raises:
            ValueError: a parameter without state whose first step would raise it, as one whose
                local tensor is not the shard it should be.
        """
        return memory_of(self)

    def moments(self, p: Tensor) -> dict[str, Tensor]:
        """The moments of a parameter as float32 tensors, for loggers and for a look at them.

            >>> optimizer.moments(model.head.weight)["exp_avg"].norm()

        Of 8-bit state these are the numbers that the next step starts from. The tensors are new:
        to change them changes nothing in the optimizer.

        Args:
            p: a parameter of the optimizer that has made a step.

        Returns:
            By the names of ``torch.optim``, such as ``exp_avg``, ``exp_avg_sq`` or
            ``momentum_buffer``: float32 tensors of the shape of the parameter, on its device, and
            DTensors placed as it is where it is one, which is no collective. Nothing for SGD
            without momentum.

        Raises:
            TypeError: no tensor.
            ValueError: no parameter of this optimizer.
            RuntimeError: the parameter has no state yet.
        """
        return moments_of(self, p)

    # -- what torch.compile runs as it is, once, when it traces a call -------------------------

    def _init_states(self) -> None:
        if init_states(self):
            log_new_state(self)

    def _shard_rows(self, group: int, param: int, bits: int) -> sharding.ShardRows | None:
        options = self.param_groups[group]
        return rows_of(self, options, options["params"][param], bits)

    def _shard_groups(self, numbers: tuple[Number, ...]) -> list[sharding.ShardGroup]:
        return sharding.shard_groups([self.param_groups[g]["params"][i] for g, i in numbers])

    # -- checkpoints and copies ----------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state and the options, as in ``torch.optim``; state tensors are not copied.

        Codes and scales stay what they are, but for parameters that FSDP1 has flattened: its
        ``optim_state_dict`` can gather moments only, so that these are given in 32 bits. Loaded at
        the same world size they become the same codes again in the dynamic format; in the mulaw
        format and in 4 bits they are rounded to nearest. Empty shards of its parameters are left
        out where there are no moments, as of SGD without momentum.
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
        ``state_format``, ``block_wise``, ``is_paged``, ``page_dir``), and except Adam's
        ``decoupled_weight_decay`` and Muon's ``higher_dims``. State tensors keep their bytes. They
        move to the device of their parameter, and to paged memory where it is paged; those that are
        there already are taken over, not copied. State that was saved in another precision or
        format than the parameter keeps here, or in other blocks, is converted, and one warning says
        so.

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
            NotImplementedError: the device of a parameter does not have its ``state_format``.
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
        for group in (*self.param_groups, self.defaults):
            for option, value in ADDED_LATER.items():
                group.setdefault(option, value)
        paging.move_states(self.param_groups, self.state)
        _run_when_traced(type(self))
        self.__dict__.setdefault("_step_supports_amp_scaling", bool(self.defaults["fused"]))


def _run_when_traced(cls: type[LowPrecisionOptimizer]) -> None:
    """Has torch.compile run some functions as they are, once, when it traces a call of them.

    ``torch.optim`` calls its method for this ``_init_group``, a name that torch.compile knows. But
    it refuses to run that one where the gradients come from the same graph, in a whole train step.
    Not a decorator: torch.compiler loads the compiler, as making an optimizer does but importing
    one should not.
    """
    torch.compiler.assume_constant_result(cls._init_states)
    torch.compiler.assume_constant_result(cls._shard_rows)
    torch.compiler.assume_constant_result(cls._shard_groups)
    if "_exchange" not in vars(LowPrecisionOptimizer):  # once: a graph is kept for one object only
        reason = (
            "Muon on sharded matrices sends them between ranks, which no graph can hold: compile "
            "without fullgraph=True"
        )
        untraced = staticmethod(torch.compiler.disable(exchange.step_, reason=reason))
        LowPrecisionOptimizer._exchange = untraced  # type: ignore[method-assign]


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


def _plain(value: Tensor | None) -> Tensor | None:
    """What GradScaler found in sharded gradients comes as a DTensor."""
    return value.full_tensor() if is_dtensor(value) else value
