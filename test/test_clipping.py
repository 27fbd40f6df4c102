"""percentile_clipping: gradients are scaled down to a percentile of their parameter's norms."""

import copy
import math
from typing import Any

import pytest
import torch
from helpers import (
    SMALL,
    all_bits,
    assert_same_training,
    bits,
    make_params,
    reset_compiler,
    set_grads,
    through_file,
    train,
)
from optim_table import OPTIMIZERS, OptimizerCase, every_optimizer
from ranks import run_ranks
from sharded import fsdp_weights, gathered, groups_of, step_with
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

import torchao8

OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "percentile_clipping": 5}


def clipped(grads: list[float], percentile: int) -> list[float]:
    """What bitsandbytes 0.45 makes of gradients of one element, in its own words: squares, sorted,
    with the current one among them."""
    squares = [0.0] * 100
    result = []
    for step, g in enumerate(grads, 1):
        if step == 1:
            squares = [g * g] * 100
        squares[step % 100] = g * g
        limit = math.sqrt(sorted(squares)[percentile])
        result.append(g * limit / abs(g) if abs(g) > limit else g)
    return result


@pytest.mark.parametrize("percentile", [1, 5, 50, 98])
def test_as_bitsandbytes_had_it(percentile: int, device: str) -> None:
    """Steps of plain SGD with lr 1 are the clipped gradients; the ring of norms goes round."""
    generator = torch.Generator().manual_seed(percentile)
    grads = (torch.randn(230, generator=generator) * 3).tolist()
    p = torch.nn.Parameter(torch.zeros(1, device=device))
    optimizer = torchao8.SGD([p], lr=1.0, percentile_clipping=percentile)
    expected = clipped(grads, percentile)
    assert expected != grads
    for g, wanted in zip(grads, expected, strict=True):
        p.data.zero_()
        p.grad = torch.full_like(p, g)
        optimizer.step()
        # A norm and a limit are rounded to float32, and the factor and the product once more.
        assert -p.item() == pytest.approx(wanted, rel=4 * 2**-24)


@every_optimizer()
def test_a_clipped_step_is_one_with_a_smaller_gradient(case: OptimizerCase, device: str) -> None:
    """Halved or quartered exactly, so that the bits of all states and parameters are the same."""
    ends = []
    for by_hand in (False, True):
        params = make_params(shapes=[(3, 300), (5,), (40, 70)], device=device)
        clip = {} if by_hand else {"percentile_clipping": 1}
        optimizer = case.make(params, **OPTIONS | {"percentile_clipping": 100} | clip)
        for power in [0, 0, 2, 1]:
            set_grads(params, 0)  # always the same norm, but for a power of two
            for p in params:
                p.grad *= 1 if by_hand else 2.0**power
            optimizer.step()
        states = [
            {k: bits(v) for k, v in optimizer.state[p].items() if k != "grad_norms"} for p in params
        ]
        ends.append(([bits(p) for p in params], states))
    assert ends[0] == ends[1]


# Compiled where factors are made in another way: without ratios, and with two kinds of them.
RESUMED = [pytest.param(case, False, id=case.cls.__name__) for case in OPTIMIZERS] + [
    pytest.param(case, True, id=f"{case.cls.__name__}, compiled")
    for case in OPTIMIZERS
    if case.cls in (torchao8.AdamW8bit, torchao8.LAMB8bit, torchao8.LARS8bit)
]


@pytest.mark.parametrize(("case", "compiled"), RESUMED)
def test_resuming_gives_the_same_bits(case: OptimizerCase, compiled: bool) -> None:
    """The history is state: saved, loaded, copied, compiled."""
    params = make_params(torch.bfloat16)
    optimizer = case.make(params, **OPTIONS)
    for seed in range(3):
        train(optimizer, params, [seed], scale=1 + seed)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = case.make(others, **OPTIONS)
    resumed.load_state_dict(through_file(optimizer.state_dict()))
    reset_compiler()
    step = (
        torch.compile(resumed.step, fullgraph=True, backend="aot_eager")
        if compiled
        else resumed.step
    )
    for seed in range(3, 6):
        train(optimizer, params, [seed], scale=0.3 * seed)
        set_grads(others, seed, scale=0.3 * seed)
        step()
    assert_same_training(optimizer, resumed)
    assert (optimizer.state[params[0]]["grad_norms"] > 0).all()


@pytest.mark.parametrize("bits_pair", [(8, 32), (32, 8)])
def test_the_history_goes_through_a_conversion(bits_pair: tuple[int, int]) -> None:
    params = make_params()
    optimizer = torchao8.AdamW(params, optim_bits=bits_pair[0], **OPTIONS)
    train(optimizer, params, range(3))
    other = torchao8.AdamW(make_params(), optim_bits=bits_pair[1], **OPTIONS)
    with pytest.warns(UserWarning, match="was saved in"):
        other.load_state_dict(through_file(optimizer.state_dict()))
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        assert torch.equal(optimizer.state[p]["grad_norms"], other.state[q]["grad_norms"])


def test_found_inf_leaves_the_history(device: str) -> None:
    params = make_params(device=device)
    optimizer = torchao8.AdamW8bit(params, **OPTIONS)
    train(optimizer, params, range(2))
    before = copy.deepcopy(all_bits(optimizer)["states"])
    set_grads(params, 7)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert all_bits(optimizer)["states"] == before


@pytest.mark.parametrize("which", ["lr", "grad_scale"])
def test_a_number_that_is_refused_leaves_everything(which: str) -> None:
    """Of the second group: neither the histories nor the first group have moved."""
    params = make_params()
    groups = [{"params": params[:3]}, {"params": params[3:], "lr": torch.tensor(1e-3)}]
    optimizer: Any = torchao8.AdamW8bit(groups, percentile_clipping=20, min_8bit_size=SMALL)
    train(optimizer, params, range(2))
    set_grads(params, 7)
    if which == "lr":
        optimizer.param_groups[1]["lr"].fill_(math.inf)
    else:
        optimizer.grad_scale = torch.tensor(0.0)
    before = all_bits(optimizer)
    with pytest.raises(RuntimeError, match=f"AdamW8bit: {which} must be "):
        optimizer.step()
    assert all_bits(optimizer) == before


def test_norms_are_those_of_unscaled_gradients() -> None:
    ends = []
    for scale in (1.0, 1024.0):
        params = make_params()
        optimizer = torchao8.AdamW8bit(params, fused=True, **OPTIONS)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(0.0)
        for seed in range(3):
            set_grads(params, seed, scale=scale * (1 + seed))
            optimizer.step()
        ends.append(all_bits(optimizer)["states"])
    assert ends[0] == ends[1]


def test_elements_that_are_not_finite_have_no_part_in_the_norm() -> None:
    ends = []
    for bad in (math.nan, math.inf, 0.0):
        (p,) = make_params(shapes=[(3, 300)])
        optimizer = torchao8.Adam8bit([p], **OPTIONS)
        for seed in range(3):
            set_grads([p], seed)
            p.grad[1, 7] = bad
            optimizer.step()
        history = optimizer.state[p]["grad_norms"]
        assert history.isfinite().all()
        ends.append(bits(history))
    assert ends[0] == ends[1] == ends[2]


def test_a_gradient_after_zeros_is_clipped_to_nothing(device: str) -> None:
    """The limit is then 0, and so is the factor; a zero norm is divided by nothing."""
    (p,) = make_params(shapes=[(4, 300)], device=device)
    optimizer = torchao8.SGD([p], lr=0.1, percentile_clipping=1)
    train(optimizer, [p], [0])
    before = bits(p)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    train(optimizer, [p], [1])
    assert bits(p) == before


@every_optimizer()
def test_zeros_before_any_other_gradient_are_no_bound(case: OptimizerCase, device: str) -> None:
    """As that of a factor whose partner starts at 0, one that is NaN all over, or that of the step
    that torch makes for its checkpoints to find state: the parameter would stay as it is for 95
    steps."""
    (p,) = make_params(shapes=[(4, 300)], device=device)
    optimizer = case.make([p], **OPTIONS)
    get_optimizer_state_dict(torch.nn.ParameterList([p]), optimizer)
    for value in (0.0, math.nan):
        p.grad = torch.full_like(p, value)
        optimizer.step()
    assert (optimizer.state[p]["grad_norms"] == -1).all()
    before = bits(p)
    train(optimizer, [p], [0])
    assert bits(p) != before
    norm = p.grad.double().norm().float()  # type: ignore[union-attr]
    assert (optimizer.state[p]["grad_norms"] == norm).all()


def test_two_groups_clip_each_as_they_say() -> None:
    ends = []
    for together in (True, False):
        params = make_params(shapes=[(3, 300), (40, 70), (5,)])
        groups = [
            {"params": params[:1], "percentile_clipping": 2},
            {"params": params[1:2]},
            {"params": params[2:], "percentile_clipping": 60},
        ]
        common = {"lr": 0.01, "min_8bit_size": SMALL}
        if together:
            optimizers = [torchao8.AdamW8bit(groups, **common)]
        else:
            optimizers = [torchao8.AdamW8bit([group], **common) for group in groups]
        for seed in range(4):
            set_grads(params, seed, scale=seed + 1.0)
            for optimizer in optimizers:
                optimizer.step()
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1]


def test_changing_it_after_the_first_step_raises() -> None:
    params = make_params()
    optimizer = torchao8.Adam8bit(params)
    train(optimizer, params, [0])
    before = copy.deepcopy(all_bits(optimizer))
    optimizer.param_groups[0]["percentile_clipping"] = 5
    set_grads(params, 0)
    with pytest.raises(RuntimeError, match="grad_norms"):
        optimizer.step()
    assert all_bits(optimizer)["states"] == before["states"]


@pytest.mark.parametrize(
    ("value", "message"),
    [(-2.0, "expected norms, or -1.0 for none, got -2.0"), (math.nan, "expected finite numbers")],
)
def test_a_damaged_history_is_refused(value: float, message: str) -> None:
    params = make_params()
    optimizer = torchao8.Adam8bit(params, **OPTIONS)
    train(optimizer, params, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][2]["grad_norms"][7] = value
    with pytest.raises(ValueError, match=f"grad_norms of parameter 2: {message}"):
        optimizer.load_state_dict(saved)


def test_a_history_of_bitsandbytes_is_read() -> None:
    """gnorm_vec holds squares; state of torch.optim has none, and the next norm begins one."""
    p = torch.nn.Parameter(torch.zeros(3))
    squares = torch.arange(100.0) ** 2
    saved: dict[str, Any] = {
        "step": 7,
        "state1": torch.zeros(3),
        "state2": torch.zeros(3),
        "gnorm_vec": squares,
    }
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    optimizer = torchao8.AdamW8bit([p], percentile_clipping=5)
    optimizer.load_state_dict({"state": {0: saved}, "param_groups": [group]})
    assert torch.equal(optimizer.state[p]["grad_norms"], torch.arange(100.0))

    theirs = torch.optim.AdamW([p])
    p.grad = torch.ones(3)
    theirs.step()
    optimizer.load_state_dict(theirs.state_dict())
    assert (optimizer.state[p]["grad_norms"] == -1).all()
    optimizer.step()
    assert torch.allclose(optimizer.state[p]["grad_norms"], torch.tensor(3.0).sqrt())


def _sharded(rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> int:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    calls = 0
    for compiled in (False, True)[: len(mesh_shape)]:
        ends = []
        for m in (mesh, None):
            params = groups_of(fsdp_weights(m).parameters(), m is not None)
            optimizer = torchao8.AdamW8bit(params, seed=3, **OPTIONS)
            step: Any = optimizer.step
            if compiled and m is not None:
                reset_compiler()
                step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
            with torch.profiler.profile() as profile:
                step_with(optimizer, range(4), step)
            if m is not None and not compiled:
                calls = sum(e.count for e in profile.key_averages() if e.key == "gloo:all_reduce")
            ends.append(gathered(optimizer))
        assert ends[0] == ends[1], compiled
    return calls


@pytest.mark.parametrize(("world_size", "mesh_shape"), [(2, (2,)), (3, (3,)), (4, (2, 2))])
def test_sharding_changes_nothing(world_size: int, mesh_shape: tuple[int, ...]) -> None:
    """The norm is that of the whole parameter, by one all-reduce a step for all of them."""
    calls = run_ranks(world_size, _sharded, mesh_shape)
    assert calls == [4] * world_size


# -- the op ----------------------------------------------------------------------------------------


def _arguments(device: str) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    histories = [torch.full((100,), -1.0, device=device), torch.rand(100, device=device)]
    norms = torch.tensor([2.0, 0.5], dtype=torch.float64, device=device)
    steps = [torch.tensor(float(s), device=device) for s in (0, 41)]
    return histories, norms, steps


def test_opcheck(device: str) -> None:
    op = torch.ops.torchao8.clip_factors_.default
    torch.library.opcheck(op, (*_arguments(device), None, 5))
    torch.library.opcheck(op, (*_arguments(device), torch.tensor(1.0, device=device), 5))


def test_a_norm_beyond_float32(device: str) -> None:
    """No NaN comes of it: the history holds the largest float32."""
    histories, _, steps = _arguments(device)
    norms = torch.tensor([1e300, 1e300], dtype=torch.float64, device=device)
    factors = torch.ops.torchao8.clip_factors_(histories, norms, steps, None, 5)
    assert factors[0] == 1
    assert 0 < factors[1] < 1e-37
    assert histories[0].isfinite().all()
