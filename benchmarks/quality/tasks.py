"""What the studies train: a byte-level GPT, and a convolutional net on handwritten digits.

A task has a model and its data. Both follow from a seed, whatever the optimizer: `model` makes a
new one, `loss` is that on the batch of a step, and `held_out` the mean loss on data that are never
trained on, the same for every seed. `guess` is the loss of equal probabilities for all outcomes: a
run that ends above it has diverged.
"""

from __future__ import annotations

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tutorials"))

from _gpt import GPT, VOCABULARY, GPTConfig, Text, cross_entropy


@dataclass(frozen=True)
class GptSize:
    """The tutorial's GPT: 160,096 parameters unless another size is given."""

    layers: int = 1
    width: int = 96
    heads: int = 3
    context: int = 64
    batch: int = 4
    held_out_batches: int = 64


class GptTask:
    """The next byte of the source of Python's standard library."""

    guess = math.log(VOCABULARY)

    def __init__(self, size: GptSize) -> None:
        self.size = size
        self.text = Text.from_stdlib("cpu")

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        size = self.size
        return GPT(GPTConfig(size.layers, size.width, size.heads, size.context))

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        batch = self.text.batch(step, seed, self.size.batch, self.size.context)
        return cross_entropy(model, *batch)

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        size = self.size
        batches = self.text.held_out_batches(size.held_out_batches, size.batch, size.context)
        return sum(cross_entropy(model, *batch).item() for batch in batches) / len(batches)


@dataclass(frozen=True)
class DigitsSize:
    """A net of 71,754 parameters unless another size is given."""

    channels: int = 16
    hidden: int = 128
    batch: int = 64


class DigitsTask:
    """The 1,797 handwritten digits of scikit-learn, 8 by 8 pixels; a quarter is held out."""

    guess = math.log(10)

    def __init__(self, size: DigitsSize) -> None:
        from sklearn.datasets import load_digits  # an extra, needed for this task alone

        self.size = size
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
        labels = torch.tensor(digits.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        held_out, train = order.tensor_split([len(order) // 4])
        self.train = images[train], labels[train]
        self.test = images[held_out], labels[held_out]

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        channels, hidden = self.size.channels, self.size.hidden
        convolutions = [
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(),
        ]  # fmt: skip
        head = [nn.Linear(2 * channels * 4 * 4, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
        return nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), *head)

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        images, labels = self.train
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = torch.randint(len(labels), (self.size.batch,), generator=generator)
        return F.cross_entropy(model(images[chosen]), labels[chosen])

    @torch.no_grad()
    def held_out(self, model: nn.Module) -> float:
        images, labels = self.test
        return F.cross_entropy(model(images), labels).item()


Size = GptSize | DigitsSize
Task = GptTask | DigitsTask


@functools.cache
def open_task(size: Size) -> Task:
    """The task of this size, with its data in memory."""
    return GptTask(size) if isinstance(size, GptSize) else DigitsTask(size)
