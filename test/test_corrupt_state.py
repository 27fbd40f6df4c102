"""State that no step leaves behind, and loss scales at the ends of float32's range.

Whatever stands in a checkpoint that was damaged, a step reads no memory that is not its own, gives
the same bits on every path, and moves no parameter by it.
"""

import math

import pytest
import torch
from adam_call import Call, call_bits, copy_call, new_call, run
from cpu_paths import PATHS
from helpers import SMALL, make_params, train
from optim_table import OPTIMIZERS, OptimizerCase

import torchao8

BAD_SCALES = {
    "exp_avg": [math.inf, -math.inf, math.nan, -math.nan, 8e37, 3e38],
    "exp_avg_sq": [math.inf, math.nan, -math.nan, 8e37, -1e-3, -2e-19, -math.inf, -0.0],
}


def corrupt_call(name: str, scale: float, stochastic: bool, device: str = "cpu") -> Call:
    """Rows of several lengths in the middle of a run, the second of them with a bad scale."""
    torch.manual_seed(0)
    shapes = [(3, 512), (3, 300), (3, 40)]
    grads = [torch.randn(s) * 1e-2 for s in shapes]
    params = [torch.randn(s) for s in shapes]
    call = new_call(params, grads, stochastic_rounding=stochastic, device=device)
    for _ in range(3):
        run(call)
    for scales in call[f"{name}_scales"]:
        scales[1] = scale
    return call


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name, all_ in BAD_SCALES.items() for scale in all_]
)
def test_a_bad_scale_is_the_same_on_every_path(workers, name, scale, stochastic) -> None:
    call = corrupt_call(name, scale, stochastic)
    results = [workers.get(path)("adam", copy_call(call), 1, False) for path in PATHS]
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name, all_ in BAD_SCALES.items() for scale in all_]
)
def test_a_bad_scale_moves_no_parameter_and_stays_in_its_row(
    name: str, scale: float, device: str
) -> None:
    call, good = (corrupt_call(name, scale, True, device) for _ in range(2))
    for healthy in good[f"{name}_scales"]:
        healthy[1] = 0.0
    before = [p.clone() for p in call["params"]]
    run(call)
    run(good)
    for p, q, old in zip(call["params"], good["params"], before, strict=True):
        # Where codes are zero times a finite scale nothing is bad: hence the step's size, not 0.
        assert (p[1] - old[1]).abs().max() < 0.2
        assert torch.equal(p[0], q[0])
        assert torch.equal(p[2], q[2])


@pytest.mark.parametrize("scale", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "case", [case for case in OPTIMIZERS if case.optim_bits == 8], ids=lambda c: c.cls.__name__
)
def test_no_rule_lets_a_bad_scale_out(case: OptimizerCase, scale: float, device: str) -> None:
    """Of any state; the other rows go on, but for LAMB, whose learning rate is one for all of them,
    and Muon, whose update is one matrix."""
    for name, _ in (*case.states, *case.more_states):
        ends = []
        for is_bad in (True, False):
            params = make_params(shapes=[(3, 512), (3, 300)], device=device)
            optimizer = case.make(params, min_8bit_size=SMALL, **case.full)
            train(optimizer, params, range(3))
            for p in params:
                optimizer.state[p][f"{name}_scale"][1] = scale if is_bad else 0.0
            before = [p.detach().clone() for p in params]
            train(optimizer, params, [3])
            ends.append(params)
            if is_bad:
                for p, old in zip(params, before, strict=True):
                    # A maximum takes no notice of -inf, so that a row may make its usual step.
                    assert (p[1] - old[1]).abs().max() < 0.2
        for bad, good in zip(*ends, strict=True):
            if case.rule not in ("lamb", "muon"):
                assert torch.equal(bad[0], good[0])
                assert torch.equal(bad[2], good[2])
            assert bad.isfinite().all()


@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("exponent", [-100, -40, 1, 40, 60, 72, 100])
def test_a_loss_scale_of_any_size_changes_no_bit(exponent, decoupled, state_bits, device) -> None:
    torch.manual_seed(0)
    p, g = torch.randn(4, 512), torch.randn(4, 512) * 1e-2
    calls = []
    for scale in (1.0, 2.0**exponent):
        grad_scale = None if scale == 1.0 else torch.tensor(scale)
        call = new_call(
            [p.clone()],
            [g * scale],
            state_bits=state_bits,
            weight_decay=0.1,
            decoupled_weight_decay=decoupled,
            grad_scale=grad_scale,
            device=device,
        )
        for _ in range(3):
            run(call)
        calls.append(call)
    assert call_bits(calls[0]) == call_bits(calls[1])


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_an_impossible_loss_scale_is_refused(scale: float, device: str) -> None:
    """Where it lies on the CPU. One on a GPU is not read: test_cuda.py says what it does."""
    call = new_call([torch.ones(4, 512)], [torch.ones(4, 512)], device=device)
    call["grad_scale"] = torch.tensor(scale)
    before = call_bits(call)
    with pytest.raises(RuntimeError, match="grad_scale must be positive and finite"):
        run(call)
    assert call_bits(call) == before


@pytest.mark.parametrize("step", [-1.0, 0.5, 2.0**24, math.inf, math.nan])
def test_an_impossible_step_is_refused(step: float) -> None:
    """On the CPU. On a GPU it is not read: test_cuda.py says what it does."""
    params, grads = [[torch.ones(4, 512) for _ in range(2)] for _ in range(2)]
    call = new_call(params, grads)
    call["steps"][1].fill_(step)
    before = call_bits(call)
    with pytest.raises(
        RuntimeError, match=r"steps\[1\] must be a whole number from 0 to 2\^24 - 1"
    ):
        run(call)
    assert call_bits(call) == before


@pytest.mark.parametrize("values", [(-1.0, 1.0), (math.inf, 1.0), (1.0, math.inf), (1.0, math.nan)])
def test_impossible_factors_are_refused(values: tuple[float, float]) -> None:
    """On the CPU, as with steps. A NaN for the gradient is possible: nothing changes then."""
    params, grads = [[torch.ones(4, 512) for _ in range(2)] for _ in range(2)]
    ones = torch.ones(2, dtype=torch.float64)
    factors = [ones, torch.tensor(values, dtype=torch.float64)]
    call = new_call(params, grads, factors=factors)
    before = call_bits(call)
    with pytest.raises(RuntimeError, match=r"factors\[1\] must hold finite numbers"):
        run(call)
    assert call_bits(call) == before


def test_one_tensor_twice_is_refused(device: str) -> None:
    p = torch.ones(4, 512, device=device)
    call = new_call([p, p], [p.clone(), p.clone()], device=device)
    before = call_bits(call)
    with pytest.raises(RuntimeError, match=r"params\[0\] and params\[1\] must be different"):
        run(call)
    assert call_bits(call) == before


@pytest.mark.parametrize(
    "option",
    [
        {"betas": (1.0, 0.9)},
        {"block_size": 64},
        {"state_rounding": "up"},
        {"is_paged": "yes"},
        {"maximize": "no"},
    ],
)
def test_an_option_refused_in_the_last_group_leaves_the_first_alone(option, device) -> None:
    params = [torch.nn.Parameter(torch.ones(8, 1024, device=device)) for _ in range(2)]
    optimizer = torchao8.AdamW8bit([{"params": [p]} for p in params])
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.param_groups[1].update(option)
    with pytest.raises((RuntimeError, ValueError, NotImplementedError)):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    assert [float(optimizer.state[p]["step"]) for p in params] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [("exp_avg_scale", math.inf), ("exp_avg_sq_scale", -1.0), ("step", 1.5), ("step", -1.0)],
)
def test_a_state_that_no_step_leaves_is_not_loaded(key: str, value: float, device: str) -> None:
    p = torch.nn.Parameter(torch.ones(8, 1024, device=device))
    optimizer = torchao8.AdamW8bit([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {**saved["state"][0], key: torch.full_like(saved["state"][0][key], value)}
    before = {k: v.clone() for k, v in optimizer.state[p].items()}
    with pytest.raises(ValueError, match=f"^{key} of parameter 0: expected"):
        optimizer.load_state_dict(saved)
    assert all(torch.equal(v, before[k]) for k, v in optimizer.state[p].items())
