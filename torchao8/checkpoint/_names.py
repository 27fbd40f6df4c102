"""Whose checkpoints these are: the optimizer, and the names of its parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchao8.optim._state.layout import init_states
from torchao8.optim._state.spec import has_state
from torchao8.optim.base import LowPrecisionOptimizer


def names_of(model: nn.Module, optimizer: LowPrecisionOptimizer) -> dict[Tensor, str]:
    """What ``torch.distributed.checkpoint`` calls each parameter: without the names of wrappers."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    params = [p for group in optimizer.param_groups for p in group["params"]]
    fresh = {p: optimizer.state.get(p) for p in params if not has_state(optimizer.state.get(p))}
    fresh = {p: None if others is None else dict(others) for p, others in fresh.items()}
    # Torch tells names of parameters with state only, and makes a step where there is none at all.
    init_states(optimizer)
    try:
        named: Any = get_optimizer_state_dict(model, optimizer)["param_groups"]
    finally:
        for p, others in fresh.items():
            if others is None:
                optimizer.state.pop(p, None)
            else:
                optimizer.state[p].clear()
                optimizer.state[p].update(others)
    return {
        p: name
        for group, live in zip(named, optimizer.param_groups, strict=True)
        for p, name in zip(live["params"], group["params"], strict=True)
    }


def check_own(function: str, optimizer: object) -> None:
    """Raises TypeError unless this is an optimizer of the library."""
    if isinstance(optimizer, LowPrecisionOptimizer):
        return
    got = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    remedy = (
        ". For torch.optim, load here first and give torchao8.checkpoint.to_torch(optimizer) to it"
        if isinstance(optimizer, torch.optim.Optimizer) and "load" in function
        else ""
    )
    raise TypeError(f"{function}: expected an optimizer of torchao8, got {got}{remedy}")
