"""The orthogonal factor of a matrix, by the Newton-Schulz iteration of Muon.

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024): a matrix X, divided
by its Frobenius norm, is replaced by ``a X + b (X X') X + c (X X')^2 X`` a few times. That leaves
the singular vectors of X and moves its singular values towards 1. All products are PyTorch's, of
bfloat16 matrices.

Two things make it faster than a product after the other:

- ``X X'``, and any polynomial of it, is symmetric. On the CPU large ones are computed as panels of
  rows, each from its diagonal on, and mirrored.
- Where one side of X is much longer than the other, two iterations are composed among the small
  matrices and meet X once. The first iteration is never one of them: it raises small singular
  values, and where these are small a rounding error of the composed polynomial would be larger than
  they are.

Tall matrices stay tall: their products are of the other side, and nothing is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchao8.matrix_shape import MatrixShape

# a, b and c of one iteration.
Triple = tuple[float, float, float]

# Of a panel. Lower ones take longer than the products that they save.
_PANEL_ROWS = 192
_MOST_PANELS = 4
# A batched product of small matrices is 4 to 10 times as fast as one after the other, and one of
# large matrices half as fast (two threads, oneDNN).
_CPU_STACK = 16
_CPU_SMALL = 1 << 16
_DEVICE_STACK = 64
_DEVICE_ELEMENTS = 1 << 23
# Composed iterations keep their accuracy for polynomials that are no steeper at 0 than Muon's own.
_STEEPEST = 4.0


def stack_size(rows: int, columns: int, device_type: str) -> int:
    """How many matrices of a shape are orthogonalized at once.

    It depends on nothing else: a stack that is not full is filled up with zeros, so that the bits
    of a factor do not depend on how many matrices of a shape there are.
    """
    elements = max(rows * columns, 1)
    if device_type == "cpu":
        return _CPU_STACK if elements < _CPU_SMALL else 1
    return min(_DEVICE_STACK, 1 << max(_DEVICE_ELEMENTS // elements, 1).bit_length() - 1)


def stack_room(matrix: MatrixShape, device_type: str) -> int:
    """How many matrices the stacks hold that so many take, with those that fill up the last one."""
    size = stack_size(matrix.rows, matrix.columns, device_type)
    return -(-matrix.matrices // size) * size


def orthogonalize_(stack: Tensor, coefficients: Sequence[Triple], eps: float) -> None:
    """Replaces each matrix by (about) its orthogonal factor.

    Matrices do not influence one another: one with a NaN becomes NaN, the others do not change. A
    matrix of zeros stays one.

    Args:
        stack: (matrices, rows, columns), bfloat16, contiguous: other strides may give other bits.
        coefficients: a triple for each iteration.
        eps: what a matrix is divided by at least, in place of its norm.
    """
    if stack.numel() == 0:
        return
    device_type = stack.device.type
    # Only where it is on: a device may know of it and lack what turning it off asks for.
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            _iterate_(stack, coefficients, eps)
    else:
        with torch.no_grad():
            _iterate_(stack, coefficients, eps)


def _iterate_(stack: Tensor, coefficients: Sequence[Triple], eps: float) -> None:
    count, rows, columns = stack.shape
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=eps)
    plan = list(_plan(rows, columns, coefficients))
    products = _Products(stack, composes=any(len(triples) == 2 for triples in plan))
    x, other = stack, torch.empty_like(stack)
    # Each entry of the plan writes into the other matrix. The last one is to write into the stack.
    if len(plan) % 2:
        x, other = other, x
    torch.div(stack, norms, out=x)
    if count == 1:
        x, other = x[0], other[0]
    for triples in plan:
        products.advance(x, triples, out=other)
        x, other = other, x


def _plan(rows: int, columns: int, coefficients: Sequence[Triple]) -> Iterator[Sequence[Triple]]:
    """One triple for each iteration on its own, two for two composed ones."""
    is_long = max(rows, columns) >= 2 * min(rows, columns)
    composes = is_long and len(set(coefficients)) == 1 and coefficients[0][0] <= _STEEPEST
    at = 0
    while at < len(coefficients):
        length = 2 if composes and 0 < at < len(coefficients) - 1 else 1
        yield coefficients[at : at + length]
        at += length


class _Symmetric:
    """A matrix that is symmetric but for rounding, or a stack of such, with views of its panels.

    A panel is some rows from the diagonal on. Of the i-th one, ``rows`` are those rows in full,
    ``columns`` all rows from its diagonal on, ``below`` what mirrors its part ``beside`` the
    diagonal.
    """

    def __init__(self, matrix: Tensor, edges: Sequence[int]) -> None:
        self.matrix = matrix
        parts = [(first, slice(first, last), last) for first, last in pairwise(edges)]
        self.rows = [matrix[..., part, :] for _, part, _ in parts]
        self.columns = [matrix[..., first:] for first, _, _ in parts]
        self.panels = [matrix[..., part, first:] for first, part, _ in parts]
        self.below = [matrix[..., last:, part] for _, part, last in parts[:-1]]
        self.beside = [matrix[..., part, last:].mT for _, part, last in parts[:-1]]

    def mirror(self) -> None:
        for below, beside in zip(self.below, self.beside, strict=True):
            below.copy_(beside)


class _Products:
    """The iterations, and the small matrices that they need, for matrices of one shape."""

    def __init__(self, stack: Tensor, composes: bool) -> None:
        count, rows, columns = stack.shape
        single = count == 1
        self.is_tall = rows > columns
        side = min(rows, columns)
        self.edges = _edges(side) if single and stack.is_cpu else [0, side]
        shape = (side, side) if single else (count, side, side)
        # Composed iterations need two more, which are small: only long matrices have composed ones.
        # So the small matrices have at most twice the elements of the stack.
        small = [_Symmetric(stack.new_empty(shape), self.edges) for _ in range(2 + 2 * composes)]
        self.gram, self.factor, *self.more = small
        self.multiply = torch.mm if single else torch.bmm
        self.multiply_add = torch.addmm if single else torch.baddbmm

    def advance(self, x: Tensor, triples: Sequence[Triple], out: Tensor) -> None:
        """One iteration, or two composed ones."""
        gram, factor = self.gram, self.factor
        self.gram_of(x)
        if len(triples) == 1:
            a, b, c = triples[0]
            self.squared(gram, gram, b, c, factor)
            self.multiply_add(x, *self.factors(factor, x), beta=a, out=out)
            return
        half, second = self.more
        # The first iteration is P X, of P = a I + b A + c A A. The second one has P A P for A.
        self.polynomial(gram, triples[0], half, factor)
        self.product(factor, gram, half)
        self.product(half, factor, gram)
        self.polynomial(gram, triples[1], half, second)
        self.product(second, factor, half)
        self.multiply(*self.factors(half, x), out=out)

    def factors(self, small: _Symmetric, x: Tensor) -> tuple[Tensor, Tensor]:
        """A tall matrix is multiplied from the right: what is X' here is X in the formulas."""
        return (x, small.matrix) if self.is_tall else (small.matrix, x)

    def polynomial(
        self, gram: _Symmetric, triple: Triple, base: _Symmetric, out: _Symmetric
    ) -> None:
        """``a I + b A + c A A``. The identity and what is subtracted from it are of one magnitude
        in the end, so they are added in float32. ``base`` is written to."""
        a, b, c = triple
        torch.mul(gram.matrix, b, out=base.matrix)
        diagonal = gram.matrix.diagonal(dim1=-2, dim2=-1).float()
        base.matrix.diagonal(dim1=-2, dim2=-1).copy_(diagonal.mul_(b).add_(a))
        self.squared(gram, base, 1.0, c, out)

    def gram_of(self, x: Tensor) -> None:
        """``X X'``, or ``X' X`` of a tall one."""
        lying = x.mT if self.is_tall else x
        for i, (first, last) in enumerate(pairwise(self.edges)):
            rows, columns = lying[..., first:last, :], lying[..., first:, :].mT
            self.multiply(rows, columns, out=self.gram.panels[i])
        self.gram.mirror()

    def product(self, left: _Symmetric, right: _Symmetric, out: _Symmetric) -> None:
        """Of two matrices that commute, so that it is symmetric, too."""
        for rows, columns, panel in zip(left.rows, right.columns, out.panels, strict=True):
            self.multiply(rows, columns, out=panel)
        out.mirror()

    def squared(
        self, gram: _Symmetric, base: _Symmetric, beta: float, alpha: float, out: _Symmetric
    ) -> None:
        """``beta * base + alpha * A A``"""
        for of_base, rows, columns, panel in zip(
            base.panels, gram.rows, gram.columns, out.panels, strict=True
        ):
            self.multiply_add(of_base, rows, columns, beta=beta, alpha=alpha, out=panel)
        out.mirror()


def _edges(rows: int) -> list[int]:
    """Where panels begin and end."""
    panels = max(1, min(_MOST_PANELS, rows // _PANEL_ROWS))
    return [rows * i // panels for i in range(panels)] + [rows]
