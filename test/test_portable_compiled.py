"""Steps in plain PyTorch operators that torch.compile has compiled, or should have."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, make_params, needs_kernels, set_grads
from optim_table import OptimizerCase, every_optimizer
from portable_steps import Differences, assert_alike, copy_state, portable, step_portably
from test_compile import Compiled
from test_optim import CountOps, oracle_step
from torch.utils.flop_counter import FlopCounterMode

import torchao8
from torchao8.portable import compiled

pytestmark = needs_kernels


def test_a_traced_step_is_one_graph(fresh_compiler: None) -> None:
    """A learning rate that changes compiles nothing again."""
    lr = torch.tensor(0.01)
    with portable():
        pair = [torchao8.AdamW8bit(make_params(), lr=lr, min_8bit_size=SMALL) for _ in range(2)]
        step = Compiled(pair[0].step, fullgraph=True)
        for seed in range(3):
            lr.fill_(0.01 / (seed + 1))
            for optimizer in pair:
                set_grads(optimizer.param_groups[0]["params"], seed)
            step()
            pair[1].step()
            assert all_bits(pair[0]) == all_bits(pair[1])
    assert step.graphs == 1


@pytest.mark.parametrize("state_format", ["dynamic", "mulaw"])
def test_a_compiled_piece_steps_like_an_eager_one(
    state_format: str, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each kind of tensor, whatever their sizes. Warns of nothing."""
    monkeypatch.setattr(compiled, "_compiled", {})
    shapes = [(40, 512), (17, 512), (300, 256), (3000,)]
    pair = []
    for compiles in (True, False):
        params = make_params(shapes=shapes)
        optimizer = torchao8.AdamW8bit(params, min_8bit_size=5000, state_format=state_format)
        with portable(compiles=compiles), warnings.catch_warnings():
            warnings.filterwarnings("error", message="torchao8")
            for seed in range(3):
                set_grads(params, seed)
                optimizer.step()
        assert len(compiled._compiled) == 2
        pair.append(optimizer)
    differences = Differences()
    for p, q in zip(*(o.param_groups[0]["params"] for o in pair), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        for key, value in pair[0].state[p].items():
            differences.add(value, pair[1].state[q][key])
    differences.check()


@pytest.mark.thorough
@every_optimizer()
@pytest.mark.parametrize("state_format", ["dynamic", "mulaw"])
def test_compiled_pieces_of_every_class(
    case: OptimizerCase, state_format: str, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once for two sizes; a step is then within the oracle's bounds of an eager one.

    The options are not the defaults: with a small eps, all numbers of RMSprop's first momentum have
    one magnitude but for rounding, which then decides the sign of the scale.
    """
    monkeypatch.setattr(compiled, "_compiled", {})  # SGD's code is that of LARS
    if state_format != "dynamic" and case.optim_bits == 32:
        pytest.skip("has no state of a format")
    options = {**case.full, **case.options[-1], "min_8bit_size": SMALL}
    options.update(case.known({"state_format": state_format}))
    pair = [case.make(make_params(shapes=[(40, 512), (17, 512)]), **options) for _ in range(2)]
    eager, compiling = pair
    differences = Differences()
    for seed in range(3):
        for optimizer in pair:
            set_grads(optimizer.param_groups[0]["params"], seed)
        eager._init_states()
        wanted = []
        if state_format == "dynamic":
            wanted = [oracle_step(case, eager, p) for p in eager.param_groups[0]["params"]]
        step_portably(eager)
        with portable(compiles=True), warnings.catch_warnings():
            warnings.filterwarnings("error", message="torchao8")
            compiling.step()
        assert_alike(case, eager, compiling, wanted, 0.0, differences)
        copy_state(eager, compiling)
    differences.check()
    # Muon's steps have two pieces: one makes directions, the other moves parameters.
    assert len(compiled._compiled) == (2 if case.matrices else 1)


def test_where_compiling_fails_it_runs_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", lambda *args, **options: fail)
    monkeypatch.setattr(compiled, "_compiled", {})
    params, same = make_params(), make_params()
    optimizers = [torchao8.AdamW8bit(ps, min_8bit_size=SMALL) for ps in (params, same)]
    for ps in (params, same):
        set_grads(ps, 0)
    with portable(compiles=True), pytest.warns(UserWarning, match="operator by operator") as told:
        optimizers[0].step()
    assert len(told) == 1
    step_portably(optimizers[1])
    assert all_bits(optimizers[0]) == all_bits(optimizers[1])


def twice(function: Callable[[], Any]) -> None:
    for _ in range(2):
        function()


@pytest.mark.parametrize("fails_at", ["importing", "compiling", "first run", "another run"])
def test_a_failure_leaves_nothing_half_written(
    fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a first run wrote before it failed is taken back; and code may be compiled again."""
    from torch._dynamo.exc import BackendCompilerFailed

    runs = 0

    def no_compiler(*arguments: Any) -> None:
        raise ImportError("no compiler")

    def compile_it(function: Any, **options: Any) -> Any:
        if fails_at == "compiling":
            raise RuntimeError("not on this Python")

        def run(x: Any) -> None:
            nonlocal runs
            runs += 1
            if fails_at == "another run" and runs == 1:
                return function(x)
            if fails_at == "first run":
                function(x)
            raise BackendCompilerFailed(compile_it, RuntimeError("no compiler"), None)

        return run

    if fails_at == "importing":
        monkeypatch.setattr(torch._dynamo, "maybe_mark_dynamic", no_compiler)
    monkeypatch.setattr(torch, "compile", compile_it)
    monkeypatch.setattr(compiled, "_compiled", {})
    pair = [torchao8.AdamW8bit(make_params(), min_8bit_size=SMALL) for _ in range(2)]
    for seed in range(2):
        for optimizer in pair:
            set_grads(optimizer.param_groups[0]["params"], seed)
    with portable(compiles=True), pytest.warns(UserWarning, match="operator by operator"):
        twice(pair[0].step)
    twice(lambda: step_portably(pair[1]))
    assert all_bits(pair[0]) == all_bits(pair[1])


def test_under_a_mode_that_sees_each_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a counter of operations is: it sees the op, and the step is compiled as ever."""
    calls = 0

    def compile_it(function: Any, **options: Any) -> Any:
        def run(x: Any) -> None:
            nonlocal calls
            calls += 1
            function(x)

        return run

    monkeypatch.setattr(torch, "compile", compile_it)
    monkeypatch.setattr(compiled, "_compiled", {})
    params = make_params()
    optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL)
    set_grads(params, 0)
    with portable(compiles=True), FlopCounterMode(display=False), CountOps() as counted:
        optimizer.step()
    assert calls > 0
    assert "torchao8::adam_step_" in counted.calls
