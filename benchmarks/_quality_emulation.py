"""AdamW as it would be with other 8-bit codecs than the library's, emulated in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from codec_error import absmax_codec, linear_map

import torchao8

MAPS = {"linear": linear_map, "dynamic": torchao8.dynamic_map}
SCOPES = {"tensor": None, "blocks": 256}
MIN_8BIT_SIZE = 4096  # as the library's default


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
