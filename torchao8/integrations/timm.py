"""The optimizers of this library in timm's registry, under names as ``torchao8.AdamW8bit``.

>>> import torchao8.integrations.timm
>>> torchao8.integrations.timm.register()
>>> optimizer = timm.optim.create_optimizer_v2(model, "torchao8.AdamW8bit", lr=1e-3)
"""

from __future__ import annotations

import inspect
from typing import Any

from torchao8.optim import classes
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.contract import bare_name

try:
    from timm.optim import OptimInfo
    from timm.optim._optim_factory import default_registry
except ImportError as error:
    raise ImportError(
        "torchao8.integrations.timm needs timm, with a registry of optimizers: pip install -U timm"
    ) from error

__all__ = ["register"]


def register() -> list[str]:
    """Adds every optimizer class to timm's registry; a second call changes nothing.

    The name is that of the class, ``torchao8.AdamW8bit``; timm reads names without regard to case.
    Where timm sets an option of its optimizer of the same rule, as ``nesterov=True`` of ``sgd``,
    that holds here too.

    Returns:
        The names.
    """
    known = set(default_registry.list_optimizers())
    names = []
    for cls in vars(classes).values():
        if not (isinstance(cls, type) and issubclass(cls, LowPrecisionOptimizer)):
            continue
        name = f"torchao8.{cls.__name__}"
        names.append(name)
        if name.lower() not in known:
            default_registry.register(_info(name, cls, known))
    return names


def _info(name: str, cls: type[LowPrecisionOptimizer], known: set[str]) -> Any:
    """What timm wants to know of a class: which of its own arguments the class has."""
    options = inspect.signature(cls).parameters
    same_rule = bare_name(cls.__name__).lower()
    theirs = default_registry.get_optimizer_info(same_rule).defaults if same_rule in known else None
    betas = options["betas"].default if "betas" in options else ()
    return OptimInfo(
        name=name,
        opt_class=cls,
        description=f"torchao8, {options['optim_bits'].default}-bit state",
        has_eps="eps" in options,
        has_momentum="momentum" in options,
        has_betas=bool(betas),
        num_betas=len(betas),
        defaults={k: v for k, v in (theirs or {}).items() if k in options},
    )
