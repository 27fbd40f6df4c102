"""torch.compile: one graph, traced once, that writes to the parameters and states themselves."""

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import (
    SHAPES,
    SMALL,
    all_bits,
    assert_same_training,
    make_params,
    reset_compiler,
    set_grads,
)
from optim_table import FEW, OF_8_BITS, OPTIMIZERS, OptimizerCase, few_8bit, one_adam
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.optim import Optimizer

import torchao8
from torchao8 import ops

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated"),  # torch's own
]


class Compiled:
    """A compiled function that counts the graphs it was compiled to, so far.

    How often it is traced, and what is traced, does not depend on the backend, and "aot_eager" is
    the quick one.
    """

    def __init__(
        self, function: Callable[..., Any], backend: str = "aot_eager", **options: Any
    ) -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.function = torch.compile(function, backend=self.counter, **options)

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    @property
    def graphs(self) -> int:
        return self.counter.frame_count


def compiled_and_eager(
    case: OptimizerCase,
    device: str,
    dynamic: bool | None = None,
    backend: str = "aot_eager",
    **options: Any,
) -> tuple[Optimizer, Optimizer, Compiled]:
    """Two optimizers of the same parameters, with 8-bit and 32-bit states, and the first's step."""
    options = {"min_8bit_size": SMALL, "weight_decay": 0.1, **options}
    pair = [case.make(make_params(device=device), **copy.deepcopy(options)) for _ in range(2)]
    return *pair, Compiled(pair[0].step, backend, fullgraph=True, dynamic=dynamic)


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def both_step(
    compiled: Optimizer, eager: Optimizer, step: Compiled, seed: int, skip: int = 0
) -> None:
    """The same gradients for both, none for the first ``skip`` parameters."""
    for optimizer in (compiled, eager):
        set_grads(params_of(optimizer)[skip:], seed)
    step()
    eager.step()
    assert_same_training(compiled, eager)


def _backends() -> Iterator[Any]:
    """Inductor for the 8-bit classes, which step both formats of state, and dynamic=True for few
    of them. The rest is thorough."""
    for case in OPTIMIZERS:
        for backend, dynamic in (("inductor", None), ("aot_eager", True)):
            common = case.cls in FEW if dynamic else case.optim_bits == 8
            marks = () if common else pytest.mark.thorough
            name = f"{case.cls.__name__}-{backend}"
            yield pytest.param(case, backend, dynamic, id=name, marks=marks)


@pytest.mark.parametrize(("case", "backend", "dynamic"), list(_backends()))
def test_one_graph_and_the_bits_of_eager(
    case: OptimizerCase, dynamic: bool | None, backend: str, device: str
) -> None:
    """From the very first step, which makes the states; compiled once."""
    compiled, eager, step = compiled_and_eager(case, device, dynamic, backend)
    both_step(compiled, eager, step, 0)
    graphs = step.graphs
    assert graphs == 1 or dynamic  # dynamic=True starts again once it has met a float it must keep
    for seed in range(1, 4):
        both_step(compiled, eager, step, seed)
    assert step.graphs == graphs


@one_adam()
@pytest.mark.parametrize(
    "options",
    [{"amsgrad": True}, {"maximize": True, "state_rounding": "nearest"}, {"seed": 5}],
    ids=str,
)
def test_options(case: OptimizerCase, options: dict[str, Any], device: str) -> None:
    compiled, eager, step = compiled_and_eager(case, device, **options)
    for seed in range(3):
        both_step(compiled, eager, step, seed)
    assert step.graphs == 1


def _rates() -> Iterator[Any]:
    """A tensor for every class; a number, which is made a tensor alike for all, for two of them."""
    for case in OF_8_BITS:
        for lr in ("tensor", "number"):
            common = lr == "tensor" or case.cls in (torchao8.AdamW8bit, torchao8.LARS8bit)
            marks = () if common else pytest.mark.thorough
            yield pytest.param(case, lr, id=f"{case.cls.__name__}-{lr}", marks=marks)


@pytest.mark.parametrize(("case", "lr"), list(_rates()))
def test_generated_code_has_no_clone(case: OptimizerCase, lr: str, device: str) -> None:
    """The ops get the inputs of the graph: nothing is allocated, copied or written back but for the
    numbers of the rule, and the one that a float lr becomes."""
    params = make_params(device=device) + make_params(torch.bfloat16, device=device)
    value = torch.tensor(0.01, device=device) if lr == "tensor" else 0.01
    optimizer = case.make(params, lr=value, optim_bits=8, min_8bit_size=SMALL)
    set_grads(params, 0)
    _, codes = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    (code,) = codes
    body = code[code.index("def call(") : code.index("runner = Runner")]
    # On a GPU inductor may align an input that is not, as all are here.
    body = body.replace("copy_if_misaligned(", "(")
    assert body.count(f"torch.ops.torchao8.{case.step_op}.default(") == 4
    for copying in ("clone", "copy_", "as_strided", "auto_functionalized"):
        assert copying not in body
    # An op that changed what the step has read would depend on each output of it, once for each
    # count: inductor took minutes over the 148 parameters of GPT-2.
    assert "count_step_" not in body
    sizes = re.findall(r"empty_strided\w*\((\([^)]*\))", body)
    # Trust ratios, and a look at gradients: some numbers a parameter, of which LAMB's sums of
    # squares are 18 each.
    n = len(params)
    of_rule = {
        "lars": {f"({n}, )", f"({n}, 2)", "()"},
        "muon": {f"({n}, 2)"},
        "lamb": {f"({n}, 2)", f"({18 * n}, )", f"({2 * n}, 18)"},
    }
    numbers = {f"({len(ops.NUMBERS[case.cls._op])}, )"} | ({"()"} if lr == "number" else set())
    of_this_rule = of_rule.get(case.rule, set())
    assert set(sizes) - of_this_rule == numbers - of_this_rule
    # Every other tensor in the calls is an input of the graph.
    calls = re.findall(rf"{case.step_op}\.default\((.*)\)", body)
    tensors = {name for call in calls for name in re.findall(r"[\[ ]((?:arg|buf)\w+)", call)}
    assert len(tensors) > 2 * len(params)
    buffers = {name for name in tensors if name.startswith("buf")}
    assert len(buffers) == 1 + (lr == "number")


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@few_8bit()
@pytest.mark.parametrize("dynamic", [None, pytest.param(True, marks=pytest.mark.thorough)])
def test_a_tensor_lr_never_recompiles(
    case: OptimizerCase, dynamic: bool | None, device: str
) -> None:
    """A scheduler writes into it after each step."""
    lr = torch.tensor(0.01, device=device)
    compiled, eager, step = compiled_and_eager(case, device, dynamic, lr=lr)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)) for o in (compiled, eager)
    ]
    both_step(compiled, eager, step, 0)
    graphs = step.graphs
    for seed in range(1, 6):
        for schedule in schedules:
            schedule.step()
        both_step(compiled, eager, step, seed)
    assert float(compiled.param_groups[0]["lr"]) == pytest.approx(0.01 / 6)
    assert step.graphs == graphs


def graphs_of_a_schedule(optimizer: Optimizer, dynamic: bool | None) -> int:
    """Graphs compiled for ten steps with ten values of a float lr."""
    reset_compiler()
    # torch.optim breaks the graph on purpose, so fullgraph is no option for it.
    step = Compiled(optimizer.step, dynamic=dynamic)
    for seed in range(10):
        optimizer.param_groups[0]["lr"] = 0.01 / (seed + 1)
        set_grads(params_of(optimizer), seed)
        step()
    return step.graphs


@one_adam()
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_float_lr_recompiles_no_more_than_in_torch(
    case: OptimizerCase, dynamic: bool | None, device: str
) -> None:
    """Once, when torch.compile sees that it changes; and the values are the right ones."""

    def few_params() -> list[torch.nn.Parameter]:  # torch.optim is traced op by op
        return make_params(shapes=SHAPES[:2], device=device)

    theirs = graphs_of_a_schedule(case.torch_cls(few_params()), dynamic)
    ours = graphs_of_a_schedule(case.make(few_params(), min_8bit_size=SMALL), dynamic)
    assert ours <= theirs
    assert ours <= 2

    reset_compiler()
    compiled, eager, step = compiled_and_eager(case, device, dynamic)
    for seed in range(5):
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["lr"] = 0.01 / (seed + 1)
        both_step(compiled, eager, step, seed)
    assert step.graphs <= 2


@few_8bit()
def test_late_first_gradient(case: OptimizerCase, device: str) -> None:
    """One more graph when gradients come that were not there before; the states are there."""
    compiled, eager, step = compiled_and_eager(case, device)
    for seed in range(2):
        both_step(compiled, eager, step, seed, skip=2)
    assert step.graphs == 1
    assert len(compiled.state) == len(params_of(compiled))
    for seed in range(2, 4):
        both_step(compiled, eager, step, seed)
    assert step.graphs == 2
    assert float(compiled.state[params_of(compiled)[0]]["step"]) == 2


@few_8bit()
def test_groups_and_dtypes(case: OptimizerCase, device: str) -> None:
    """Groups of their own options, bfloat16 parameters, and a group that comes later."""

    def make() -> Optimizer:
        halves = make_params(torch.bfloat16, device=device)
        groups = [
            {"params": make_params(device=device), "lr": 0.1, "optim_bits": 32},
            {"params": halves, "weight_decay": 0.5, **case.known({"amsgrad": True})},
        ]
        return case.make(groups, min_8bit_size=SMALL)

    compiled, eager = make(), make()
    step = Compiled(compiled.step, fullgraph=True)
    for seed in range(2):
        both_step(compiled, eager, step, seed)
    assert step.graphs == 1
    for optimizer in (compiled, eager):
        later = make_params(seed=3, device=device)
        optimizer.add_param_group({"params": later, "maximize": True})
    for seed in range(2, 4):
        both_step(compiled, eager, step, seed)
    assert step.graphs == 2


@few_8bit()
def test_a_checkpoint_loaded_between_compiled_steps(case: OptimizerCase, device: str) -> None:
    """The new states are stepped, not those that were traced."""
    compiled, eager, step = compiled_and_eager(case, device)
    both_step(compiled, eager, step, 0)
    saved = copy.deepcopy(compiled.state_dict())
    both_step(compiled, eager, step, 1)
    compiled.load_state_dict(copy.deepcopy(saved))
    eager.load_state_dict(copy.deepcopy(saved))
    for seed in range(2, 4):
        both_step(compiled, eager, step, seed)
    assert {float(s["step"]) for s in compiled.state.values()} == {3.0}


@one_adam()
def test_closure_and_hooks(case: OptimizerCase, device: str) -> None:
    """Hooks are traced with the step, and may count."""
    compiled, eager, step = compiled_and_eager(case, device)
    seen: list[int] = []
    compiled.register_step_pre_hook(lambda o, args, kwargs: seen.append(1))
    compiled.register_step_post_hook(lambda o, args, kwargs: seen.append(2))
    for seed in range(2):
        both_step(compiled, eager, step, seed)
    assert seen == [1, 2, 1, 2]
    for optimizer in (compiled, eager):
        set_grads(params_of(optimizer), 5)
    closure = lambda: torch.ones(()) * 3  # noqa: E731
    assert float(Compiled(compiled.step)(closure)) == float(eager.step(closure)) == 3
    assert_same_training(compiled, eager)


@one_adam()
def test_a_write_is_seen_by_autograd(case: OptimizerCase, device: str) -> None:
    """Also when the step is compiled."""
    optimizer, _, step = compiled_and_eager(case, device, backend="inductor")
    params = params_of(optimizer)
    set_grads(params, 0)
    step()
    stale = (params[0] ** 2).sum()
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@one_adam()
def test_grad_scaler_attributes(case: OptimizerCase, device: str) -> None:
    """grad_scale and found_inf are inputs of the graph: their values do not recompile it."""
    compiled, eager, step = compiled_and_eager(case, device, fused=True)
    for seed in range(4):
        overflow = float(seed == 2)
        before = all_bits(compiled)
        for optimizer in (compiled, eager):
            optimizer.grad_scale = torch.tensor(2.0**seed, device=device)
            optimizer.found_inf = torch.tensor(overflow, device=device)
        both_step(compiled, eager, step, seed)
        after = all_bits(compiled)
        assert (after["params"] == before["params"]) == bool(overflow)
        assert (after["states"] == before["states"]) == bool(overflow)
    assert step.graphs == 1


# -- a whole train step ------------------------------------------------------------------------


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(70, 100), torch.nn.Tanh(), torch.nn.Linear(100, 5, bias=False)
    )


def check_train_step(
    case: OptimizerCase,
    lr: str,
    device: str,
    make_step: Callable[[torch.nn.Module, Optimizer], Callable[[Tensor], Tensor]],
    **options: Any,
) -> list[int]:
    """Five compiled train steps, each with another lr; gives the number of graphs after each.

    The compiled model rounds differently, so an eager step is given the gradients of the compiled
    one, and must have the same bits.
    """

    def make() -> tuple[torch.nn.Module, Optimizer]:
        model = make_model().to(device)
        value = torch.tensor(0.01, device=device) if lr == "tensor" else 0.01
        return model, case.make(model.parameters(), lr=value, min_8bit_size=SMALL)

    model, optimizer = make()
    other_model, other = make()
    x = torch.randn(8, 70).to(device)
    compiled = Compiled(make_step(model, optimizer), "inductor", **options)
    losses, graphs = [], []
    for i in range(5):
        losses.append(float(compiled(x)))
        graphs.append(compiled.graphs)
        for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
            q.grad = p.grad
        other.step()
        assert_same_training(optimizer, other)
        for group in optimizer.param_groups + other.param_groups:
            if lr == "tensor":
                group["lr"].fill_(0.01 / (i + 2))
            else:
                group["lr"] = 0.01 / (i + 2)
    assert losses[-1] < losses[0]
    return graphs


@pytest.mark.parametrize(
    "change", [{"block_size": 128}, {"optim_bits": 32}, {"min_8bit_size": 10**6}], ids=str
)
def test_a_layout_option_that_is_changed_late_is_refused(change: dict[str, int]) -> None:
    """As without torch.compile, and with the same words.

    Before the tests of whole train steps: torch mixes up what it compiled of ``step`` inside of
    them with what it compiles of it alone.
    """
    p = torch.nn.Parameter(torch.ones(64, 256))
    optimizer = torchao8.AdamW8bit([p], lr=torch.tensor(0.1))
    p.grad = torch.ones_like(p)
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    step()
    optimizer.param_groups[0].update(change)
    before = p.detach().clone()
    with pytest.raises(Exception, match=r"already has 8-bit state.*Set that back"):
        step()
    assert torch.equal(p, before)


@one_adam()
@pytest.mark.parametrize("lr", ["tensor", "number"])
def test_a_whole_train_step(case: OptimizerCase, lr: str, device: str) -> None:
    """Forward, backward and step, as people compile them: a graph on each side of backward()."""

    def make_step(model: torch.nn.Module, optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
        def step(x: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    graphs = check_train_step(case, lr, device, make_step)
    assert graphs == ([2] * 5 if lr == "tensor" else [2, 3, 3, 3, 3])


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch cannot trace backward()",
)
@one_adam()
@pytest.mark.parametrize("lr", ["tensor", "number"])
def test_a_whole_train_step_in_one_graph(case: OptimizerCase, lr: str, device: str) -> None:
    """With backward() in the graph: the step gets gradients that no parameter has yet.

    It is a function of its own because torch mixes up what it compiled of one function with
    ``trace_autograd_ops`` and without.
    """

    def make_step(model: torch.nn.Module, optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
        def step_in_one_graph(x: Tensor) -> Tensor:
            for p in model.parameters():
                p.grad = None
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step_in_one_graph

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        graphs = check_train_step(case, lr, device, make_step, fullgraph=True)
    assert graphs == ([1] * 5 if lr == "tensor" else [1, 2, 2, 2, 2])
