"""Every optimizer of the library, with what the tests, which run over this table, must know."""

from collections.abc import Iterator
from dataclasses import dataclass
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
        torch_cls: the class of torch.optim whose place it takes.
        optim_bits: the default.
        decoupled: whether weight decay is decoupled.
        states: name of each state and whether it is signed, without any option.
        options: sets of options that a test of the update rule goes through.
    """

    cls: type[LowPrecisionOptimizer]
    torch_cls: type[torch.optim.Optimizer]
    optim_bits: int
    decoupled: bool
    states: tuple[tuple[str, bool], ...]
    options: tuple[Options, ...]

    def state_keys(self, bits: int, *extra: str) -> list[str]:
        """The keys of ``optimizer.state[p]``; ``extra`` are states that an option adds."""
        names = [name for name, _ in self.states] + list(extra)
        if bits == 32:
            return ["step", *names]
        return ["step", *(f"{n}_{part}" for n in names for part in ("codes", "scale"))]


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

ADAM_STATES = (("exp_avg", True), ("exp_avg_sq", False))

OPTIMIZERS = (
    OptimizerCase(torchao8.Adam, torch.optim.Adam, 32, False, ADAM_STATES, ADAM_OPTIONS),
    OptimizerCase(torchao8.AdamW, torch.optim.AdamW, 32, True, ADAM_STATES, ADAM_OPTIONS),
    OptimizerCase(torchao8.Adam8bit, torch.optim.Adam, 8, False, ADAM_STATES, ADAM_OPTIONS),
    OptimizerCase(torchao8.AdamW8bit, torch.optim.AdamW, 8, True, ADAM_STATES, ADAM_OPTIONS),
)

# Options that every optimizer refuses, with the type of the error.
BAD_OPTIONS: tuple[tuple[Options, type[Exception]], ...] = (
    ({"lr": -1e-3}, ValueError),
    ({"lr": float("nan")}, ValueError),
    ({"lr": "fast"}, ValueError),
    ({"lr": torch.tensor([1e-3, 1e-3])}, ValueError),
    ({"lr": torch.tensor(-1.0)}, ValueError),
    ({"optim_bits": 4}, ValueError),
    ({"min_8bit_size": -1}, ValueError),
    ({"min_8bit_size": 4096.0}, ValueError),
    ({"block_size": 32}, ValueError),
    ({"block_size": 100}, ValueError),
    ({"block_size": 4096}, ValueError),
    ({"block_size": 256.0}, ValueError),
    ({"state_rounding": "up"}, ValueError),
    ({"seed": 0.5}, ValueError),
    ({"seed": 2**63}, ValueError),
    ({"differentiable": True}, NotImplementedError),
)

# And those that only Adam has.
BAD_ADAM_OPTIONS: tuple[tuple[Options, type[Exception]], ...] = (
    ({"betas": (1.0, 0.999)}, ValueError),
    ({"betas": (0.9, -0.1)}, ValueError),
    ({"betas": (0.9, float("nan"))}, ValueError),
    ({"betas": 0.9}, ValueError),
    ({"betas": (torch.tensor(0.9), torch.tensor(0.999))}, ValueError),
    ({"eps": -1e-8}, ValueError),
    ({"weight_decay": -0.1}, ValueError),
)

# They stand in the signature of the 8-bit classes, as in bitsandbytes.
LATER_OPTIONS: tuple[Options, ...] = (
    {"percentile_clipping": 5},
    {"block_wise": False},
    {"is_paged": True},
)


def every_optimizer() -> pytest.MarkDecorator:
    """Runs a test over the table, as its argument ``case``."""
    return pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.cls.__name__)


def every_option_set() -> pytest.MarkDecorator:
    """Runs a test over each set of options of each optimizer: ``case`` and ``options``."""

    def pairs() -> Iterator[Any]:
        for case in OPTIMIZERS:
            for options in case.options:
                name = ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"
                yield pytest.param(case, options, id=f"{case.cls.__name__}-{name}")

    return pytest.mark.parametrize(("case", "options"), list(pairs()))
