"""The optimizers, drop-in for those of the same name in ``torch.optim`` and bitsandbytes."""

from typing import TYPE_CHECKING

from torchao8.optim.classes import *
from torchao8.optim.options import CommonOptions as CommonOptions

if not TYPE_CHECKING:  # see classes.py
    from torchao8.optim.classes import __all__ as _classes

    __all__ = sorted([*_classes, "CommonOptions"])
