"""bfloat16 parameters that are rounded stochastically: which numbers, unbiased, wherever they lie.

The oracle is a float32 parameter of the same numbers. It takes the same step, as all arithmetic is
in float32, and is stored as it is; rounding it by the random number of each element, made here in
whole numbers of Python, gives the bfloat16 parameter to the bit.
"""

import copy
import functools
import itertools
import math
import re
from typing import Any

import pytest
import reference
import torch
from adam_call import Call, assert_same_bits, copy_call, live_state, new_call, run
from cpu_paths import Workers, every_path
from helpers import (
    SMALL,
    all_bits,
    assert_same_training,
    bits,
    make_params,
    needs_kernels,
    set_grads,
    train,
)
from helpers import through_file as through
from optim_table import OptimizerCase, every_optimizer
from ranks import run_ranks
from sharded import distributed, distributed_param, gathered, step_with
from test_paths import laid_out, large_call, reversed_call
from test_sharded_training import PLACEMENTS
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

import torchao8
from torchao8 import ops, shard_layout, sharding

BF16_MAX = torch.finfo(torch.bfloat16).max


# -- the oracle --------------------------------------------------------------------------------

WORD, LONG = 2**32, 2**64
GOLDEN = 0x9E3779B97F4A7C15
# 16 bits behind the point of the roots of the first primes, the last three being the lane.
LANE_FACTORS = [
    (math.isqrt(prime << 32) % 2**16 & ~7) | lane
    for lane, prime in enumerate([2, 3, 5, 7, 11, 13, 17, 19])
]


def mix_bits(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % LONG
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % LONG
    return z ^ (z >> 31)


@functools.lru_cache(maxsize=100_000)
def coefficients(seed: int, step: int, first: int) -> tuple[int, int, int, int]:
    """Of a parameter's block that begins at this element of the whole tensor."""
    key = mix_bits(mix_bits((seed + GOLDEN) % LONG) ^ mix_bits(4 * step + 3))
    z = mix_bits((key + GOLDEN * first) % LONG)
    w = mix_bits((z + GOLDEN) % LONG)
    return z % WORD, z // WORD, w % WORD, w // WORD


def random_number(seed: int, step: int, first: int, i: int) -> int:
    """The 16 bits of the i-th element of a block."""
    c0, c1, c2, c3 = coefficients(seed, step, first)
    t, j = LANE_FACTORS[i % 8], i // 8
    return (c0 + c1 * t + (c2 + c3 * t) * j) % WORD >> 16


def places_in_blocks(
    shape: tuple[int, ...], block_size: int, offset: int = 0, stride: int | None = None
) -> list[tuple[int, int]]:
    """Of each element: where its block begins in the whole tensor, and its number in the block."""
    k = reference.row_dims(shape, block_size)
    rows, length = math.prod(shape[:k]), math.prod(shape[k:])
    stride = length if stride is None else stride
    return [
        (offset + row * stride + column // block_size * block_size, column % block_size)
        for row in range(rows)
        for column in range(length)
    ]


def places_in_32bit(
    shape: tuple[int, ...], offset: int = 0, stride: int | None = None
) -> list[tuple[int, int]]:
    """The same where there are no blocks: of 256 elements of the whole tensor."""
    length = shape[-1] if len(shape) > 1 else math.prod(shape)
    stride = length if stride is None else stride
    elements = [
        offset + row * stride + column
        for row in range(math.prod(shape) // max(length, 1))
        for column in range(length)
    ]
    return [(element - element % 256, element % 256) for element in elements]


def rounded(x: Tensor, seed: int, step: int, places: list[tuple[int, int]]) -> Tensor:
    """float32 numbers as bfloat16, each up or down by its random number."""
    patterns = [u % WORD for u in x.detach().cpu().contiguous().view(-1).view(torch.int32).tolist()]
    assert len(patterns) == len(places)
    result = []
    for u, (first, i) in zip(patterns, places, strict=True):
        if u % 2**31 > 0x7F800000:
            result.append(u >> 16 | 0x40)
        else:
            result.append((u + random_number(seed % LONG, step, first, i)) >> 16)
    signed = [u - 2**16 if u >= 2**15 else u for u in result]
    return torch.tensor(signed, dtype=torch.int16).view(torch.bfloat16).reshape(x.shape)


def expected_params(call: Call) -> list[Tensor]:
    """What the next step of a call makes of its parameters; and of float32 ones, as they are."""
    twin = copy_call(call)
    twin["params"] = [p.float().contiguous() for p in twin["params"]]
    twin["stochastic_params"] = False
    run(twin)
    in_8bit, size = bool(call["exp_avg_scales"]), call["block_size"]
    params = []
    for i, (p, x, step) in enumerate(
        zip(call["params"], twin["params"], call["steps"], strict=True)
    ):
        if p.dtype != torch.bfloat16:
            params.append(x)
            continue
        shape = tuple(p.shape)
        where = (
            (call["shard_offsets"][i], call["shard_row_strides"][i])
            if call["shard_offsets"]
            else ()
        )
        places = (
            places_in_blocks(shape, size, *where) if in_8bit else places_in_32bit(shape, *where)
        )
        params.append(rounded(x, call["seed"], int(step) + 1, places))
    return params


# -- exactly these numbers ---------------------------------------------------------------------

SHAPES = [(1,), (7,), (8,), (9,), (255,), (256,), (257,), (1031,), (3, 300), (2, 3, 70), (5, 17),
          (9, 513), (), (0, 4), (2, 512), (300, 1)]  # fmt: skip
LAYOUTS = ["contiguous", "odd offset", "transposed", "gaps"]
STATES: list[dict[str, Any]] = [
    {"state_bits": 8, "one_scale": False},
    {"state_bits": 8, "one_scale": True},
    {"state_bits": 32, "one_scale": False},
]
every_state = pytest.mark.parametrize(
    ("state_bits", "one_scale"), [tuple(state.values()) for state in STATES], ids=str
)
SPECIAL = [math.nan, math.inf, -math.inf, 0.0, -0.0, BF16_MAX, -BF16_MAX, 1e-39, 1e30]


def mixed_call(layout: str, grad_dtype: torch.dtype, **options: Any) -> Call:
    """Parameters with all sorts of numbers among them, one in four float32, and bad gradients."""
    params, grads = [], []
    for i, shape in enumerate(SHAPES):
        p, g = torch.randn(shape), torch.randn(shape)
        for x in (p, g):
            replaced = torch.rand(shape) < 0.02
            x.copy_(x.where(~replaced, torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]))
        params.append(laid_out(p.to(torch.float32 if i % 4 == 3 else torch.bfloat16), layout))
        grads.append(laid_out(g.to(grad_dtype), layout))
    steps = [i % 5 for i in range(len(SHAPES))]
    call = new_call(params, grads, step=steps, stochastic_params=True, lr=0.013, weight_decay=0.1,
                    **options)  # fmt: skip
    return live_state(call)


@needs_kernels
@every_path
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@every_state
def test_the_numbers_are_those_of_the_hash(
    workers: Workers,
    path: str,
    state_bits: int,
    one_scale: bool,
    layout: str,
    grad_dtype: torch.dtype,
) -> None:
    """On each path, for blocks of several sizes, whole tensors and shards."""
    worker = workers.get(path)
    for seed, block_size, amsgrad in [(0, 256, False), (-5, 64, True), (2**40, 512, False)]:
        options = {"seed": seed, "block_size": block_size, "amsgrad": amsgrad,
                   "state_bits": state_bits, "one_scale": one_scale,
                   "stochastic_rounding": amsgrad}  # fmt: skip
        call = mixed_call(layout, grad_dtype, **options)
        if seed:
            call["shard_offsets"] = [1000 * i + 77 * (i % 3) for i in range(len(SHAPES))]
            call["shard_row_strides"] = [math.prod(s[1:]) * 3 + 1 for s in SHAPES]
        want = copy_call(call)
        for p, x in zip(want["params"], expected_params(call), strict=True):
            p.copy_(x)
        got = worker("adam", call, 1, False)
        for i, (p, shape) in enumerate(zip(want["params"], SHAPES, strict=True)):
            memory = torch.empty(0, dtype=p.dtype).set_(p.untyped_storage())
            assert got["params"][i] == bits(memory), (shape, seed)


def test_the_numbers_on_every_device(device: str) -> None:
    for state in STATES:
        call = mixed_call("contiguous", torch.bfloat16, device=device, **state)
        want = [x.where(~x.isnan(), math.nan) for x in expected_params(call)]
        run(call)
        got = [p.cpu().where(~p.cpu().isnan(), math.nan) for p in call["params"]]
        assert [bits(p) for p in got] == [bits(x) for x in want]


def test_states_do_not_see_it(device: str) -> None:
    """Moments are those of the same parameters rounded to nearest; in float32 nothing changes."""
    for state in STATES:
        call = mixed_call("contiguous", torch.bfloat16, device=device, **state)
        nearest = copy_call(call) | {"stochastic_params": False}
        run(call)
        run(nearest)
        for i, p in enumerate(call["params"]):
            same = bits(p) == bits(nearest["params"][i])
            assert same or p.dtype == torch.bfloat16
        assert bits(call["params"][8]) != bits(nearest["params"][8])
        call["params"] = nearest["params"]
        assert_same_bits(call, nearest)


@every_path
@every_state
def test_threads_and_grouping(
    workers: Workers, path: str, state_bits: int, one_scale: bool
) -> None:
    call = large_call(state_bits, one_scale=one_scale)
    call["params"] = [p.to(torch.bfloat16) for p in call["params"]]
    call["stochastic_params"] = True
    worker = workers.get(path)
    want = worker("adam", call, 2, False, threads=1)
    assert worker("adam", call, 2, False, threads=3) == want
    assert worker("adam", call, 2, True, threads=2) == want
    assert worker("adam", reversed_call(call), 2, False, threads=2) == {
        name: tensors[::-1] for name, tensors in want.items()
    }


@every_optimizer()
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_optimizer(case: OptimizerCase, grad_dtype: torch.dtype, device: str) -> None:
    """Three steps: each from the parameters that the one before it made."""
    options = {"lr": 0.01, "min_8bit_size": SMALL, "stochastic_rounding": True, "seed": 3}
    params = make_params(torch.bfloat16, device=device)
    twins = [nn.Parameter(p.detach().float()) for p in params]
    optimizer, twin = case.make(params, **options), case.make(twins, **options)
    for step in (1, 2, 3):
        set_grads(params, step, grad_dtype)
        for p, q in zip(params, twins, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        optimizer.step()
        twin.step()
        for p, q in zip(params, twins, strict=True):
            shape, state = tuple(p.shape), optimizer.state[p]
            in_8bit = any(key.endswith("_codes") for key in state)
            # The update of a matrix has no states, and so no blocks.
            in_blocks = in_8bit and not case.matrices
            places = places_in_blocks(shape, 256) if in_blocks else places_in_32bit(shape)
            with torch.no_grad():
                q.copy_(rounded(q, 3, step, places))
            assert bits(p) == bits(q.bfloat16())
            assert [bits(v) for v in state.values()] == [bits(v) for v in twin.state[q].values()]


# -- bad gradients, and numbers that are no numbers --------------------------------------------


@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_a_bad_gradient_stays_where_it_is(layout: str, state_bits: int, device: str) -> None:
    """The parameter keeps its bits, and its neighbours take what they take without it."""
    p, g = torch.randn(9, 300).bfloat16(), torch.randn(9, 300)
    bad = torch.rand(p.shape) < 0.01
    values = torch.tensor([math.nan, math.inf, -math.inf])[torch.randint(3, p.shape)]
    ends = []
    for grad in (g.where(~bad, values), g.where(~bad, 0.0)):
        param = laid_out(p.clone().to(device), layout)
        call = new_call([param], [grad.bfloat16()], state_bits=state_bits, lr=0.3, device=device,
                        stochastic_params=True)  # fmt: skip
        run(call)
        ends.append(param.cpu())
    assert bad.any()
    assert bits(ends[0][bad]) == bits(p[bad])
    assert bits(ends[0][~bad]) == bits(ends[1][~bad])
    assert (ends[0] != p)[~bad].float().mean() > 0.9


@pytest.mark.parametrize("state_bits", [8, 32])
def test_what_is_not_finite_stays_so(state_bits: int, device: str) -> None:
    p = torch.ones(300).bfloat16()
    p[3], p[4], p[5], p[6] = math.nan, -math.nan, math.inf, -math.inf
    for seed in range(20):
        call = new_call([p.clone()], [torch.randn(300).bfloat16()], state_bits=state_bits,
                        stochastic_params=True, seed=seed, device=device)  # fmt: skip
        run(call)
        after = call["params"][0].cpu()
        assert after[3:5].isnan().all()
        assert torch.equal(after[5:7], p[5:7])
        assert after[torch.arange(300) > 6].isfinite().all()


# -- unbiased ----------------------------------------------------------------------------------


def sgd_step(p: Tensor, g: Tensor, lr: float, seed: int, step: int = 0) -> Tensor:
    """p - lr * g, rounded stochastically: SGD without state."""
    ops.step_("sgd_step_", [p], [g], [[]], [[]], [torch.tensor(float(step), device=p.device)],
              torch.tensor(lr, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), None, [],
              [], None, stochastic_params=True, seed=seed, nesterov=False, rate_in_buffer=False,
              maximize=False)  # fmt: skip
    return p


def neighbours(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The bfloat16 numbers on both sides of float32 ones, towards zero and away, and how far it is
    to the second one."""
    u = x.view(torch.int32)
    low = u & ~0xFFFF
    high = low + 0x10000
    both = [v.view(torch.float32) for v in (low, high)]
    return both[0], both[1], (u & 0xFFFF).double() / 2**16


def test_unbiased_and_always_a_neighbour(device: str) -> None:
    """The chance of the number away from zero is the distance from the other one, exactly, in
    every binade and with both signs.

    The counts of each element over the seeds are binomial: within 5.5 standard errors, one of 4096
    going beyond by chance once in 6,000 runs; and the sum of their squares within six of
    chi-squared's, which a chance that is wrong by 1% would leave: 0.01^2 / (1/4) * 512 seeds = 0.2
    a degree of freedom, and six standard errors are 6 * sqrt(2 / 4096) = 0.13.
    """
    n, seeds = 4096, 512
    exponent = torch.randint(-40, 40, (n,))
    p = torch.ldexp(torch.randn(n), exponent).bfloat16()
    g = torch.ldexp(torch.randn(n), exponent - 3)
    x = p.float().clone().to(device)
    sgd_step(x, g.to(device), 1.0, 0)
    low, high, chance = neighbours(x.cpu())
    ups = torch.zeros(n, dtype=torch.float64)
    for seed in range(seeds):
        got = sgd_step(p.clone().to(device), g.to(device), 1.0, seed).float().cpu()
        up = got == high
        assert (up | (got == low)).all()
        ups += up
    live = chance > 0
    assert (ups[~live] == 0).all()
    z = ((ups - seeds * chance) / (seeds * chance * (1 - chance)).sqrt())[live]
    wide = (seeds * chance * (1 - chance))[live] > 9  # else it is no bell
    assert z[wide].abs().max() < 5.5
    count = int(live.sum())
    # A rare event counts as itself: the fourth moment of z is 3 + 1 / variance.
    spread = (2 + 1 / (seeds * chance * (1 - chance))[live]).sum().sqrt()
    assert abs((z**2).sum() - count) < 6 * spread


def test_beyond_the_largest_number_is_infinity(device: str) -> None:
    """It follows the largest one, as in rounding to nearest, at a chance of the distance."""
    ulp = 2.0**120
    p = torch.full((4096,), BF16_MAX).bfloat16()
    got = sgd_step(p.clone().to(device), torch.full((4096,), -ulp / 4).to(device), 1.0, 0).cpu()
    assert (got.isinf() | (got == p)).all()
    assert abs(got.isinf().float().mean() - 0.25) < 5 * math.sqrt(0.25 * 0.75 / 4096)
    stays = sgd_step(p.clone().to(device), torch.zeros(4096, device=device), 1.0, 0).cpu()
    assert torch.equal(stays, p)


def test_small_updates_add_up(device: str) -> None:
    """Updates of a 16th of a unit in the last place: lost one by one, and here kept on average.

    Below 1 the numbers are 2^-8 apart, so each of 256 steps of 2^-12 goes down with a chance of
    1/16: 16 units on average. The variance of a step is 1/16 * 15/16 of a unit squared, and steps
    are independent: the mean of 4096 elements is off by less than five standard errors.
    """
    n, steps, update = 4096, 256, 2.0**-12
    p = torch.ones(n, dtype=torch.bfloat16, device=device)
    nearest = torch.ones(n, dtype=torch.bfloat16, device=device)
    g = torch.ones(n, dtype=torch.bfloat16, device=device)
    optimizer = torchao8.SGD([nn.Parameter(nearest)], lr=update)
    for step in range(steps):
        sgd_step(p, g, update, seed=0, step=step)
        optimizer.param_groups[0]["params"][0].grad = g
        optimizer.step()
    assert (optimizer.param_groups[0]["params"][0] == 1).all()
    error = p.double().mean().item() - (1 - steps * update)
    deviation = 2.0**-8 * math.sqrt(steps / 16 * 15 / 16)
    assert abs(error) < 5 * deviation / math.sqrt(n)
    assert 0.8 < p.double().std().item() / deviation < 1.2


def test_not_correlated_with_the_states(device: str) -> None:
    """Nor are elements with each other. Of 2^20 independent pairs the product of two signs has a
    mean within five standard errors, 2^-10 each."""
    n = 2**20
    p = torch.ones(n // 256, 256, dtype=torch.bfloat16)
    middle = torch.full_like(p, -(2.0**-8), dtype=torch.float32)  # half way from 1 to its next
    up = {
        step: sgd_step(p.clone().to(device), middle.to(device), 1.0, 0, step).cpu() > 1
        for step in (0, 1)
    }
    signs = {step: u.double() * 2 - 1 for step, u in up.items()}
    bound = 5 * 2.0**-10
    assert abs(signs[0].mean()) < bound
    assert abs((signs[0] * signs[1]).mean()) < bound
    for lag in (1, 2, 7, 8, 9, 16, 128, 255):
        flat = signs[0].flatten()
        assert abs((flat[lag:] * flat[:-lag]).mean()) < bound, lag
    # v = g^2 between codes, so that its rounding shows: beta2 is 0, and 1.0 ends each block.
    values = torchao8.dynamic_map(False)
    grad = ((values[150] + values[151]) / 2).sqrt().expand(n // 256, 256).clone()
    grad[:, -1] = 1.0
    call = new_call([p.clone()], [grad], lr=1.0, beta1=0.0, beta2=0.0, eps=1e30, device=device)
    run(call)
    state = (call["exp_avg_sqs"][0].cpu() == 151).double() * 2 - 1
    assert abs((signs[0] * state)[:, :-1].mean()) < bound + 1e-4  # of the blocks' last elements


# -- where a shard lies ------------------------------------------------------------------------

Placed = tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]
MORE_PLACEMENTS: dict[str, Placed] = {
    "an element": ((2,), (), (Replicate(),)),
    "a long vector, uneven": ((3,), (1031,), (Shard(0),)),
    "more ranks than elements": ((4,), (3,), (Shard(0),)),
    "a vector, strided": ((2, 2), (1030,), (_StridedShard(0, split_factor=3), Shard(0))),
    "columns, strided": ((2, 2), (5, 77), (_StridedShard(1, split_factor=3), Shard(0))),
    "the dimensions around one": ((2, 2), (4, 5, 6), (Shard(0), Shard(2))),
    "the dimensions behind one": ((2, 2), (3, 5, 6, 7), (Shard(1), Shard(3))),
    "FSDP over tensor parallelism": ((2, 2), (9, 70), (_StridedShard(0, split_factor=2), Shard(0))),
    "no elements": ((2,), (0, 5), (Shard(0),)),
}


@pytest.mark.parametrize("name", [*PLACEMENTS, *MORE_PLACEMENTS])
def test_the_rows_of_a_shard_are_where_it_lies(name: str) -> None:
    """Against the numbers of all elements, cut as the tensor is, for every rank of the mesh."""
    mesh_shape, shape, placements = {**PLACEMENTS, **MORE_PLACEMENTS}[name][:3]
    numbers = torch.arange(math.prod(shape)).reshape(shape)
    seen = []
    for coordinate in itertools.product(*(range(size) for size in mesh_shape)):
        here = numbers
        for d in range(len(shape)):
            index = shard_layout.shard_indices(shape, mesh_shape, coordinate, placements, d)
            here = here.index_select(d, torch.tensor(list(index), dtype=torch.int64))
        place = shard_layout.flat_rows(shape, mesh_shape, coordinate, placements)
        assert place.shape == tuple(here.shape)
        if not here.numel():
            assert not place.runs
            continue
        if place.whole:
            assert len(place.runs) == 1
            assert len(shape) < 2 or here.shape[-1] == place.row
        rows = [
            run_of_rows.offset + i * run_of_rows.stride
            for run_of_rows in place.runs
            for i in range(run_of_rows.last - run_of_rows.first)
        ]
        elements = [start + i for start in rows for i in range(place.row)]
        assert elements == here.flatten().tolist()
        assert [r.first for r in place.runs] == [0, *(r.last for r in place.runs[:-1])]
        seen += elements
    assert sorted(set(seen)) == list(range(math.prod(shape)))


def _sharded_against_whole(rank: int, world_size: int) -> None:
    """8-bit rows, cut rows and vectors, without state and with trust ratios, one optimizer each."""
    mesh = init_device_mesh("cpu", (world_size,))
    # Shape, placement, and whether 8 bits are kept.
    cases = [((7, 300), Shard(0), True), ((5, 1024 * world_size), Shard(1), True),
             ((6, 75 * world_size), Shard(1), world_size == 1), ((1031,), Shard(0), False),
             ((4, 3 * world_size, 35), Shard(1), None), ((3, 6, 9), Shard(2), None),
             ((40, 3), Shard(0), False), ((2, 3), Shard(0), False)]  # fmt: skip
    for cls in (
        torchao8.AdamW8bit,
        torchao8.AdamW,
        torchao8.SGD,
        torchao8.LAMB8bit,
        torchao8.Lion8bit,
    ):
        options = {"lr": 0.01, "min_8bit_size": SMALL, "stochastic_rounding": True, "seed": 3}
        params = make_params(torch.bfloat16, [shape for shape, *_ in cases])
        placed = [distributed_param(p, mesh, [c[1]]) for p, c in zip(params, cases, strict=True)]
        sharded = cls(placed, **options)
        step_with(sharded, [0])
        whole = cls(
            [
                {
                    "params": [p],
                    "optim_bits": 8 if any("codes" in k for k in sharded.state[q]) else 32,
                }
                for p, q in zip(params, placed, strict=True)
            ],
            **options,
        )
        step_with(sharded, [1, 2])
        for seed in range(3):
            set_grads(params, seed)
            whole.step()
        assert gathered(sharded) == gathered(whole), cls
        if cls is torchao8.AdamW8bit:
            kept = ["exp_avg_codes" in sharded.state[q] for q in placed]
            assert all(c[2] in (None, k) for k, c in zip(kept, cases, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.filterwarnings("ignore")
def test_sharding_changes_nothing(world_size: int) -> None:
    run_ranks(world_size, _sharded_against_whole)


def _wrong_shard(rank: int, world_size: int) -> None:
    """Where the place decides, a 32-bit shard that is not where it says is refused, too."""
    mesh = init_device_mesh("cpu", (3, 2))
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    p = distributed_param(torch.ones(7, dtype=torch.bfloat16), mesh, placements)
    optimizer = torchao8.AdamW([p], stochastic_rounding=True)
    p.grad = distributed(torch.ones(7, dtype=torch.bfloat16), p)
    wrong = tuple(p.to_local().shape) != sharding.flat_shard_rows(p).shape
    if wrong:
        with pytest.raises(ValueError, match=r"parameter 0 of shape \[7\], .* local shape of"):
            optimizer.step()
        assert not optimizer.state
    optimizer.param_groups[0]["stochastic_rounding"] = False
    optimizer.step()
    optimizer.param_groups[0]["stochastic_rounding"] = True
    before = bits(p.to_local())
    if wrong:
        with pytest.raises(ValueError, match="local shape of"):
            optimizer.step()
        assert bits(p.to_local()) == before
    votes = torch.tensor(int(wrong))
    torch.distributed.all_reduce(votes)
    assert votes > 0


def test_a_shard_that_is_not_what_it_says() -> None:
    run_ranks(6, _wrong_shard)


# -- torch.compile -----------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [torchao8.AdamW8bit, torchao8.LAMB, torchao8.SGD])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_as_eager(cls: Any, device: str) -> None:
    """One graph, the same bits, and nothing is copied for it."""
    ends = []
    for compiled in (True, False):
        lr = torch.tensor(0.01, device=device)
        params = make_params(torch.bfloat16, device=device)
        optimizer = cls(params, lr=lr, min_8bit_size=SMALL, stochastic_rounding=True)
        step, counter = optimizer.step, CompileCounterWithBackend("inductor")
        if compiled:
            step = torch.compile(optimizer.step, fullgraph=True, backend=counter)
        for seed in range(3):
            lr.mul_(0.9)
            set_grads(params, seed)
            step()
        assert counter.frame_count == int(compiled)
        ends.append(all_bits(optimizer))
    assert ends[0] == ends[1]


@pytest.mark.usefixtures("fresh_compiler")
def test_generated_code_has_no_clone(device: str) -> None:
    params = make_params(torch.bfloat16, device=device)
    lr = torch.tensor(0.01, device=device)
    optimizer = torchao8.AdamW8bit(params, lr=lr, min_8bit_size=SMALL, stochastic_rounding=True)
    set_grads(params, 0)
    _, codes = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    (code,) = codes
    body = code[code.index("def call(") : code.index("runner = Runner")]
    assert "torchao8.adam_step_" in body
    assert not re.findall(r"clone|copy_\(", body)
    # The numbers of the rule, in one tensor for all calls; nothing else is allocated.
    assert re.findall(r"empty_strided\w*\((\([^)]*\))", body) == ["(4, )"]


# -- the option --------------------------------------------------------------------------------

OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}


@every_optimizer()
def test_off_by_default_and_nothing_for_float32(case: OptimizerCase, device: str) -> None:
    def trained(dtype: torch.dtype, **options: Any) -> Any:
        params = make_params(dtype, device=device)
        optimizer = case.make(params, lr=0.01, min_8bit_size=SMALL, **options)
        train(optimizer, params, range(3))
        end = all_bits(optimizer)
        del end["options"]
        return end

    assert trained(torch.bfloat16) == trained(torch.bfloat16, stochastic_rounding=False)
    assert trained(torch.bfloat16) != trained(torch.bfloat16, stochastic_rounding=True)
    assert trained(torch.float32) == trained(torch.float32, stochastic_rounding=True)
    half = trained(torch.float16)
    assert half == trained(torch.float16, stochastic_rounding=False)


def test_the_step_chooses_the_numbers_and_a_group_the_option(device: str) -> None:
    params = make_params(torch.bfloat16, [(3, 300)] * 2, device=device)
    with torch.no_grad():
        params[1].copy_(params[0])
    groups = [{"params": [params[0]], "stochastic_rounding": True}, {"params": [params[1]]}]
    optimizer = torchao8.AdamW8bit(groups, **OPTIONS)
    set_grads(params, 0)
    params[1].grad = params[0].grad
    optimizer.step()
    other = optimizer.param_groups[1]
    (p,) = make_params(torch.bfloat16, [(3, 300)], device=device)
    alone = torchao8.AdamW8bit([p], **OPTIONS)
    p.grad = params[0].grad
    alone.step()
    assert not other["stochastic_rounding"]
    assert bits(params[1]) == bits(p)
    assert bits(params[0]) != bits(p)


def test_a_resumed_run_has_the_same_bits(device: str) -> None:
    """The option comes back with the checkpoint; one that lacks it leaves it as it is."""
    params = make_params(torch.bfloat16, device=device)
    optimizer = torchao8.AdamW8bit(params, **OPTIONS, stochastic_rounding=True)
    train(optimizer, params, range(3))
    saved = through(copy.deepcopy(optimizer.state_dict()))
    others = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = torchao8.AdamW8bit(others, **OPTIONS)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["stochastic_rounding"] is True
    train(optimizer, params, range(3, 6))
    train(resumed, others, range(3, 6))
    assert_same_training(resumed, optimizer)

    for group in saved["param_groups"]:
        del group["stochastic_rounding"]
    for value in (True, False):
        fresh = make_params(torch.bfloat16, device=device)
        old = torchao8.AdamW8bit(fresh, **OPTIONS, stochastic_rounding=value)
        old.load_state_dict(saved)
        assert old.param_groups[0]["stochastic_rounding"] is value


NO_FLOAT16 = (
    "expected bfloat16 or float32 under stochastic_rounding=True, .* got torch.float16. Make it"
)


@every_optimizer()
def test_float16_is_refused(case: OptimizerCase, device: str) -> None:
    bad, good = (make_params(dtype, device=device) for dtype in (torch.float16, torch.bfloat16))
    with pytest.raises(ValueError, match=rf"params\[0\]: {NO_FLOAT16}"):
        case.make(bad, stochastic_rounding=True)
    optimizer = case.make([{"params": good}], stochastic_rounding=True, min_8bit_size=SMALL)
    with pytest.raises(ValueError, match=rf"params\[1\]: {NO_FLOAT16}"):
        optimizer.add_param_group({"params": [make_params(torch.bfloat16)[0], bad[0]]})
    assert len(optimizer.param_groups) == 1
    bad[0].requires_grad_(False)
    optimizer.add_param_group({"params": [bad[0]]})  # a frozen one is no concern of the option
    optimizer.add_param_group({"params": bad[1:], "stochastic_rounding": False})
    train(optimizer, [*good, *bad[1:]], range(2))


def test_float16_is_refused_at_a_step(device: str) -> None:
    """Where it comes later, by the parameter's name, and before anything changes."""
    names = [f"w{i}" for i in range(8)]
    for state_bits in (8, 32):
        params = make_params(torch.float16, device=device)
        named = zip(names, params, strict=True)
        optimizer = torchao8.AdamW8bit(named, optim_bits=state_bits, min_8bit_size=SMALL)
        train(optimizer, params, range(2))
        optimizer.param_groups[0]["stochastic_rounding"] = True
        set_grads(params, 2)
        before = all_bits(optimizer)
        with pytest.raises(ValueError, match=rf"AdamW8bit: parameter 0 \(w0\): {NO_FLOAT16}"):
            optimizer.step()
        assert all_bits(optimizer) == before
    cast = make_params(torch.bfloat16, device=device)
    optimizer = torchao8.AdamW8bit(cast, stochastic_rounding=True)
    optimizer.param_groups[0]["params"] = params = make_params(torch.float16, device=device)
    set_grads(params, 0)
    with pytest.raises(ValueError, match=rf"params\[0\]: {NO_FLOAT16}"):
        optimizer.step()
    assert not optimizer.state


def test_float16_is_refused_at_a_load(device: str) -> None:
    params = make_params(torch.bfloat16, device=device)
    optimizer = torchao8.AdamW8bit(params, **OPTIONS, stochastic_rounding=True)
    train(optimizer, params, [0])
    half = make_params(torch.float16, device=device)
    other = torchao8.AdamW8bit(half, **OPTIONS)
    train(other, half, [0])
    before = all_bits(other)
    with pytest.raises(ValueError, match=NO_FLOAT16):
        other.load_state_dict(optimizer.state_dict())
    assert all_bits(other) == before


def test_the_op_refuses_float16(device: str) -> None:
    shapes = [(3, 300), (5,)]
    params = [torch.randn(shapes[0]).bfloat16(), torch.randn(shapes[1]).half()]
    call = new_call(params, [torch.randn(s) for s in shapes], stochastic_params=True, device=device)
    before = copy_call(call)
    with pytest.raises(RuntimeError, match=r"params\[1\] must be bfloat16, .* got float16"):
        run(call)
    assert_same_bits(call, before)
