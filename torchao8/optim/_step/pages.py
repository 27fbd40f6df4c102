"""The op calls of a step whose state is paged: in pieces, with the next piece on its way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchao8.optim._state import paging
from torchao8.optim._step.bucket import Bucket, Work


def pieces(work: Work) -> Work:
    """The same work, in op calls of about ``paging.PIECE`` bytes of state where that is paged.

    Which tensors share a call changes no bit. But parts of a tensor with one scale are stepped by
    the same call, which writes the new scale when all of them are done with the old one.
    """
    if not work.group["is_paged"]:
        return work
    block_wise = work.group["block_wise"]
    buckets: list[Bucket] = []
    for bucket in work.buckets:
        first, held = 0, 0
        for i in range(len(bucket.params)):
            size = sum(t.numel() * t.dtype.itemsize for t in bucket.states_of(i))
            goes_on = i > 0 and bucket.numbers[i] == bucket.numbers[i - 1]
            is_tied = goes_on and not block_wise
            if held and held + size > paging.PIECE and not is_tied:
                buckets.append(bucket.part(first, i))
                first, held = i, 0
            held += size
        buckets.append(bucket.part(first, len(bucket.params)))
    return work._replace(buckets=buckets)


def pages_ahead(calls: Sequence[tuple[Work, Bucket]]) -> list[list[list[Tensor]]]:
    """What to hand to :func:`torchao8.ops.prefetch_pages_` before each call, one after the other.

    Before its first call a device is asked for the pages of that one, and before each call for
    those of the next: then these are on their way while the call is at work.
    """
    plan: list[list[list[Tensor]]] = [[] for _ in calls]
    if not any(work.group["is_paged"] for work, _ in calls):
        return plan
    pages = [
        [
            t
            for i, number in enumerate(bucket.numbers)
            if paging.folder_of(work.group, work.params[number]) is not None
            for t in bucket.states_of(i)
        ]
        for work, bucket in calls
    ]
    last: dict[torch.device, int] = {}
    for i, (_, bucket) in enumerate(calls):
        device = bucket.params[0].device
        if device not in last:
            plan[i] += [pages[i]] if pages[i] else []
        elif pages[i] or pages[last[device]]:
            plan[last[device]].append(pages[i])
        last[device] = i
    for device, i in last.items():
        if pages[i] and device.type == "cuda":
            plan[i].append([])  # nothing more to bring, but a call to wait for its own pages
    return plan
