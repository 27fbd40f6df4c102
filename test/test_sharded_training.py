"""Sharding changes nothing: the bits of sharded training are those of unsharded training."""

import functools
import itertools
import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import SMALL, make_params, params_for, report, set_grads
from optim_table import OPTIMIZERS, OptimizerCase
from ranks import run_ranks
from sharded import (
    Weights,
    assert_shards_of,
    distributed,
    distributed_param,
    ends_of,
    fsdp_weights,
    gathered,
    groups_of,
    set_global_grads,
    step_with,
    whole,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

import torchao8

OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}


# -- the same gradients, sharded and not -----------------------------------------------------------

# Of what: the dtype of the parameters, and whether all states that a class can have, maximize and
# stochastic rounding of the parameters are on.
KINDS = tuple(itertools.product((torch.float32, torch.bfloat16), (False, True)))
MESHES = ((2,), (3,), (8,), (2, 2))  # those of two dimensions are of HSDP
OTHER_MESHES = ((1,), (4,), (2, 3))


def planned(turn: int) -> list[tuple[int, int]]:
    """Of one run, each class, by its place in the table, with one kind, by its place in KINDS.

    In a run each kind meets classes of 8 bits and of 32, and in the runs of all turns each class
    meets each kind.
    """
    return [(i, (i + i // 4 + turn) % len(KINDS)) for i in range(len(OPTIMIZERS))]


# Each mesh takes another turn. So each class meets each mesh and each kind, and each kind meets
# each mesh; of the triples of the three, these are a fourth. test_coverage_of_table.py watches
# over it.
RUNS = [(mesh, turn) for turn, mesh in enumerate(MESHES)]
OTHER_RUNS = [
    (mesh, turn)
    for mesh in (*MESHES, *OTHER_MESHES)
    for turn in range(len(KINDS))
    if (mesh, turn) not in RUNS
]


def options_of(case: OptimizerCase, everything: bool) -> dict[str, Any]:
    if not everything:
        return OPTIONS
    known = case.known({"amsgrad": True, "maximize": True})
    return {**OPTIONS, **known, "stochastic_rounding": True}


@functools.cache
def _unsharded(i: int, kind: int) -> bytes:
    """The ends of four steps, once for all meshes."""
    case, (dtype, everything) = OPTIMIZERS[i], KINDS[kind]
    with params_for(case):
        params = groups_of(Weights(dtype).parameters(), False)
        optimizer = case.make(params, **options_of(case, everything))
        step_with(optimizer, range(4))
    return ends_of(optimizer)


def _fsdp_against_unsharded(
    rank: int, world_size: int, mesh_shape: tuple[int, ...], runs: list[tuple[int, int, bytes]]
) -> None:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for i, kind, ends in runs:
        case, (dtype, everything) = OPTIMIZERS[i], KINDS[kind]
        with params_for(case):
            params = groups_of(fsdp_weights(mesh, dtype).parameters(), True)
        optimizer = case.make(params, **options_of(case, everything))
        step_with(optimizer, range(4))
        assert_shards_of(optimizer, ends, (case.cls, dtype, everything))


@pytest.mark.parametrize(
    ("mesh", "turn"),
    [*RUNS, *(pytest.param(*run, marks=pytest.mark.thorough) for run in OTHER_RUNS)],
    ids=str,
)
def test_same_bits_on_every_mesh(mesh: tuple[int, ...], turn: int) -> None:
    """FSDP2 with uneven rows and ranks without rows, four steps, stochastic rounding; and HSDP."""
    runs = [(i, kind, _unsharded(i, kind)) for i, kind in planned(turn)]
    run_ranks(math.prod(mesh), _fsdp_against_unsharded, mesh, runs)


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
        kinds = ((torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True))
        for dtype, rounds in kinds:
            (p,) = make_params(dtype, [shape])
            q = distributed_param(p, mesh, placements)
            options = {**OPTIONS, "stochastic_rounding": rounds}
            unsharded = torchao8.AdamW8bit([p], optim_bits=8 if kept else 32, **options)
            sharded = torchao8.AdamW8bit([q], **options)
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
    shards that are multiples of the block (a last one may be short, of 16 elements or more).""",
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


@pytest.mark.parametrize(
    ("world_size", "hidden", "out"),
    [
        (4, 40, 34),
        (6, 40, 33),
        pytest.param(6, 40, 26, marks=pytest.mark.thorough),
        pytest.param(8, 40, 33, marks=pytest.mark.thorough),
    ],
)
def test_fsdp_over_tensor_parallelism(world_size: int, hidden: int, out: int) -> None:
    """Rows split twice, by the strided placement; evenly or not by FSDP, and by both."""
    run_ranks(world_size, _fsdp_over_tp, hidden, out)


def _ddp(rank: int, world_size: int) -> None:
    model = nn.parallel.DistributedDataParallel(Net())
    _train_and_shadow(model)


def test_real_training_under_ddp() -> None:
    """Parameters are plain tensors there; sharded vectors are none."""
    run_ranks(2, _ddp)


# -- gradients that come otherwise -----------------------------------------------------------------


def _partial_gradients(rank: int, world_size: int) -> None:
    """Each rank of a replicated parameter has a part of the sum, as sequence parallelism leaves."""
    mesh = init_device_mesh("cpu", (world_size,))
    for placement in (Replicate(), Shard(0)):
        (p,) = make_params(shapes=[(40, 70)])
        q = distributed_param(p, mesh, [placement])
        sharded, unsharded = (torchao8.AdamW8bit([x], **OPTIONS) for x in (q, p))
        for seed in range(3):
            set_grads([p], seed)
            # Sums of two halves are exact.
            part = p.grad / 2 if rank < 2 else torch.zeros_like(p)
            q.grad = DTensor.from_local(part, mesh, [Partial()], run_check=False)
            sharded.step()
            unsharded.step()
        assert gathered(sharded) == gathered(unsharded)


def _scaled(rank: int, world_size: int) -> None:
    """An infinite gradient on one rank skips the step on all; others are unscaled by the op."""
    mesh = init_device_mesh("cpu", (world_size,))
    model, plain = fully_shard(Net(), mesh=mesh), Net()
    sharded = torchao8.AdamW8bit(groups_of(model.parameters(), True), **OPTIONS, fused=True)
    unsharded = torchao8.AdamW8bit(groups_of(plain.parameters(), False), **OPTIONS)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        p.data.copy_(whole(q.data))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for seed in range(4):
        loss = model(torch.randn(2, 300)).square().mean()
        scaler.scale(loss * (float("inf") if rank == 1 and seed == 1 else 1.0)).backward()
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            p.grad = whole(q.grad) / scaler.get_scale()
        scaler.step(sharded)
        scaler.update()
        sharded.zero_grad()
        if seed != 1:
            unsharded.step()
        assert gathered(sharded) == gathered(unsharded)
    assert scaler.get_scale() == 4.0


def _refused(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    p = nn.Parameter(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()], run_check=False))
    with pytest.raises(ValueError, match=r"params\[0\]: expected a DTensor of shards and replicas"):
        torchao8.AdamW8bit([p])


@pytest.mark.parametrize("function", [_partial_gradients, _scaled, _refused])
def test_gradients(function: Any) -> None:
    run_ranks(3, function)


# -- parameters that come otherwise ----------------------------------------------------------------


def _swapped(rank: int, world_size: int) -> None:
    """accelerate builds the optimizer first, and puts the sharded parameters into its groups."""
    mesh = init_device_mesh("cpu", (world_size,))
    model, plain = Weights(), Weights()
    optimizer = torchao8.AdamW8bit(groups_of(model.parameters(), True), **OPTIONS)
    unsharded = torchao8.AdamW8bit(groups_of(plain.parameters(), False), **OPTIONS)
    names = {p: name for name, p in model.named_parameters()}
    in_groups = [[names[p] for p in group["params"]] for group in optimizer.param_groups]
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group, params in zip(optimizer.param_groups, in_groups, strict=True):
        group["params"] = [sharded[name] for name in params]
    step_with(optimizer, range(3))
    step_with(unsharded, range(3))
    assert gathered(optimizer) == gathered(unsharded)


def _several_meshes(rank: int, world_size: int) -> None:
    """Parameters sharded over all ranks, over two dimensions of them, and not at all, in one op."""
    flat = init_device_mesh("cpu", (world_size,))
    square = init_device_mesh("cpu", (2, world_size // 2))
    plain = make_params(torch.bfloat16, [(40, 70), (9, 300), (12, 512), (7, 300)])
    params = [
        distributed_param(plain[0], flat, [Shard(0)]),
        distributed_param(plain[1], square, [Replicate(), Shard(0)]),
        distributed_param(plain[2], square, [Shard(0), Shard(1)]),
        nn.Parameter(plain[3].detach().clone()),
    ]
    sharded, unsharded = (torchao8.AdamW8bit(ps, **OPTIONS) for ps in (params, plain))
    step_with(sharded, range(3))
    step_with(unsharded, range(3))
    assert gathered(sharded) == gathered(unsharded)


@pytest.mark.parametrize("function", [_swapped, _several_meshes])
def test_parameters(function: Any) -> None:
    run_ranks(4, function)


# -- torch.compile ---------------------------------------------------------------------------------


def _compiled(rank: int, world_size: int, backend: str) -> None:
    mesh = init_device_mesh("cpu", (world_size // 2, 2))
    lr = torch.tensor(0.01)
    ends = []
    for compiled in (True, False):
        plain = make_params(torch.bfloat16, [(40, 70), (9, 300), (12, 512), (700,), (3, 6, 300)])
        placements = [(Replicate(), Shard(0)), (Shard(0), Shard(0)), (Shard(0), Shard(1)),
                      (Shard(0), Replicate()), (Replicate(), Shard(1))]  # fmt: skip
        params = [
            distributed_param(p, mesh, where) for p, where in zip(plain, placements, strict=True)
        ]
        options = {**OPTIONS, "lr": lr.clone(), "stochastic_rounding": True}
        optimizer = torchao8.AdamW8bit(params, **options)
        step, counter = optimizer.step, CompileCounterWithBackend(backend)
        if compiled:
            step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
        for seed in range(3):
            optimizer.param_groups[0]["lr"].mul_(0.9)
            step_with(optimizer, [seed], step)
        assert counter.frame_count == int(compiled)
        ends.append(gathered(optimizer))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("world_size", "backend"),
    [
        (2, "inductor"),
        pytest.param(4, "inductor", marks=pytest.mark.thorough),
        pytest.param(4, "aot_eager", marks=pytest.mark.thorough),
    ],
)
def test_one_graph_and_the_bits_of_eager(world_size: int, backend: str) -> None:
    """A schedule of the learning rate included. Each rank compiles, so that two must do."""
    run_ranks(world_size, _compiled, backend)


def _code_of_step(rank: int, world_size: int) -> str:
    mesh = init_device_mesh("cpu", (world_size,))
    params = list(fully_shard(Weights(torch.bfloat16), mesh=mesh).parameters())
    options = {**OPTIONS, "lr": torch.tensor(0.01), "stochastic_rounding": True}
    optimizer = torchao8.AdamW8bit(params, **options)
    set_global_grads(params, 0)
    _, codes = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    (code,) = codes
    return code


def test_generated_code_has_no_clone() -> None:
    """The ops get the local tensors themselves; nothing is copied or written back."""
    for code in run_ranks(2, _code_of_step):
        assert "torchao8.adam_step_" in code
        assert not re.findall(r"clone|copy_\(", code)
        # The numbers of the rule; nothing else is allocated.
        assert set(re.findall(r"empty_strided\w*\((\([^)]*\))", code)) <= {"(4, )"}


# -- FSDP1 -----------------------------------------------------------------------------------------


def _fsdp1(rank: int, world_size: int, use_orig_params: bool) -> None:
    """Trains, and its own checkpoints, of moments in 32 bits, come back to the same codes."""
    ends: list[Any] = []
    saved: dict[str, Any] = {}
    for resumed in (False, True):
        torch.manual_seed(0)
        model = FullyShardedDataParallel(
            Net(), use_orig_params=use_orig_params, device_id=torch.device("cpu")
        )
        # Offloading to the CPU, the default, copies nothing here: torch (2.13) then gives one
        # buffer for both moments.
        FullyShardedDataParallel.set_state_dict_type(
            model,
            StateDictType.FULL_STATE_DICT,
            FullStateDictConfig(offload_to_cpu=False),
            FullOptimStateDictConfig(offload_to_cpu=False),
        )
        optimizer = torchao8.AdamW8bit(model.parameters(), **OPTIONS)
        for step in range(4):
            if resumed and step == 2:
                optimizer = torchao8.AdamW8bit(model.parameters(), **OPTIONS)
                state = FullyShardedDataParallel.optim_state_dict_to_load(model, optimizer, saved)
                optimizer.load_state_dict(state)
            generator = torch.Generator().manual_seed(step)
            model(torch.randn(4, 300, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
                shapes = {k: tuple(v.shape) for k, v in saved["state"]["one.weight"].items()}
                assert shapes == {"step": (), "exp_avg": (40, 300), "exp_avg_sq": (40, 300)}
        assert any("exp_avg_codes" in state for state in optimizer.state.values())
        ends.append(gathered(optimizer))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_fsdp1(use_orig_params: bool) -> None:
    """Its blocks follow the local tensors, so that other world sizes give other bits."""
    run_ranks(2, _fsdp1, use_orig_params)


def _shards_that_are_not_what_they_say(rank: int, world_size: int) -> None:
    """An uneven split that is none of FSDP2's, and pieces in another order of memory."""
    mesh = init_device_mesh("cpu", (3, 2))
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    p = distributed_param(torch.ones(7, 300), mesh, placements)
    optimizer = torchao8.AdamW8bit([p], min_8bit_size=SMALL)
    p.grad = distributed(torch.ones(7, 300), p)
    if rank < 4:
        optimizer.step()
    else:
        with pytest.raises(ValueError, match=r"parameter 0 of shape \[7, 300\], .* local shape of"):
            optimizer.step()
        assert not optimizer.state
    dist.barrier()
    line = init_device_mesh("cpu", (world_size,))
    part = torch.ones(1, 5, 300).transpose(0, 1)  # of (5, 6, 300) along its second dimension
    p = torch.nn.Parameter(DTensor.from_local(part, line, [Shard(1)], run_check=False))
    optimizer = torchao8.AdamW8bit([p], min_8bit_size=SMALL)
    p.grad = DTensor.from_local(torch.ones(5, 1, 300), line, [Shard(1)], run_check=False)
    optimizer.step()  # one element a row: any strides will do
    part = torch.ones(300, 2, 5).permute(2, 1, 0)
    p = torch.nn.Parameter(DTensor.from_local(part, line, [Shard(1)], run_check=False))
    optimizer = torchao8.AdamW8bit([p], min_8bit_size=SMALL)
    p.grad = DTensor.from_local(torch.ones(5, 2, 300), line, [Shard(1)], run_check=False)
    with pytest.raises(ValueError, match="expected a contiguous local tensor"):
        optimizer.step()


def test_shards_that_are_not_what_they_say() -> None:
    run_ranks(6, _shards_that_are_not_what_they_say)


def _versions(rank: int, world_size: int) -> None:
    """Autograd hears of the write, so that a backward through the old values raises."""
    model = fsdp_weights(init_device_mesh("cpu", (world_size,)))
    optimizer = torchao8.AdamW8bit(model.parameters(), min_8bit_size=SMALL)
    set_global_grads(model.parameters(), 0)
    before = [p._version for p in model.parameters()]
    optimizer.step()
    assert all(p._version > old for p, old in zip(model.parameters(), before, strict=True))


def test_autograd_hears_of_the_write() -> None:
    run_ranks(2, _versions)
