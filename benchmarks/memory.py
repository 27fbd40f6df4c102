"""Draws the memory of a training step: weights, gradients and the state of the optimizer.

    python -m benchmarks.memory --out docs/images

The figures are those of `torchao8.estimate`, for the shapes of Llama 3 8B on one device.
Activations are not counted. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import torchao8
from benchmarks import reporting
from benchmarks.pictures import DARK, LIGHT, OURS, picture
from torchao8._estimate_command import MODELS

MODEL = "llama-8b"
# Label: the dtype of weights and gradients, the optimizer, and the bits of its state.
ROWS = {
    "AdamW, float32 weights": (torch.float32, "AdamW", 32),
    "AdamW8bit, float32 weights": (torch.float32, "AdamW", 8),
    "AdamW, bfloat16 weights": (torch.bfloat16, "AdamW", 32),
    "AdamW8bit, bfloat16 weights": (torch.bfloat16, "AdamW", 8),
    "Lion8bit, bfloat16 weights": (torch.bfloat16, "Lion", 8),
}


def gibibytes(dtype: torch.dtype, optimizer: str, bits: int) -> dict[str, float]:
    """What a step holds by kind."""
    found = torchao8.estimate(MODELS[MODEL], dtype=dtype, optimizer=optimizer)
    state = found.state_8bit if bits == 8 else found.state_32bit
    parts = {"weights": found.parameters, "gradients": found.gradients, "optimizer state": state}
    return {name: size / 2**30 for name, size in parts.items()}


def draw(panel: Any) -> None:
    """Draws the bars into a panel."""
    rows = [gibibytes(*what) for what in ROWS.values()]
    left = [0.0] * len(rows)
    for (name, _), color in zip(rows[0].items(), (LIGHT, DARK, OURS), strict=True):
        sizes = [row[name] for row in rows]
        drawn = panel.barh(list(ROWS), sizes, left=left, color=color, label=name)
        ink = "white" if color == OURS else "black"
        panel.bar_label(drawn, [f"{s:.0f}" for s in sizes], label_type="center", color=ink)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    panel.bar_label(drawn, [f" {total:.0f} GiB" for total in left], fontweight="bold")
    panel.set_xlim(0, 1.15 * max(left))
    panel.invert_yaxis()
    panel.set_xlabel("GiB; less is better", fontsize=9)
    panel.legend(ncols=3, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)


def main(argv: Iterable[str] | None = None) -> None:
    """Draws with the command line `argv` (of the process if None)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder (%(default)s)")
    args = parser.parse_args(argv)
    note = f"One device, activations not counted; torchao8 {torchao8.__version__}, by estimate()"
    heading = "Memory of a training step of Llama 3 8B"
    with picture(args.out / "memory.png", heading, note, [1.4 * len(ROWS)]) as (panel,):
        draw(panel)


if __name__ == "__main__":
    main()
