"""Clipping a gradient by a percentile of the norms that its parameter's gradients have had.

As the optimizers of bitsandbytes up to 0.45 did it: a parameter keeps the norms of its last 100
gradients, and one that is larger than the p-th of them, in ascending order and counted from 0, is
scaled down to that. Norms of 0 before any other are left out: they come of state that torch makes
for a checkpoint, or of a factor whose partner starts at 0, and would bound what follows by 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchao8.optim._state.spec import NORMS_KEPT

_LARGEST = torch.finfo(torch.float32).max


def clip_factors_(
    histories: list[Tensor],
    norms: Tensor,
    steps: list[Tensor],
    found_inf: Tensor | None,
    percentile: int,
) -> Tensor:
    """Takes the norms of this step into the histories, and tells what clips the gradients.

    An op, so that no compiler rounds otherwise; nothing waits for the device.

    Args:
        histories: float32 of shape (100,), one for each parameter; changed.
        norms: of shape (n,), float64 where the device has that.
        steps: 0-d float32, the steps that a parameter has made before this one.
        found_inf: where it is not 0, the histories stay as they are.

    Returns:
        Of the shape and dtype of the norms, from 0 to 1.
    """
    before = torch.stack(histories)
    # No norm is infinite, but float32 ends earlier than float64.
    current = norms.clamp(max=_LARGEST).to(torch.float32).unsqueeze(1)
    slot = (torch.stack(steps) + 1).remainder(NORMS_KEPT).unsqueeze(1)
    is_empty = before < 0
    is_new = is_empty | (torch.arange(NORMS_KEPT, dtype=torch.int64, device=slot.device) == slot)
    after = torch.where(is_new & ~(is_empty & (current == 0)), current, before)
    limit = after.sort(dim=1).values[:, percentile : percentile + 1].clamp_min(0)
    factors = torch.where(current > limit, limit.to(norms.dtype) / current.to(norms.dtype), 1.0)
    if found_inf is not None:
        after = torch.where(found_inf != 0, before, after)
    torch._foreach_copy_(histories, after.unbind())
    return factors.squeeze(1)


torch.library.impl("torchao8::clip_factors_", "CompositeExplicitAutograd", clip_factors_)
OP = torch.ops.torchao8.clip_factors_.default


@torch.library.register_fake("torchao8::clip_factors_")
def _(
    histories: list[Tensor],
    norms: Tensor,
    steps: list[Tensor],
    found_inf: Tensor | None,
    percentile: int,
) -> Tensor:
    return torch.empty_like(norms)
