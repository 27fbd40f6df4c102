"""Estimates how long a warp's look-ups in shared memory take, in wavefronts for 32 elements.

    python tools/count_wavefronts.py

A wavefront reads one word from each of the 32 banks. If lanes need different words of one bank, the
bank takes one wavefront for each. The moments are those of Adam after 300 steps of normal gradients
whose size differs within a block. Lane l has the elements 8 l to 8 l + 7, as in
csrc/cuda/fast_block.cuh. An H100 does one wavefront a cycle; memory takes 24 cycles for 32 elements
in bfloat16.
"""

import torch
from torch import Tensor

import torchao8

BANKS = LANES = 32


def moments(blocks: int = 1500, steps: int = 300) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    size = (0.7 * torch.randn(blocks, 256)).exp()
    m, v = torch.zeros(blocks, 256), torch.zeros(blocks, 256)
    for _ in range(steps):
        g = torch.randn(blocks, 256) * size
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
    return m, v


def wavefronts(word: Tensor) -> float:
    """The mean number of wavefronts when each lane of a warp looks up one 4-byte word."""
    of_warps = word.reshape(-1, LANES, 8).transpose(1, 2).reshape(-1, LANES)
    worst = [
        torch.bincount(lanes.unique() % BANKS, minlength=BANKS).max() for lanes in of_warps[:8000]
    ]
    return float(torch.stack(worst).double().mean())


def cells(y: Tensor, lowest: float) -> Tensor:
    return y.clamp(min=lowest).view(torch.int32).long() >> 16


def main() -> None:
    m, v = moments()
    (m_codes, _), (v_codes, _) = (
        torchao8.quantize_blockwise(x, signed=signed) for x, signed in ((m, True), (v, False))
    )
    y = v / v.amax(1, keepdim=True) + 2.0**-31
    lines = y.view(torch.int32).long() >> 24 & 15  # and 16 more lines, in other banks
    counts = {
        "decode m": wavefronts(m_codes.long()),
        "decode v": wavefronts(v_codes.long()),
        "encode m": wavefronts(cells(m.abs() / m.abs().amax(1, keepdim=True), 2.0**-22)),
        "encode v, four look-ups": 4 * wavefronts(lines),
    }
    for name, count in {**counts, "together": sum(counts.values())}.items():
        print(f"{name:<24}{count:5.1f}")


if __name__ == "__main__":
    main()
