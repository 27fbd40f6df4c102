"""The row layout: the package's arithmetic, the ops' and the oracle's are the same."""

import math

import format_reference
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchao8 import quantize_blockwise
from torchao8.block_layout import codes_shape, row_length, row_start, scale_shape
from torchao8.state_bits import TOO_SMALL, why_32bit

# Sizes around a block, and around what makes a row long enough; the product is kept small.
SIZES = st.sampled_from([0, 1, 2, 3, 5, 15, 16, 17, 63, 64, 65, 255, 256, 257, 300])
SHAPES = st.lists(SIZES, max_size=4).map(tuple).filter(lambda shape: math.prod(shape) <= 100_000)
BLOCK_SIZES = st.sampled_from([64, 128, 256, 512, 1024, 2048])


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3072, 768), (3072, 3)),
        ((64, 64, 3, 3), (64, 3)),
        ((8, 1024, 4096), (8, 1024, 16)),
        ((10, 7, 5), (10, 1)),
        ((4096, 8), (128,)),  # LoRA's matrices of rank 8
        ((300, 15), (18,)),
        ((300, 16), (300, 1)),
        ((64, 3, 1, 1), (1,)),
        ((64, 3, 3, 3), (64, 1)),
        ((100, 5, 3), (6,)),
        ((3, 0), (3, 0)),
        ((0, 5), (0,)),
        ((10, 256), (10, 1)),
        ((10, 257), (10, 2)),
        ((5000,), (20,)),
        ((0, 300), (0, 2)),
        ((), (1,)),
    ],
)
def test_published_shapes(shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    assert scale_shape(shape, 256) == reference.scale_shape(shape, 256) == expected


@given(shape=SHAPES, block_size=BLOCK_SIZES)
def test_three_layouts_agree(shape: tuple[int, ...], block_size: int) -> None:
    expected = reference.scale_shape(shape, block_size)
    assert scale_shape(shape, block_size) == expected
    _, scale = quantize_blockwise(torch.ones(shape), block_size=block_size)
    assert tuple(scale.shape) == expected
    rows = math.prod(expected[:-1])
    assert row_length(shape, block_size) * rows == math.prod(shape) or rows == 0


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3072, 768), (3072, 384)),
        ((64, 64, 3, 3), (64, 288)),  # 3 * 3 elements fill no block, 64 * 3 * 3 do
        ((8, 1024, 4096), (8, 1024, 2048)),
        ((10, 7, 5), (10, 18)),
        ((300, 15), (2250,)),
        ((5, 3), (8,)),
        ((300, 17), (300, 9)),
        ((4097,), (2049,)),
        ((3, 0), (3, 0)),
        ((0, 5), (0,)),
        ((0, 17), (0, 9)),
        ((), (1,)),
    ],
)
def test_published_shapes_of_packed_codes(
    shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    assert codes_shape(shape, 64, bits=4) == expected
    assert codes_shape(shape, 64) == shape


@given(shape=SHAPES, block_size=BLOCK_SIZES)
def test_packed_codes_are_those_of_the_oracle(shape: tuple[int, ...], block_size: int) -> None:
    """And one a row for each of its scales, so that both are cut alike along other dimensions."""
    packed, k = codes_shape(shape, block_size, bits=4), row_start(shape, block_size)
    assert packed == format_reference.packed_shape(shape, k)
    assert packed[:-1] == scale_shape(shape, block_size)[:-1]


@given(shape=SHAPES, block_size=BLOCK_SIZES, data=st.data())
def test_elements_share_a_scale_as_the_oracle_says(
    shape: tuple[int, ...], block_size: int, data: st.DataObject
) -> None:
    """One element that is not zero shows in one scale, and which one that is."""
    x = torch.zeros(shape)
    if x.numel() == 0:
        return
    index = data.draw(st.integers(0, x.numel() - 1))
    x.view(-1)[index] = -3.0
    _, scale = quantize_blockwise(x, block_size=block_size)
    block = reference.block_of_element(shape, block_size).flatten()[index]
    assert scale.flatten().nonzero().flatten().tolist() == [block]


@pytest.mark.parametrize(
    ("shape", "min_8bit_size", "reason"),
    [
        ((4096,), 4096, None),
        ((256, 16), 4096, None),
        ((512, 8), 4096, None),
        ((64, 64, 1, 1), 4096, None),
        ((2, 8), 0, None),
        ((16,), 0, None),
        ((300, 4, 4), 4096, None),
        ((4095,), 4096, TOO_SMALL),
        ((511, 8), 4096, TOO_SMALL),
        ((3, 5), 0, TOO_SMALL),
        ((300, 0), 0, TOO_SMALL),
        ((15,), 0, TOO_SMALL),
        ((), 0, TOO_SMALL),
    ],
)
def test_what_is_worth_8_bits(
    shape: tuple[int, ...], min_8bit_size: int, reason: str | None
) -> None:
    assert why_32bit(shape, (), (), 256, min_8bit_size) == reason
