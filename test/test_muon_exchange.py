"""Muon on sharded matrices: the bits of unsharded ones, and what goes between the ranks."""

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, bits, make_params, set_grads
from ranks import run_ranks
from sharded import (
    Weights,
    assert_shards_of,
    distributed,
    distributed_param,
    ends_of,
    gathered,
    of_rank,
    set_global_grads,
    step_with,
    whole,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import torchao8
from torchao8 import sharding
from torchao8.optim._muon import update

# Rows that no world size divides, fewer rows than ranks, tall and wide ones, some that share a
# stack, one that is a stack of its own and computed in panels.
SHAPES = ((40, 70), (7, 300), (300, 20), (13, 300), (2, 33), (40, 70), (1, 513), (260, 400))
OPTIONS = {"lr": 0.02, "weight_decay": 0.1, "min_8bit_size": SMALL, "seed": 3}
F32, BF16 = torch.float32, torch.bfloat16
# The dtype of the parameters, the class, options, and elements that a rank owns in a round.
KINDS: list[tuple[torch.dtype, str, dict[str, Any], int]] = [
    (F32, "Muon8bit", {}, update.CHUNK),
    (F32, "Muon", {"maximize": True, "ns_steps": 2}, 3000),
    (BF16, "Muon", {"stochastic_rounding": True, "nesterov": False}, update.CHUNK),
    (BF16, "Muon8bit", {"stochastic_rounding": True, "adjust_lr_fn": "match_rms_adamw"}, 1),
    (F32, "Muon8bit", {"block_wise": False, "percentile_clipping": 60}, update.CHUNK),
    (BF16, "PagedMuon8bit", {"state_format": "mulaw"}, 20_000),
]
STEPS = range(10)


def make(name: str, params: Any, **options: Any) -> torchao8.Muon:
    cls: type[torchao8.Muon] = getattr(torchao8, name)
    return cls(params, **{**OPTIONS, **options})


# -- the same gradients, sharded and not -----------------------------------------------------------


def _unsharded(rank: int, world_size: int) -> list[bytes]:
    ends = []
    for dtype, name, options, _ in KINDS:
        optimizer = make(name, Weights(dtype, SHAPES).parameters(), **options)
        step_with(optimizer, STEPS)
        ends.append(ends_of(optimizer))
    return ends


@pytest.fixture(scope="module")
def unsharded() -> list[bytes]:
    """The ends of all kinds, in a process with one thread, as the ranks have: the bits of a product
    of matrices may depend on the threads."""
    return run_ranks(1, _unsharded)[0]


def _fsdp(rank: int, world_size: int, mesh_shape: tuple[int, ...], ends: list[bytes]) -> None:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for (dtype, name, options, chunk), end in zip(KINDS, ends, strict=True):
        update.CHUNK = chunk
        params = fully_shard(Weights(dtype, SHAPES), mesh=mesh).parameters()
        optimizer = make(name, params, **options)
        step_with(optimizer, STEPS)
        assert_shards_of(optimizer, end, (dtype, name, options))


@pytest.mark.parametrize("mesh", [(1,), (2,), (3,), (4,), (2, 2)], ids=str)
def test_same_bits_on_every_mesh(unsharded: list[bytes], mesh: tuple[int, ...]) -> None:
    """FSDP2 with uneven rows and ranks without rows, ten steps, in one round or several; HSDP."""
    run_ranks(math.prod(mesh), _fsdp, mesh, unsharded)


STRIDED = _StridedShard(0, split_factor=2)
# On a mesh of 2 x 2. 8-bit state needs shards of whole blocks: those of other columns have 32 bits.
PLACED: list[tuple[str, tuple[int, ...], tuple[Any, ...]]] = [
    ("refuse", (40, 70), (Shard(0), Shard(0))),
    ("refuse", (40, 70), (STRIDED, Shard(0))),
    ("refuse", (11, 512), (Shard(0), Shard(1))),
    ("refuse", (12, 512), (Replicate(), Shard(1))),
    ("refuse", (40, 70), (Replicate(), Replicate())),
    ("refuse", (9, 300), (Shard(0), Replicate())),
    ("refuse", (40, 70), ()),  # a plain tensor
    ("batch", (5, 24, 300), (Shard(0), Replicate())),  # whole experts
    ("batch", (1, 24, 300), (Shard(0), Shard(0))),  # and ranks that have none
    ("refuse", (0, 300), (Shard(0), Shard(0))),
    ("batch", (3, 24, 300), (Shard(0), Shard(1))),
    ("batch", (4, 10, 512), (Shard(1), Shard(2))),
    ("batch", (2, 3, 20, 16), (Shard(1), Shard(0))),
    ("flatten", (13, 3, 5, 5), (Shard(0), Shard(0))),
    ("flatten", (6, 4, 300), (Shard(1), Replicate())),
]


def _placed(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, world_size // 2))
    for name, dtype, block_wise in (("Muon8bit", BF16, True), ("Muon", BF16, True),
                                    ("Muon8bit", F32, True), ("Muon8bit", F32, False)):  # fmt: skip
        groups: list[dict[str, dict[str, Any]]] = [{}, {}]
        plain = make_params(dtype, [shape for _, shape, _ in PLACED])
        for (higher_dims, _, placements), p in zip(PLACED, plain, strict=True):
            q = nn.Parameter(p.detach().clone())
            q = distributed_param(q, mesh, placements) if placements else q
            for each, x in zip(groups, (p, q), strict=True):
                group = each.setdefault(higher_dims, {"higher_dims": higher_dims, "params": []})
                group["params"].append(x)
        options = {"stochastic_rounding": True, "block_wise": block_wise}
        alone, shared = (make(name, list(each.values()), **options) for each in groups)
        step_with(alone, range(4))
        step_with(shared, range(4))
        assert gathered(shared) == gathered(alone), (name, dtype, block_wise)


def test_same_bits_however_they_are_placed() -> None:
    """FSDP over tensor parallelism, columns, replicas, plain tensors, experts and convolutions."""
    run_ranks(4, _placed)


def _replicas_of_shards_over_tensor_parallelism(rank: int, world_size: int) -> None:
    """The parts of a matrix lie on four of eight ranks, along two dimensions of the mesh."""
    mesh = init_device_mesh("cpu", (2, 2, 2))
    placements = [Replicate(), STRIDED, Shard(0)]
    for _ in range(2):
        plain = make_params(BF16, [(40, 70), (16, 300)])
        params = [distributed_param(p, mesh, placements) for p in plain]
        alone, shared = (make("Muon8bit", ps) for ps in (plain, params))
        step_with(alone, range(2))
        step_with(shared, range(2))
        assert gathered(shared) == gathered(alone)
    # Made once: each takes threads and connections.
    assert len(sharding._made_groups) == 1


def test_a_group_of_ranks_that_no_dimension_of_the_mesh_has() -> None:
    run_ranks(8, _replicas_of_shards_over_tensor_parallelism)


def _part_of_the_ranks(rank: int, world_size: int, store: str) -> None:
    """A mesh of four of five ranks; the fifth one has no part of the parameter. And all again when
    the process groups have been destroyed."""
    for again in (False, True):
        if again:
            dist.barrier()
            dist.destroy_process_group()
            place = {"rank": rank, "world_size": world_size}
            dist.init_process_group("gloo", init_method=f"file://{store}", **place)
        mesh = DeviceMesh("cpu", torch.arange(4).reshape(2, 2))
        (p,) = make_params(BF16, [(40, 70)])
        q = distributed_param(p, mesh, [Shard(0), Shard(1)])
        alone, shared = make("Muon", [p]), make("Muon", [q])
        step_with(alone, range(2))
        step_with(shared, range(2))
        if rank < 4:
            assert bits(whole(q)) == bits(p)
            assert list(sharding._made_groups) == [(0, 1, 2, 3)]
        else:
            assert not sharding._made_groups


def test_ranks_without_a_part(tmp_path: Path) -> None:
    run_ranks(5, _part_of_the_ranks, str(tmp_path / "store"))


def _changed_gradients(rank: int, world_size: int) -> None:
    """Parameters that have no gradient at a step; the plan is another one then."""
    mesh = init_device_mesh("cpu", (world_size,))
    plain = make_params(F32, SHAPES)
    params = list(fully_shard(Weights(F32, SHAPES), mesh=mesh).parameters())
    alone, shared = (make("Muon8bit", ps) for ps in (plain, params))
    for seed in range(4):
        for ps, optimizer in ((plain, alone), (params, shared)):
            set_global_grads(ps, seed)
            for i, p in enumerate(ps):
                if i % 3 == seed % 3 or seed == 3:
                    p.grad = None
            optimizer.step()
    assert gathered(shared) == gathered(alone)


def test_parameters_without_a_gradient() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_ranks(2, _changed_gradients)


# -- gradients that no step can take, and refusals -------------------------------------------------


def spoiled_grads(params: list[Tensor], seed: int) -> None:
    """Gradients, with a NaN in the last row of one matrix, and an infinity in the first of
    another."""
    plain = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in params]
    set_grads(plain, seed)
    plain[0].grad[-1, 3] = torch.nan
    plain[3].grad[0, 0] = -torch.inf
    for p, q in zip(params, plain, strict=True):
        p.grad = distributed(q.grad, p)


def _bad_gradients(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    plain = make_params(F32, SHAPES)
    params = list(fully_shard(Weights(F32, SHAPES), mesh=mesh).parameters())
    alone, shared = (make("Muon8bit", ps) for ps in (plain, params))
    step_with(alone, range(2))
    step_with(shared, range(2))
    before = [bits(whole(p)) for p in params]
    for ps, optimizer in ((plain, alone), (params, shared)):
        spoiled_grads(ps, 2)
        optimizer.step()
    assert gathered(shared) == gathered(alone)
    kept = [i for i, p in enumerate(params) if bits(whole(p)) == before[i]]
    assert kept == [0, 3]
    step_with(alone, range(3, 5))
    step_with(shared, range(3, 5))
    assert gathered(shared) == gathered(alone)


def test_a_bad_gradient_of_one_rank_keeps_its_matrix_on_all() -> None:
    run_ranks(4, _bad_gradients)


def _refused(rank: int, world_size: int) -> None:
    """What only an op finds, in the last of several rounds."""
    update.CHUNK = 1
    mesh = init_device_mesh("cpu", (world_size,))
    params = list(fully_shard(Weights(F32, SHAPES), mesh=mesh).parameters())
    optimizer = make("Muon8bit", params)
    step_with(optimizer, range(2))
    optimizer.state[params[4]]["step"].fill_(0.5)
    set_global_grads(params, 2)
    before = of_rank(optimizer)
    with pytest.raises(RuntimeError, match="steps"):
        optimizer.step()
    assert of_rank(optimizer) == before


def test_a_refused_step_changes_nothing() -> None:
    run_ranks(2, _refused)


def _not_what_they_say(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (3, 2))
    # Not split as FSDP2 splits what tensor parallelism has: the last ranks have other rows.
    p = distributed_param(torch.ones(7, 300), mesh, [STRIDED, Shard(0)])
    optimizer = make("Muon", [p])
    p.grad = distributed(torch.ones(7, 300), p)
    if rank >= 4:
        with pytest.raises(ValueError, match=r"parameter 0 .* local shape of"):
            optimizer.step()
        assert not optimizer.state


def test_shards_that_are_not_what_they_say() -> None:
    """Refused before anything is sent: what an owner got would not fit."""
    run_ranks(6, _not_what_they_say)


# -- what goes between the ranks -------------------------------------------------------------------


def _collectives(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Elements that are sent to other ranks by each all-to-all, and elements received."""
    seen: list[tuple[int, int]] = []
    real = dist.all_to_all_single

    def counted(output: Tensor, given: Tensor, received: Any, sent: Any, group: Any) -> None:
        assert output.dtype == given.dtype == torch.bfloat16
        others = [r for r in range(world_size) if r != rank]
        seen.append((sum(sent[r] for r in others), sum(received[r] for r in others)))
        real(output, given, received, sent, group)

    dist.all_to_all_single = counted
    mesh = init_device_mesh("cpu", (world_size,))
    optimizer = make("Muon", fully_shard(Weights(F32, [(256, 256)] * 4), mesh=mesh).parameters())
    step_with(optimizer, range(1))
    # What each rank has whole is not sent.
    experts = [distributed_param(torch.ones(2, 64, 64), mesh, [Shard(0)])]
    copies = [distributed_param(torch.ones(64, 64), mesh, [Replicate()])]
    groups = [{"params": experts, "higher_dims": "batch"}, {"params": copies}]
    step_with(make("Muon", groups), range(1))
    return seen


def test_two_all_to_alls_a_round() -> None:
    """Four matrices, two of which each rank owns: it sends half of the others, and gets half of its
    own; and back."""
    for seen in run_ranks(2, _collectives):
        assert seen == [(65536, 65536), (65536, 65536)]


# -- torch.compile ---------------------------------------------------------------------------------


def _compiled(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    ends = []
    for compiled in (False, True):
        params = fully_shard(Weights(BF16, SHAPES[:3]), mesh=mesh).parameters()
        optimizer = make("Muon8bit", params, lr=torch.tensor(0.02), stochastic_rounding=True)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for seed in range(3):
            optimizer.param_groups[0]["lr"].mul_(0.9)
            step_with(optimizer, [seed], step)
        ends.append(gathered(optimizer))
    assert ends[0] == ends[1]
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="which no graph can hold: compile"):
        step_with(optimizer, [0], step)


def test_compiled_around_the_exchange() -> None:
    """A compiled step has the bits of eager; it is no single graph."""
    run_ranks(2, _compiled)
