"""What the tests on ranks stand on: a rank that fails is told, and disturbs nothing after it."""

import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import SMALL
from optim_table import OPTIMIZERS
from ranks import run_ranks
from sharded import Weights, assert_shards_of, ends_of, fsdp_weights, groups_of, step_with
from torch.distributed.device_mesh import init_device_mesh

import torchao8


def _sum(rank: int, world_size: int, term: int) -> int:
    total = torch.tensor(rank + term)
    dist.all_reduce(total)
    return int(total)


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_talk_and_answer(world_size: int) -> None:
    assert run_ranks(world_size, _sum, 5) == [sum(range(5, 5 + world_size))] * world_size


def _raise(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("that is why")
    time.sleep(3600)


def _die(rank: int, world_size: int) -> None:
    if rank == 1:
        os._exit(3)
    time.sleep(3600)


@pytest.mark.parametrize(
    ("function", "message"),
    [(_raise, "^rank 1 raised:\n(?s:.*)ValueError: that is why"), (_die, "^rank 1 died")],
)
def test_the_first_failure_is_told_and_none_waits(function: Any, message: str) -> None:
    """Though the other ranks sleep for an hour. The next call knows nothing of it."""
    with pytest.raises(AssertionError, match=message):
        run_ranks(3, function)
    assert run_ranks(3, _sum, 0) == [3] * 3


def _patch(rank: int, world_size: int) -> bool:
    was_patched = hasattr(torchao8, "patched")
    torchao8.patched = True  # type: ignore[attr-defined]
    return was_patched


def test_ranks_are_new_at_each_call() -> None:
    for _ in range(2):
        assert run_ranks(2, _patch) == [False, False]


def _changed(rank: int, world_size: int, cls: Any, ends: bytes) -> list[str]:
    """What is found wrong if on the last rank an element of one tensor is."""
    mesh = init_device_mesh("cpu", (world_size,))
    optimizer = cls(groups_of(fsdp_weights(mesh).parameters(), True), min_8bit_size=SMALL)
    step_with(optimizer, range(2))
    assert_shards_of(optimizer, ends, "unchanged")
    p = optimizer.param_groups[0]["params"][1]
    found = []
    for key, value in {"param": p.detach(), **optimizer.state[p]}.items():
        if key == "step":
            continue
        here = value.to_local().view(torch.uint8).flatten()
        here[-1] ^= int(rank == world_size - 1)
        try:
            assert_shards_of(optimizer, ends, "changed")
        except AssertionError as error:
            found.append(key if f"('changed', '{key}')" in str(error) else str(error))
        here[-1] ^= int(rank == world_size - 1)
    return found


@pytest.mark.parametrize("case", OPTIMIZERS[1:4:2], ids=lambda case: case.cls.__name__)
def test_a_wrong_bit_on_a_rank_is_seen(case: Any) -> None:
    optimizer = case.cls(groups_of(Weights().parameters(), False), min_8bit_size=SMALL)
    step_with(optimizer, range(2))
    found = run_ranks(3, _changed, case.cls, ends_of(optimizer))
    assert found == [[], [], ["param", *case.state_keys(case.optim_bits)[1:]]]
