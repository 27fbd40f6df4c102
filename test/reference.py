"""The oracle of the codec: the codebook from its published construction, a search by brute force.

Slow and obvious; it shares no code and no shortcut with the library. That of the rules is in
reference_rules.py.
"""

import functools
import math

import torch
from torch import Tensor

FLOAT32_TINY = 2.0**-126  # the smallest normal float32


# -- the codebook ------------------------------------------------------------------------------


@functools.cache
def dynamic_map(signed: bool) -> Tensor:
    """The dynamic tree map of 8 bits, float64, ascending, by the construction of the papers.

    For each of seven decades, 1e-6 to 1: cut [0.1, 1] into as many equal intervals as the decade
    has fraction values (twice as many from one decade to the next), take the middle of each, and
    multiply by the decade. The signed map has all of them with both signs, the unsigned one has
    twice as many of one sign. Then 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        intervals = 2**decade if signed else 2 ** (decade + 1)
        borders = torch.linspace(0.1, 1, intervals + 1, dtype=torch.float64)
        for low, high in zip(borders[:-1].tolist(), borders[1:].tolist(), strict=True):
            value = 10.0 ** (decade - 6) * (low + high) / 2
            values += [value, -value] if signed else [value]
    assert len(values) == 256
    return torch.tensor(sorted(values), dtype=torch.float64)


# -- the block layout --------------------------------------------------------------------------


def row_dims(shape: tuple[int, ...], block_size: int) -> int:
    """How many leading dimensions count rows; the others are one row, flattened."""
    if len(shape) <= 1 or 1 <= math.prod(shape[1:]) <= 15:
        return 0
    long_enough = [k for k in range(1, len(shape)) if math.prod(shape[k:]) >= block_size]
    return max(long_enough) if long_enough else 1


def scale_shape(shape: tuple[int, ...], block_size: int) -> tuple[int, ...]:
    k = row_dims(shape, block_size)
    return (*shape[:k], math.ceil(math.prod(shape[k:]) / block_size))


@functools.cache
def block_of_element(shape: tuple[int, ...], block_size: int) -> Tensor:
    """For each element, the flat index of its scale: counted one by one, row after row."""
    k = row_dims(shape, block_size)
    rows, length = math.prod(shape[:k]), math.prod(shape[k:])
    numbers, next_block = [], 0
    for _ in range(rows):
        for column in range(length):
            numbers.append(next_block + column // block_size)
        next_block += math.ceil(length / block_size)
    return torch.tensor(numbers, dtype=torch.int64).reshape(shape)


# -- the codec ---------------------------------------------------------------------------------


def nearest_code(y: Tensor, signed: bool) -> Tensor:
    """The code whose value is nearest to each y, by comparing it with all 256."""
    codebook = dynamic_map(signed)
    codes = torch.empty(y.shape, dtype=torch.int64)
    for part, out in zip(y.flatten().split(4096), codes.view(-1).split(4096), strict=True):
        out.copy_((part.double()[:, None] - codebook).abs().argmin(1))
    return codes


def block_scale(x: Tensor, block_size: int) -> Tensor:
    """Each block's element of largest magnitude with its sign; 0 if below the normal floats."""
    shape = tuple(x.shape)
    flat, blocks = x.double().flatten(), block_of_element(shape, block_size).flatten()
    scale = torch.zeros(math.prod(scale_shape(shape, block_size)), dtype=torch.float64)
    for block in range(scale.numel()):
        elements = flat[blocks == block]
        scale[block] = elements[elements.abs().argmax()]
    scale[scale.abs() < FLOAT32_TINY] = 0.0
    return scale.reshape(scale_shape(shape, block_size))


def expand_scale(scale: Tensor, shape: tuple[int, ...], block_size: int) -> Tensor:
    """The scale of each element."""
    return scale.flatten()[block_of_element(shape, block_size)]


def quantize(x: Tensor, block_size: int, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes and scales of finite x. A v > 0 of an unsigned x never gets code 0."""
    scale = block_scale(x, block_size)
    per_element = expand_scale(scale, tuple(x.shape), block_size)
    y = torch.where(per_element == 0, 0.0, x.double() / per_element)
    codes = nearest_code(y, signed)
    if not signed:
        codes[(x > 0) & (per_element > 0) & (codes == 0)] = 1
    return codes.to(torch.uint8), scale.float()


def dequantize(codes: Tensor, scale: Tensor, block_size: int, signed: bool) -> Tensor:
    """In float64."""
    per_element = expand_scale(scale.double(), tuple(codes.shape), block_size)
    return dynamic_map(signed)[codes.long()] * per_element
