"""The container of optimizers of torchtitan, which also makes those of this library.

>>> from torchtitan.components.optimizer import ParamGroupConfig
>>> from torchao8.integrations.torchtitan import OptimizersContainer
>>> optimizer = OptimizersContainer.Config(
...     param_groups=[
...         ParamGroupConfig(
...             pattern=".*",
...             optimizer_name="torchao8.AdamW8bit",
...             optimizer_kwargs={"lr": 8e-4, "betas": (0.9, 0.95), "weight_decay": 0.1},
...         )
...     ]
... )
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch.optim import Optimizer

from torchao8.optim import classes
from torchao8.optim.base import LowPrecisionOptimizer

try:
    from torchtitan.components import optimizer as titan
except ImportError as error:
    raise ImportError(
        "torchao8.integrations.torchtitan needs torchtitan 0.3 or newer: pip install torchtitan"
    ) from error

__all__ = ["OptimizersContainer", "adamw8bit"]

_PREFIX = "torchao8."


class OptimizersContainer(titan.OptimizersContainer):
    """torchtitan's, with one more kind of ``optimizer_name``: ``"torchao8."`` and a class of ours.

    Names without ``torchao8.`` mean what they mean in torchtitan. A group's ``optimizer_kwargs``
    may have every option of the class.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):
        """As torchtitan's; ``implementation`` has no effect on optimizers of this library."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if not name.startswith(_PREFIX):
            theirs = titan.OptimizersContainer._resolve_optimizer_factory(name)
            return cast(Callable[..., Optimizer], theirs)
        cls = getattr(classes, name[len(_PREFIX) :], None)
        if not (isinstance(cls, type) and issubclass(cls, LowPrecisionOptimizer)):
            raise ValueError(
                f"optimizer_name: expected 'torchao8.' and the name of a class of torchao8, as "
                f"'torchao8.AdamW8bit', got {name!r}"
            )
        return cast(Callable[..., Optimizer], cls)


def adamw8bit(lr: float = 8e-4, **options: Any) -> Any:
    """The config of one group of all parameters: torchtitan's ``default_adamw``, in 8 bits.

    Its numbers are those of ``default_adamw``: betas 0.9 and 0.95, eps 1e-8, weight decay 0.1.

    Args:
        lr: learning rate.
        options: further options of :class:`torchao8.AdamW8bit`.
    """
    config = titan.default_adamw(lr, **options)
    groups = config.param_groups
    for group in groups:
        group.optimizer_name = f"{_PREFIX}AdamW8bit"
    return OptimizersContainer.Config(param_groups=groups)
