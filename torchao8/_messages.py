"""What messages say of an optimizer's parameters, and at whose line warnings point."""

import sys
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def name_in(group: dict[str, Any], i: int) -> str | None:
    """The name of a parameter in its group; None if it has none.

    Names may be fewer than parameters: some programs append to ``group["params"]`` themselves.
    """
    names = group.get("param_names", ())
    return names[i] if i < len(names) else None


def describe(optimizer: Optimizer, p: Tensor) -> str:
    """``parameter 3 (layer.weight)``: its number in the state dict, and its name if it has one."""
    number = 0
    for group in optimizer.param_groups:
        for i, q in enumerate(group["params"]):
            if q is p:
                name = name_in(group, i)
                return f"parameter {number}" if name is None else f"parameter {number} ({name})"
            number += 1
    raise ValueError("the parameter is not in the optimizer")


def with_shape(optimizer: Optimizer, p: Tensor) -> str:
    """The same, with the shape of one that has no name: ``parameter 3 (of shape [40, 70])``."""
    label = describe(optimizer, p)
    return label if label.endswith(")") else f"{label} (of shape {list(p.shape)})"


def meta_message(optimizer: Optimizer, p: Tensor) -> str:
    """Why a step is refused, as torch.optim refuses it with fused=True."""
    return (
        f"{type(optimizer).__name__}: {describe(optimizer, p)}, of shape {list(p.shape)}, is on "
        "the device meta: expected a parameter with values. Materialize the model before the "
        "first step (model.to_empty(device=...), then load or initialize its weights)"
    )


def warn_caller(message: str) -> None:
    """Warns, pointing at the line outside of torch and torchao8 that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


# The modules whose frames are skipped. The standard library's contextlib is one of them: functions
# decorated with a context manager run inside its wrapper.
_LIBRARIES = ("torch.", "torchao8.", "contextlib")


def kind(t: Tensor) -> str:
    """The dtype of a tensor, and its layout if that is not the dense one."""
    return f"{t.dtype}" if t.layout is torch.strided else f"{t.dtype} in layout {t.layout}"
