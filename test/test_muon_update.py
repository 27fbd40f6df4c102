"""The op of a whole step of Muon on plain tensors, and the one that finds bad gradients."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import bits, reset_compiler
from torch import Tensor
from torch.optim._muon import _adjust_lr

from torchao8 import matrix_shape, ops, quantize_blockwise
from torchao8.optim._muon import factors, update
from torchao8.optim._muon.newton_schulz import orthogonalize_, stack_size

CPU = torch.device("cpu")
MUON = (3.4445, -4.7750, 2.0315)
# Small ones that share a stack, more of a shape than a stack takes, tall and wide, composed ones,
# one above the size of stacks, one of no elements.
SHAPES = [(24, 16), (16, 24), *[(20, 40)] * 17, (100, 20), (260, 256), (0, 4), (1, 7)]
FEW = [(24, 16), (20, 40), (20, 40), (100, 20)]


class Step:
    """The arguments of a step, which step_() makes.

    Args:
        state: of the buffers: "float32", or a name of ops.FORMATS.
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        state: str = "float32",
        dtype: torch.dtype = torch.float32,
        higher_dims: str = "refuse",
        seed: int = 0,
        **options: Any,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn() -> list[Tensor]:
            return [torch.randn(s, generator=generator) for s in shapes]

        self.params = [p.to(dtype) for p in randn()]
        self.grads = [g.to(dtype) for g in randn()]
        self.buffers, self.scales = randn(), list[Tensor]()
        self.format = 0
        if state != "float32":
            pairs = [quantize_blockwise(b, state_format=state) for b in self.buffers]
            self.buffers, self.scales = [c for c, _ in pairs], [s for _, s in pairs]
            self.format = ops.FORMAT_NUMBERS[state]
        self.steps = [torch.tensor(float(i)) for i in range(len(shapes))]
        self.factors: list[Tensor] = []
        self.lr = torch.tensor(options.pop("lr", 0.02), dtype=torch.float64)
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        numbers = {"momentum": 0.95, "weight_decay": 0.1, "rate_scale": 1.0}
        self.numbers = ops.rule_numbers("muon_step_", numbers, CPU)
        self.options: dict[str, Any] = {
            "nesterov": True,
            "maximize": False,
            "matrices": [matrix_shape.of(s, higher_dims) for s in shapes],
            "coefficients": [MUON] * 5,
            "eps": 1e-7,
            "match_rms": False,
            "block_size": 256,
            "stochastic_params": dtype == torch.bfloat16,
            "count_steps": True,
            "state_format": self.format,
            "seed": 3,
            **options,
        }

    def step_(self) -> "Step":
        update.update_(
            self.params,
            self.grads,
            self.buffers,
            self.scales,
            self.steps,
            self.factors,
            [],
            self.lr,
            self.numbers,
            self.grad_scale,
            self.found_inf,
            **self.options,
        )
        return self

    def only(self, members: Sequence[int]) -> "Step":
        """The same step of some of the parameters."""
        part = copy.deepcopy(self)
        for name in ("params", "grads", "buffers", "scales", "steps", "factors"):
            of_all = getattr(part, name)
            setattr(part, name, [of_all[i] for i in members] if of_all else [])
        part.options["matrices"] = [self.options["matrices"][i] for i in members]
        return part

    def bits_of(self, i: int) -> list[bytes]:
        lists = (self.params, self.buffers, self.scales, self.steps)
        return [bits(tensors[i]) for tensors in lists if tensors]

    def bits(self) -> list[list[bytes]]:
        return [self.bits_of(i) for i in range(len(self.params))]


def by_hand(step: Step, i: int) -> Step:
    """The three stages, of one parameter, its matrices by themselves in a stack of zeros."""
    one = step.only([i])
    ((count, rows, columns),) = one.options["matrices"]
    direction = torch.zeros(one.params[0].shape, dtype=torch.bfloat16)
    states = [one.buffers], [one.scales], one.steps
    flags = {"nesterov": one.options["nesterov"], "maximize": one.options["maximize"]}
    block = {"block_size": one.options["block_size"], "state_format": one.format}
    ops.step_(
        "muon_step_", [direction], one.grads, *states, torch.zeros((), dtype=torch.float64),
        one.numbers, one.grad_scale, one.factors, [], one.found_inf, **flags, **block
    )  # fmt: skip
    matrices = direction.view(count, rows, columns)
    for k in range(count):
        stack = torch.zeros(stack_size(rows, columns, "cpu"), rows, columns, dtype=torch.bfloat16)
        stack[0] = matrices[k]
        orthogonalize_(stack, one.options["coefficients"], one.options["eps"])
        matrices[k] = stack[0]
    numbers = one.numbers.clone()
    numbers[2] *= update.rate_scale(one.options["matrices"][0], one.options["match_rms"])
    ops.step_(
        "muon_step_", one.params, [direction], [[]], [[]], one.steps, one.lr, numbers, None, [], [],
        one.found_inf, nesterov=False, maximize=False, count_steps=True, seed=one.options["seed"],
        stochastic_params=one.options["stochastic_params"]
    )  # fmt: skip
    return one


@pytest.mark.parametrize(
    ("state", "dtype", "options"),
    [
        ("float32", torch.float32, {"nesterov": False, "maximize": True}),
        ("dynamic", torch.bfloat16, {"match_rms": True}),
        ("mulaw", torch.float32, {}),
    ],
    ids=["float32", "bfloat16 and dynamic", "mulaw"],
)
def test_stages_of_single_matrices(monkeypatch, state, dtype, options):
    """Neither stacks nor chunks change a bit."""
    step = Step(SHAPES, state, dtype, **options)
    expected = [by_hand(step, i).bits_of(0) for i in range(len(SHAPES))]
    assert copy.deepcopy(step).step_().bits() == expected
    monkeypatch.setattr(update, "CHUNK", 20_000)
    assert len(list(update._chunks(step.options["matrices"], "cpu"))) > 3
    assert step.step_().bits() == expected


def test_parameters_do_not_matter_to_others():
    step = Step(SHAPES, "dynamic")
    members = [18, 3, 0, 20]
    part = step.only(members).step_()
    step.step_()
    assert part.bits() == [step.bits_of(i) for i in members]


@pytest.mark.parametrize("shape", [(3, 20, 40), (18, 24, 16), (2, 2, 8, 9)], ids=str)
def test_batches_of_matrices(shape):
    """As the matrices by themselves; and flattened, as one matrix."""
    batch = Step([shape], higher_dims="batch")
    count = math.prod(shape[:-2])
    single = Step([shape[-2:]] * count)
    for name in ("params", "grads", "buffers"):
        (tensor,) = getattr(batch, name)
        setattr(single, name, list(tensor.reshape(count, *shape[-2:]).clone()))
    single.steps = [batch.steps[0].clone() for _ in range(count)]
    batch.step_()
    single.step_()
    assert bits(batch.params[0]) == bits(torch.stack(single.params))
    assert bits(batch.buffers[0]) == bits(torch.stack(single.buffers))

    flat = Step([shape], higher_dims="flatten")
    matrix = Step([(shape[0], math.prod(shape[1:]))])
    assert bits(flat.step_().params[0]) == bits(matrix.step_().params[0])


def test_any_strides():
    step = Step(FEW)
    expected = copy.deepcopy(step).step_().bits()
    step.params = [p.T.contiguous().T for p in step.params]
    step.grads = [torch.stack((g, g), -1)[..., 0] for g in step.grads]
    assert step.step_().bits() == expected


# -- torch.optim.Muon ------------------------------------------------------------------------------


def in_float64(params: list[Tensor], grads: Sequence[list[Tensor]], adjust: str) -> list[Tensor]:
    """torch.optim.Muon's formulas."""
    params = [p.double() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    for step in grads:
        for p, g, buffer in zip(params, step, buffers, strict=True):
            g = g.double()
            buffer.lerp_(g, 1 - 0.95)
            x = g.lerp(buffer, 0.95)
            x = x.T if x.shape[0] > x.shape[1] else x
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = MUON[0] * x + (MUON[1] * gram + MUON[2] * gram @ gram) @ x
            x = x.T if p.shape[0] > p.shape[1] else x
            p.mul_(1 - 0.02 * 0.1).sub_(_adjust_lr(0.02, adjust, p.shape) * x)
    return params


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fifty_steps_as_near_to_float64_as_torchs(adjust, dtype):
    step = Step(FEW, dtype=dtype, match_rms=adjust == "match_rms_adamw", stochastic_params=False)
    step.buffers = [torch.zeros_like(b) for b in step.buffers]
    start = [p.clone() for p in step.params]
    generator = torch.Generator().manual_seed(5)
    grads = [[torch.randn(s, generator=generator).to(dtype) for s in FEW] for _ in range(50)]
    exact = in_float64(start, grads, adjust)

    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    optimizer = torch.optim.Muon(theirs, lr=0.02, adjust_lr_fn=adjust)
    for now in grads:
        for p, g in zip(theirs, now, strict=True):
            p.grad = g.clone()
        optimizer.step()
        step.grads = now
        step.step_()
    for p, q, reference, first in zip(step.params, theirs, exact, start, strict=True):
        moved = (reference - first.double()).norm()
        ours, of_torch = ((x.detach().double() - reference).norm() / moved for x in (p, q))
        assert ours <= 2.5 * of_torch
        # bfloat16 parameters, rounded to nearest, lose steps: torch's too.
        assert dtype == torch.bfloat16 or ours < 0.05


# -- gradients that no step can take ---------------------------------------------------------------


@pytest.mark.parametrize("state", ["float32", "dynamic", "mulaw"])
def test_a_bad_gradient_keeps_its_matrix(state):
    step = Step(FEW, state)
    good = copy.deepcopy(step)
    step.grads[1][3, 4] = torch.nan
    step.grads[3][99, 19] = -torch.inf
    found = factors.OP(step.grads)
    assert found.isnan().tolist() == [False, True, False, True]
    step.factors = list(torch.stack((found, torch.ones_like(found)), 1).unbind())
    before = copy.deepcopy(step)
    step.step_()
    good.step_()
    for i in (0, 2):
        assert step.bits_of(i) == good.bits_of(i)
    for i in (1, 3):
        assert bits(step.params[i]) == bits(before.params[i])
        assert float(step.steps[i]) == i + 1
        if state == "float32":  # 8-bit state is encoded again
            assert bits(step.buffers[i]) == bits(before.buffers[i])


def test_found_inf_stops_all():
    step = Step(FEW, "dynamic")
    step.found_inf = torch.tensor(1.0)
    before = step.bits()
    assert step.step_().bits() == before


def test_clipping_scales_the_gradient_alone():
    step = Step(FEW)
    clipped = copy.deepcopy(step)
    clipped.factors = [torch.tensor([0.25, 1.0], dtype=torch.float64) for _ in FEW]
    step.grads = [g * 0.25 for g in step.grads]
    scaled = copy.deepcopy(step)
    scaled.grads = [g * 4 for g in step.grads]
    scaled.grads = [g * 8 for g in scaled.grads]
    scaled.grad_scale = torch.tensor(32.0)
    expected = step.step_().bits()
    assert clipped.step_().bits() == expected
    assert scaled.step_().bits() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_which_gradients_are_bad(dtype):
    largest = torch.finfo(dtype).max
    rows = [
        ([1.0, 2.0], False),
        ([largest, -largest], False),
        ([0.0, torch.nan], True),
        ([torch.inf, 0.0], True),
        ([-torch.inf, torch.inf], True),
        ([], False),
        ([0.0], False),
    ]
    grads = [torch.tensor(values, dtype=dtype) for values, _ in rows]
    found = factors.OP(grads)
    assert found.dtype == torch.float64
    assert found.isnan().tolist() == [bad for _, bad in rows]
    assert (found.nan_to_num(1.0) == 1).all()
    assert factors.OP([torch.ones(0, 3)]).tolist() == [1.0]
    assert factors.OP([torch.tensor([[1.0, torch.nan]]).T, torch.ones(3).bfloat16()]).isnan()[0]


# -- what is refused -------------------------------------------------------------------------------


def wrong_gradient(step: Step) -> None:
    step.grads[3] = step.grads[3].T


def no_rate(step: Step) -> None:
    step.numbers[0] = 1.0


def other_matrices(step: Step) -> None:
    step.options["matrices"] = [*step.options["matrices"][:3], (1, 100, 21)]


def few_matrices(step: Step) -> None:
    step.options["matrices"] = step.options["matrices"][:3]


def no_coefficients(step: Step) -> None:
    step.options["coefficients"] = []


def no_buffers(step: Step) -> None:
    step.buffers = []


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_gradient, r"grads\[3\] must have shape \[100, 20\]"),
        (no_rate, "momentum must be in"),
        (other_matrices, r"matrices of params\[3\] must have its 2000 elements, got 1 of 100 x 21"),
        (few_matrices, r"matrices must have 12 numbers .*, got 9"),
        (no_coefficients, "coefficients must have three numbers for each iteration, got 0"),
        (no_buffers, r"momentum_buffers must have 4 elements \(one per parameter\), got 0"),
    ],
)
def test_a_refused_call_changes_nothing(monkeypatch, spoil, message):
    monkeypatch.setattr(update, "CHUNK", 1)  # a parameter each
    step = Step(FEW)
    spoil(step)
    before = [bits(t) for t in (*step.params, *step.buffers, *step.steps)]
    with pytest.raises(RuntimeError, match=message):
        step.step_()
    assert [bits(t) for t in (*step.params, *step.buffers, *step.steps)] == before


def test_no_parameters():
    Step([]).step_()


# -- chunks ----------------------------------------------------------------------------------------


def test_chunks_have_all_parameters_and_an_end(monkeypatch):
    monkeypatch.setattr(update, "CHUNK", 40_000)
    shapes = [matrix_shape.of(s) for s in SHAPES]
    chunks = list(update._chunks(shapes, "cpu"))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(SHAPES)))
    for chunk in chunks:
        sizes = [SHAPES[i] for i in chunk]
        directions, stacks = update.make_stacks(sizes, [shapes[i] for i in chunk], CPU)
        elements = sum(stack.numel() for stack in stacks)
        assert elements <= 40_000 or len(chunk) == 1
        assert [d.shape for d in directions] == [torch.Size(SHAPES[i]) for i in chunk]
        sizes = {tuple(stack.shape) for stack in stacks}
        assert all(len(s) == stack_size(*s.shape[1:], "cpu") for s in stacks), sizes


def test_memory_of_a_stack_behind_its_directions():
    """Directions of a shape and what fills up their last stack are one piece of memory."""
    sizes = FEW[1:3]
    directions, stacks = update.make_stacks(sizes, [matrix_shape.of(s) for s in sizes], CPU)
    (stack,) = stacks
    for i, direction in enumerate(directions):
        assert direction.data_ptr() == stack[i].data_ptr()
        assert direction.is_contiguous()


# -- tracing ---------------------------------------------------------------------------------------


def test_one_graph_for_all_learning_rates():
    reset_compiler()
    step = Step(FEW, "dynamic")
    eager = copy.deepcopy(step)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(graph)
        return graph

    def run(step: Step) -> None:
        found = factors.OP(step.grads)
        step.factors = list(torch.stack((found, torch.ones_like(found)), 1).unbind())
        step.step_()

    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for lr in (0.02, 0.01, 0.005):
        for each, function in ((step, compiled), (eager, run)):
            each.lr = torch.tensor(lr, dtype=torch.float64)
            function(each)
    assert step.bits() == eager.bits()
    assert len(graphs) == 1
    reset_compiler()


def test_schemas_and_fakes():
    step = Step(FEW, "dynamic")
    arguments: list[Any] = [
        step.params, step.grads, step.buffers, step.scales, step.steps, [], [], step.lr,
        step.numbers, None, None
    ]  # fmt: skip
    options = {**step.options, "coefficients": [*MUON] * 5}
    options["matrices"] = [n for matrix in step.options["matrices"] for n in matrix]
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(update.OP, arguments, options, test_utils=tests)
    torch.library.opcheck(factors.OP, (step.grads,), test_utils=tests)


def test_autograd_hears_of_the_update():
    step = Step([(4, 5)])
    (p,) = step.params
    p.requires_grad_()
    loss = (p * p).sum()
    with torch.no_grad():
        step.step_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
