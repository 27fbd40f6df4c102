"""What an optimizer class tells of itself: its options, its states and the op of its rule.

The step, the layout of the state and checkpoints ask the class, so that a new rule changes none of
them. The one option of a rule that they look at themselves is ``dampening`` (layout.wake).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import ops, sharding
from torchao8._numbers import plain_numbers
from torchao8.optim._state.formats import holds, own_keys
from torchao8.optim._state.spec import State, add_own_keys, has_state
from torchao8.optim.options import (
    COMMON,
    LAYOUT_OPTIONS,
    STATE_VERSION,
    CommonOptions,
    Group,
    check_common_options,
    check_number,
    plain_hints,
    signature_of,
)

if TYPE_CHECKING:
    from torchao8.optim._step.bucket import Bucket, Work


class OptimizerContract(Optimizer):
    """The attributes and methods that a class defines, with what holds for most of them.

    Attributes:
        _op: of :data:`torchao8.ops.STEP_OPS`.
        _op_states: all states of the rule, in the order of the op's lists, as the extension names
            them.
        _op_scaled_states: those that have lists of scales.
        _own_options: the options that a checkpoint does not replace. A checkpoint whose state is
            laid out otherwise is converted or refused, not taken over.
        _resting: states that stay as they are while an option is 0: their names by the option's.
        _added: states that an option adds when it is True: their names by the option's.
        _compares_updates: whether trust ratios compare parameters with their updates
            (:meth:`_update_sums`), or with their gradients, unscaled and clipped.
        _bits, _paged: the defaults of ``optim_bits`` and ``is_paged``. That of ``block_size``
            follows from the first.
        _has_4bit: whether the rule has state of 4 bits.
        _bad_gradients: what its docstring says of gradients that are not finite.
        _fixed: options of every group that the constructor does not take.
        _kinds: what each group of a class of several rules must say, one entry for each rule.
        _torch_class: the class of torch.optim with the same rule, where there is one.
        _torch_state_at_start: whether that class has state before the first step.
    """

    _op: str
    _op_states: tuple[str, ...]
    _op_scaled_states: tuple[str, ...]
    _own_options: tuple[str, ...] = LAYOUT_OPTIONS
    _resting: dict[str, str] = {}  # noqa: RUF012 (nobody writes to it)
    _added: dict[str, str] = {}  # noqa: RUF012
    _compares_updates = False
    _bits = 32
    _paged = False
    _has_4bit = False
    _bad_gradients = (
        "An element whose gradient is not finite keeps its value and its state, up to rounding."
    )
    _fixed: Group = {}  # noqa: RUF012
    _kinds: tuple[Group, ...] = ({},)
    _torch_class: type[Optimizer] | None = None
    _torch_state_at_start = False
    __signature__: ClassVar[inspect.Signature]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = {**defaults_of(cls._bits), "is_paged": cls._paged}
        cls.__signature__ = signature_of(cls.__init__, own)
        if hasattr(cls, "_op"):
            (family,) = (family for family in ops.FAMILIES if family.step_op == cls._op)
            cls._op_states = tuple(state.name for state in family.states)
            cls._op_scaled_states = tuple(s.name for s in family.states if not s.scalar)
            add_own_keys(own_keys(cls._op_states))

    # -- options -------------------------------------------------------------------------------

    @classmethod
    def _options(cls, own: Group, common: CommonOptions) -> Group:
        """The options of a group: the arguments of the rule, and all common ones.

        Raises:
            TypeError: a name that is none of them, as of any unexpected argument.
        """
        for name in common:
            if name not in COMMON:
                raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}")
        return {**own, **cls._fixed, **COMMON, **defaults_of(cls._bits), **common}

    @classmethod
    def _normalized(cls, options: Group) -> Group:
        """The same options without None: checkpoint tools take none."""
        return plain_hints(options)

    @classmethod
    def _as_defaults(cls, options: Group) -> Group:
        """The options as a group has them: without None, with all numbers Python's own."""
        defaults = cls._normalized({**options, "state_version": STATE_VERSION})
        if defaults["is_paged"] is None:
            defaults["is_paged"] = cls._paged
        plain_numbers(defaults)
        return defaults

    @classmethod
    def _check_options(cls, group: Group) -> None:
        """Raises ValueError or NotImplementedError for an option that is out of range."""
        check_common_options(group)
        if group["optim_bits"] == 4 and not cls._has_4bit:
            raise ValueError(
                f"optim_bits: expected 8 or 32, got 4: {bare_name(cls.__name__)} has no state of 4 "
                "bits. Adam, AdamW, Lion and SGD have"
            )

    @classmethod
    def _check_new_group(cls, group: Group) -> None:
        """Raises ValueError for options of a new group that do not go together; a schedule may
        change them later as it likes."""

    @classmethod
    def _check_new(cls, group: Group) -> None:
        """Raises ValueError or NotImplementedError for options that no group may begin with."""
        check_number("lr", group["lr"])
        cls._check_options(group)
        cls._check_new_group(group)

    @classmethod
    def _why_refused(cls, group: Group, p: Tensor) -> str | None:
        """What the rule of a group expects of a parameter and what it got, without the name of the
        parameter; None if it takes it. What no rule takes is refused elsewhere."""
        return None

    # -- the state -----------------------------------------------------------------------------

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        """The states of a parameter under these options."""
        raise NotImplementedError

    def _states_in(self, group: Group, state: Collection[str]) -> tuple[State, ...]:
        """The states of a parameter whose state has these keys: those under the options of its
        group, and those that rest."""
        on = {k: 1.0 for k, n in self._resting.items() if holds(n, state)}
        return self._states({**group, **on} if on else group)

    def _states_of(self, group: Group) -> tuple[State, ...]:
        """The states of the parameters of a group."""
        if self._resting:
            for p in group["params"]:
                state = self.state.get(p, {})
                if has_state(state):
                    return self._states_in(group, state)
        return self._states(group)

    # -- the step ------------------------------------------------------------------------------

    @classmethod
    def _rule(cls, group: Group) -> type[OptimizerContract]:
        """The class whose ``_op`` steps the parameters of a group: a class may have two rules."""
        return cls

    @classmethod
    def _is_of_matrices(cls, group: Group) -> bool:
        """Whether the parameters of a group are matrices that are orthogonalized: a step of
        :mod:`torchao8.optim._muon`, which calls the op of the rule itself."""
        return False

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        """The options of a group that the op of the rule has, and that are no numbers."""
        return {"maximize": group["maximize"]}

    @classmethod
    def _op_numbers(cls, group: Group, device: torch.device) -> Tensor:
        """The numbers of a group as the op of the rule takes them."""
        betas = {f"beta{i}": beta for i, beta in enumerate(group.get("betas", ()), 1)}
        return ops.rule_numbers(cls._op, {**group, **betas}, device)

    def _has_trust_ratios(self, group: Group) -> bool:
        """Whether the learning rate of each parameter is multiplied by a ratio of norms."""
        return False

    def _trust_ratios(self, group: Group, param_norms: Tensor, norms: Tensor) -> Tensor:
        """What learning rates are multiplied by, float64 of shape (n,).

        Args:
            param_norms, norms: of parameters and of what they are compared with, float64 of shape
                (n,).
        """
        raise NotImplementedError

    def _update_sums(
        self, group: Group, bucket: Bucket, factors: list[Tensor], grad_scale: Tensor | None
    ) -> Tensor:
        """The exact sums of squares of the updates of an op call, rows as of
        :func:`torchao8.ops.sum_squares`.

        Args:
            factors: of the parameters, see :func:`torchao8.ops.step_`.
        """
        raise NotImplementedError

    # -- checkpoints ---------------------------------------------------------------------------

    def _assumed_steps(self, group: Group) -> int | None:
        """Step count to assume for state of another library without one; None if the rule needs
        the true count."""
        return None

    def _check_source(self, saved: Group) -> None:
        """Raises ValueError where these options of a checkpoint tell that its state means something
        else than the state of the same name here."""

    def _saved_options(self, saved: Group) -> Group:
        """The options of a group of a checkpoint, as this class means them: those that another
        class has under another name, or not at all, are added or renamed in a copy."""
        return saved

    def _warnings_of_load(
        self, groups: Sequence[Group], saved: Sequence[Group], writers: Collection[str]
    ) -> list[str]:
        """What to tell of a checkpoint that loads, but whose options mean something else here.

        Args:
            groups: with the options that hold from now on.
            saved: the groups of the checkpoint, in the same order.
            writers: the other libraries that wrote its state, as "bitsandbytes".
        """
        return []

    def _check_for_torch(self, group: Group) -> None:
        """Raises ValueError where the class of torch.optim does not do what these options say, or
        does not take the parameters of the group."""

    def _of_torch(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the class of torch.optim keeps of the 32-bit state of a parameter."""
        return state

    def _mend_decoded(self, state: dict[str, Tensor]) -> None:
        """Repairs, in place, decoded states whose separate rounding broke a relation (RMSprop:
        v >= a^2)."""

    # -- what torch.compile runs as it is, once, when it traces a call -------------------------

    def _init_states(self) -> None:
        """Gives state to every parameter that lacks it, or, if anything is refused, to none."""
        raise NotImplementedError

    def _shard_rows(self, group: int, param: int, bits: int) -> sharding.ShardRows | None:
        """Where the shard of a DTensor parameter with state of so many bits lies; by its numbers,
        which can be traced."""
        raise NotImplementedError

    @staticmethod
    def _exchange(
        work: Work,
        arguments: Callable[[Bucket], ops.Arguments],
        extremes: Mapping[int, Tensor],
        found_inf: Tensor | None,
    ) -> None:
        """Steps a group of matrices some of which are DTensors. Not traced at all: a compiled step
        calls it between two graphs."""
        raise NotImplementedError

    def _shard_groups(self, numbers: tuple[tuple[int, int], ...]) -> list[sharding.ShardGroup]:
        """The process groups that share parameters; by their numbers, which can be traced."""
        raise NotImplementedError


def bare_name(name: str) -> str:
    """The name of the class with resident 32-bit state, of any class of the same rule."""
    return name.removeprefix("Paged").removesuffix("8bit").removesuffix("4bit")


def defaults_of(bits: int) -> Group:
    """Common options whose defaults differ between classes of other numbers of bits."""
    return {"optim_bits": bits, "block_size": 64 if bits == 4 else COMMON["block_size"]}


def states_under(cls: type[OptimizerContract], options: Group) -> tuple[State, ...]:
    """The states of a parameter under these options, with all others at their defaults.

    Args:
        options: those that the constructor has.

    Raises:
        ValueError, NotImplementedError: an option that is out of range.
    """
    arguments = inspect.signature(cls).parameters
    defaults = {name: p.default for name, p in arguments.items() if name != "params"}
    group = cls._as_defaults({**cls._fixed, **defaults, **options})
    cls._check_new(group)
    return cls._states(group)
