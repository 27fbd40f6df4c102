"""Which matrices a parameter holds, for optimizers that orthogonalize matrices.

All of it follows from the shape of the (global) parameter and from one option. Nothing here needs
PyTorch.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

HIGHER_DIMS = ("refuse", "batch", "flatten")


class MatrixShape(NamedTuple):
    """So many matrices of ``rows`` times ``columns`` elements, one behind the other."""

    matrices: int
    rows: int
    columns: int


def of(shape: Sequence[int], higher_dims: str = "refuse") -> MatrixShape:
    """The matrices in a tensor of this shape.

    Args:
        higher_dims: what a tensor of three dimensions or more is. "refuse": an error. "batch": the
            last two dimensions are a matrix, those before them count the matrices, as in the
            weights of experts. "flatten": one matrix, whose rows are ``shape[1:]`` flattened, as in
            the weight of a convolution.

    Raises:
        ValueError: the tensor holds no matrices; the message says what was expected, and does not
            name the tensor.

    >>> of((8, 64, 32), "batch")
    MatrixShape(matrices=8, rows=64, columns=32)
    >>> of((64, 32, 3, 3), "flatten")
    MatrixShape(matrices=1, rows=64, columns=288)
    """
    if higher_dims not in HIGHER_DIMS:
        names = ", ".join(map(repr, HIGHER_DIMS))
        raise ValueError(f"higher_dims: expected one of {names}, got {higher_dims!r}")
    if len(shape) < 2:
        raise ValueError(f"expected a matrix, got the shape {list(shape)}")
    if len(shape) == 2:
        return MatrixShape(1, shape[0], shape[1])
    if higher_dims == "batch":
        return MatrixShape(math.prod(shape[:-2]), shape[-2], shape[-1])
    if higher_dims == "flatten":
        return MatrixShape(1, shape[0], math.prod(shape[1:]))
    raise ValueError(
        f"expected a matrix, got the shape {list(shape)}. higher_dims='batch' takes the last two "
        "dimensions for a matrix and those before them for a number of matrices, as in experts; "
        "higher_dims='flatten' takes all dimensions after the first for the columns of one matrix, "
        "as in a convolution"
    )
