"""The orthogonal factor of a matrix, by the Newton-Schulz iteration of Muon.

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024): a matrix X, divided
by its Frobenius norm, is replaced by ``a X + b (X X') X + c (X X')^2 X`` a few times. That leaves
the singular vectors of X and moves its singular values towards 1. All products are PyTorch's, of
bfloat16 matrices.

Two things make it faster than a product after the other:

- ``X X'``, and any polynomial of it, is symmetric. On the CPU large ones are computed as panels of
  rows, each from its diagonal on, and mirrored.
- Where X is much longer than high, two iterations are composed among the small matrices and meet X
  once. The first iteration is never one of them: it raises small singular values, and where these
  are small a rounding error of the composed polynomial would be larger than they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

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


def orthogonalize_(stack: Tensor, coefficients: Sequence[Triple], eps: float) -> None:
    """Replaces each matrix by (about) its orthogonal factor.

    Matrices do not influence one another: one with a NaN becomes NaN, the others do not change. A
    matrix of zeros stays one.

    Args:
        stack: (matrices, rows, columns), bfloat16, contiguous, with rows <= columns.
        coefficients: a triple for each iteration.
        eps: what a matrix is divided by at least, in place of its norm.
    """
    if stack.numel() == 0:
        return
    device_type = stack.device.type
    if torch.amp.is_autocast_available(device_type):
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            _iterate_(stack, coefficients, eps)
    else:
        with torch.no_grad():
            _iterate_(stack, coefficients, eps)


def _iterate_(stack: Tensor, coefficients: Sequence[Triple], eps: float) -> None:
    _, rows, columns = stack.shape
    plan = list(_plan(rows, columns, coefficients))
    x, other = stack, torch.empty_like(stack)
    norms = torch.linalg.vector_norm(stack, dim=(1, 2), keepdim=True).clamp(min=eps)
    # Each entry of the plan writes into the other matrix. The last one is to write into the stack.
    if len(plan) % 2:
        x, other = other, x
    torch.div(stack, norms, out=x)
    work = _Workspace(stack)
    for triples in plan:
        work.advance(x, triples, out=other)
        x, other = other, x


def _plan(rows: int, columns: int, coefficients: Sequence[Triple]) -> Iterator[Sequence[Triple]]:
    """One triple for each iteration on its own, two for two composed ones."""
    composes = (
        columns >= 2 * rows and len(set(coefficients)) == 1 and coefficients[0][0] <= _STEEPEST
    )
    at = 0
    while at < len(coefficients):
        length = 2 if composes and 0 < at < len(coefficients) - 1 else 1
        yield coefficients[at : at + length]
        at += length


class _Workspace:
    """The small matrices of an iteration, for matrices of one shape."""

    def __init__(self, stack: Tensor) -> None:
        count, rows, _ = stack.shape
        self.edges = _edges(rows) if count == 1 and stack.is_cpu else [0, rows]
        self.single = count == 1
        self.made: list[Tensor] = []
        self.like = stack
        self.shape = (count, rows, rows)

    def small(self, i: int) -> Tensor:
        while len(self.made) <= i:
            self.made.append(self.like.new_empty(self.shape))
        return self.made[i]

    def advance(self, x: Tensor, triples: Sequence[Triple], out: Tensor) -> None:
        """One iteration, or two composed ones."""
        gram, factor, half = self.small(0), self.small(1), self.small(2)
        self.symmetric(x, x.mT, gram)
        if len(triples) == 1:
            (a, b, c) = triples[0]
            self.symmetric(gram, gram, factor, gram, b, c)
            self.product(factor, x, out, x, a)
            return
        # The first iteration is P X, of P = a I + b A + c A A. The second one has P A P for A.
        self.polynomial(gram, triples[0], half, factor)
        self.symmetric(factor, gram, half)
        self.symmetric(half, factor, gram)
        second = self.small(3)
        self.polynomial(gram, triples[1], half, second)
        self.symmetric(second, factor, half)
        self.product(half, x, out)

    def polynomial(self, gram: Tensor, triple: Triple, base: Tensor, out: Tensor) -> None:
        """``a I + b A + c A A``. Near the end its parts cancel on the diagonal, so the first two
        are added in float32 there; ``base`` is written to."""
        a, b, c = triple
        torch.mul(gram, b, out=base)
        diagonal = gram.diagonal(dim1=1, dim2=2).float()
        base.diagonal(dim1=1, dim2=2).copy_(diagonal.mul_(b).add_(a))
        self.symmetric(gram, gram, out, base, 1.0, c)

    def product(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        base: Tensor | None = None,
        beta: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        """``beta * base + alpha * left @ right``."""
        if self.single:
            left, right, out = (t.squeeze(0) for t in (left, right, out))
            if base is None:
                torch.mm(left, right, out=out)
            else:
                torch.addmm(base.squeeze(0), left, right, beta=beta, alpha=alpha, out=out)
        elif base is None:
            torch.bmm(left, right, out=out)
        else:
            torch.baddbmm(base, left, right, beta=beta, alpha=alpha, out=out)

    def symmetric(
        self,
        left: Tensor,
        right: Tensor,
        out: Tensor,
        base: Tensor | None = None,
        beta: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        """The same, of a product and a base that are symmetric but for rounding."""
        for first, last in zip(self.edges, self.edges[1:], strict=False):
            panel = slice(first, last)
            of_base = None if base is None else base[:, panel, first:]
            of_out = out[:, panel, first:]
            self.product(left[:, panel], right[:, :, first:], of_out, of_base, beta, alpha)
            out[:, last:, panel] = out[:, panel, last:].mT


def _edges(rows: int) -> list[int]:
    """Where panels begin and end."""
    panels = max(1, min(_MOST_PANELS, rows // _PANEL_ROWS))
    return [rows * i // panels for i in range(panels)] + [rows]
