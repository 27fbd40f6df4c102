"""What a step multiplies gradients and learning rates by: clipping and trust ratios.

Beside them, the gradients of matrices that no step can take are multiplied by NaN.

They need norms of whole parameters, of their gradients or of their updates, before the update
begins. The sums of squares are exact, so that neither sharding nor the order of a sum changes a
bit; those of all parameters go through one all-reduce for each dimension of a mesh that shards
them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchao8 import ops, sharding
from torchao8.optim._muon import factors as bad_gradients
from torchao8.optim._step import clipping
from torchao8.optim._step.bucket import Member, Work
from torchao8.optim._step.pages import pages_ahead
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.options import clips

# Of a trust ratio: a learning rate times much more is no float32 any more, and a gradient of next
# to nothing, whose update is a finite one, would make its parameter infinite.
LARGEST_RATIO = 2.0**100


def factors_of(
    optimizer: OptimizerContract,
    works: Sequence[Work],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> list[list[Tensor]]:
    """For each work, the factors of its parameters as the step ops take them, or none.

    Histories of norms take in those of this step. A collective where parameters are sharded.
    """
    wanted = [
        i
        for i, work in enumerate(works)
        if optimizer._has_trust_ratios(work.group)
        or clips(work.group)
        or optimizer._is_of_matrices(work.group)
    ]
    result: list[list[Tensor]] = [[] for _ in works]
    for device in dict.fromkeys(grad.device for i in wanted for grad in works[i].grads):
        members = [
            (i, k) for i in wanted for k, grad in enumerate(works[i].grads) if grad.device == device
        ]
        scale, found = (t if t is None else t.to(device) for t in (grad_scale, found_inf))
        pairs = _Device(optimizer, works, members, scale, found).factors()
        for (i, k), pair in zip(members, pairs.unbind(), strict=True):
            result[i] = result[i] or [pair] * len(works[i].grads)
            result[i][k] = pair
    return result


class _Device:
    """The factors of the parameters on one device."""

    def __init__(
        self,
        optimizer: OptimizerContract,
        works: Sequence[Work],
        members: list[Member],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        self.optimizer = optimizer
        self.works = works
        self.members = members
        self.grad_scale = grad_scale
        self.found_inf = found_inf
        groups = [works[i].group for i, _ in members]
        self.clips = any(clips(group) for group in groups)
        self.trusts = any(optimizer._has_trust_ratios(group) for group in groups)
        self.of_matrices = [n for n, group in enumerate(groups) if optimizer._is_of_matrices(group)]

    def factors(self) -> Tensor:
        """Of shape (n, 2), in the order of the members."""
        if not self.of_matrices:
            return self._of_norms()
        flags = self._matrix_factors()
        if not (self.clips or self.trusts):
            return torch.stack((flags, torch.ones_like(flags)), 1)
        pairs = self._of_norms()
        return torch.stack((pairs[:, 0] * flags, pairs[:, 1]), 1)

    def _matrix_factors(self) -> Tensor:
        """For each member 1, or NaN where it is a matrix with a gradient that no step can take, on
        this rank or on another one."""
        members = [self.members[n] for n in self.of_matrices]
        found = bad_gradients.OP([self.works[i].grads[k] for i, k in members])
        if any(sharding.is_dtensor(self.works[i].params[k]) for i, k in members):
            numbers = tuple((self.works[i].number, self.works[i].numbers[k]) for i, k in members)
            is_bad = found.isnan().to(torch.int64).unsqueeze(1)
            is_bad = sharding.largest_rows(is_bad, self.optimizer._shard_groups(numbers))
            found = torch.where(is_bad.squeeze(1) > 0, torch.nan, 1.0).to(found.dtype)
        if len(members) == len(self.members):
            return found
        flags = list(torch.ones(len(self.members), dtype=found.dtype, device=found.device).unbind())
        for n, flag in zip(self.of_matrices, found.unbind(), strict=True):
            flags[n] = flag
        return torch.stack(flags)

    def _of_norms(self) -> Tensor:
        """What clipping and trust ratios multiply by."""
        measures = self.trusts and self.optimizer._compares_updates
        grads = [self.works[i].grads[k] for i, k in self.members]
        params = [sharding.local(self.works[i].params[k]) for i, k in self.members]
        device = grads[0].device
        clip = torch.ones(len(self.members), dtype=ops.number_dtype(device), device=device)
        norms = param_norms = clip
        if measures:
            if self.clips:
                norms = self._norms(ops.sum_squares(grads))
        elif self.trusts:
            rows = ops.sum_squares(grads + params)
            norms, param_norms = self._norms(rows).split(len(grads))
        else:
            norms = self._norms(ops.sum_squares(grads))
        if self.grad_scale is not None:
            norms = norms / self.grad_scale
        if self.clips:
            clip = self._clip(norms)
        if not self.trusts:
            return torch.stack((clip, torch.ones_like(clip)), 1)
        if measures:
            rows = torch.cat((self._update_sums(clip), ops.sum_squares(params)))
            norms, param_norms = self._norms(rows).split(len(params))
        else:
            norms = norms * clip
        return torch.stack((clip, self._ratios(param_norms, norms)), 1)

    def _parts(self) -> list[tuple[Work, list[int], slice]]:
        """Each work with the numbers of its members and where these stand; they are neighbours."""
        parts: dict[int, list[int]] = {}
        for n, (i, _) in enumerate(self.members):
            parts.setdefault(i, []).append(n)
        return [
            (self.works[i], [self.members[n][1] for n in ns], slice(ns[0], ns[-1] + 1))
            for i, ns in parts.items()
        ]

    def _norms(self, rows: Tensor) -> Tensor:
        """Of the whole of what this rank has the sums of: one row for each member, or several."""
        if any(sharding.is_dtensor(self.works[i].params[k]) for i, k in self.members):
            numbers = [(self.works[i].number, self.works[i].numbers[k]) for i, k in self.members]
            numbers *= len(rows) // len(numbers)
            rows = sharding.sum_rows(rows, self.optimizer._shard_groups(tuple(numbers)))
        return ops.norms(rows)

    def _clip(self, norms: Tensor) -> Tensor:
        clip = []
        for work, numbers, part in self._parts():
            if not clips(work.group):
                clip.append(torch.ones_like(norms[part]))
                continue
            clip.append(
                clipping.OP(
                    [work.histories[k] for k in numbers],
                    norms[part],
                    [work.steps[k] for k in numbers],
                    self.found_inf,
                    work.group["percentile_clipping"],
                )
            )
        return torch.cat(clip)

    def _ratios(self, param_norms: Tensor, norms: Tensor) -> Tensor:
        ratios = [
            self.optimizer._trust_ratios(work.group, param_norms[part], norms[part])
            if self.optimizer._has_trust_ratios(work.group)
            else torch.ones_like(norms[part])
            for work, _, part in self._parts()
        ]
        return torch.cat(ratios).clamp(max=LARGEST_RATIO)

    def _update_sums(self, clip: Tensor) -> Tensor:
        """A row for each member, of what this rank has of it."""
        none = torch.zeros(ops.SUM_LIMBS, dtype=torch.int64, device=clip.device)
        pairs = torch.stack((clip, torch.ones_like(clip)), 1).unbind()
        rows: list[Tensor] = []
        parts = self._parts()
        calls = [
            (work, bucket)
            for work, _, _ in parts
            for bucket in work.buckets
            if bucket.params[0].device == clip.device
        ]
        ahead = iter(pages_ahead(calls))
        for work, numbers, part in parts:
            mine = dict.fromkeys(numbers, none)
            own = dict(zip(numbers, pairs[part], strict=True))
            for bucket in work.buckets:
                if bucket.params[0].device != clip.device:
                    continue
                ops.prefetch_pages_(next(ahead), bucket.params[0])
                factors = [own[k] for k in bucket.numbers] if self.clips else []
                sums = self.optimizer._update_sums(work.group, bucket, factors, self.grad_scale)
                for k, row in zip(bucket.numbers, sums.unbind(), strict=True):
                    mine[k] = row if mine[k] is none else mine[k] + row
            rows += mine.values()
        return torch.stack(rows)
