"""What a step of parameters with one scale a state must know before it begins.

All of a tensor is encoded with one scale, which is the new state's element of largest magnitude: a
pass over parameters, gradients and states looks for it and writes nothing. The maxima of all
parameters go through one all-reduce for each dimension of a mesh that shards them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from torchao8 import ops, sharding
from torchao8.optim._step.bucket import Bucket, Member, Number, Work
from torchao8.optim._step.pages import pages_ahead

# Of a work, by its index, and a bucket of it: a row for each of its tensors, see ops.extremes.
Find = Callable[[int, Bucket], Tensor]


def extremes_of(
    find: Find,
    works: Sequence[Work],
    shard_groups: Callable[[tuple[Number, ...]], list[sharding.ShardGroup]],
) -> list[dict[int, Tensor]]:
    """For each work, the extremes of its parameters as the step ops take them, by their numbers.

    A collective where parameters are sharded. Those with a scale for each block have none.
    """
    found: dict[Member, Tensor] = {}
    calls = [
        (i, work, bucket)
        for i, work in enumerate(works)
        if not work.group["block_wise"]
        for bucket in work.buckets
        if any(bucket.scales.values())  # or it is 32-bit state
    ]
    ahead = pages_ahead([(work, bucket) for _, work, bucket in calls])
    for (i, _, bucket), pages in zip(calls, ahead, strict=True):
        ops.prefetch_pages_(pages, bucket.params[0])
        for k, row in zip(bucket.numbers, find(i, bucket).unbind(), strict=True):
            of_others = found.get((i, k))
            found[i, k] = row if of_others is None else torch.maximum(row, of_others)
    for device in dict.fromkeys(row.device for row in found.values()):
        members = sorted(member for member, row in found.items() if row.device == device)
        if any(sharding.is_dtensor(works[i].params[k]) for i, k in members):
            numbers = tuple((works[i].number, works[i].numbers[k]) for i, k in members)
            found.update(_over_shards(members, found, shard_groups(numbers)))
    return [{k: row for (j, k), row in found.items() if j == i} for i in range(len(works))]


def _over_shards(
    members: list[Member], found: dict[Member, Tensor], groups: list[sharding.ShardGroup]
) -> dict[Member, Tensor]:
    """The largest that the ranks found: of rows that are as long as those of most states."""
    lengths = [len(found[member]) for member in members]
    rows = [
        torch.nn.functional.pad(found[member], (0, max(lengths) - length))
        for member, length in zip(members, lengths, strict=True)
    ]
    largest = sharding.largest_rows(torch.stack(rows), groups).unbind()
    return {
        member: row[:length] for member, row, length in zip(members, largest, lengths, strict=True)
    }
