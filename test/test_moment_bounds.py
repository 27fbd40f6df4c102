"""The moments of a rule at the largest magnitudes of a block bound those of each of its elements.

A format may so know a block's scale from one look at its gradients, parameters and stored states,
before it computes a new state. The bound holds to the last bit, without any slack: moments are sums
and products whose coefficients a block shares, and rounding to nearest is monotone and symmetric.
It does not hold where moments divide, as RMSprop's with momentum.

The kernels of 32-bit state say so here: every row of a matrix is a block, and an element of a
vector stands for each row's largest magnitudes.
"""

from typing import Any

import pytest
import torch
from helpers import bits
from optim_table import OPTIMIZERS, OptimizerCase
from torch import Tensor

ROWS, LENGTH, STEPS = 512, 16, 3

CASES = [
    pytest.param(case, options, id=f"{case.cls.__name__}-{options}")
    for case in OPTIMIZERS
    if case.optim_bits == 32
    for options in case.options
]


def divides(case: OptimizerCase, options: dict[str, Any]) -> bool:
    """Whether the new momentum of a rule is a quotient."""
    return case.rule == "rmsprop" and bool(options.get("momentum"))


def numbers(generator: torch.Generator, *shape: int) -> Tensor:
    """Of both signs and many magnitudes, subnormal ones and zeros among them."""
    x = torch.randn(shape, generator=generator)
    x *= torch.randn(shape, generator=generator).mul(4).exp()
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    x[torch.rand(shape, generator=generator) < 0.02] *= 2.0**-130
    return x


def largest(x: Tensor) -> Tensor:
    return x.abs().amax(1, keepdim=True)


@pytest.mark.parametrize(("case", "options"), CASES)
def test_moments_at_the_largest_magnitudes_bound_all_others(
    case: OptimizerCase, options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(1)
    options = {"lr": 0.01, **options}
    if "adaptive" in case.make([torch.nn.Parameter(torch.ones(1, 1))]).defaults:
        options["adaptive"] = False  # a trust ratio is of the tensor, not of the block
    blocks = torch.nn.Parameter(numbers(generator, ROWS, LENGTH))
    optimizer = case.make([blocks], **options)
    # What the largest magnitudes get has no sign, but for that of a gradient that is maximized.
    most = torch.nn.Parameter(largest(blocks.detach()))
    bound = case.make([most], **{**options, "maximize": False})
    broken = 0
    for _ in range(STEPS):
        blocks.grad = numbers(generator, ROWS, LENGTH)
        with torch.no_grad():
            most.copy_(largest(blocks))
            most.grad = largest(blocks.grad)
            for key, value in optimizer.state[blocks].items():
                bound.state[most][key] = value.clone() if value.dim() == 0 else largest(value)
        optimizer.step()
        bound.step()
        for key, value in optimizer.state[blocks].items():
            if value.dim() == 0:
                assert bits(value) == bits(bound.state[most][key])
            else:
                broken += int((largest(value) > bound.state[most][key]).sum())
    assert (broken > 0) == divides(case, options)
