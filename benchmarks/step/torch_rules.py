"""What torch.optim lacks, as it would have it, to be compared with: AdEMAMix, LAMB, LARS, Lion.

Each in two forms, as torch's own: with `foreach`, every operation goes over all tensors before the
next one; without, all operations go over one tensor before the next, which stays in the cache if it
is small. Operations are in place and merged where there is one of torch for two. State has the
dtype of its parameter, as torch's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]
Group = dict[str, Any]


class _Reference(torch.optim.Optimizer):
    """Makes the state and goes over the tensors; a subclass has an update rule, `update`."""

    names: tuple[str, ...]  # of the options, all of which must be given
    states: tuple[str, ...]

    def __init__(self, params: Iterable[Tensor], foreach: bool, **options: Any) -> None:
        super().__init__(params, {"foreach": foreach, **options})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {name: torch.zeros_like(p) for name in self.states}
            for some in [params] if group["foreach"] else [[p] for p in params]:
                states = [[self.state[p][name] for p in some] for name in self.states]
                self.update(group, some, [p.grad for p in some], *states)


def _decayed_square(squares: Tensors, grads: Tensors, beta: float) -> None:
    torch._foreach_mul_(squares, beta)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta)


def _root(squares: Tensors, correction: float, eps: float) -> Tensors:
    root = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(root, correction**0.5)
    torch._foreach_add_(root, eps)
    return root


class AdEMAMix(_Reference):
    """Algorithm 1 of "The AdEMAMix Optimizer" (Pagliardini et al., 2024), without warm-ups."""

    names = ("lr", "betas", "alpha", "eps", "weight_decay")
    states = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")

    def update(self, group: Group, params: Tensors, grads: Tensors, *states: Tensors) -> None:
        fast, slow, squares = states
        lr, (beta1, beta2, beta3), step = group["lr"], group["betas"], group["step"]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        torch._foreach_lerp_(fast, grads, 1 - beta1)
        torch._foreach_lerp_(slow, grads, 1 - beta3)
        _decayed_square(squares, grads, beta2)
        root = _root(squares, correction2, group["eps"])
        # (fast / correction1 + alpha * slow) * lr, with lr / correction1 taken out.
        update = torch._foreach_add(fast, slow, alpha=group["alpha"] * correction1)
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_addcdiv_(params, update, root, -lr / correction1)


def _trust_ratios(norms: Tensors, below: Tensors, coefficient: float = 1.0) -> Tensors:
    """coefficient * norm / below for each tensor, 1 where either is 0; nothing is waited for."""
    return [
        torch.where((norm > 0) & (other > 0), coefficient * norm / other, 1.0)
        for norm, other in zip(norms, below, strict=True)
    ]


class LAMB(_Reference):
    """Algorithm 2 of "Large Batch Optimization for Deep Learning" (You et al., 2019)."""

    names = ("lr", "betas", "eps", "weight_decay")
    states = ("exp_avg", "exp_avg_sq")

    def update(self, group: Group, params: Tensors, grads: Tensors, *states: Tensors) -> None:
        averages, squares = states
        (beta1, beta2), step = group["betas"], group["step"]
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        _decayed_square(squares, grads, beta2)
        root = _root(squares, 1 - beta2**step, group["eps"])
        torch._foreach_mul_(root, 1 - beta1**step)
        update = torch._foreach_div(averages, root)
        torch._foreach_add_(update, params, alpha=group["weight_decay"])
        norms = list(torch._foreach_norm(params)), list(torch._foreach_norm(update))
        rates = _trust_ratios(*norms)
        torch._foreach_mul_(rates, group["lr"])
        torch._foreach_mul_(update, rates)
        torch._foreach_sub_(params, update)


class LARS(_Reference):
    """Algorithm 1 of "Large Batch Training of Convolutional Networks" (You et al., 2017)."""

    names = ("lr", "momentum", "weight_decay", "trust_coefficient")
    states = ("momentum_buffer",)

    def update(self, group: Group, params: Tensors, grads: Tensors, buffers: Tensors) -> None:
        decay, norms = group["weight_decay"], torch._foreach_norm(params)
        below = torch._foreach_add(torch._foreach_norm(grads), norms, alpha=decay)
        rates = _trust_ratios(list(norms), list(below), group["trust_coefficient"])
        torch._foreach_mul_(rates, group["lr"])
        update = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_mul_(update, rates)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, update)
        torch._foreach_sub_(params, buffers)


class Lion(_Reference):
    """Algorithm 2 of "Symbolic Discovery of Optimization Algorithms" (Chen et al., 2023)."""

    names = ("lr", "betas", "weight_decay")
    states = ("exp_avg",)

    def update(self, group: Group, params: Tensors, grads: Tensors, averages: Tensors) -> None:
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        update = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(update)
        torch._foreach_add_(params, update, alpha=-group["lr"])
        torch._foreach_lerp_(averages, grads, 1 - beta2)
