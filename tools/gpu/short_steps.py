"""A program for compute-sanitizer: a few steps of every class on small tensors, whole and broken.

Ends early, between two classes, when its seconds are over: under racecheck a step takes long. The
bits are those of the CPU, or it exits with 1.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import torchao8
from torchao8 import ops

# Rows of whole blocks and of broken ones, a vector, a tensor too small for 8 bits, a scalar.
SHAPES = ((24, 512), (70, 300), (5000,), (40, 24), (7,), ())
BAD = (torch.nan, torch.inf, -torch.inf, 3e38, 0.0, 1e-38)
# Those with the most kernels first.
NAMES = ("AdamW8bit", "LAMB8bit", "AdEMAMix8bit", "RMSprop8bit", "SGD8bit", "Lion8bit",
         "Adagrad8bit", "LARS8bit", "NAdam8bit", "AdamW")  # fmt: skip


def runs() -> Iterator[tuple[str, torch.dtype, dict[str, Any]]]:
    """Classes and options: first all classes once, then rarer ways through the kernels."""
    for name in NAMES:
        yield name, torch.float32, {}
    for name in NAMES:
        yield name, torch.bfloat16, {"stochastic_rounding": True, "weight_decay": 0.1}
        yield name, torch.float32, {"block_wise": False, "percentile_clipping": 50}
        yield name, torch.float16, {"block_size": 64, "maximize": True}


def step(name: str, dtype: torch.dtype, options: dict[str, Any], device: str) -> list[Tensor]:
    """Parameters and states after two steps, on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def random() -> list[Tensor]:
        return [torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES]

    params = [torch.nn.Parameter(x) for x in random()]
    optimizer = getattr(torchao8, name)(params, lr=1e-3, min_8bit_size=100, **options)
    for _ in range(2):
        for p, grad in zip(params, random(), strict=True):
            if grad.dim() == 2:
                for i, bad in enumerate(BAD):
                    grad.view(-1)[97 * i + 3] = bad
            p.grad = grad
        optimizer.step()
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [x.detach().cpu() for x in (*params, *states)]


def codec(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    made: list[Tensor] = []
    for shape in SHAPES:
        x = torch.randn(shape, generator=generator).to(device)
        codes, scale = torchao8.quantize_blockwise(x)
        made += [codes, scale, torchao8.dequantize_blockwise(codes, scale)]
        made.append(ops.norms(ops.sum_squares([x])))
    return [x.cpu() for x in made]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    def bits(x: Tensor) -> Tensor:
        return x.contiguous().reshape(-1).view(torch.uint8)

    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="when to stop (never)")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    torch.ones(1, device=args.device)  # starts the GPU, which takes seconds of its own
    end, done, wrong = time.monotonic() + args.seconds, 0, []
    if not same(codec("cpu"), codec(args.device)):
        wrong.append("codec")
    every = list(runs())
    for name, dtype, options in every:
        if done and time.monotonic() > end:
            break
        label = f"{name} {str(dtype).removeprefix('torch.')} {options or ''}"
        print(label, flush=True)
        if not same(step(name, dtype, options, "cpu"), step(name, dtype, options, args.device)):
            wrong.append(label)
        done += 1
    print(f"{done} of {len(every)} runs; other bits than the CPU's: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
