"""Optimizers for PyTorch that keep their state in 8 bits.

    >>> optimizer = torchao8.AdamW8bit(model.parameters(), lr=1e-3)

takes the place of ``torch.optim.AdamW``. ``python -m torchao8`` prints what a bug report needs.
"""

import sys as _sys
from typing import TYPE_CHECKING

from torchao8._class_names import missing as _missing
from torchao8._version import __version__ as __version__

try:
    from torchao8 import checkpoint as checkpoint
    from torchao8 import nn as nn
    from torchao8 import optim as optim
    from torchao8.estimate import Estimate as Estimate
    from torchao8.estimate import estimate as estimate
    from torchao8.groups import param_groups as param_groups
    from torchao8.ops import dequantize_blockwise as dequantize_blockwise
    from torchao8.ops import dynamic_map as dynamic_map
    from torchao8.ops import quantize_blockwise as quantize_blockwise
    from torchao8.optim._state.memory import Memory as Memory
    from torchao8.optim.classes import *
except ImportError:
    # Python imports the package before it runs `python -m torchao8`, whose report is wanted most
    # when the extension does not load. While it looks for the module, argv[0] is "-m".
    if _sys.argv[:1] != ["-m"] or "torchao8" not in _sys.orig_argv:
        raise
else:
    if not TYPE_CHECKING:  # see optim/classes.py
        from torchao8.optim.classes import __all__ as _classes

        _others = [
            "Estimate",
            "Memory",
            "__version__",
            "checkpoint",
            "dequantize_blockwise",
            "dynamic_map",
            "estimate",
            "nn",
            "optim",
            "param_groups",
            "quantize_blockwise",
        ]
        __all__ = sorted([*_classes, *_others])


if not TYPE_CHECKING:  # a type checker would take any name for one of this module

    def __getattr__(name: str) -> None:
        raise _missing(__name__, name, globals())
