"""Optimizers with paged state, and where that lies."""

import errno
import gc
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_params, train
from optim_table import OPTIMIZERS, OptimizerCase
from torch import Tensor
from torch.optim import Optimizer

import torchao8
from torchao8.optim._state import paging

ROOT = Path(__file__).resolve().parent.parent
# Of these the third to fifth are paged: matrices of rows that are a multiple of the block and not,
# and a vector.
SHAPES = ((300, 333), (64, 70), (400, 250), (200, 512), (100_001,), ())
PAGED = (2, 3, 4)

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="no /proc/self/maps, as Linux has it"
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU that this torch can use: run `make gpu` on a machine with one, and with nvcc",
)


def every_family() -> pytest.MarkDecorator:
    """Runs a test over the classes of the table, each of which has a paged form."""
    return pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda c: f"Paged{c.cls.__name__}")


def paged(case: OptimizerCase, params: Any, **options: Any) -> Any:
    cls = getattr(torchao8, f"Paged{case.cls.__name__}")
    return cls(params, **{**case.base, **options})


def adam(cls: Any = torchao8.PagedAdamW8bit, device: str = "cpu", **options: Any) -> Any:
    return cls(make_params(shapes=SHAPES, device=device), **{"lr": 0.01, "seed": 3, **options})


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained(optimizer: Any, steps: Sequence[int] = range(2)) -> Any:
    train(optimizer, params_of(optimizer), steps)
    return optimizer


def folders(optimizer: Optimizer) -> list[dict[str, str | None]]:
    """Of each parameter, where each tensor of its state lies; None in ordinary memory."""
    return [
        {k: paging.found_in(v) for k, v in optimizer.state[p].items()} for p in params_of(optimizer)
    ]


def assert_paged(optimizer: Optimizer, folder: str = "", of: Sequence[int] = PAGED) -> None:
    """All states of these parameters but single numbers, and no other tensor of state."""
    for i, (p, found) in enumerate(zip(params_of(optimizer), folders(optimizer), strict=True)):
        for key, where in found.items():
            is_tensor = optimizer.state[p][key].dim() > 0
            assert where == (folder if i in of and is_tensor else None), (i, key)


def mapping_of(address: int) -> str:
    """The line of /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(n, 16) for n in line.split()[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError("not mapped")


def held() -> tuple[int, int]:
    """File descriptors, and mapped files without a name."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    nameless = [line for line in maps if re.search(r"rw-s .* \(deleted\)$", line)]
    return len(os.listdir("/proc/self/fd")), len(nameless)


def run_python(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


def full_disk(file: int, offset: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
