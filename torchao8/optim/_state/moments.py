"""The moments of a parameter as float32 numbers, whatever format they are kept in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao8._messages import describe
from torchao8._modes import normal_tensors
from torchao8.block_layout import Scales
from torchao8.optim._state.convert import in_32bit
from torchao8.optim._state.formats import FLOAT32, format_in
from torchao8.optim._state.spec import State, has_state
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import Group


def decoded(
    p: Tensor, states: Sequence[State], kept: Mapping[str, Any], scales: Scales
) -> dict[str, Tensor]:
    """New float32 tensors by the names of the states, sharded as the parameter is.

    Args:
        states: those to read, all of which are there.
        kept: the state of the parameter, in any format.
        scales: of quantized state.
    """
    wide = in_32bit(p, states, dict(kept), scales)
    is_decoded = format_in(states, kept) is not FLOAT32
    is_new = {s.name: is_decoded and not s.is_scalar for s in states}
    return {
        name: wide[name] if new else wide[name].detach().clone() for name, new in is_new.items()
    }


@torch.no_grad()
@normal_tensors()
def moments_of(optimizer: OptimizerContract, p: Tensor) -> dict[str, Tensor]:
    """What :meth:`LowPrecisionOptimizer.moments` returns, and raises."""
    group, kept = _group_of(optimizer, p), optimizer.state.get(p, {})
    if not has_state(kept):
        why = (
            "it gets its state at the first step"
            if p.requires_grad
            else "it does not require a gradient, so that no step gives it one"
        )
        raise RuntimeError(
            f"moments: expected a parameter with state, got {describe(optimizer, p)}: {why}"
        )
    every = optimizer._states_in(group, kept)
    found = format_in(every, kept)
    states = [s for s in every if not s.is_scalar and found.keys(s)[0] in kept]
    return decoded(p, states, kept, Scales.of(group))


def _group_of(optimizer: OptimizerContract, p: Tensor) -> Group:
    if not isinstance(p, Tensor):
        raise TypeError(f"moments: expected a parameter, got {type(p).__name__}")
    for group in optimizer.param_groups:
        if any(q is p for q in group["params"]):
            return group
    raise ValueError(
        f"moments: expected a parameter of the optimizer, got a tensor of shape {list(p.shape)} "
        "that is in none of its groups. Sharding a model replaces its parameters: take them from "
        "optimizer.param_groups, or from the model after that"
    )
