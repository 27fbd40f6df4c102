"""What torch.optim has in place of MuonAdamW: two optimizers, which step one after the other."""

from __future__ import annotations

from typing import Any

import torch


class MuonAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` on the groups with ``use_muon`` True, ``torch.optim.AdamW`` on others.

    Learning rate and weight decay are those of both, as in ``torchao8.MuonAdamW``.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
        betas: tuple[float, float],
    ) -> None:
        super().__init__([dict(group) for group in groups], {})  # it changes them
        shared = {"lr": lr, "weight_decay": weight_decay}
        hidden, others = ([g for g in groups if g["use_muon"] is on] for on in (True, False))
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(hidden, **shared, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, **shared, betas=betas, fused=True),
        ]
        self.param_groups = [group for part in self._parts for group in part.param_groups]
        for part in self._parts:
            part.state = self.state

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()
