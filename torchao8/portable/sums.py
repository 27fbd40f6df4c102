"""Exact sums of squares and their norms, in integers: rows as csrc/codec/exact_sum.h has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from torchao8._numbers import number_dtype
from torchao8.portable.pieces import PIECE

LIMBS = 18
_MOST = 1 << 15  # squares of 48 bits in a bin
_MASK32 = (1 << 32) - 1


def _bins(x: Tensor) -> Tensor:
    """The squares of up to 2^15 numbers in each row, summed by exponent: int64, 256 for a row.

    The exponent e is that of twice the bits above the smallest square, see `_limbs`.
    """
    magnitude = x.view(torch.int32) & 0x7FFFFFFF
    exponent = magnitude >> 23
    mantissa = (magnitude & 0x7FFFFF) | torch.where(exponent > 0, 0x800000, 0)
    mantissa = torch.where(exponent < 255, mantissa, 0).to(torch.int64)
    index = (exponent - 1).clamp_min(0).to(torch.int64)
    bins = torch.zeros(*x.shape[:-1], 256, dtype=torch.int64, device=x.device)
    return bins.scatter_add(-1, index, mantissa * mantissa)


def _limbs(bins: Tensor) -> Tensor:
    """Bins as limbs: bin e counts units of 2^(2e) of limb 0's, so that 16 of them begin in each."""
    bins = bins.unflatten(-1, (16, 16))
    shift = 2 * torch.arange(16, dtype=torch.int64, device=bins.device)
    low = (bins & ((_MASK32 + 1 >> shift) - 1)) << shift
    rest = bins >> (32 - shift)
    parts = [low, rest & _MASK32, rest >> 32]
    padded = [torch.nn.functional.pad(part.sum(-1), (k, 2 - k)) for k, part in enumerate(parts)]
    return padded[0] + padded[1] + padded[2]


def canonical(rows: Tensor) -> Tensor:
    """With carries propagated: all limbs but the last come into [0, 2^32)."""
    done, carry = [], torch.zeros_like(rows[..., 0])
    for k in range(LIMBS - 1):
        limb = rows[..., k] + carry
        done.append(limb & _MASK32)
        carry = limb >> 32
    return torch.stack([*done, rows[..., -1] + carry], -1)


def _row(x: Tensor) -> Tensor:
    """The sum of a piece, of one dimension."""
    whole = x.numel() // _MOST * _MOST
    total = _limbs(_bins(x[whole:].unsqueeze(0))).sum(0)
    if whole:
        total = total + canonical(_limbs(_bins(x[:whole].view(-1, _MOST)))).sum(0)
    return total


def sum_rows(count: int, device: torch.device, pieces: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The sums of pieces of ``count`` tensors, each with its number."""
    rows = [torch.zeros(LIMBS, dtype=torch.int64, device=device) for _ in range(count)]
    for i, x in pieces:
        rows[i] = canonical(rows[i] + _row(x.reshape(-1).to(torch.float32)))
    return torch.stack(rows)


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """As :func:`torchao8.ops.sum_squares`."""

    def pieces() -> Iterator[tuple[int, Tensor]]:
        for i, t in enumerate(tensors):
            parts = [t.detach()]
            if not t.is_contiguous() and t.dim() > 1 and t.numel() > PIECE:
                parts = list(t.detach().split(max(1, PIECE * t.shape[0] // t.numel())))
            for part in parts:
                for x in part.reshape(-1).split(PIECE):
                    yield i, x

    return sum_rows(len(tensors), tensors[0].device, pieces())


def norms(sums: Tensor) -> Tensor:
    """As :func:`torchao8.ops.norms`, computed in float32, which every device has.

    Of the highest limb that is not 0 and the two below it: the others are less than 2^-32 of them.
    """
    rows = canonical(sums)
    k = torch.arange(LIMBS, dtype=torch.int64, device=rows.device)
    highest = torch.where(rows != 0, k, 0).amax(-1, keepdim=True)
    near = (highest - torch.arange(3, dtype=torch.int64, device=rows.device)).clamp_min(0)
    weights = torch.exp2(-32.0 * torch.arange(3, dtype=torch.float32, device=rows.device))
    below = highest - torch.arange(3, dtype=torch.int64, device=rows.device) >= 0
    value = torch.where(below, rows.gather(-1, near).to(torch.float32) * weights, 0.0).sum(-1)
    # The unit of limb k is 2^(32 k - 298), whose root is 2^(16 k - 149): as two factors, as
    # float32 has no numbers near the least of them.
    half = torch.exp2((8 * highest.squeeze(-1) - 75).to(torch.float32))
    root = value.sqrt() * half * (half * 2)
    return torch.where(rows[..., -1] < 0, torch.nan, root).to(number_dtype(root.device))
