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


def wavefronts(entry: Tensor, words: int = 1, stride: int = 1) -> float:
    """The mean number of wavefronts when each lane of a warp looks up an entry of so many words.
    Words of 8 bytes are read for half a warp at a time."""
    half = LANES // words
    of_lanes = entry.reshape(-1, LANES, 8).transpose(1, 2).reshape(-1, half)
    worst = [
        torch.bincount(lanes.unique() * stride // words % half, minlength=half).max()
        for lanes in of_lanes[: 8000 * words]
    ]
    return words * float(torch.stack(worst).double().mean())


def cells(y: Tensor, lowest: float) -> Tensor:
    return y.clamp(min=lowest).view(torch.int32).long() >> 16


def position_entries(y: Tensor) -> tuple[Tensor, Tensor]:
    """The entries of dynamic::Tables::positions that y's cell has, and that its line has."""
    below_start = 24
    codes = torch.tensor([1, 2, 6, 14, 30, 62, 126, 254])  # the last one of each decade
    starts = torchao8.dynamic_map(signed=False)[codes]
    cell, cell_of_start = (x.view(torch.int32).long() >> 24 & 15 for x in (y, starts))
    below = sum((cell == c) & (y < start) for c, start in zip(cell_of_start, starts, strict=True))
    return cell, cell + below_start * below


def main() -> None:
    m, v = moments()
    (m_codes, _), (v_codes, _) = (
        torchao8.quantize_blockwise(x, signed=signed) for x, signed in ((m, True), (v, False))
    )
    y = v / v.amax(1, keepdim=True) + 2.0**-31
    cell, line = position_entries(y)
    counts = {
        "decode m": wavefronts(m_codes.long()),
        "decode v": wavefronts(v_codes.long()),
        "encode m": wavefronts(cells(m.abs() / m.abs().amax(1, keepdim=True), 2.0**-22)),
        "encode v, start": wavefronts(cell, stride=2),
        "encode v, a and b": wavefronts(line, words=2, stride=2),
        "encode v, c": wavefronts(line, stride=2),
    }
    for name, count in {**counts, "together": sum(counts.values())}.items():
        print(f"{name:<24}{count:5.1f}")


if __name__ == "__main__":
    main()
