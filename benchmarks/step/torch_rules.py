"""What torch.optim lacks, as it would have it, to be compared with: Lion, AdEMAMix, LARS, LAMB.

Each in two forms, as torch's own: with `foreach`, every operation goes over all tensors before the
next one; without, all operations go over one tensor before the next, which stays in the cache if it
is small. Operations are in place and merged where there is one of torch for two. State has the
dtype of its parameter, as torch's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

Tensors = list[Tensor]


class _Reference(torch.optim.Optimizer):
    """Makes the state and goes over the tensors; a subclass is an update rule."""

    names: tuple[str, ...]  # of the options, all of which must be given
    _state_names: tuple[str, ...]

    def __init__(self, params: Iterable[Tensor], foreach: bool, **options: Any) -> None:
        if options.keys() != {*self.names}:
            raise TypeError(f"{type(self).__name__}: expected {self.names}, got {list(options)}")
        super().__init__(params, {"foreach": foreach, **options})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = {name: torch.zeros_like(p) for name in self._state_names}
            for some in [params] if group["foreach"] else [[p] for p in params]:
                grads = [p.grad for p in some]
                states = [[self.state[p][name] for p in some] for name in self._state_names]
                self._update(some, grads, *states, group)
        return loss

    def _update(self, params: Tensors, grads: Tensors, *states_and_group: Any) -> None:
        raise NotImplementedError


class Lion(_Reference):
    """Algorithm 2 of "Symbolic Discovery of Optimization Algorithms" (Chen et al., 2023)."""

    _state_names = ("exp_avg",)
    names = ("lr", "betas", "weight_decay")

    def _update(  # type: ignore[override]
        self, params: Tensors, grads: Tensors, averages: Tensors, group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        update = torch._foreach_lerp(averages, grads, 1 - beta1)
        torch._foreach_sign_(update)
        torch._foreach_add_(params, update, alpha=-group["lr"])
        torch._foreach_lerp_(averages, grads, 1 - beta2)


class AdEMAMix(_Reference):
    """Algorithm 1 of "The AdEMAMix Optimizer" (Pagliardini et al., 2024), without warm-ups."""

    _state_names = ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")
    names = ("lr", "betas", "alpha", "eps", "weight_decay")

    def _update(  # type: ignore[override]
        self,
        params: Tensors,
        grads: Tensors,
        fast: Tensors,
        slow: Tensors,
        squares: Tensors,
        group: dict[str, Any],
    ) -> None:
        lr, (beta1, beta2, beta3), step = group["lr"], group["betas"], group["step"]
        correction1, correction2 = 1 - beta1**step, 1 - beta2**step
        torch._foreach_lerp_(fast, grads, 1 - beta1)
        torch._foreach_lerp_(slow, grads, 1 - beta3)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(squares)
        torch._foreach_div_(root, correction2**0.5)
        torch._foreach_add_(root, group["eps"])
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


class LARS(_Reference):
    """Algorithm 1 of "Large Batch Training of Convolutional Networks" (You et al., 2017)."""

    _state_names = ("momentum_buffer",)
    names = ("lr", "momentum", "weight_decay", "trust_coefficient")

    def _update(  # type: ignore[override]
        self, params: Tensors, grads: Tensors, buffers: Tensors, group: dict[str, Any]
    ) -> None:
        decay, norms = group["weight_decay"], torch._foreach_norm(params)
        below = torch._foreach_add(torch._foreach_norm(grads), norms, alpha=decay)
        rates = _trust_ratios(list(norms), list(below), group["trust_coefficient"])
        torch._foreach_mul_(rates, group["lr"])
        update = torch._foreach_add(grads, params, alpha=decay)
        torch._foreach_mul_(update, rates)
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, update)
        torch._foreach_sub_(params, buffers)


class LAMB(_Reference):
    """Algorithm 2 of "Large Batch Optimization for Deep Learning" (You et al., 2019)."""

    _state_names = ("exp_avg", "exp_avg_sq")
    names = ("lr", "betas", "eps", "weight_decay")

    def _update(  # type: ignore[override]
        self,
        params: Tensors,
        grads: Tensors,
        averages: Tensors,
        squares: Tensors,
        group: dict[str, Any],
    ) -> None:
        (beta1, beta2), step = group["betas"], group["step"]
        torch._foreach_lerp_(averages, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
        root = torch._foreach_sqrt(squares)
        torch._foreach_div_(root, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(root, group["eps"])
        torch._foreach_mul_(root, 1 - beta1**step)
        update = torch._foreach_div(averages, root)
        torch._foreach_add_(update, params, alpha=group["weight_decay"])
        norms = list(torch._foreach_norm(params)), list(torch._foreach_norm(update))
        rates = _trust_ratios(*norms)
        torch._foreach_mul_(rates, group["lr"])
        torch._foreach_mul_(update, rates)
        torch._foreach_sub_(params, update)
