"""How far 8-bit averages of gradients are from exact ones, under both ways of rounding.

    python -m benchmarks.quality.average_error

Drives AdEMAMix8bit, with lr=0, so that its slow average has the given rate. The gradients are a
constant and noise of so many times its size, in rows of other magnitudes; in the middle of the run
the constant is multiplied by -1/2. Prints, against float64: the relative L2 error of the stored
average, its share along the exact one (1 is unbiased), and the share of wrong signs.
"""

from __future__ import annotations

import argparse
import itertools
import warnings

import torch

import torchao8
from benchmarks.reporting import format_table

SHAPE = (16, 1024)


def errors(rate: float, noise: float, rounding: str, steps: int) -> tuple[float, float, float]:
    generator = torch.Generator().manual_seed(0)
    rows = 10.0 ** (-3 * torch.rand((SHAPE[0], 1), generator=generator))
    signal = rows * torch.randn(SHAPE, generator=generator)
    p = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = torchao8.AdEMAMix8bit(
        [p], lr=0.0, weight_decay=0.0, betas=(0.9, 0.999, rate), state_rounding=rounding
    )
    exact = torch.zeros(SHAPE, dtype=torch.float64)
    for step in range(steps):
        if step == steps // 2:
            signal = -signal / 2
        noisy = noise * signal.abs() * torch.randn(SHAPE, generator=generator)
        p.grad = signal + noisy
        exact = rate * exact + (1 - rate) * p.grad.double()
        optimizer.step()
    stored = optimizer.moments(p)["exp_avg_slow"].double()
    return (
        float((stored - exact).norm() / exact.norm()),
        float((stored * exact).sum() / (exact * exact).sum()),
        float((stored.sign() * exact.sign() < 0).double().mean()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8000, help="(%(default)s)")
    steps = parser.parse_args().steps
    warnings.simplefilter("ignore")
    print(f"torchao8 {torchao8.__version__}, torch {torch.__version__}, {steps} steps")
    header = ["rate", "noise", "rounding", "error", "along the exact one", "wrong signs"]
    rates, noises = (0.9999, 0.999, 0.99, 0.9), (1.0, 10.0)
    rows = [
        [f"{rate}", f"{noise:g}", way, *(f"{x:.3f}" for x in errors(rate, noise, way, steps))]
        for rate, noise, way in itertools.product(rates, noises, ("nearest", "stochastic"))
    ]
    print(format_table(header, rows))


if __name__ == "__main__":
    main()
