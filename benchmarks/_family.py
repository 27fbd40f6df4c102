"""Every update rule with 8-bit state, and the forms in which torch has the rule.

For `step.py --family`. A rule is timed with all its forms in the same rounds; what counts is how
much faster 8-bit state is than the fastest of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import _rules
import torch
from _contender import STATE_8BIT, Contender, Needs
from torch import Tensor

# What a form is called, and what it is asked for by.
FORMS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

# (rule, form, device, dtype) that give wrong results and so are not timed. torch 2.13 leaves
# bfloat16 parameters, but for the last few elements, unchanged in the fused CPU step of SGD with
# momentum.
BROKEN = {("SGD", "fused", "cpu", "bfloat16")}


@dataclass(frozen=True)
class Rule:
    """A rule of the family, with the options that everybody gets.

    A weight decay of zero would let some skip work, and a learning rate that is too small would
    leave bfloat16 parameters as they are. `reference` is the class that stands in where torch.optim
    has none.
    """

    name: str
    options: dict[str, Any]
    forms: tuple[str, ...] = ("for-loop", "foreach", "fused")
    reference: type[torch.optim.Optimizer] | None = None

    @property
    def ours(self) -> str:
        """The name of the contender with 8-bit state."""
        return f"{self.name.lower()}-8bit"

    def rivals(self, device: str, dtype: str) -> list[str]:
        """The names of the contenders to be faster than."""
        forms = [form for form in self.forms if (self.name, form, device, dtype) not in BROKEN]
        return [f"{self.name.lower()}-{form}" for form in forms]

    def contenders(self) -> Iterator[Contender]:
        """All of them. They run when the rule is asked for, or when they are named."""
        rival = self.reference or getattr(torch.optim, self.name)
        where = "torch._foreach_*" if self.reference else "torch.optim"
        for form in self.forms:
            yield Contender(
                f"{self.name.lower()}-{form}",
                f"{where} {self.name}, {form}",
                "torch",
                partial(rival, **self.options, **FORMS[form]),
                lists=(),
                needs={device: Needs(20) for device in ("cpu", "cuda")},  # state and temporaries
            )
        yield Contender(
            self.ours,
            f"torchao8.{self.name}8bit",
            "torchao8",
            partial(_build_8bit, self.name, self.options),
            lists=(),
            needs=STATE_8BIT,
        )


def _build_8bit(name: str, options: dict[str, Any], params: list[Tensor]) -> torch.optim.Optimizer:
    import torchao8

    cls: type[torch.optim.Optimizer] = getattr(torchao8, f"{name}8bit")
    return cls(params, **options)


_DECAY = {"weight_decay": 1e-2}
_ADAM = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, **_DECAY}
_LOOPS = ("for-loop", "foreach")
_MIX = {**_ADAM, "betas": (0.9, 0.999, 0.9999), "alpha": 5.0}

# A rule more is a row more.
_RULES = [
    Rule("Adam", _ADAM),
    Rule("AdamW", _ADAM),
    Rule("AdEMAMix", _MIX, _LOOPS, _rules.AdEMAMix),
    Rule("Adagrad", {"lr": 1e-2, "eps": 1e-10, **_DECAY}),
    Rule("LAMB", {**_ADAM, "lr": 1e-2}, _LOOPS, _rules.LAMB),
    Rule("LARS", {"lr": 10.0, "momentum": 0.9, **_DECAY}, _LOOPS, _rules.LARS),
    Rule("Lion", {"lr": 1e-3, "betas": (0.9, 0.99), **_DECAY}, _LOOPS, _rules.Lion),
    Rule("RMSprop", {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8, **_DECAY}, _LOOPS),
    Rule("SGD", {"lr": 1.0, "momentum": 0.9, **_DECAY}),
]
RULES = {rule.name: rule for rule in _RULES}
