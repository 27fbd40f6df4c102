"""The optimizers, drop-in for those of the same name in ``torch.optim`` and bitsandbytes."""

from typing import TYPE_CHECKING

from torchao8._class_names import missing as _missing
from torchao8.optim.classes import *
from torchao8.optim.options import CommonOptions as CommonOptions

if not TYPE_CHECKING:  # see classes.py
    from torchao8.optim.classes import __all__ as _classes

    __all__ = sorted([*_classes, "CommonOptions"])

    def __getattr__(name: str) -> None:
        raise _missing(__name__, name, globals())
