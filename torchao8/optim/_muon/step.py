"""The step of a group of matrices: what its options say, in the words of :mod:`.update`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from torchao8 import ops
from torchao8.optim._muon.newton_schulz import Triple
from torchao8.optim._muon.update import update_
from torchao8.optim._step.bucket import Bucket, Work
from torchao8.optim.options import Group


class Iterations(NamedTuple):
    """What is made of a direction: the coefficients of each Newton-Schulz iteration, what a matrix
    is divided by at least, and which learning rate it has, see :func:`.update.rate_scale`."""

    coefficients: list[Triple]
    eps: float
    match_rms: bool


def iterations_of(group: Group) -> Iterations:
    """What the options of a group say."""
    given, eps = group["ns_coefficients"], float(group["eps"])
    match_rms = group["adjust_lr_fn"] == "match_rms_adamw"
    if isinstance(given[0], (tuple, list)):
        # Only a step that is not compiled checks all options.
        if len(given) != group["ns_steps"]:
            raise ValueError(
                f"ns_steps: expected {len(given)}, the number of triples in ns_coefficients, got "
                f"{group['ns_steps']}"
            )
        return Iterations([(a, b, c) for a, b, c in given], eps, match_rms)
    a, b, c = given
    return Iterations([(a, b, c)] * group["ns_steps"], eps, match_rms)


def step_(
    work: Work,
    bucket: Bucket,
    arguments: ops.Arguments,
    extremes: list[Tensor],
    found_inf: Tensor | None,
) -> None:
    """Steps the plain tensors of a bucket.

    Args:
        arguments: as the op of the rule takes them.
        extremes: of its parameters, where their states have one scale each.
    """
    assert work.matrices is not None
    a, group = arguments, work.group
    update_(
        a.params,
        a.grads,
        a.values[0],
        a.scales[0],
        a.steps,
        a.factors,
        extremes,
        a.lr,
        a.numbers,
        a.grad_scale,
        found_inf,
        nesterov=group["nesterov"],
        maximize=group["maximize"],
        matrices=[work.matrices[k] for k in bucket.numbers],
        **iterations_of(group)._asdict(),
        block_size=group["block_size"],
        stochastic_params=group["stochastic_rounding"],
        count_steps=bucket.counts,
        state_format=bucket.state_format,
        seed=group["seed"],
    )


def is_exchanged(work: Work) -> bool:
    """Whether it takes the road of :mod:`.exchange`: some of its matrices are DTensors."""
    return work.matrices is not None and bool(work.sharded)
