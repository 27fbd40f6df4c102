"""What the codec must give, to the bit: exact thresholds, scales with their sign, and neighbours.

All of it is arithmetic in float64 on the library's float32 codebook (`dynamic_map`, which has a
test of its own against the published one). Differences and midpoints of two float32 numbers of
these magnitudes are exact in float64, so nothing here is approximate but where it says so.
"""

import functools
import math

import numpy
import reference
import torch
from torch import Tensor

import torchao8

ZERO_CODE = {True: 127, False: 0}


@functools.cache
def codebook(signed: bool) -> Tensor:
    """The library's codebook, float64."""
    return torchao8.dynamic_map(signed).double()


@functools.cache
def magnitudes(signed: bool) -> Tensor:
    """The values that a number above 0 can get, ascending, float64. Zero is one of them in the
    signed map alone: a second moment above 0 is never rounded to it."""
    return codebook(signed)[127:] if signed else codebook(signed)[1:]


@functools.cache
def thresholds(signed: bool) -> Tensor:
    """The first float32 that gets each of `magnitudes` but the first: the midpoint below it or,
    where that is no float32, the next float32 above. A tie goes to the larger magnitude."""
    values = magnitudes(signed).numpy()
    midpoints = (values[:-1] + values[1:]) / 2
    rounded = midpoints.astype(numpy.float32)
    above = numpy.nextafter(rounded, numpy.float32(numpy.inf))
    return torch.from_numpy(numpy.where(rounded >= midpoints, rounded, above))


def codes_by_threshold(y: Tensor, signed: bool) -> Tensor:
    """The nearest code of each float32 in [-1, 1] or [0, 1], int64."""
    magnitude = torch.bucketize(y.abs(), thresholds(signed), right=True)
    if signed:
        # There is no -1.0: what rounds to it gets the code above it.
        return torch.where(y < 0, (127 - magnitude).clamp_min(0), 127 + magnitude)
    return torch.where(y > 0, 1 + magnitude, 0)


def codes_by_search(y: Tensor, signed: bool) -> Tensor:
    """The same by comparing each number with all 256, a tie going to the larger magnitude."""
    values = codebook(signed)
    distance = (y.double().flatten()[:, None] - values).abs()
    if not signed:
        distance[:, 0] = torch.where(y.flatten() > 0, math.inf, 0.0)
    nearest = distance == distance.amin(1, keepdim=True)
    return torch.where(nearest, values.abs(), -1.0).argmax(1).reshape(y.shape)


def block_scale(x: Tensor, block_size: int) -> Tensor:
    """Each block's element of largest magnitude with its sign, the positive one in a tie; 0 where
    it is below the normal floats, NaN where an element is not finite. Float32, of scale_shape."""
    shape = tuple(x.shape)
    scale_shape = reference.scale_shape(shape, block_size)
    block = reference.block_of_element(shape, block_size).flatten()
    flat = x.float().flatten()
    good = flat.isfinite()
    extremes = torch.zeros(2, math.prod(scale_shape))
    for row, reduction in zip(extremes, ("amax", "amin"), strict=True):
        row.scatter_reduce_(0, block, flat.where(good, 0.0), reduction)
    high, low = extremes
    scale = torch.where(high >= -low, high, low)
    scale[scale.abs() < reference.FLOAT32_TINY] = 0.0
    scale[block[~good]] = math.nan
    return scale.reshape(scale_shape)


def assert_nearest(codes: Tensor, scale: Tensor, x: Tensor, block_size: int, signed: bool) -> None:
    """Scales to the bit, and each code as near to its element as any code is.

    The library multiplies by a rounded reciprocal: x * (1 / scale) is off by at most 3 half units,
    one of them that the reciprocal is rounded up. So a code may be the second nearest where it is
    further by no more than twice that, 3 * 2^-23 of y. That the comparison itself is exact shows at
    scale 1, in the tests over whole ranges of floats.
    """
    want = block_scale(x, block_size)
    assert (codes.dtype, codes.shape) == (torch.uint8, x.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, want.shape)
    assert codes.is_contiguous()
    assert scale.is_contiguous()
    torch.testing.assert_close(scale, want, rtol=0, atol=0, equal_nan=True)
    if x.numel() == 0:
        return
    per_element = reference.expand_scale(want.double(), tuple(x.shape), block_size).flatten()
    code, flat = codes.flatten().long(), x.double().flatten()
    dead = (per_element == 0) | per_element.isnan()
    assert (code[dead] == ZERO_CODE[signed]).all()
    code, y = code[~dead], (flat / per_element)[~dead]
    values = codebook(signed)
    distance = (y[:, None] - values).abs()
    if not signed:
        distance[y > 0, 0] = math.inf
    chosen = distance.gather(1, code[:, None]).squeeze(1)
    assert (chosen <= distance.amin(1) + 3 * 2.0**-23 * y.abs()).all()
    assert (code[y == 1] == 255).all()
    assert (code[y == 0] == ZERO_CODE[signed]).all()


def neighbours(y: Tensor) -> tuple[Tensor, Tensor]:
    """Of numbers in (0, 1], float64: the unsigned code at or below each, at least 1, and the
    fraction of the way to the code above, 0 for what lies below code 1."""
    values = codebook(False)
    below = (torch.searchsorted(values, y, right=True) - 1).clamp(1, 254)
    fraction = (y - values[below]) / (values[below + 1] - values[below])
    return below, fraction.clamp_min(0.0)


def encoded_range(signed: bool, stochastic: bool) -> tuple[Tensor, Tensor]:
    """The least and the largest number that may get each code: up to the midpoints with its
    neighbours, or up to the neighbours. -1.0 gets code 0; no second moment above 0 does."""
    values = codebook(signed)
    low = torch.cat([torch.tensor([-1.0 if signed else 0.0]), values[:-1]]).double()
    high = torch.cat([values[1:], torch.ones(1)]).double()
    if signed or not stochastic:
        low[1:], high[:-1] = (values[1:] + values[:-1]) / 2, (values[1:] + values[:-1]) / 2
    if not signed:
        low[1], high[0] = 0.0, 0.0
    return low, high
