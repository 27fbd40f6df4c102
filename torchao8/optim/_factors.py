"""What a step multiplies gradients and learning rates by: clipping and trust ratios.

They need the norm of a whole parameter, or of its whole gradient, before the update begins. The
sums of squares are exact, so that neither sharding nor the order of a sum changes a bit; those of
all parameters go through one all-reduce for each dimension of a mesh that shards them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao8 import ops, sharding
from torchao8.optim import _clipping
from torchao8.optim._buckets import Group, Work

# A parameter, by the number of its group and its own there.
Number = tuple[int, int]


class Rule(NamedTuple):
    """What an optimizer has to do with factors.

    Attributes:
        has_trust_ratios: of a group.
        trust_ratios: of a group, the norms of its parameters and those of its gradients, both
            float64 of shape (n,): what their learning rates are multiplied by.
        shard_groups: the process groups that share some parameters, see
            :func:`torchao8.sharding.shard_groups`.
    """

    has_trust_ratios: Callable[[Group], bool]
    trust_ratios: Callable[[Group, Tensor, Tensor], Tensor]
    shard_groups: Callable[[tuple[Number, ...]], list[tuple[str, list[int]]]]


def factors_of(
    rule: Rule, works: Sequence[Work], grad_scale: Tensor | None, found_inf: Tensor | None
) -> list[list[Tensor]]:
    """For each work, the factors of its parameters as the step ops take them, or none.

    Histories of norms take in those of this step. A collective where parameters are sharded.
    """
    wanted = [
        i
        for i, work in enumerate(works)
        if rule.has_trust_ratios(work.group) or _clipping.clips(work.group)
    ]
    result: list[list[Tensor]] = [[] for _ in works]
    for device in dict.fromkeys(grad.device for i in wanted for grad in works[i].grads):
        members = [
            (i, k) for i in wanted for k, grad in enumerate(works[i].grads) if grad.device == device
        ]
        grad_norms, param_norms = _norms(rule, works, members)
        if grad_scale is not None:
            grad_norms = grad_norms / grad_scale.to(device)
        for i in wanted:
            mine = [n for n, (j, _) in enumerate(members) if j == i]
            if not mine:
                continue
            part = slice(mine[0], mine[-1] + 1)  # members are in the order of the works
            numbers = [members[n][1] for n in mine]
            both = _factors(rule, works[i], numbers, grad_norms[part], param_norms[part], found_inf)
            result[i] = result[i] or [both] * len(works[i].grads)
            for k, pair in zip(numbers, both.unbind(), strict=True):
                result[i][k] = pair
    return result


def _norms(
    rule: Rule, works: Sequence[Work], members: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """The norms of whole gradients and, if the rule asks for them, of whole parameters."""
    tensors = [works[i].grads[k] for i, k in members]
    numbers = [(works[i].number, works[i].numbers[k]) for i, k in members]
    if any(rule.has_trust_ratios(works[i].group) for i, _ in members):
        tensors += [sharding.local(works[i].params[k]) for i, k in members]
        numbers += numbers
    rows = ops.sum_squares(tensors)
    if any(sharding.is_dtensor(works[i].params[k]) for i, k in members):
        rows = sharding.sum_rows(rows, rule.shard_groups(tuple(numbers)))
    norms = ops.norms(rows)
    return norms[: len(members)], norms[-len(members) :]


def _factors(
    rule: Rule,
    work: Work,
    numbers: Sequence[int],
    grad_norms: Tensor,
    param_norms: Tensor,
    found_inf: Tensor | None,
) -> Tensor:
    """float64 of shape (n, 2), for the parameters of these numbers."""
    clip = torch.ones_like(grad_norms)
    if _clipping.clips(work.group):
        clip = torch.ops.torchao8.clip_factors_(
            [work.histories[k] for k in numbers],
            grad_norms,
            [work.steps[k] for k in numbers],
            found_inf if found_inf is None else found_inf.to(clip.device),
            work.group["percentile_clipping"],
        )
    ratio = torch.ones_like(clip)
    if rule.has_trust_ratios(work.group):
        ratio = rule.trust_ratios(work.group, param_norms, grad_norms * clip)
    return torch.stack((clip, ratio), 1)
