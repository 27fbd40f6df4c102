"""Sharding changes nothing: the bits of sharded training are those of unsharded training."""

import warnings
from typing import Any

import pytest
import torch
from helpers import SMALL, make_params, report
from optim_table import OPTIMIZERS
from ranks import run_ranks
from sharded import (
    Weights,
    distributed_param,
    fsdp_weights,
    gathered,
    groups_of,
    step_with,
    whole,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import torchao8

WORLD_SIZES = [1, 2, 3, 4, 8]
OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}


# -- the same gradients, sharded and not -----------------------------------------------------------


def _fsdp_against_unsharded(rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> None:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for case in OPTIMIZERS:
        for dtype in (torch.float32, torch.bfloat16):
            for options in ({}, {"amsgrad": True, "maximize": True}):
                ends = []
                for m in (mesh, None):
                    params = groups_of(fsdp_weights(m, dtype).parameters(), m is not None)
                    optimizer = case.cls(params, **OPTIONS, **options)
                    step_with(optimizer, range(10))
                    ends.append(gathered(optimizer))
                assert ends[0] == ends[1], (case.cls, dtype, options)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_same_bits_at_every_world_size(world_size: int) -> None:
    """FSDP2 with uneven rows and ranks without rows, ten steps, stochastic rounding."""
    run_ranks(world_size, _fsdp_against_unsharded, (world_size,))


def test_same_bits_under_hsdp() -> None:
    run_ranks(6, _fsdp_against_unsharded, (2, 3))


# Mesh, shape, placements, and whether 8-bit state is kept.
PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...], bool]] = {
    "replicated": ((4,), (7, 300), (Replicate(),), True),
    "along the row, at borders of blocks": ((4,), (6, 1024), (Shard(1),), True),
    "along the row, the last block short": ((4,), (6, 1000), (Shard(1),), False),
    "along the row, one rank with a short block": ((3,), (6, 767), (Shard(1),), True),
    "along the row, a rank without blocks": ((4,), (5, 5, 128), (Shard(1),), True),
    "through blocks": ((4,), (6, 300), (Shard(1),), False),
    "a leading dimension behind the first": ((4,), (3, 6, 300), (Shard(1),), True),
    "rows and columns": ((2, 2), (7, 512), (Shard(0), Shard(1)), True),
    "columns and rows": ((2, 2), (7, 512), (Shard(1), Shard(0)), True),
    "twice along the row": ((2, 2), (5, 1024), (Shard(1), Shard(1)), True),
    "twice along rows, uneven": ((2, 2), (9, 300), (Shard(0), Shard(0)), True),
    "two leading dimensions": ((2, 2), (3, 5, 300), (Shard(0), Shard(1)), True),
    "rows of two dimensions": ((4,), (6, 8, 9, 5), (Shard(1),), False),
    "rows of two dimensions, whole blocks": ((2,), (6, 16, 32, 1), (Shard(1),), True),
    "a vector": ((4,), (1024,), (Shard(0),), False),
    "replicated and sharded": ((2, 2), (9, 300), (Replicate(), Shard(0)), True),
}  # fmt: skip


def _placed_against_unsharded(rank: int, world_size: int, names: list[str]) -> None:
    for name in names:
        mesh_shape, shape, placements, kept = PLACEMENTS[name]
        mesh = init_device_mesh("cpu", mesh_shape)
        for dtype in (torch.float32, torch.bfloat16):
            (p,) = make_params(dtype, [shape])
            q = distributed_param(p, mesh, placements)
            unsharded = torchao8.AdamW8bit([p], optim_bits=8 if kept else 32, **OPTIONS)
            sharded = torchao8.AdamW8bit([q], **OPTIONS)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step_with(sharded, range(3))
            step_with(unsharded, range(3))
            assert ("exp_avg_codes" in sharded.state[q]) == kept, name
            assert len(caught) == (not kept and len(shape) > 1), name
            assert gathered(sharded) == gathered(unsharded), name


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_same_bits_for_every_placement(world_size: int) -> None:
    """Where shards cut blocks, the bits are those of 32-bit state."""
    names = [n for n, (mesh, *_) in PLACEMENTS.items() if torch.Size(mesh).numel() == world_size]
    assert names
    run_ranks(world_size, _placed_against_unsharded, names)


def test_a_cut_row_is_told_once_by_name(assert_expected_inline: Any) -> None:
    (messages, _) = run_ranks(2, _warnings_of_cut_rows)
    assert_expected_inline(
        report(messages),
        """\
AdamW8bit: parameter 0 (w0) of shape [6, 300] is placed as (Shard(dim=1),) on a mesh of shape
    [2], which cuts its blocks of 256 (rows of 300 elements), so that it keeps 32-bit state.
    Shard it along dimension 0, or choose a split of the row, or a smaller block_size, with
    shards that are multiples of the block.""",
    )


def _warnings_of_cut_rows(rank: int, world_size: int) -> list[str]:
    mesh = init_device_mesh("cpu", (world_size,))
    model = Weights(shapes=[(6, 300), (6, 512), (300,)])
    for name, p in list(model.named_parameters()):
        setattr(model, name, distributed_param(p, mesh, [Shard(p.ndim - 1)]))
    optimizer = torchao8.AdamW8bit(model.named_parameters(), min_8bit_size=SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step_with(optimizer, range(3))
    return [str(w.message) for w in caught]


# -- real training ---------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, with rows of 300 elements and of as many as there are hidden units."""

    def __init__(self, hidden: int = 40, out: int = 34) -> None:
        super().__init__()
        self.one = nn.Linear(300, hidden)
        self.two = nn.Linear(hidden, out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.two(torch.nn.functional.gelu(self.one(x)))
        return y


def _train_and_shadow(
    model: nn.Module, cls: Any = torchao8.AdamW8bit, steps: int = 4, micro_batches: int = 1
) -> None:
    """Trains, and feeds the gathered gradients to an unsharded optimizer: the same bits."""
    shadow = [
        nn.Parameter(whole(p.detach()).cpu().clone(), p.requires_grad) for p in model.parameters()
    ]
    sharded = cls(groups_of(model.parameters(), True), **OPTIONS)
    unsharded = cls(groups_of(shadow, False), **OPTIONS)
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        for _ in range(micro_batches):
            x = torch.randn(4, 300, generator=generator).to(dtype)
            model(x).float().square().mean().backward()
        for p, q in zip(model.parameters(), shadow, strict=True):
            q.grad = None if p.grad is None else whole(p.grad).cpu().to(q.dtype).clone()
        sharded.step()
        sharded.zero_grad()
        unsharded.step()
    assert gathered(sharded) == gathered(unsharded)


def _real_training(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    _train_and_shadow(fully_shard(Net(), mesh=mesh))
    _train_and_shadow(fully_shard(Net(), mesh=mesh), micro_batches=3)
    _train_and_shadow(fully_shard(Net().bfloat16(), mesh=mesh), torchao8.Adam8bit)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _train_and_shadow(fully_shard(Net(), mesh=mesh, mp_policy=policy))
    offload = CPUOffloadPolicy(pin_memory=False)
    _train_and_shadow(fully_shard(Net(), mesh=mesh, offload_policy=offload))
    frozen = Net()
    frozen.one.weight.requires_grad_(False)
    _train_and_shadow(fully_shard(frozen, mesh=mesh))
    layered = Net()
    fully_shard(layered.one, mesh=mesh)
    _train_and_shadow(fully_shard(layered, mesh=mesh))


@pytest.mark.parametrize("world_size", [2, 3])
def test_real_training_under_fsdp2(world_size: int) -> None:
    """Gradient accumulation, mixed precision, offload, frozen parameters, several FSDP modules."""
    run_ranks(world_size, _real_training)


def _fsdp_over_tp(rank: int, world_size: int, hidden: int, out: int) -> None:
    mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
    column_wise = {n: ColwiseParallel(output_layouts=Replicate()) for n in ("one", "two")}
    model = parallelize_module(Net(hidden, out), mesh["tp"], column_wise)
    fully_shard(model, mesh=mesh["dp"])
    _train_and_shadow(model)


@pytest.mark.parametrize(("world_size", "hidden", "out"), [(4, 40, 34), (6, 40, 26), (8, 40, 33)])
def test_fsdp_over_tensor_parallelism(world_size: int, hidden: int, out: int) -> None:
    """Rows split twice, by the strided placement; evenly or not by FSDP, and by both."""
    run_ranks(world_size, _fsdp_over_tp, hidden, out)
