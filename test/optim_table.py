"""Every optimizer of the library, with what the tests, which run over this table, must know."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import torchao8
from torchao8.optim.base import LowPrecisionOptimizer

Options = dict[str, Any]


@dataclass(frozen=True)
class OptimizerCase:
    """One optimizer class.

    Attributes:
        cls: the class.
        torch_cls: the class of torch.optim whose place it takes, if there is one.
        optim_bits: the default.
        rule: of reference_rules.RULES.
        states: name of each state and whether it is signed, under the options of ``base``.
        options: sets of options that a test of the update rule goes through.
        base: what :meth:`make` passes, so that there is state.
        full: options under which there are all states that the class can have; those that come on
            top of ``states``, by name and whether signed.
        matrices: whether all parameters have to be matrices, see helpers.make_params.
        own_options: sets of options that ``torch_cls`` does not take.
    """

    cls: type[LowPrecisionOptimizer]
    torch_cls: type[torch.optim.Optimizer] | None
    optim_bits: int
    rule: str
    states: tuple[tuple[str, bool], ...]
    options: tuple[Options, ...]
    base: Options = field(default_factory=dict)
    full: Options = field(default_factory=dict)
    more_states: tuple[tuple[str, bool], ...] = ()
    scalars: tuple[str, ...] = ()
    is_new: bool = False
    matrices: bool = False
    own_options: tuple[Options, ...] = ()

    def make(self, params: Any, **options: Any) -> LowPrecisionOptimizer:
        """The optimizer, with state."""
        return self.cls(params, **{**self.base, **options})

    def known(self, options: Options) -> Options:
        """Those of the options that the class has; for amsgrad, what gives it all of its states."""
        defaults = self.make([torch.nn.Parameter(torch.ones(1, 1))]).defaults
        known = {k: v for k, v in options.items() if k in defaults and k != "amsgrad"}
        if "betas" in known:  # two of them: a rule with three gets its own third one
            known["betas"] = (*known["betas"], *defaults["betas"][2:])
        return {**known, **self.full} if "amsgrad" in options else known

    def state_keys(self, bits: int, *extra: str) -> list[str]:
        """The keys of ``optimizer.state[p]``; ``extra`` are states that an option adds."""
        names = [name for name, _ in self.states] + list(extra)
        if bits == 8:
            names = [f"{name}_{part}" for name in names for part in ("codes", "scale")]
        if bits == 4:
            names = [f"{name}_{part}" for name in names for part in ("4bit", "4bit_scale")]
        return ["step", *names, *self.scalars]

    def takes(self, p: torch.Tensor) -> bool:
        """Whether it steps a parameter of this shape, with ``higher_dims="batch"`` if it asks."""
        return not self.matrices or p.dim() > 1

    @property
    def step_op(self) -> str:
        """The op that the optimizer calls for plain tensors."""
        return "muon_update_" if self.matrices else self.cls._op

    def is_signed(self, state: str) -> bool:
        return state not in self.scalars and dict((*self.states, *self.more_states))[state]

    def is_stochastic(self, state: str) -> bool:
        """Whether the state is rounded stochastically by default."""
        return state == "exp_avg_slow" or not self.is_signed(state)


# Each of them tells a wrong rule from a right one: all are off in the defaults.
ADAM_OPTIONS: tuple[Options, ...] = (
    {},
    {"weight_decay": 0.1, "lr": 0.05},
    {"weight_decay": 0.0, "betas": (0.0, 0.5), "eps": 1e-3},
    {"amsgrad": True, "betas": (0.8, 0.6)},
    {"maximize": True, "weight_decay": 0.3},
    {"amsgrad": True, "maximize": True, "weight_decay": 0.2, "lr": 1.5},
    {"betas": (0.95, 0.0), "eps": 0.1},
)
ADAGRAD_OPTIONS: tuple[Options, ...] = (
    {},
    {"lr_decay": 0.3, "weight_decay": 0.1, "lr": 0.05},
    {"initial_accumulator_value": 0.5, "maximize": True, "eps": 1e-3},
)
ADEMAMIX_OPTIONS: tuple[Options, ...] = (
    {},
    {"alpha": 2.0, "betas": (0.8, 0.9, 0.99), "weight_decay": 0.3, "lr": 0.05},
    {"t_alpha": 4, "t_beta3": 5, "maximize": True, "eps": 1e-3},
)
LAMB_OPTIONS: tuple[Options, ...] = (
    {},
    {"weight_decay": 0.0, "lr": 0.05, "eps": 1e-3},
    {"betas": (0.0, 0.5), "maximize": True, "weight_decay": 0.3},
    {"adaptive": False, "betas": (0.8, 0.0), "weight_decay": 0.1},
)
LARS_OPTIONS: tuple[Options, ...] = (
    {"momentum": 0.0, "weight_decay": 0.1, "lr": 2.0},
    {"lr": 3.0},
    {"dampening": 0.3, "weight_decay": 0.1, "lr": 0.5, "trust_coefficient": 0.02},
    {"nesterov": True, "maximize": True, "weight_decay": 0.2, "lr": 1.5},
    {"adaptive": False, "lr": 0.05, "weight_decay": 0.1},
)
LION_OPTIONS: tuple[Options, ...] = (
    {},
    {"weight_decay": 0.3, "lr": 0.05},
    {"betas": (0.0, 0.5), "maximize": True},
    {"betas": (0.8, 0.0)},
)
MUON_OPTIONS: tuple[Options, ...] = (
    {},
    {"weight_decay": 0.3, "lr": 0.05, "nesterov": False},
    {"momentum": 0.5, "eps": 1e-3, "ns_steps": 3, "adjust_lr_fn": "match_rms_adamw"},
)
OWN_MUON_OPTIONS: tuple[Options, ...] = (
    {"maximize": True, "weight_decay": 0.2},
    {"ns_coefficients": ((3.4, -4.7, 2.0), (3.0, -3.2, 1.2)), "ns_steps": 2, "eps": 1e-3},
)
NADAM_OPTIONS: tuple[Options, ...] = (
    {},
    {"weight_decay": 0.1, "lr": 0.05, "momentum_decay": 0.5},
    {"weight_decay": 0.3, "decoupled_weight_decay": True, "betas": (0.8, 0.6)},
    {"betas": (0.0, 0.5), "maximize": True, "eps": 1e-3},
    {"betas": (0.95, 0.0), "momentum_decay": 0.0, "eps": 0.1},
)
RMSPROP_OPTIONS: tuple[Options, ...] = (
    {},
    {"weight_decay": 0.1, "lr": 0.05, "alpha": 0.5},
    {"momentum": 0.9, "eps": 1e-3},
    {"centered": True, "alpha": 0.9, "eps": 1e-2},
    {"centered": True, "momentum": 0.5, "maximize": True, "weight_decay": 0.2, "eps": 1e-2},
)
SGD_OPTIONS: tuple[Options, ...] = (
    {"momentum": 0.0, "weight_decay": 0.1},
    {},
    {"dampening": 0.3, "weight_decay": 0.1, "lr": 0.05},
    {"nesterov": True, "maximize": True, "weight_decay": 0.2},
)

ADEMAMIX_STATES = (("exp_avg_fast", True), ("exp_avg_slow", True), ("exp_avg_sq", False))
ADAM_STATES = (("exp_avg", True), ("exp_avg_sq", False))
AMSGRAD: dict[str, Any] = {
    "full": {"amsgrad": True},
    "more_states": (("max_exp_avg_sq", False),),
}
RMSPROP: dict[str, Any] = {
    "full": {"centered": True, "momentum": 0.9},
    "more_states": (("grad_avg", True), ("momentum_buffer", True)),
}


BOTH = (("", 32), ("8bit", 8))


def family(
    name: str,
    torch_cls: Any,
    states: tuple[tuple[str, bool], ...],
    options: Any,
    kinds: Any = BOTH,
    **others: Any,
) -> list[OptimizerCase]:
    """The classes of a rule: with 32-bit and with 8-bit state, or of other kinds."""
    return [
        OptimizerCase(
            getattr(torchao8, name + suffix),
            torch_cls,
            bits,
            name.lower(),
            states,
            options,
            **others,
        )
        for suffix, bits in kinds
    ]


# Those of Adam: tests whose subject is not the rule, but what all rules share, often run over these
# alone.
ADAMS = (
    OptimizerCase(
        torchao8.Adam, torch.optim.Adam, 32, "adam", ADAM_STATES, ADAM_OPTIONS, **AMSGRAD
    ),
    OptimizerCase(
        torchao8.AdamW, torch.optim.AdamW, 32, "adam", ADAM_STATES, ADAM_OPTIONS, **AMSGRAD
    ),
    OptimizerCase(
        torchao8.Adam8bit, torch.optim.Adam, 8, "adam", ADAM_STATES, ADAM_OPTIONS, **AMSGRAD
    ),
    OptimizerCase(
        torchao8.AdamW8bit, torch.optim.AdamW, 8, "adam", ADAM_STATES, ADAM_OPTIONS, **AMSGRAD
    ),
)
OPTIMIZERS = (
    *ADAMS,
    *family("Adagrad", torch.optim.Adagrad, (("sum", False),), ADAGRAD_OPTIONS),
    *family("AdEMAMix", None, ADEMAMIX_STATES, ADEMAMIX_OPTIONS),
    *family("LAMB", None, ADAM_STATES, LAMB_OPTIONS),
    *family(
        "LARS",
        None,
        (("momentum_buffer", True),),
        LARS_OPTIONS,
        base={"momentum": 0.9},
    ),
    *family("Lion", None, (("exp_avg", True),), LION_OPTIONS),
    *family(
        "Muon",
        torch.optim.Muon,
        (("momentum_buffer", True),),
        MUON_OPTIONS,
        is_new=True,
        matrices=True,
        own_options=OWN_MUON_OPTIONS,
    ),
    *family(
        "NAdam",
        torch.optim.NAdam,
        ADAM_STATES,
        NADAM_OPTIONS,
        scalars=("mu_product",),
        is_new=True,
    ),
    *family("RMSprop", torch.optim.RMSprop, (("square_avg", False),), RMSPROP_OPTIONS, **RMSPROP),
    *family(
        "SGD",
        torch.optim.SGD,
        (("momentum_buffer", True),),
        SGD_OPTIONS,
        base={"momentum": 0.9},
    ),
)

# Those whose step of an element depends on no other one of its parameter but by a norm.
OF_ELEMENTS = tuple(case for case in OPTIMIZERS if not case.matrices)
OF_8_BITS = tuple(case for case in OPTIMIZERS if case.optim_bits == 8)
# Not among the others: what they share with these, tests of formats run over them.
FOUR: dict[str, Any] = {"kinds": (("4bit", 4),)}
OF_4_BITS = (
    *(
        replace(case, cls=getattr(torchao8, f"{case.cls.__name__}4bit"), optim_bits=4)
        for case in ADAMS
        if case.optim_bits == 32
    ),
    *family("Lion", None, (("exp_avg", True),), LION_OPTIONS, **FOUR),
    *family(
        "SGD",
        torch.optim.SGD,
        (("momentum_buffer", True),),
        SGD_OPTIONS,
        base={"momentum": 0.9},
        **FOUR,
    ),
)

# Options that every optimizer refuses, with the type of the error.
BAD_OPTIONS: tuple[tuple[Options, type[Exception]], ...] = (
    ({"lr": -1e-3}, ValueError),
    ({"lr": float("nan")}, ValueError),
    ({"lr": "fast"}, ValueError),
    ({"lr": torch.tensor([1e-3, 1e-3])}, ValueError),
    ({"lr": torch.tensor(-1.0)}, ValueError),
    ({"optim_bits": 16}, ValueError),
    ({"optim_bits": 4, "state_format": "mulaw"}, ValueError),
    ({"optim_bits": 4, "block_wise": False}, ValueError),
    ({"min_8bit_size": -1}, ValueError),
    ({"min_8bit_size": 4096.0}, ValueError),
    ({"block_size": 32}, ValueError),
    ({"block_size": 100}, ValueError),
    ({"block_size": 4096}, ValueError),
    ({"block_size": 256.0}, ValueError),
    ({"block_wise": 0}, ValueError),
    ({"state_rounding": "up"}, ValueError),
    ({"maximize": 1}, ValueError),
    ({"stochastic_rounding": 1}, ValueError),
    ({"seed": 0.5}, ValueError),
    ({"seed": 2**63}, ValueError),
    ({"differentiable": True}, NotImplementedError),
    ({"percentile_clipping": 0}, ValueError),
    ({"percentile_clipping": 101}, ValueError),
    ({"percentile_clipping": 5.0}, ValueError),
    ({"is_paged": "yes"}, ValueError),
    ({"page_dir": "."}, ValueError),
    ({"is_paged": True, "page_dir": b"."}, ValueError),
    ({"is_paged": True, "page_dir": "no such folder"}, ValueError),
)

# And those that a rule has, with what the error says.
BAD_BETAS: tuple[tuple[Options, str], ...] = (
    ({"betas": (1.0, 0.999)}, "betas[0]: expected a number in [0, 1), got 1.0"),
    ({"betas": (0.9, -0.1)}, "betas[1]: expected a number in [0, 1), got -0.1"),
    ({"betas": (0.9, float("nan"))}, "betas[1]: expected a number in [0, 1), got nan"),
    ({"betas": 0.9}, "betas: expected two numbers, got 0.9"),
    ({"betas": (0.9, torch.tensor(1.0))}, "betas[1]: expected a number in [0, 1), got 1.0"),
)
BAD_COEFFICIENTS = "ns_coefficients: expected three Python numbers that float32 can hold, or"
BAD_NESTEROV = "nesterov: expected a momentum above 0 and a dampening of 0 with it, got"
BAD_OF_RULE: dict[str, tuple[tuple[Options, str], ...]] = {
    "adam": (
        *BAD_BETAS,
        ({"eps": -1e-8}, "eps: expected a finite number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
    ),
    "adagrad": (
        ({"lr_decay": -0.1}, "lr_decay: expected a finite number >= 0, got -0.1"),
        ({"eps": -1e-8}, "eps: expected a finite number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
        (
            {"initial_accumulator_value": -1.0},
            "initial_accumulator_value: expected a finite number >= 0, got -1.0",
        ),
        (
            {"initial_accumulator_value": float("inf")},
            "initial_accumulator_value: expected a finite number >= 0, got inf",
        ),
    ),
    "ademamix": (
        ({"betas": (0.9, 0.999)}, "betas: expected three numbers, got (0.9, 0.999)"),
        ({"betas": (0.9, 0.999, 1.0)}, "betas[2]: expected a number in [0, 1), got 1.0"),
        ({"alpha": -1.0}, "alpha: expected a finite number >= 0, got -1.0"),
        ({"t_alpha": 0.5}, "t_alpha: expected an int >= 0, got 0.5"),
        ({"t_beta3": -1}, "t_beta3: expected an int >= 0, got -1"),
        ({"eps": -1e-8}, "eps: expected a finite number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
    ),
    "lamb": (
        *BAD_BETAS,
        ({"eps": -1e-8}, "eps: expected a finite number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
        ({"adaptive": 1}, "adaptive: expected True or False, got 1"),
    ),
    "lars": (
        ({"momentum": -0.1}, "momentum: expected a finite number >= 0, got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
        ({"trust_coefficient": -0.1}, "trust_coefficient: expected a finite number >= 0, got -0.1"),
        ({"adaptive": 1}, "adaptive: expected True or False, got 1"),
        (
            {"nesterov": True, "dampening": 0.1},
            f"{BAD_NESTEROV} momentum=0.9, dampening=0.1",
        ),
    ),
    "lion": (
        *BAD_BETAS,
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
    ),
    "muon": (
        ({"momentum": 1.0}, "momentum: expected a number in [0, 1), got 1.0"),
        ({"momentum": -0.1}, "momentum: expected a number in [0, 1), got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
        ({"nesterov": 1}, "nesterov: expected True or False, got 1"),
        ({"eps": -1e-7}, "eps: expected a finite number >= 0, got -1e-07"),
        ({"eps": torch.tensor(1e-7)}, "eps: expected a Python number, got a tensor"),
        ({"ns_steps": 0}, "ns_steps: expected an int from 1 to 99, got 0"),
        ({"ns_steps": 100}, "ns_steps: expected an int from 1 to 99, got 100"),
        ({"ns_steps": 5.0}, "ns_steps: expected an int from 1 to 99, got 5.0"),
        (
            {"ns_coefficients": [(3.4, -4.8, 2.0)] * 8},
            "ns_steps: expected 8, as ns_coefficients has 8 triples, got 5",
        ),
        (
            {"ns_coefficients": [(3.4, -4.8, 2.0)]},
            "ns_steps: expected 1, as ns_coefficients has 1 triple, got 5",
        ),
        ({"ns_coefficients": (3.4, -4.8)}, BAD_COEFFICIENTS),
        ({"ns_coefficients": ((3.4, -4.8), (3.4, -4.8))}, BAD_COEFFICIENTS),
        ({"ns_coefficients": ()}, BAD_COEFFICIENTS),
        ({"ns_coefficients": (3.4, -4.8, float("nan"))}, BAD_COEFFICIENTS),
        ({"ns_coefficients": (3.4, -(10**400), 1)}, BAD_COEFFICIENTS),
        ({"eps": 1e300}, "eps: expected a number that float32 can hold, got 1e+300"),
        ({"ns_coefficients": (3.4, -4.8, torch.tensor(2.0))}, BAD_COEFFICIENTS),
        (
            {"adjust_lr_fn": "rms"},
            "adjust_lr_fn: expected 'original', 'match_rms_adamw' or None, got 'rms'",
        ),
        (
            {"higher_dims": True},
            "higher_dims: expected one of 'refuse', 'batch', 'flatten', got True",
        ),
        (
            {"optim_bits": 4},
            "optim_bits: expected 8 or 32, got 4: Muon has no state of 4 bits",
        ),
    ),
    "nadam": (
        *BAD_BETAS,
        ({"eps": -1e-8}, "eps: expected a finite number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
        ({"momentum_decay": -0.1}, "momentum_decay: expected a finite number >= 0, got -0.1"),
        ({"decoupled_weight_decay": 1}, "decoupled_weight_decay: expected True or False, got 1"),
    ),
    "rmsprop": (
        ({"alpha": 1.0}, "alpha: expected a number in [0, 1), got 1.0"),
        ({"alpha": -0.1}, "alpha: expected a number in [0, 1), got -0.1"),
        ({"eps": -1e-8}, "eps: expected a finite number >= 0, got -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
        ({"momentum": -0.1}, "momentum: expected a finite number >= 0, got -0.1"),
        ({"momentum": torch.tensor(0.9)}, "momentum: expected a finite number >= 0, got a tensor"),
        ({"centered": 1}, "centered: expected True or False, got 1"),
    ),
    "sgd": (
        ({"momentum": -0.1}, "momentum: expected a finite number >= 0, got -0.1"),
        ({"dampening": -0.1}, "dampening: expected a finite number >= 0, got -0.1"),
        ({"weight_decay": -0.1}, "weight_decay: expected a finite number >= 0, got -0.1"),
        ({"nesterov": 1}, "nesterov: expected True or False, got 1"),
        (
            {"nesterov": True, "momentum": 0.0},
            f"{BAD_NESTEROV} momentum=0.0, dampening=0",
        ),
        (
            {"nesterov": True, "dampening": 0.1},
            f"{BAD_NESTEROV} momentum=0.9, dampening=0.1",
        ),
    ),
}


# What a schedule gives the numbers of each rule, at one step after the other.
BETAS = [(0.9, 0.99), (0.8, 0.95), (0.85, 0.9), (0.0, 0.5)]
THREE_BETAS = [(*betas, 0.999 - 0.1 * i) for i, betas in enumerate(BETAS)]
DECAY = {"weight_decay": [0.1, 0.2, 0.05, 0.0]}
EPS = {"eps": [1e-8, 1e-3, 1e-2, 0.1]}
MOMENTUM = {"momentum": [0.9, 0.8, 0.5, 0.95]}
SCHEDULES: dict[str, dict[str, list[Any]]] = {
    "adam": {"betas": BETAS, **EPS, **DECAY},
    "adagrad": {"lr_decay": [0.0, 0.1, 0.3, 0.2], **EPS, **DECAY},
    "ademamix": {
        "betas": THREE_BETAS,
        "alpha": [5.0, 2.0, 3.0, 0.0],
        "t_alpha": [0, 4, 7, 9],
        "t_beta3": [9, 4, 7, 0],
        **EPS,
        **DECAY,
    },
    "lamb": {"betas": BETAS, **EPS, **DECAY},
    "lars": {
        **MOMENTUM,
        "dampening": [0.0, 0.3, 0.2, 0.1],
        "trust_coefficient": [0.01, 0.02, 0.05, 0.1],
        **DECAY,
    },
    "lion": {"betas": BETAS, **DECAY},
    "muon": {**MOMENTUM, **DECAY},
    "nadam": {"betas": BETAS, "momentum_decay": [0.004, 0.1, 0.5, 0.0], **EPS, **DECAY},
    "rmsprop": {"alpha": [0.99, 0.9, 0.5, 0.8], **MOMENTUM, **EPS, **DECAY},
    "sgd": {**MOMENTUM, "dampening": [0.0, 0.3, 0.2, 0.1], **DECAY},
}


def every_optimizer(cases: tuple[OptimizerCase, ...] = OPTIMIZERS) -> pytest.MarkDecorator:
    """Runs a test over the table, or a part of it, as its argument ``case``."""
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.cls.__name__)


def every_8bit() -> pytest.MarkDecorator:
    """The same over the classes with 8-bit state: for tests that say optim_bits themselves, where
    the others would be the same again, and for those that compile, where they nearly are."""
    return pytest.mark.parametrize("case", OF_8_BITS, ids=lambda case: case.cls.__name__)


# A rule of two states, one of three, and one that measures its update before it steps.
FEW = (torchao8.AdamW8bit, torchao8.AdEMAMix8bit, torchao8.LAMB8bit)


def few_8bit() -> pytest.MarkDecorator:
    """The same where rules differ little: over those that are built differently. The others are
    thorough."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                id=case.cls.__name__,
                marks=() if case.cls in FEW else pytest.mark.thorough,
            )
            for case in OF_8_BITS
        ],
    )


def every_adam() -> pytest.MarkDecorator:
    """The same over the classes of Adam."""
    return pytest.mark.parametrize("case", ADAMS, ids=lambda case: case.cls.__name__)


def one_adam() -> pytest.MarkDecorator:
    """The same where the rule does not matter: AdamW8bit, which steps both formats of state; the
    others are thorough."""
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(
                case,
                id=case.cls.__name__,
                marks=() if case.cls is torchao8.AdamW8bit else pytest.mark.thorough,
            )
            for case in ADAMS
        ],
    )


def every_option_set(
    of_torch: bool = False, cases: tuple[OptimizerCase, ...] = OPTIMIZERS
) -> pytest.MarkDecorator:
    """Runs a test over each set of options of each optimizer: ``case`` and ``options``.

    Args:
        of_torch: only where torch.optim has the class.
        cases: the optimizers.
    """

    def pairs() -> Iterator[Any]:
        for case in cases:
            if of_torch and case.torch_cls is None:
                continue
            for options in case.options + (() if of_torch else case.own_options):
                name = ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"
                yield pytest.param(case, options, id=f"{case.cls.__name__}-{name}")

    return pytest.mark.parametrize(("case", "options"), list(pairs()))


def every_bad_option() -> pytest.MarkDecorator:
    """Runs a test over what each optimizer must refuse: ``case``, ``options``, ``error`` and, of
    those of its rule, the ``message``."""

    def rows() -> Iterator[Any]:
        for case in OPTIMIZERS:
            of_all = [(options, error, "") for options, error in BAD_OPTIONS]
            of_rule = [(options, ValueError, text) for options, text in BAD_OF_RULE[case.rule]]
            for row in (*of_all, *of_rule):
                yield pytest.param(case, *row, id=f"{case.cls.__name__}-{row[0]}")

    return pytest.mark.parametrize(("case", "options", "error", "message"), list(rows()))
