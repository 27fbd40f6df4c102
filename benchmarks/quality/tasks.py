"""What the studies train: a byte-level GPT, and a convolutional net on handwritten digits.

A task is its sizes; model and data follow from them and a seed, whatever the optimizer. `loss` is
that on the batch of a step, and `held_out` the mean loss on data that are never trained on, the
same for every seed. `guess` is the loss of equal probabilities for all outcomes: a run that ends
above it has diverged.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tutorials"))

from _gpt import GPT, VOCABULARY, GPTConfig, Text, cross_entropy

_text = functools.cache(Text.from_stdlib)


@dataclass(frozen=True)
class Gpt:
    """The tutorial's GPT, 160,096 parameters by default, on the source of Python's library."""

    layers: int = 1
    width: int = 96
    heads: int = 3
    context: int = 64
    batch: int = 4
    held_out_batches: int = 64
    guess: ClassVar[float] = math.log(VOCABULARY)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return GPT(GPTConfig(self.layers, self.width, self.heads, self.context))

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        return cross_entropy(model, *_text("cpu").batch(step, seed, self.batch, self.context))

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        count = self.held_out_batches
        batches = _text("cpu").held_out_batches(count, self.batch, self.context)
        return sum(cross_entropy(model, *batch).item() for batch in batches) / len(batches)


@functools.cache
def _digits() -> list[tuple[Tensor, Tensor]]:
    """The 1,797 images of scikit-learn, 8 by 8 pixels, and their labels: a quarter, the rest."""
    from sklearn.datasets import load_digits  # an extra, needed for this task alone

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [(images[some], labels[some]) for some in order.tensor_split([len(order) // 4])]


@dataclass(frozen=True)
class Digits:
    """A net of 71,754 parameters by default; a quarter of the digits is held out."""

    channels: int = 16
    hidden: int = 128
    batch: int = 64
    guess: ClassVar[float] = math.log(10)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        channels, hidden = self.channels, self.hidden
        convolutions = [
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(),
        ]  # fmt: skip
        head = [nn.Linear(2 * channels * 4 * 4, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
        return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *head)

    def batch_of(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and labels to train on."""
        images, labels = _digits()[1]
        chosen = torch.randint(len(labels), (self.batch,), generator=generator)
        return images[chosen], labels[chosen]

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        images, labels = self.batch_of(generator)
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        images, labels = _digits()[0]
        return F.cross_entropy(model(images), labels).item()


Task = Gpt | Digits
