"""Steps in plain PyTorch operators, against those of the kernels.

State and random numbers are the same; how far results may differ is in portable_steps.py. The ops,
pieces of tensors and compiled code have files of their own: test_portable_*.py.
"""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from format_table import MULAW as MULAW_CASE
from helpers import SMALL, all_bits, bits, make_params, needs_kernels, set_grads, through_file
from optim_table import (
    OF_8_BITS,
    OF_ELEMENTS,
    OPTIMIZERS,
    OptimizerCase,
    Options,
    every_8bit,
    every_option_set,
)
from portable_steps import (
    MOST_DIFFERENT,
    Differences,
    assert_alike,
    copy_state,
    portable,
    sorted_by_value,
    step_portably,
)
from ranks import run_ranks
from reference_rules import exact
from test_format_promises import check_what_is_almost_too_large
from test_format_promises import oracle_step as format_oracle_step
from test_optim import moment, oracle_step
from test_sharded_training import _fsdp_against_unsharded, _unsharded

import torchao8

pytestmark = needs_kernels


MULAW: Options = {"state_format": "mulaw"}


# Kinds of parameters and state; the last two are thorough.
KINDS: dict[str, tuple[torch.dtype, Options]] = {
    "float32": (torch.float32, {}),
    "float16": (torch.float16, {"block_size": 64}),
    "bfloat16": (torch.bfloat16, {"stochastic_rounding": True}),
    "one scale": (torch.float32, {"block_wise": False}),
    "mulaw": (torch.float32, MULAW),
    "mulaw, one scale": (torch.float32, {**MULAW, "block_wise": False}),
    "mulaw, bfloat16": (torch.bfloat16, {**MULAW, "stochastic_rounding": True}),
}


def _kinds_of_steps() -> Iterator[Any]:
    """Each set of options in float32, and each kind with the longest set of a class; the rest of
    the product is thorough."""
    for case in OPTIMIZERS:
        longest = max(case.options, key=len)
        for options in case.options:
            name = ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"
            for kind, (dtype, more) in KINDS.items():
                if "state_format" in more and case.optim_bits == 32:
                    continue
                common = kind == "float32" or options is longest
                is_thorough = not common or kind in list(KINDS)[-2:]
                yield pytest.param(
                    case,
                    options,
                    dtype,
                    more,
                    id=f"{case.cls.__name__}-{name}-{kind}",
                    marks=pytest.mark.thorough if is_thorough else (),
                )


@pytest.mark.parametrize(("case", "options", "dtype", "more"), list(_kinds_of_steps()))
def test_steps_like_the_kernels(
    case: OptimizerCase, options: Options, dtype: torch.dtype, more: Options, device: str
) -> None:
    """Ten steps, four in other formats, each from the same state: no error adds up."""
    of_kernels, of_operators = (make_params(dtype, device=device) for _ in range(2))
    options = {**options, **more, "min_8bit_size": SMALL}
    theirs, ours = (case.make(ps, **options) for ps in (of_kernels, of_operators))
    differences = Differences()
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for step in range(4 if "state_format" in options else 10):
        for params in (of_kernels, of_operators):
            set_grads(params, step)
        theirs._init_states()
        wanted = []
        if more.get("state_format") == "mulaw" and "block_wise" not in more:
            wanted = [format_oracle_step(case, MULAW_CASE, theirs, p) for p in of_kernels]
        elif not {"block_wise", "block_size"} & set(options):
            wanted = [oracle_step(case, theirs, p) for p in of_kernels]
        theirs.step()
        step_portably(ours, device)
        assert_alike(case, theirs, ours, wanted, unit, differences)
        copy_state(theirs, ours)
    differences.check()


@pytest.mark.parametrize("size", [9.2e18, 8.5e37], ids=["squares", "averages"])
@pytest.mark.parametrize(
    ("rule", "options"),
    [("adam", {"optim_bits": 4}), ("adam", MULAW), ("sgd", {"optim_bits": 4}), ("sgd", MULAW),
     ("adam", {**MULAW, "block_wise": False}), ("rmsprop", MULAW)],
)  # fmt: skip
def test_what_is_almost_too_large_stays(rule: str, options: Options, size: float) -> None:
    case = next(case for case in OF_8_BITS if case.rule == rule)
    check_what_is_almost_too_large(case, {**case.full, **options}, size, step_portably)


@every_8bit()
def test_ten_steps_on_their_own(case: OptimizerCase) -> None:
    """Codes that differ once mostly differ from then on: by a value that is one code, or several
    where the sum of an average and a gradient has become small."""
    of_kernels, of_operators = make_params(), make_params()
    theirs, ours = (case.make(ps, min_8bit_size=SMALL) for ps in (of_kernels, of_operators))
    for step in range(10):
        for params in (of_kernels, of_operators):
            set_grads(params, step)
        theirs.step()
        step_portably(ours)
    codes = different = 0
    for p, q in zip(of_kernels, of_operators, strict=True):
        # A moment that is a code away moves its parameter by a share of a step.
        near = (p - q).abs() <= 1e-5 * (1 + p.abs())
        assert (~near).sum() <= max(1, 1e-3 * p.numel())
        for state in theirs._states(theirs.param_groups[0]):
            if f"{state.name}_codes" not in theirs.state[p]:
                continue
            a, b = (moment(case, o.state[x], state.name) for o, x in ((theirs, p), (ours, q)))
            scale = theirs.state[p][f"{state.name}_scale"].abs().max()
            assert ((a - b).abs() <= 1.1 * 0.9 / 64 * scale).all()  # the map's widest gap
            a, b = (o.state[x][f"{state.name}_codes"] for o, x in ((theirs, p), (ours, q)))
            codes, different = codes + a.numel(), different + int((a != b).sum())
    assert different <= max(1, MOST_DIFFERENT * codes)


@every_8bit()
def test_parameters_that_are_not_finite_stay(case: OptimizerCase) -> None:
    """As with the kernels: a mask of minus infinity among them is not made NaN."""
    for options in ({}, case.full):
        of_kernels, of_operators = make_params(), make_params()
        values = torch.tensor([math.inf, -math.inf, math.nan])
        for ps, step in ((of_kernels, lambda o: o.step()), (of_operators, step_portably)):
            for p in ps:
                p.data.view(-1)[:3] = values[: p.numel()]
            optimizer = case.make(ps, min_8bit_size=SMALL, **options)
            set_grads(ps, 0)
            step(optimizer)
        for p, q in zip(of_kernels, of_operators, strict=True):
            assert bits(p.isfinite()) == bits(q.isfinite())
            assert torch.equal(p.isnan(), q.isnan())


@every_8bit()
@pytest.mark.parametrize("state_format", ["dynamic", "mulaw"])
def test_blocks_that_are_not_like_others(case: OptimizerCase, state_format: str) -> None:
    """Gradients that are not finite or all zero, and state that no step leaves, as the kernels."""
    pair = []
    for step in (lambda o: o.step(), step_portably):
        params = make_params(shapes=[(6, 512)])
        # With an eps: without it all momenta of the first step of RMSprop have one magnitude.
        options = {**case.full, **case.known({"adaptive": False, "eps": 1e-2})}
        options["state_format"] = state_format
        optimizer = case.make(params, min_8bit_size=SMALL, **options)
        for seed in range(2):
            set_grads(params, seed)
            grad: Any = params[0].grad
            grad[0, 3], grad[0, 300], grad[1, :256], grad[2] = math.nan, math.inf, -math.inf, 0.0
            grad[3] = 1e30  # its square is infinite
            grad[4] *= 1e-30
            step(optimizer)
            scales = [v for k, v in optimizer.state[params[0]].items() if k.endswith("_scale")]
            for scale in scales:
                scale[5] = torch.tensor([math.nan, 2.0**126])
        pair.append(optimizer)
    (p, mine), (q, other) = ((o.param_groups[0]["params"][0], o.state) for o in pair)
    torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    differences = Differences()
    for key, value in mine[p].items():
        if key.endswith("_scale"):
            torch.testing.assert_close(value, other[q][key], rtol=1e-4, atol=0, equal_nan=True)
        elif value.dtype == torch.uint8:
            is_mulaw = key.endswith("_mulaw") and case.is_signed(key.removesuffix("_mulaw"))
            pair = [sorted_by_value(x) if is_mulaw else x for x in (value, other[q][key])]
            differences.add(*pair)
    assert differences.codes > 0
    differences.check()


@every_8bit()
@pytest.mark.parametrize("saved_by", ["kernels", "operators"])
@pytest.mark.parametrize("state_format", ["dynamic", "mulaw"])
def test_state_goes_from_one_to_the_other(
    case: OptimizerCase, saved_by: str, state_format: str
) -> None:
    options = {"min_8bit_size": SMALL, "state_format": state_format, **case.full}
    first, second = make_params(), make_params()
    writer, reader = case.make(first, **options), case.make(second, **options)
    steps = [lambda o: o.step(), step_portably]
    write, read = steps if saved_by == "kernels" else steps[::-1]
    for seed in range(2):
        set_grads(first, seed)
        write(writer)
    saved = through_file(copy.deepcopy(writer.state_dict()))
    reader.load_state_dict(saved)
    for p, q in zip(first, second, strict=True):
        q.data.copy_(p.data)
        assert {k: bits(v) for k, v in writer.state[p].items()} == {
            k: bits(v) for k, v in reader.state[q].items()
        }
    set_grads(second, 2)
    read(reader)
    assert all(q.isfinite().all() for q in second)


@every_8bit()
@pytest.mark.parametrize(
    "kind", [{"optim_bits": 8}, {"optim_bits": 32}, {"state_format": "mulaw"}], ids=str
)
def test_found_inf_changes_nothing(case: OptimizerCase, kind: Options) -> None:
    for options in ({}, {"block_wise": False}):
        params = make_params()
        options = {**options, **case.full, **kind, "min_8bit_size": SMALL}
        optimizer = case.make(params, fused=True, **options)
        set_grads(params, 0)
        step_portably(optimizer)
        before = all_bits(optimizer)
        set_grads(params, 1)
        expected = all_bits(optimizer)["grads"]
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(1.0)
        step_portably(optimizer)
        assert all_bits(optimizer) == {**before, "grads": expected}
        optimizer.found_inf = torch.tensor(0.0)
        step_portably(optimizer)
        assert all_bits(optimizer)["params"] != before["params"]


@every_option_set(of_torch=True, cases=OF_ELEMENTS)
def test_the_rules_are_those_of_torch_optim(case: OptimizerCase, options: Options) -> None:
    """In float64: what the oracle and the portable step have in common."""
    if case.optim_bits == 8:
        pytest.skip("the rule is the same")
    options = {**case.base, **options}
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(50, dtype=torch.float64, generator=generator)
    ours = case.make([torch.nn.Parameter(torch.ones(1))], **options)
    group = ours.param_groups[0]
    group["decoupled_weight_decay"] = group.get("decoupled_weight_decay", False)
    if case.cls.__name__ == "AdamW":
        group["decoupled_weight_decay"] = True
    theirs = p.clone().requires_grad_()
    optimizer = case.torch_cls([theirs], **options)  # type: ignore[misc]
    states = {s.name: torch.zeros_like(p) for s in ours._states(group)}
    states.update({name: torch.ones((), dtype=torch.float64) for name in case.scalars})
    if "initial_accumulator_value" in options:
        states["sum"] += options["initial_accumulator_value"]
    for step in range(1, 6):
        theirs.grad = torch.randn(50, dtype=torch.float64, generator=generator)
        rule = case.rule
        p, states = exact(rule, p, theirs.grad, states, step, group, False)
        optimizer.step()
        # NAdam of torch.optim keeps a product of momenta in float32.
        rtol = 1e-6 if case.scalars else 1e-11
        torch.testing.assert_close(p, theirs.detach(), rtol=rtol, atol=1e-2 * rtol)


def test_sharded_over_two_ranks() -> None:
    """FSDP2 with uneven rows: the bits of the same steps unsharded."""
    adam = next(i for i, case in enumerate(OPTIMIZERS) if case.cls is torchao8.AdamW8bit)
    lamb = next(i for i, case in enumerate(OPTIMIZERS) if case.cls is torchao8.LAMB8bit)
    with portable():
        runs = [(i, kind, _unsharded.__wrapped__(i, kind)) for i in (adam, lamb) for kind in (0, 1)]
    run_ranks(2, _sharded_portably, runs)


def _sharded_portably(rank: int, world_size: int, runs: Any) -> None:
    with portable():
        _fsdp_against_unsharded(rank, world_size, (world_size,), runs)
