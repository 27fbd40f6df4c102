"""What every optimizer here shares: groups, the layout of the state, buckets and checkpoints.

An optimizer is a subclass that gives its options, declares its states (:class:`State`) and calls
the op of its update rule on one :class:`Bucket`. Nothing in this file knows a rule.
"""

import difflib
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from torchao8 import ops
from torchao8.block_layout import check_block_size, fits_8bit, scale_shape
from torchao8.optim._checkpoint import TensorSpec, seal, unseal
from torchao8.optim._checks import (
    PARAM_DTYPES,
    check_grad,
    check_number,
    check_params,
    describe,
    is_int,
)

Group = dict[str, Any]

# Torch's hints of implementation. The step here is always fused, multi-tensor and capturable, so
# they choose nothing, but for fused=True, which opts in to the fused protocol of
# torch.amp.GradScaler.
HINTS = ("foreach", "fused", "capturable", "differentiable")
# Options of every optimizer that have one value so far, and what the others would be.
FIXED = {
    "differentiable": (False, "a step that autograd records"),
    "percentile_clipping": (100, "clipping by a percentile of the gradient norms"),
    "block_wise": (True, "one scale for a whole tensor"),
    "is_paged": (False, "paged state"),
}


class State(NamedTuple):
    """A state of a parameter: ``name`` in 32 bits, ``name_codes`` and ``name_scale`` in 8."""

    name: str
    signed: bool


class Bucket(NamedTuple):
    """The tensors of one op call: one device, one dtype of parameters and of gradients, one format.

    ``values`` and ``scales`` hold a list for each state, by its name: the codes and their scales,
    or the float32 values and an empty list.
    """

    params: list[Tensor]
    grads: list[Tensor]
    steps: list[Tensor]
    values: dict[str, list[Tensor]]
    scales: dict[str, list[Tensor]]


class LowPrecisionOptimizer(Optimizer):
    """Base class: a ``torch.optim.Optimizer`` that keeps its state in 8 or 32 bits.

    A subclass defines :meth:`_states` and :meth:`_update`, and extends :meth:`_check_options`.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of a group's ``params`` and options.
        options: the default of every option of the class. All of them live in the parameter groups
            and may differ from group to group. They are read at every step; those that say how the
            state is laid out may not change after the first one, which raises.
    """

    # The options that a checkpoint does not replace: they say where the bytes of the state lie. A
    # checkpoint that was laid out otherwise is refused, not taken over.
    _own_options: tuple[str, ...] = ("optim_bits", "min_8bit_size", "block_size")

    def __init__(self, params: ParamsT, options: Group) -> None:
        fixed = {name: value for name, (value, _) in FIXED.items()}
        defaults = _plain_hints({**fixed, **options})
        self._check_options(defaults)
        super().__init__(params, defaults)
        _run_when_traced(type(self)._init_states)
        self._step_supports_amp_scaling = bool(defaults["fused"])

    # -- what a subclass defines ---------------------------------------------------------------

    def _states(self, group: Group) -> tuple[State, ...]:
        """The states of a parameter under these options."""
        raise NotImplementedError

    def _update(
        self,
        group: Group,
        bucket: Bucket,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Updates one bucket in place; ``steps`` are those made before, and are counted later."""
        raise NotImplementedError

    def _check_options(self, group: Group) -> None:
        """Raises ValueError or NotImplementedError for an option that is out of range."""
        for name, (value, other) in FIXED.items():
            if group[name] != value:
                raise NotImplementedError(
                    f"{name}={group[name]!r}: {other} is not implemented, it must be {value!r}"
                )
        check_number("lr", group["lr"], tensor=True)
        if not is_int(group["optim_bits"]) or group["optim_bits"] not in (8, 32):
            raise ValueError(f"optim_bits: expected 8 or 32, got {group['optim_bits']!r}")
        if not is_int(group["min_8bit_size"]) or group["min_8bit_size"] < 0:
            raise ValueError(f"min_8bit_size: expected an int >= 0, got {group['min_8bit_size']!r}")
        check_block_size(group["block_size"])
        rounding = group["state_rounding"]
        if rounding not in ("stochastic", "nearest"):
            raise ValueError(
                f"state_rounding: expected 'stochastic' or 'nearest', got {rounding!r}"
            )
        if not is_int(group["seed"]) or not -(2**63) <= group["seed"] < 2**63:
            raise ValueError(f"seed: expected an int of 64 bits, got {group['seed']!r}")

    # -- groups --------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Adds a group; nothing is added if one of its options or parameters is refused.

        Raises:
            TypeError: not a dict, or ``params`` not an ordered collection of tensors.
            ValueError: an option out of range; a parameter that is not a leaf, not of a supported
                dtype, or already in the optimizer.
            NotImplementedError: an option of a later version, or a DTensor parameter.
        """
        if isinstance(param_group, dict):
            given = param_group["params"]
            if not isinstance(given, (Tensor, list, set)):
                param_group["params"] = given = list(given)  # an iterator can be read only once
            _warn_of_misspelled(param_group, self.defaults)
            self._check_options({**self.defaults, **_plain_hints(param_group)})
            check_params([given] if isinstance(given, Tensor) else given)
        super().add_param_group(param_group)
        self.param_groups[-1].update(_plain_hints(self.param_groups[-1]))

    # -- state ---------------------------------------------------------------------------------

    def _layout(self, group: Group, p: Tensor) -> dict[str, TensorSpec]:
        """Every key of ``state[p]`` under the options of its group, and what stands there."""
        shape, block_size = tuple(p.shape), group["block_size"]
        in_8bit = group["optim_bits"] == 8 and fits_8bit(shape, block_size, group["min_8bit_size"])
        layout = {"step": TensorSpec(torch.float32, ())}
        for name, signed in self._states(group):
            if in_8bit:
                zero_code = 127 if signed else 0
                layout[f"{name}_codes"] = TensorSpec(torch.uint8, shape, zero_code)
                layout[f"{name}_scale"] = TensorSpec(torch.float32, scale_shape(shape, block_size))
            else:
                layout[name] = TensorSpec(torch.float32, shape)
        return layout

    def _init_states(self) -> None:
        """Gives state to every parameter that lacks it, or, if anything is refused, to none.

        All trainable parameters get theirs at the first step, with a gradient or without: then no
        checkpoint is partial, and a first gradient that comes late meets nothing new.
        """
        fresh = []
        for group in self.param_groups:
            check_params(group["params"])
            for p in group["params"]:
                if p.grad is not None:
                    check_grad(self, p)
                if (p.requires_grad or p.grad is not None) and not self.state.get(p):
                    fresh.append((p, self._layout(group, p)))
        for p, layout in fresh:
            self.state[p] = {key: spec.empty(p.device) for key, spec in layout.items()}

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
                its parameter and options (``optim_bits`` was changed, for one).
            ValueError: a parameter put into a group after construction is of an unsupported dtype.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._init_states()  # at trace time: the traced step finds every state in place
        else:
            for group in self.param_groups:  # lr, a tensor maybe, is not read: it may be on a GPU
                self._check_options({**group, "lr": 0.0})
        calls = []
        for group in self.param_groups:
            lr = _lr_tensor(group["lr"])
            calls += [(group, lr, bucket) for bucket in self._buckets(group)]
        for group, _, bucket in calls:
            _check_layout(self, group, bucket)
        # Only now: what is refused in one group leaves all of them as they were.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        steps: dict[torch.device, list[Tensor]] = {}
        for group, lr, bucket in calls:
            device = bucket.params[0].device
            self._update(
                group,
                bucket,
                lr if lr.is_cpu else _to_device(lr, device),  # a number on the CPU goes anywhere
                _to_device(grad_scale, device),
                _to_device(found_inf, device),
            )
            steps.setdefault(device, []).extend(bucket.steps)
        for device, made in steps.items():  # one kernel on a GPU, for all buckets
            ops.count_step_(made, _to_device(found_inf, device))
        return loss

    def _buckets(self, group: Group) -> list[Bucket]:
        """Sorts the parameters with a gradient, their gradients and states into op calls."""
        names = [state.name for state in self._states(group)]
        codes, scales = [f"{name}_codes" for name in names], [f"{name}_scale" for name in names]
        keys32, keys8 = ["step", *names], ["step", *codes, *scales]
        first_codes = codes[0] if codes else None
        # Of each kind of bucket its parameters, one after the other: p, p.grad, step, states...
        kinds: dict[Any, list[Tensor]] = {}
        for p in group["params"]:
            grad, state = p.grad, self.state.get(p)
            if not state:
                if grad is None and not p.requires_grad:
                    continue
                self._init_states()
                state = self.state[p]
            if grad is None:
                continue
            if grad.layout is not torch.strided or grad.dtype not in PARAM_DTYPES:
                check_grad(self, p)
            quantized = first_codes in state
            tensors = kinds.setdefault((quantized, p.device, p.dtype, grad.dtype), [])
            tensors += (p, grad)
            try:
                tensors += [state[key] for key in (keys8 if quantized else keys32)]
            except KeyError:
                raise RuntimeError(_keys_message(self, p, keys8 if quantized else keys32)) from None
        return [_bucket(names, kind[0], tensors) for kind, tensors in kinds.items()]

    # -- checkpoints and copies ----------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a checkpoint, or raises and changes nothing.

        As in ``torch.optim``, the options of the checkpoint replace those of the groups, except
        those that lay out the state (``optim_bits``, ``min_8bit_size``, ``block_size``). State
        tensors keep their bytes. They move to the device of their parameter; those that are there
        already are taken over, not copied.

        Args:
            state_dict: what :meth:`state_dict` returned.

        Raises:
            ValueError: groups of another number or size, an option out of range, or a state whose
                keys, dtypes or shapes are not those of the parameter.
        """
        # Registered for this call only: so it runs after the user's hooks, and copies and pickles
        # of the optimizer, which carry no hooks, load checkpoints as well.
        handle = self.register_load_state_dict_pre_hook(_seal_state_dict)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __setstate__(self, state: dict[str, Any]) -> None:
        unseal(state["state"])
        super().__setstate__(state)
        _run_when_traced(type(self)._init_states)
        self.__dict__.setdefault("_step_supports_amp_scaling", bool(self.defaults["fused"]))


def _seal_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Load hook: checks a checkpoint against the optimizer and protects its tensors from a cast."""
    assert isinstance(optimizer, LowPrecisionOptimizer)
    live, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in live] != [len(g["params"]) for g in saved]:
        return None  # torch refuses it, and says so
    groups, state, index = [], dict(state_dict["state"]), 0
    for live_group, saved_group in zip(live, saved, strict=True):
        kept = {name: live_group[name] for name in optimizer._own_options}
        missing = {name: live_group[name] for name in optimizer.defaults}
        group = {**missing, **_plain_hints(saved_group), **kept}
        optimizer._check_options(group)
        groups.append(group)
        for p, saved_id in zip(live_group["params"], saved_group["params"], strict=True):
            if state.get(saved_id):
                layout = optimizer._layout(group, p)
                state[saved_id] = seal(index, layout, state[saved_id])
            index += 1
    return {**state_dict, "state": state, "param_groups": groups}


def _run_when_traced(method: Callable[..., None]) -> None:
    """Has torch.compile run the method as it is, once, when it traces a call of it.

    ``torch.optim`` calls its method for this ``_init_group``, a name that torch.compile knows. But
    it refuses to run that one where the gradients come from the same graph, in a whole train step.
    Not a decorator: torch.compiler loads the compiler, as making an optimizer does but importing
    one should not.
    """
    torch.compiler.assume_constant_result(method)


def _warn_of_misspelled(group: Group, options: Group) -> None:
    """Unknown keys of a group are tolerated, as in torch.optim; near misses are not."""
    for name in group:
        if name not in options and name not in ("params", "param_names"):
            near = difflib.get_close_matches(name, options, n=1, cutoff=0.85)
            if near:
                warnings.warn(
                    f"{name!r} is no option of a parameter group here and has no effect; "
                    f"did you mean {near[0]!r}?",
                    stacklevel=4,
                )


def _plain_hints(options: Group) -> Group:
    """The same options with torch's hints as bools: checkpoint tools take no None."""
    return {k: bool(v) if k in HINTS else v for k, v in options.items()}


def _lr_tensor(lr: float | Tensor) -> Tensor:
    """The learning rate as the op takes it: 0-d, float64 where it comes as a number."""
    if not isinstance(lr, Tensor):
        if torch.compiler.is_compiling():
            # torch.compile makes a graph input of a float that changes if it meets it in arithmetic
            # with a tensor; torch.tensor(lr) would burn its value into the graph.
            return torch.ones((), dtype=torch.float64) * lr
        return torch.tensor(lr, dtype=torch.float64)
    if lr.dtype not in (torch.float32, torch.float64):
        lr = lr.to(torch.float32)
    return lr if lr.dim() == 0 else lr.reshape(())


def _check_layout(optimizer: Optimizer, group: Group, bucket: Bucket) -> None:
    """Raises RuntimeError if an option was changed after it had laid out the state."""
    compiling = torch.compiler.is_compiling()  # which has no use for a cache
    scale_of = scale_shape if compiling else _cached_scale_shape
    scales = next(iter(bucket.scales.values()), [])
    least, block_size = group["min_8bit_size"], group["block_size"]
    for i, p in enumerate(bucket.params):
        # Not as one expression: under dynamic=True its value would be symbolic.
        if group["optim_bits"] == 8 and p.numel() >= least:
            wants_8bit = bool(scales) or fits_8bit(p.shape, block_size, least)
        else:
            wants_8bit = False
        if wants_8bit != bool(scales) or (
            scales and scales[i].shape != scale_of(p.shape, block_size)
        ):
            has = f"8-bit state, scales {list(scales[i].shape)}" if scales else "32-bit state"
            raise RuntimeError(
                f"{type(optimizer).__name__}: {describe(optimizer, p)} already has {has}, but its "
                f"group now says optim_bits={group['optim_bits']}, min_8bit_size={least}, "
                f"block_size={block_size}. Set them back, or build a new optimizer."
            )


@functools.cache
def _cached_scale_shape(shape: torch.Size, block_size: int) -> tuple[int, ...]:
    return scale_shape(shape, block_size)


_Number = TypeVar("_Number", Tensor, None)


def _to_device(value: _Number, device: torch.device) -> _Number:
    """GradScaler keeps its tensors on one device; a model may lie on several."""
    return value if value is None else value.to(device)


def _bucket(names: list[str], quantized: bool, tensors: list[Tensor]) -> Bucket:
    """Turns one parameter after the other into one list for each thing of a parameter."""
    width = 3 + len(names) * (2 if quantized else 1)
    columns = [tensors[i::width] for i in range(width)]
    states = columns[3 : 3 + len(names)]
    scales = columns[3 + len(names) :] if quantized else [[] for _ in names]
    return Bucket(
        columns[0],
        columns[1],
        columns[2],
        dict(zip(names, states, strict=True)),
        dict(zip(names, scales, strict=True)),
    )


def _keys_message(optimizer: Optimizer, p: Tensor, keys: list[str]) -> str:
    return (
        f"{type(optimizer).__name__}: state of {describe(optimizer, p)}: expected the keys {keys}, "
        f"got {list(optimizer.state[p])}. An option that decides which state there is, such as "
        "amsgrad, must be set before the first step."
    )
