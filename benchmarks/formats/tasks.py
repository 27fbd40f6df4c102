"""Where the gradients come from: two trainings with 32-bit state, and blocks of unequal elements.

A task gives, step by step, float32 matrices whose rows are rows of blocks: a sample of the rows of
those parameters that would have 8-bit state.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality import runs as quality
from benchmarks.quality.tasks import Digits, Gpt
from torchao8.block_layout import row_length
from torchao8.state_bits import why_32bit

BETAS = (0.9, 0.95)  # of the training; the shadows have their own
LAYOUT = 256, 4096  # block_size and min_8bit_size, the library's defaults


class Gradients(NamedTuple):
    """Those of a step, and its loss; NaN where there is none."""

    rows: list[Tensor]
    loss: float


@dataclass(frozen=True)
class NoisyDigits(Digits):
    """Digits under fresh noise at each step: else they are learned by heart, and gradients end."""

    noise: float = 0.5

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images, labels = self.batch_of(generator)
        noise = torch.randn(images.shape, generator=generator)
        return F.cross_entropy(model(images + self.noise * noise), labels)


@dataclass(frozen=True)
class Training:
    """AdamW with 32-bit state, decoupled decay, clipped gradients, as in `benchmarks.quality`."""

    model: Gpt | NoisyDigits
    lr: float
    every: int  # of so many rows one is shown to the shadows

    def gradients(self, steps: int, seed: int) -> Iterator[Gradients]:
        model = self.model.model(seed)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.lr, betas=BETAS, weight_decay=0.1, fused=True
        )
        shown = [
            p for p in model.parameters() if why_32bit(tuple(p.shape), (), (), *LAYOUT) is None
        ]
        for step in range(steps):
            quality.set_lr(optimizer, quality.learning_rate(step, steps, self.lr))
            loss = self.model.loss(model, step, seed)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), quality.CLIP_NORM)
            yield Gradients([self._rows(p) for p in shown], loss.item())
            optimizer.step()
            optimizer.zero_grad()

    def _rows(self, p: Tensor) -> Tensor:
        assert p.grad is not None
        rows = p.grad.reshape(-1, row_length(tuple(p.shape), LAYOUT[0]))
        return rows[:: self.every].contiguous()


@dataclass(frozen=True)
class Unequal:
    """Noise, in blocks whose elements have gradients of unequal size.

    The sizes of a block's elements are evenly distributed between 1 and `ratio`, in their
    logarithms, and in no order.
    """

    ratio: float
    blocks: ClassVar[int] = 64
    largest: ClassVar[float] = 1e-3

    def gradients(self, steps: int, seed: int) -> Iterator[Gradients]:
        generator = torch.Generator().manual_seed(seed)
        shape = self.blocks, LAYOUT[0]
        sizes = self.largest * self.ratio ** -torch.rand(shape, generator=generator)
        for _ in range(steps):
            yield Gradients([sizes * torch.randn(shape, generator=generator)], math.nan)


Task = Training | Unequal

TASKS: dict[str, Task] = {
    # The model of tutorials/train_gpt.py --full, 2.5 million parameters; it trains on 8 sequences.
    "gpt": Training(Gpt(layers=3, width=256, heads=4, context=128, batch=2), 1e-3, every=8),
    "conv": Training(NoisyDigits(channels=64, hidden=256, batch=32), 1e-3, every=2),
    **{f"unequal {ratio:g}": Unequal(ratio) for ratio in (1e2, 1e4, 1e6)},
}
QUICK: dict[str, Task] = {
    "gpt": Training(Gpt(layers=1, width=64, heads=2, context=32, batch=2), 1e-3, every=2),
    "conv": Training(NoisyDigits(channels=16, hidden=32, batch=8), 1e-3, every=1),
    "unequal 100": Unequal(1e2),
}
