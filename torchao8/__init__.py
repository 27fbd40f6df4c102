"""Optimizers for PyTorch that keep their state in 8 bits.

    >>> optimizer = torchao8.AdamW8bit(model.parameters(), lr=1e-3)

takes the place of ``torch.optim.AdamW``. ``python -m torchao8`` prints what a bug report needs.
"""

import sys as _sys

from torchao8._version import __version__

try:
    from torchao8 import checkpoint, nn, optim
    from torchao8.estimate import Estimate, estimate
    from torchao8.groups import param_groups
    from torchao8.ops import dequantize_blockwise, dynamic_map, quantize_blockwise
    from torchao8.optim import (
        LAMB,
        LARS,
        SGD,
        Adagrad,
        Adagrad8bit,
        Adam,
        Adam8bit,
        AdamW,
        AdamW8bit,
        AdEMAMix,
        AdEMAMix8bit,
        LAMB8bit,
        LARS8bit,
        Lion,
        Lion8bit,
        PagedAdagrad,
        PagedAdagrad8bit,
        PagedAdam,
        PagedAdam8bit,
        PagedAdamW,
        PagedAdamW8bit,
        PagedAdEMAMix,
        PagedAdEMAMix8bit,
        PagedLAMB,
        PagedLAMB8bit,
        PagedLARS,
        PagedLARS8bit,
        PagedLion,
        PagedLion8bit,
        PagedRMSprop,
        PagedRMSprop8bit,
        PagedSGD,
        PagedSGD8bit,
        RMSprop,
        RMSprop8bit,
        SGD8bit,
    )
except ImportError:
    # Python imports the package before it runs `python -m torchao8`, whose report is wanted most
    # when the extension does not load. While it looks for the module, argv[0] is "-m".
    if _sys.argv[:1] != ["-m"] or "torchao8" not in _sys.orig_argv:
        raise

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "Estimate",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdagrad",
    "PagedAdagrad8bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLAMB",
    "PagedLAMB8bit",
    "PagedLARS",
    "PagedLARS8bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedRMSprop",
    "PagedRMSprop8bit",
    "PagedSGD",
    "PagedSGD8bit",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
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
