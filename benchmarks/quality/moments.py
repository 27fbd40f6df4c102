"""Moments other than the library's: emulated codecs, and exact ones to tell the error of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import torchao8
from benchmarks.codec_error import absmax_codec, linear_map
from torchao8.state_bits import why_32bit

MAPS = {"linear": linear_map, "dynamic": torchao8.dynamic_map}
SCOPES = {"tensor": None, "blocks": 256}
MIN_8BIT_SIZE = 4096  # as the library's default
PERCENTILES = (0.01, 0.5, 0.99)


class EmulatedAdamW8bit(torch.optim.AdamW):
    """`torch.optim.AdamW` whose moments are quantized and dequantized after every step.

    They are rounded to nearest, a second moment also to zero, with the largest magnitude as the
    scale: as the 8-bit paper has it, without what the library does beyond that. Groups with
    optim_bits=32 and small tensors are left as they are. Memory and time are not those of 8 bits.

    Args:
        params: parameters or groups.
        map_name: "linear" or "dynamic".
        scope: what shares a scale, a "tensor" or "blocks" of 256 elements.
        options: of ``torch.optim.AdamW``.
    """

    def __init__(self, params: Iterable[Any], map_name: str, scope: str, **options: Any) -> None:
        super().__init__(params, **options)
        self._codec = absmax_codec(MAPS[map_name], SCOPES[scope])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss: float | None = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.numel() >= MIN_8BIT_SIZE and group.get("optim_bits", 8) == 8:
                    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                        moment = self.state[p][name]
                        moment.copy_(self._codec(moment, signed))
        return loss


class UpdateError:
    """The error of the steps of an `AdamW8bit`, against moments of `torch.optim.AdamW`.

    Both see the same gradients, those of the 8-bit run, so that the error is of the moments alone
    and not of two trainings that went apart. The update is taken from what the step did to the
    parameters: u = (p * (1 - lr * weight_decay) - p') / lr. Only parameters with 8-bit state count.
    """

    def __init__(self, optimizer: torchao8.AdamW8bit, every: int) -> None:
        self._optimizer, self._every, self._step = optimizer, every, 0
        (self._group,) = optimizer.param_groups
        layout = self._group["block_size"], self._group["min_8bit_size"]
        self._params: list[Tensor] = [
            p for p in self._group["params"] if why_32bit(tuple(p.shape), (), (), *layout) is None
        ]
        # They are zero before each step, and minus the exact update after it.
        self._exact = [torch.nn.Parameter(torch.zeros_like(p)) for p in self._params]
        options = {name: self._group[name] for name in ("betas", "eps")}
        self._adam = torch.optim.AdamW(self._exact, lr=1.0, weight_decay=0.0, **options)
        self._old: list[Tensor] | None = None
        self.errors: list[tuple[int, float]] = []  # (step, relative L2 error)

    @torch.no_grad()
    def before_step(self) -> None:
        """Takes in the gradients."""
        self._step += 1
        for p, exact in zip(self._params, self._exact, strict=True):
            exact.zero_()
            exact.grad = p.grad
        self._adam.step()
        due = self._step % self._every == 0
        self._old = [p.double() for p in self._params] if due else None

    @torch.no_grad()
    def after_step(self) -> None:
        """Compares, where it is due."""
        if self._old is None:
            return
        lr, decay = self._group["lr"], self._group["weight_decay"]
        difference = total = 0.0
        for p, old, exact in zip(self._params, self._old, self._exact, strict=True):
            update = (old * (1 - lr * decay) - p) / lr
            difference += (update + exact).square().sum().item()
            total += exact.square().sum().item()
        self.errors.append((self._step, (difference / total) ** 0.5))

    @torch.no_grad()
    def stored_over_exact(self) -> list[float]:
        """Percentiles (1, 50, 99) of stored second moments over exact ones, of those above 0."""
        ratios = []
        for p, exact in zip(self._params, self._exact, strict=True):
            v = self._adam.state[exact]["exp_avg_sq"]
            ratios.append((self._optimizer.moments(p)["exp_avg_sq"] / v)[v > 0])
        ordered = torch.cat(ratios).sort().values
        return [ordered[round(q * (len(ordered) - 1))].item() for q in PERCENTILES]
