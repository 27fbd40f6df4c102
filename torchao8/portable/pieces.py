"""Tensors in pieces: small enough that what a step computes with them takes little memory.

A piece has its blocks in the last dimension. All pieces are views of their tensors, so that a step
writes into them, but for a tensor of other strides than those of a contiguous one: its pieces are
those of a copy, of one slice of the tensor at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao8.block_layout import row_length, row_start

# Elements of a piece: a step computes about a hundred bytes for each of them.
PIECE = 1 << 18


class Entry(NamedTuple):
    """A parameter with its gradient and state: all of it, or some of its slices along dim 0.

    ``offset`` and ``stride`` say where its rows lie in the global tensor; ``one_scale`` that all of
    a whole tensor shares a scale.
    """

    param: Tensor
    grad: Tensor
    values: list[Tensor]
    scales: list[Tensor]
    offset: int
    stride: int
    one_scale: bool = False


class Piece(NamedTuple):
    """Blocks of one length, or a run of elements with 32-bit state.

    ``first`` are the global indices of the first elements of the blocks, and of all elements where
    there are no blocks.
    """

    param: Tensor
    grad: Tensor
    values: list[Tensor]
    scales: list[Tensor]
    first: Tensor


def slices(entry: Entry, block_size: int | None) -> Iterator[Entry]:
    """The entry, or slices of it where it is large and has to be copied.

    Args:
        block_size: None for 32-bit state, whose rows are the last dimension.
    """
    p, shape = entry.param, entry.param.shape
    rows_inside = 1 if block_size is None else row_start(shape, block_size)
    is_plain = p.is_contiguous() and entry.grad.is_contiguous()
    if is_plain or p.numel() <= PIECE or p.dim() < 2 or rows_inside == 0 or shape[0] < 2:
        yield entry
        return
    last = p.dim() - 1 if block_size is None else rows_inside
    rows = math.prod(shape[1:last])
    count = max(1, PIECE * shape[0] // p.numel())
    for i in range(0, shape[0], count):
        part = slice(i, i + count)
        yield entry._replace(
            param=p[part],
            grad=entry.grad[part],
            values=[v[part] for v in entry.values],
            scales=entry.scales if entry.one_scale else [s[part] for s in entry.scales],
            offset=entry.offset + i * rows * entry.stride,
        )


def _ranges(rows: int, length: int, block: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Rows and blocks of each piece, as ranges, and the elements of a block."""
    whole, tail = divmod(length, block)
    count = max(1, PIECE // block)
    if whole > count:
        for row in range(rows):
            for b in range(0, whole, count):
                yield row, row + 1, b, min(b + count, whole), block
    elif whole:
        step = count // whole
        for row in range(0, rows, step):
            yield row, min(row + step, rows), 0, whole, block
    if tail:
        step = max(1, PIECE // tail)
        for row in range(0, rows, step):
            yield row, min(row + step, rows), whole, whole + 1, tail


def block_pieces(entry: Entry, block: int) -> Iterator[Piece]:
    """Of state with scales: pieces of shape (rows, blocks, elements), and scales of (rows, blocks,
    1). Codes may share bytes, two elements of a row each."""
    p = entry.param
    length = row_length(p.shape, block)
    rows = p.numel() // length if length else 0
    if rows == 0:
        return
    as_rows = [t.reshape(rows, length) for t in (p, entry.grad)]
    codes = [t.view(rows, -1) for t in entry.values]
    one_scale = entry.one_scale
    of_rows = [s if one_scale else s.view(rows, -1) for s in entry.scales]
    for r0, r1, b0, b1, width in _ranges(rows, length, block):
        p_blocks, g_blocks = (_blocks(t[r0:r1], b0 * block, b1 - b0, width) for t in as_rows)
        values = []
        for t in codes:
            share = -(-length // t.shape[1])
            values.append(_blocks(t[r0:r1], b0 * block // share, b1 - b0, -(-width // share)))
        scales = [s if one_scale else s[r0:r1, b0:b1].unsqueeze(-1) for s in of_rows]
        first = _grid(entry.offset + r0 * entry.stride, r1 - r0, entry.stride, p.device)
        first = first + _grid(b0 * block, b1 - b0, block, p.device).squeeze(-1)
        yield Piece(p_blocks, g_blocks, values, scales, first)
    _write_back(as_rows[0], p)


def _blocks(t: Tensor, start: int, count: int, width: int) -> Tensor:
    return t[:, start : start + count * width].unflatten(1, (count, width))


def _grid(start: int, count: int, step: int, device: torch.device) -> Tensor:
    return (torch.arange(count, dtype=torch.int64, device=device) * step + start).unsqueeze(-1)


def element_pieces(entry: Entry) -> Iterator[Piece]:
    """Of 32-bit state: pieces of one dimension."""
    p = entry.param
    flat = [t.reshape(-1) for t in (p, entry.grad, *entry.values)]
    last = p.shape[-1] if p.dim() else 1
    for i in range(0, p.numel(), PIECE):
        end = min(i + PIECE, p.numel())
        parts = [t[i:end] for t in flat]
        element = torch.arange(i, end, dtype=torch.int64, device=p.device)
        if p.dim() > 1 and entry.stride != last:
            element = element // last * entry.stride + element % last
        yield Piece(parts[0], parts[1], parts[2:], [], element + entry.offset)
    _write_back(flat[0], p)


def _write_back(changed: Tensor, p: Tensor) -> None:
    """Where ``changed`` is a copy: ``reshape`` makes a view of some other strides, too."""
    if changed.data_ptr() != p.data_ptr():
        p.copy_(changed.view(p.shape))


def shards(
    params: Sequence[Tensor], offsets: Sequence[int], strides: Sequence[int], block: int | None
) -> list[tuple[int, int]]:
    """Offset and stride of each parameter, whole ones among them."""
    if offsets:
        return list(zip(offsets, strides, strict=True))
    return [(0, row_length(p.shape, block) if block else _last(p)) for p in params]


def _last(p: Tensor) -> int:
    return p.shape[-1] if p.dim() else 1
