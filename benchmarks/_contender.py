"""What a contender of `step.py` is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from _lists import LISTS
from torch import Tensor

ALL_LISTS = tuple(dict.fromkeys(name for names in LISTS.values() for name in names))

Build = Callable[[list[Tensor]], torch.optim.Optimizer]


class Needs(NamedTuple):
    """A guess of the bytes that an optimizer takes besides parameters and gradients.

    `state` is for a parameter, `temporary` for an element of the largest tensor, in a step or while
    the state is made.
    """

    state: float
    temporary: float = 0


STATE_32BIT = {"cpu": Needs(8), "cuda": Needs(8)}
STATE_8BIT = {"cpu": Needs(3), "cuda": Needs(2.2)}


@dataclass(frozen=True)
class Contender:
    """One optimizer, configured.

    `build` makes it from a list of parameters. `lists` are the tensor lists it runs on when no
    contender is named on the command line. `needs` has an entry for each kind of device it runs on:
    by them the harness decides how many fit into memory at a time. `cpu_path` forces a code path of
    torchao8.
    """

    name: str
    label: str
    package: str
    build: Build
    lists: tuple[str, ...] = ALL_LISTS
    needs: Mapping[str, Needs] = field(default_factory=lambda: STATE_32BIT)
    compiled: bool = False
    cpu_path: str | None = None
