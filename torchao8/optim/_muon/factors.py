"""Which matrices have a gradient that no step can take.

A product of matrices spreads one NaN over all of a matrix. So a matrix with a gradient element that
is NaN or infinite keeps all of its elements and its momentum at that step: the factor of its
gradient is NaN, by which the step op finds none of its elements to be finite.

Gradients are looked at as they are, before they are divided by grad_scale. One that only that makes
infinite is not found here: the step op leaves out its elements, and the others move the matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchao8 import ops


def matrix_factors(grads: list[Tensor]) -> Tensor:
    """For each gradient 1, or NaN where one of its elements is NaN or infinite.

    An op, so that a compiler keeps it whole; nothing waits for the device.

    Args:
        grads: float32, bfloat16 or float16, of any shapes and strides, on one device; at least one.

    Returns:
        Of shape (n,), float64 where the device has that.
    """
    device = grads[0].device
    factors = torch.ones(len(grads), dtype=ops.number_dtype(device), device=device)
    filled = [i for i, grad in enumerate(grads) if grad.numel() > 0]
    if not filled:
        return factors
    if device.type == "cpu":  # where it takes a twentieth of the time
        # An infinite element is one of the two, and with a NaN both are NaN.
        pairs = [torch.stack(torch.aminmax(grads[i])) for i in filled]
        extremes = torch.stack([pair.to(factors.dtype) for pair in pairs])
        # Multiplied by 0 before they are added: their sum may be infinite.
        found = (extremes * 0).sum(1)
    else:
        norms = torch._foreach_norm([grads[i] for i in filled], math.inf)
        found = torch.stack([norm.to(factors.dtype) for norm in norms]) * 0
    if len(filled) == len(grads):
        return factors + found
    # A list of indices would be copied to the device.
    parts = dict(zip(filled, found.unbind(), strict=True))
    return torch.stack([f + parts[i] if i in parts else f for i, f in enumerate(factors.unbind())])


torch.library.impl("torchao8::matrix_factors", "CompositeExplicitAutograd", matrix_factors)
OP = torch.ops.torchao8.matrix_factors.default


@torch.library.register_fake("torchao8::matrix_factors")
def _(grads: list[Tensor]) -> Tensor:
    device = grads[0].device
    return torch.empty(len(grads), dtype=ops.number_dtype(device), device=device)
