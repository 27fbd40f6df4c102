"""Trust ratios: a learning rate that follows the norms of the whole parameter and its gradient."""

import math
from typing import Any

import pytest
import torch
from helpers import SMALL, bits, make_params, set_grads
from optim_table import OPTIMIZERS, OptimizerCase
from ranks import run_ranks
from sharded import fsdp_weights, gathered, groups_of, step_with
from torch.distributed.device_mesh import init_device_mesh

import torchao8

TRUSTING = [case for case in OPTIMIZERS if case.rule in ("lars", "lamb")]


def every_trusting() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", TRUSTING, ids=lambda case: case.cls.__name__)


@every_trusting()
def test_a_step_is_a_share_of_the_parameter(case: OptimizerCase, device: str) -> None:
    """Whatever the size of the gradient, the first step is lr * coefficient times the norm."""
    for scale in (1e-3, 1.0, 1e3):
        (p,) = make_params(shapes=[(40, 300)], device=device)
        before = p.detach().clone()
        options = {"trust_coefficient": 0.5} if case.rule == "lars" else {"eps": 1e-12}
        optimizer = case.make([p], lr=0.1, **options)
        set_grads([p], 0, scale=scale)
        optimizer.step()
        share = (p.detach() - before).double().norm() / before.double().norm()
        expected = 0.05 if case.rule == "lars" else 0.1
        assert share.item() == pytest.approx(expected, rel=1e-5)


@every_trusting()
def test_what_has_no_norm_is_stepped_without_a_ratio(case: OptimizerCase, device: str) -> None:
    """A parameter of zeros would never move, and a gradient of zeros would divide by zero."""
    (p,) = make_params(shapes=[(40, 300)], device=device)
    p.data.zero_()
    optimizer = case.make([p], lr=0.1)
    set_grads([p], 0)
    optimizer.step()
    moved = p.detach().clone()
    assert moved.isfinite().all()
    assert moved.abs().max() > 1e-3
    (q,) = make_params(shapes=[(40, 300)], device=device)
    before = bits(q)
    optimizer = case.make([q], lr=0.1, weight_decay=0.0)
    q.grad = torch.zeros_like(q)
    optimizer.step()
    assert bits(q) == before


@every_trusting()
def test_a_gradient_of_next_to_nothing_makes_nothing_infinite(
    case: OptimizerCase, device: str
) -> None:
    """The ratio that would give it an update of the usual size is no float32: it has a bound."""
    for tiny in (1e-40, 1e-45):
        (p,) = make_params(shapes=[(40, 300)], device=device)
        before = p.detach().clone()
        optimizer = case.make([p], lr=10.0, weight_decay=0.0, optim_bits=case.optim_bits)
        p.grad = torch.full_like(p, tiny)
        optimizer.step()
        assert p.isfinite().all()
        assert (p.detach() - before).abs().max() < 0.01


@every_trusting()
def test_bad_elements_have_no_part_in_the_ratio(case: OptimizerCase, device: str) -> None:
    """Neither of the gradient nor of the parameter; the others are stepped as if it were zero."""
    ends = []
    for bad in (math.nan, -math.inf, 0.0):
        (p,) = make_params(shapes=[(4, 300)], device=device)
        with torch.no_grad():
            p[1, 7] = 0.0
        optimizer = case.make([p], lr=0.5, min_8bit_size=SMALL, weight_decay=0.0)
        for seed in range(3):
            set_grads([p], seed)
            p.grad[1, 7] = bad
            optimizer.step()
        ends.append(bits(p))
    assert ends[0] == ends[1] == ends[2]


@every_trusting()
@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_group_may_do_without(case: OptimizerCase, state_bits: int) -> None:
    """Parameters of the same optimizer, with and without ratios, and clipped as well."""
    ends = []
    for together in (True, False):
        params = make_params(shapes=[(3, 300), (40, 70), (5,)])
        groups: list[dict[str, Any]] = [
            {"params": params[:1], "adaptive": False},
            {"params": params[1:2]},
            {"params": params[2:], "percentile_clipping": 60},
        ]
        common = {"lr": 0.3, "min_8bit_size": SMALL, "optim_bits": state_bits}
        parts = [groups] if together else [[group] for group in groups]
        optimizers = [case.make(part, **common) for part in parts]
        for seed in range(4):
            set_grads(params, seed, scale=seed + 1.0)
            for optimizer in optimizers:
                optimizer.step()
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1]


@every_trusting()
def test_gradients_are_clipped_before_the_ratio(case: OptimizerCase) -> None:
    """By powers of two, so that the same bits come of gradients that were clipped by hand."""
    ends = []
    for by_hand in (False, True):
        (p,) = make_params(shapes=[(3, 300)])
        clip = {} if by_hand else {"percentile_clipping": 1}
        optimizer = case.make([p], lr=0.5, min_8bit_size=SMALL, weight_decay=0.1, **clip)
        for power in (0, 0, 3):
            set_grads([p], 0)
            p.grad *= 1 if by_hand else 2.0**power
            optimizer.step()
        ends.append(bits(p))
    assert ends[0] == ends[1]


def _calls_of_a_step(rank: int, world_size: int) -> list[int]:
    mesh = init_device_mesh("cpu", (world_size,))
    calls = []
    for case in TRUSTING:
        ends = []
        for m in (mesh, None):
            params = groups_of(fsdp_weights(m).parameters(), m is not None)
            optimizer = case.make(params, lr=0.3, min_8bit_size=SMALL, percentile_clipping=20)
            with torch.profiler.profile() as profile:
                step_with(optimizer, range(3))
            if m is not None:
                events = profile.key_averages()
                calls.append(sum(e.count for e in events if e.key == "gloo:all_reduce"))
            ends.append(gathered(optimizer))
        assert ends[0] == ends[1], case.cls
    return calls


def test_few_collectives() -> None:
    """One for all parameters of both groups, clipping included; LAMB has one more, between its
    passes."""
    calls = run_ranks(3, _calls_of_a_step)
    assert calls == [[3 * (1 if case.rule == "lars" else 2) for case in TRUSTING]] * 3


def test_lars_without_decay_ignores_what_is_not_the_direction() -> None:
    """The ratio takes the norm out of the gradient: of twice the gradient, the same bits."""
    ends = []
    for scale in (1.0, 2.0):
        params = make_params()
        optimizer = torchao8.LARS8bit(params, lr=0.3, momentum=0.9, min_8bit_size=SMALL)
        for seed in range(3):
            set_grads(params, seed)
            for p in params:
                p.grad *= scale
            optimizer.step()
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1]
