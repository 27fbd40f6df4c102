"""The promises, for every optimizer with state in every format beside the dynamic one.

That all paths of the CPU give the same bits is in test_mulaw_steps.py.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import reference_rules
import torch
import torch.distributed.checkpoint as dcp
from format_table import (
    FORMAT_CASES,
    FormatCase,
    every_pair,
    every_pair_and_options,
    every_pair_and_scales,
    few_pairs,
    has_blocks,
)
from format_table import moment as decoded
from helpers import (
    SHAPES,
    SMALL,
    assert_same_training,
    bits,
    make_params,
    params_for,
    set_grads,
    train,
)
from optim_table import OptimizerCase, Options
from paged import SHAPES as PAGED_SHAPES
from paged import assert_paged, paged
from ranks import run_ranks
from sharded import Weights, assert_shards_of, ends_of, fsdp_weights, groups_of, step_with
from test_compile import both_step, compiled_and_eager
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from torchao8.optim.base import LowPrecisionOptimizer

COMMON: Options = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}

# -- a step is that of the oracle ------------------------------------------------------------------


def oracle_step(
    case: OptimizerCase, form: FormatCase, optimizer: LowPrecisionOptimizer, p: Tensor
) -> reference_rules.Result:
    """What the next step does to a parameter."""
    state, group = optimizer.state[p], optimizer.param_groups[0]
    names = [s.name for s in optimizer._states(group)]
    assert p.grad is not None
    return reference_rules.RULES[case.rule](
        p.detach().double(),
        p.grad.double(),
        {name: decoded(case, form, state, name, tuple(p.shape))[0] for name in names},
        int(state["step"]) + 1,
        group,
        any(has_blocks(state, form, name) for name in names),
    )


def check_stored(
    case: OptimizerCase,
    form: FormatCase,
    state: dict[str, Tensor],
    name: str,
    want: Tensor,
    error: Tensor,
    nearest: bool,
) -> None:
    """A stored state is the oracle's, but for float32 rounding and that of its format."""
    found, scale = decoded(case, form, state, name, tuple(want.shape))
    signed = case.is_signed(name)
    gap = torch.where(scale != 0, form.gap(want / scale, signed) * scale.abs(), 0.0)
    share = 0.5 if nearest else 1.0
    off = (found - want).abs()
    # The rounding of the scaled number to float32 is of the order of 2^-24 of it.
    limit = share * gap * (1 + 2.0**-10) + 2 * error + 1e-37
    if not signed and has_blocks(state, form, name):
        smallest = form.smallest * scale
        assert (found[(want > 0) & (scale > 0)] > 0).all()  # never zero
        limit = torch.where(found == smallest, torch.maximum(limit, smallest), limit)
    assert (off <= limit).all(), name


@every_pair_and_options()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_each_step_is_that_of_the_oracle(
    case: OptimizerCase, form: FormatCase, options: Options, dtype: torch.dtype
) -> None:
    """Each step is repeated in float64 from the state before it, so that no error adds up."""
    params = make_params(dtype, (*SHAPES, (5, 131)))  # the last one of rows of odd length
    rounding = "nearest" if options.get("amsgrad") else "stochastic"
    optimizer = case.make(
        params, **options, **form.options, min_8bit_size=SMALL, state_rounding=rounding
    )
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    states = optimizer._states(optimizer.param_groups[0])
    # With 4 bits, also an average of gradients that is not divided by roots.
    drawn = {s.name for s in states if case.is_stochastic(s.name)}
    drawn |= {s.name for s in states if form.bits == 4 and s.signed and not s.squares}
    optimizer._init_states()
    for step in range(3):
        set_grads(params, step)
        if step == 2:
            params[0].grad.zero_()  # type: ignore[union-attr]
        expected = [oracle_step(case, form, optimizer, p) for p in params]
        optimizer.step()
        for p, want in zip(params, expected, strict=True):
            limit = want.param_error + unit * want.param.abs() + torch.finfo(dtype).smallest_normal
            assert ((p.detach().double() - want.param).abs() <= limit).all()
            for name, value in want.states.items():
                nearest = rounding == "nearest" or name not in drawn
                state, error = optimizer.state[p], want.errors[name]
                check_stored(case, form, state, name, value, error, nearest)


# -- a bad gradient stays where it is --------------------------------------------------------------


@every_pair_and_scales(of_elements=True)  # of matrices: test_muon.py
@pytest.mark.parametrize("bad", [math.nan, -math.inf], ids=str)
def test_a_bad_gradient_stays_alone(
    case: OptimizerCase, form: FormatCase, bad: float, block_wise: bool
) -> None:
    place, ends = (1, 70), []
    options = {**COMMON, **case.full, **form.options, "block_wise": block_wise}
    options.update(case.known({"adaptive": False}))  # a ratio is of all elements' updates
    for value in (bad, 0.0):
        params = make_params(shapes=[(3, 300)])
        p = params[0].detach()
        optimizer = case.make(params, **options)
        train(optimizer, params, range(3))
        set_grads(params, 3)
        params[0].grad[place] = value  # type: ignore[index]
        before, old = float(p[place]), optimizer.moments(params[0])
        optimizer.step()
        if value is bad:
            assert float(p[place]) == before
            for name, moment in optimizer.moments(params[0]).items():
                scales = decoded(case, form, optimizer.state[params[0]], name, (3, 300))[1]
                scale, signed = scales[place], case.is_signed(name)
                gap = float(form.gap(old[name][place].double() / scale, signed) * scale.abs())
                assert abs(float(moment[place] - old[name][place])) <= gap * (1 + 2.0**-10)
        p[place] = 0.0
        ends.append(bits(p))
    assert ends[0] == ends[1]


@every_pair_and_scales()
@pytest.mark.parametrize("size", [9.2e18, 8.5e37], ids=["squares", "averages"])
def test_what_is_almost_too_large_stays(
    case: OptimizerCase, form: FormatCase, block_wise: bool, size: float
) -> None:
    """The largest numbers that a step takes may be rounded up to some that it does not. An element
    with a bad gradient keeps them, and so do the others of its block."""
    options = {**case.full, **form.options, "block_wise": block_wise}
    check_what_is_almost_too_large(case, options, size, lambda o: o.step())


def check_what_is_almost_too_large(
    case: OptimizerCase, options: Options, size: float, step: Callable[[Any], None]
) -> None:
    params = [torch.nn.Parameter(torch.ones(4, 256)) for _ in range(2)]
    optimizer = case.make(params, **{**COMMON, **options, "weight_decay": 0.0})
    params[0].grad = torch.linspace(0.8 * size, size, 1024).view(4, 256)
    params[1].grad = -params[0].grad
    step(optimizer)
    for bad in (math.nan, math.inf, -math.inf):
        for p in params:
            p.grad = torch.zeros_like(p)
            p.grad[:, ::7] = bad
        step(optimizer)
        for p in params:
            for key, value in optimizer.state[p].items():
                assert value.dtype == torch.uint8 or value.isfinite().all(), key


# -- sharding changes nothing, and checkpoints are exact -------------------------------------------


def sharded_options(case: OptimizerCase, form: FormatCase, block_wise: bool) -> Options:
    return {**COMMON, **case.full, **form.options, "block_wise": block_wise}


def unsharded(case: OptimizerCase, options: Options, steps: int) -> bytes:
    with params_for(case):
        optimizer = case.make(groups_of(Weights().parameters(), False), **options)
        step_with(optimizer, range(steps))
    return ends_of(optimizer)


def sharded_run(
    world_size: int, case: OptimizerCase, options: Options
) -> tuple[Weights, LowPrecisionOptimizer]:
    with params_for(case):
        model = fsdp_weights(init_device_mesh("cpu", (world_size,)))
    return model, case.make(groups_of(model.parameters(), True), **options)


def _against_unsharded(
    rank: int, world_size: int, f: int, runs: list[tuple[int, Options, bytes]], folder: Path
) -> None:
    saved = {}
    for number, (i, options, ends) in enumerate(runs):
        case = FORMAT_CASES[f].cases[i]
        model, optimizer = sharded_run(world_size, case, options)
        step_with(optimizer, range(3))
        assert_shards_of(optimizer, ends, (case.cls, options))
        weights, state = get_state_dict(model, optimizer)
        saved[str(number)] = {"model": weights, "optimizer": state}
    dcp.save(saved, checkpoint_id=folder)


def _loaded(
    rank: int, world_size: int, f: int, runs: list[tuple[int, Options, bytes, bytes]], folder: Path
) -> None:
    cases = FORMAT_CASES[f].cases
    made = [sharded_run(world_size, cases[i], options) for i, options, *_ in runs]
    saved = {}
    for number, pair in enumerate(made):
        weights, state = get_state_dict(*pair)
        saved[str(number)] = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder)
    for number, ((model, optimizer), (_, options, then, later)) in enumerate(
        zip(made, runs, strict=True)
    ):
        found = saved[str(number)]
        set_state_dict(
            model, optimizer,
            model_state_dict=found["model"], optim_state_dict=found["optimizer"],
        )  # fmt: skip
        assert_shards_of(optimizer, then, (type(optimizer), options, "loaded"))
        step_with(optimizer, range(3, 5))
        assert_shards_of(optimizer, later, (type(optimizer), options, "two more steps"))


@pytest.mark.parametrize(
    ("form", "block_wise"),
    [
        pytest.param(form, each, id=f"{form.name}-{'blocks' if each else 'one-scale'}")
        for form in FORMAT_CASES
        for each in form.block_wise
    ],
)
def test_two_ranks_have_the_bits_of_one_and_three_load_them(
    form: FormatCase, block_wise: bool, tmp_path: Path
) -> None:
    """All classes in one run of processes, with all states that they have."""
    sets = [sharded_options(case, form, block_wise) for case in form.cases]
    then, later = (
        [unsharded(case, options, steps) for case, options in zip(form.cases, sets, strict=True)]
        for steps in (3, 5)
    )
    numbers, f = range(len(sets)), FORMAT_CASES.index(form)
    run_ranks(2, _against_unsharded, f, list(zip(numbers, sets, then, strict=True)), tmp_path)
    run_ranks(3, _loaded, f, list(zip(numbers, sets, then, later, strict=True)), tmp_path)


# -- traced once -----------------------------------------------------------------------------------


@few_pairs()
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own
def test_one_graph_and_the_bits_of_eager(case: OptimizerCase, form: FormatCase) -> None:
    compiled, eager, step = compiled_and_eager(case, "cpu", **form.options)
    for seed in range(3):
        both_step(compiled, eager, step, seed)
    assert step.graphs == 1
    assert any(form.keys("")[0] in key for state in eager.state.values() for key in state)


# -- paged -----------------------------------------------------------------------------------------


def paged_params() -> list[Tensor]:
    return make_params(shapes=PAGED_SHAPES)


def trained(optimizer: Any, params: Iterable[Tensor]) -> Any:
    train(optimizer, params, range(2))
    return optimizer


@every_pair()
def test_paged_state_has_the_same_bits(case: OptimizerCase, form: FormatCase) -> None:
    options = {"lr": 0.01, "seed": 3, **case.full, **form.options}
    ours, theirs = paged_params(), paged_params()
    there = trained(paged(case, ours, **options), ours)
    assert_paged(there)
    here = trained(case.make(theirs, **options), theirs)
    assert_same_training(there, here)
    again = paged(case, ours, **options)
    again.load_state_dict(there.state_dict())
    assert_paged(again)
    assert_same_training(again, here)
