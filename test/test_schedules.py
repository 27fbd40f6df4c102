"""Numbers that change from step to step: by hand, by a scheduler, in place; momentum down to 0."""

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import (
    SMALL,
    all_bits,
    assert_same_training,
    bits,
    make_params,
    set_grads,
    through_file,
    train,
)
from optim_table import FEW, OF_8_BITS, SCHEDULES, OptimizerCase, every_8bit, every_optimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

import torchao8
from torchao8 import ops
from torchao8._numbers import all_numbers

# Of every rule, each number that its step reads, and values of a schedule that count.
# Of all optimizers, besides those of their rules.
OF_ALL = {"lr": [0.1, 0.01, 0.05, 0.02], "seed": [0, 3, 1, 9], "percentile_clipping": [5, 9, 50, 7]}


def schedule_of(case: OptimizerCase) -> dict[str, list[Any]]:
    return {**OF_ALL, **SCHEDULES[case.rule]}


def as_tensor(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(as_tensor(v, dtype) for v in value)
    return torch.tensor(value, dtype=dtype)


def made(
    case: OptimizerCase, schedule: dict[str, list[Any]], tensors: torch.dtype | None = None
) -> Optimizer:
    """An optimizer with the first values of a schedule and state in both formats.

    Numbers in tensors of a dtype: float64 holds them exactly.
    """
    first = {name: values[0] for name, values in schedule.items()}
    if tensors is not None:
        first = {k: v if is_number(case, k) else as_tensor(v, tensors) for k, v in first.items()}
    return case.make(make_params(), **{"min_8bit_size": SMALL, **case.full, **first})


def is_number(case: OptimizerCase, name: str) -> bool:
    """Whether an option stays a Python number where the others are tensors."""
    return name in INTEGERS or (case.rule, name) == ("rmsprop", "momentum")


INTEGERS = ("seed", "percentile_clipping", "t_alpha", "t_beta3")  # numbers, but no tensors


def set_options(optimizer: Optimizer, schedule: dict[str, list[Any]], i: int) -> None:
    """Replaces the options by their i-th values, or writes these into the tensors that they are."""

    def put(old: Any, new: Any) -> Any:
        if isinstance(old, Tensor):
            return old.fill_(new)
        if isinstance(old, tuple):
            return tuple(put(o, n) for o, n in zip(old, new, strict=True))
        return new

    (group,) = optimizer.param_groups
    for name, values in schedule.items():
        group[name] = put(group[name], values[i % len(values)])


def step_with(optimizer: Optimizer, step: Any, seed: int) -> None:
    set_grads(optimizer.param_groups[0]["params"], seed)
    step()


def test_the_schedules_hold_every_number_of_the_ops() -> None:
    """So that a number that is added to a rule is scheduled here, too."""
    for case in OF_8_BITS:
        scheduled: set[str] = set()
        for name in SCHEDULES[case.rule]:
            n = len(SCHEDULES[case.rule]["betas"][0]) if name == "betas" else 0
            scheduled |= {f"beta{i + 1}" for i in range(n)} or {name}
        of_shapes = {"rate_scale"}  # of Muon, which has no option for it
        assert scheduled >= set(ops.NUMBERS[case.cls._op]) - of_shapes, case.cls


# -- eager ---------------------------------------------------------------------------------------


@every_optimizer()
def test_tensors_are_as_good_as_numbers(case: OptimizerCase) -> None:
    """Options as float64 tensors that are written to in place, and as numbers that are replaced."""
    schedule = schedule_of(case)
    numbers, tensors = made(case, schedule), made(case, schedule, tensors=torch.float64)
    for seed in range(6):
        for optimizer in (numbers, tensors):
            set_options(optimizer, schedule, seed)
            step_with(optimizer, optimizer.step, seed)
        assert all_bits(numbers)["params"] == all_bits(tensors)["params"]
        assert all_bits(numbers)["states"] == all_bits(tensors)["states"]


@every_8bit()
def test_tensors_in_checkpoints(case: OptimizerCase) -> None:
    """Saved, loaded the safe way, and gone on with; into numbers as into tensors."""
    schedule = {k: v for k, v in schedule_of(case).items() if k not in INTEGERS}
    saver = made(case, schedule, tensors=torch.float64)
    step_with(saver, saver.step, 0)
    saved = through_file(saver.state_dict())
    tensors, numbers = made(case, schedule, tensors=torch.float64), made(case, schedule)
    tensors.load_state_dict(copy.deepcopy(saved))
    numbers.load_state_dict(copy.deepcopy(numbers_in(saved)))
    from_numbers = made(case, schedule, tensors=torch.float64)
    from_numbers.load_state_dict(through_file(numbers_in(saved)))
    group = from_numbers.param_groups[0]
    assert isinstance(group["betas"][0] if "betas" in group else group["lr"], Tensor)
    for other in (tensors, numbers, from_numbers):
        for p, q in zip(params_of(saver), params_of(other), strict=True):
            q.data.copy_(p)
    for optimizer in (saver, tensors, numbers, from_numbers):
        step_with(optimizer, optimizer.step, 1)
    for optimizer in (tensors, numbers, from_numbers):
        assert all_bits(optimizer)["params"] == all_bits(saver)["params"]
        assert all_bits(optimizer)["states"] == all_bits(saver)["states"]


def numbers_in(saved: dict[str, Any]) -> dict[str, Any]:
    """The state dict with numbers where its options are tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(plain(v) for v in value)
        return float(value) if isinstance(value, Tensor) else value

    groups = [{k: plain(v) for k, v in group.items()} for group in saved["param_groups"]]
    return {**saved, "param_groups": groups}


def params_of(optimizer: Optimizer) -> Iterator[Tensor]:
    return iter(optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_tensor_of_numbers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Whatever dtype a number has, the op gets just that number."""
    number = torch.full(shape, 0.7, dtype=dtype)
    found = all_numbers([0.1, number, 3], torch.device("cpu"))
    assert found.tolist() == [0.1, float(number), 3.0]
    assert found.dtype == torch.float64


@every_optimizer()
def test_a_tensor_that_holds_a_bad_number(case: OptimizerCase) -> None:
    """Looked at in each step, on the CPU; nothing changes."""
    schedule = {"lr": [0.1], "weight_decay": [0.1]}
    optimizer = made(case, schedule, tensors=torch.float64)
    step_with(optimizer, optimizer.step, 0)
    optimizer.param_groups[0]["weight_decay"].fill_(-1.0)
    set_grads(params_of(optimizer), 1)
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match="weight_decay: expected a finite number >= 0, got -1"):
        optimizer.step()
    assert all_bits(optimizer) == before


# -- compiled ------------------------------------------------------------------------------------


def _kinds_of_numbers() -> Iterator[Any]:
    """Tensors for each rule, and numbers, which are made tensors alike for all, for few."""
    for case in OF_8_BITS:
        for tensors in (None, torch.float32):
            common = tensors is not None or case.cls in FEW
            yield pytest.param(
                case,
                tensors,
                id=f"{case.cls.__name__}-{'numbers' if tensors is None else 'tensors'}",
                marks=() if common else pytest.mark.thorough,
            )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("case", "tensors"), list(_kinds_of_numbers()))
def test_a_schedule_of_every_number_compiles_once(
    case: OptimizerCase, tensors: torch.dtype | None
) -> None:
    """Tensors: one graph. Numbers: one more, when torch.compile sees that they change.

    (Of float64 tensors torch.compile starts the first graph twice, for a reason of its own.)
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    schedule = schedule_of(case)
    if tensors:
        schedule = {k: v for k, v in schedule.items() if not is_number(case, k)}
    compiled, eager = (made(case, schedule, tensors) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, fullgraph=True, backend=counter)
    for seed in range(10):
        set_options(compiled, schedule, seed)
        set_options(eager, schedule, seed)
        step_with(compiled, step, seed)
        step_with(eager, eager.step, seed)
        assert_same_training(compiled, eager)
    assert counter.frame_count == (1 if tensors else 2)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
def test_one_cycle() -> None:
    """OneCycleLR writes lr, here a tensor, in place, and replaces betas."""
    from torch._dynamo.testing import CompileCounterWithBackend

    pair = [
        torchao8.AdamW8bit(make_params(), lr=torch.tensor(0.01), min_8bit_size=SMALL)
        for _ in range(2)
    ]
    counter = CompileCounterWithBackend("inductor")
    # A scheduler wraps optimizer.step in what torch.compile does not trace: compile before.
    step = torch.compile(pair[0].step, fullgraph=True, backend=counter)
    schedules = [OneCycleLR(optimizer, 0.1, total_steps=40) for optimizer in pair]
    for seed in range(39):
        step_with(pair[0], step, seed)
        step_with(pair[1], pair[1].step, seed)
        for schedule in schedules:
            schedule.step()
        assert_same_training(*pair)
    assert counter.frame_count == 2


RESTING = [case for case in OF_8_BITS if case.cls._resting]
RESTING_OPTIONS = [{}, {"nesterov": True}, {"dampening": 0.3}, {"block_wise": False}]


def buffers(optimizer: Optimizer) -> list[bytes]:
    return [
        bits(value)
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.startswith("momentum_buffer")
    ]


@pytest.mark.parametrize("case", RESTING, ids=lambda case: case.cls.__name__)
@pytest.mark.parametrize("optim_bits", [8, 32])
def test_a_momentum_that_begins_late(case: OptimizerCase, optim_bits: int) -> None:
    """0 at the first steps: the buffer is made when there is a momentum, and is that of torch."""
    params, theirs_params = make_params(), make_params()
    ours = case.make(params, lr=0.05, momentum=0.0, optim_bits=optim_bits, min_8bit_size=SMALL)
    theirs = torch.optim.SGD(theirs_params, lr=0.05)
    for seed in range(6):
        for optimizer, ps in ((ours, params), (theirs, theirs_params)):
            optimizer.param_groups[0]["momentum"] = 0.9 if seed > 2 else 0.0
            train(optimizer, ps, [seed])
        assert bool(buffers(ours)) == (seed > 2)
        if case.cls is torchao8.SGD8bit and optim_bits == 32:
            for p, q in zip(params, theirs_params, strict=True):
                torch.testing.assert_close(p, q)


@pytest.mark.parametrize(
    "case", [c for c in RESTING if c.rule != "rmsprop"], ids=lambda case: case.cls.__name__
)
def test_a_buffer_that_would_begin_dampened_is_refused(case: OptimizerCase) -> None:
    """Torch's first one is undampened, and ours would not know that it is the first."""
    params = make_params()
    optimizer = case.make(params, momentum=0.0, dampening=0.5, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    optimizer.param_groups[0]["momentum"] = 0.9
    set_grads(params, 1)
    before = all_bits(optimizer)
    with pytest.raises(RuntimeError, match=r"expected the keys .*momentum_buffer"):
        optimizer.step()
    assert all_bits(optimizer) == before


# -- momentum that comes to be 0 -------------------------------------------------------------------


@pytest.mark.parametrize("case", RESTING, ids=lambda case: case.cls.__name__)
@pytest.mark.parametrize("options", RESTING_OPTIONS, ids=str)
def test_the_buffer_rests_while_momentum_is_0(case: OptimizerCase, options: dict[str, Any]) -> None:
    """The parameter moves as without momentum, and the buffer keeps its bits, in both formats."""
    options = {"lr": 0.05, "weight_decay": 0.1, "min_8bit_size": SMALL, **case.known(options)}
    params = make_params()
    optimizer = case.make(params, **{**options, "momentum": 0.9})
    train(optimizer, params, range(3))
    kept = buffers(optimizer)
    assert kept
    plain_params = [p.detach().clone().requires_grad_() for p in params]
    plain = case.make(plain_params, **{**options, "momentum": 0.0, **off(options)})
    for p, q in zip(params, plain_params, strict=True):
        (names,) = {tuple(k for k in optimizer.state[p] if not k.startswith("momentum"))}
        plain.state[q].update({k: optimizer.state[p][k].clone() for k in names})
    optimizer.param_groups[0]["momentum"] = 0.0
    for seed in range(3, 6):
        train(optimizer, params, [seed])
        train(plain, plain_params, [seed])
        assert [bits(p) for p in params] == [bits(p) for p in plain_params]
        assert buffers(optimizer) == kept
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, params, [6])
    assert buffers(optimizer) != kept


def off(options: dict[str, Any]) -> dict[str, Any]:
    """Nesterov's momentum takes a momentum in a new group."""
    return {"nesterov": False} if "nesterov" in options else {}


@pytest.mark.parametrize("case", [c for c in RESTING if c.torch_cls], ids=lambda c: c.cls.__name__)
def test_torch_does_the_same(case: OptimizerCase) -> None:
    """With 32-bit state, to rounding, by a scheduler whose momentum comes to 0 and back."""
    assert case.torch_cls is not None
    ours_params, theirs_params = make_params(), make_params()
    ours = case.make(ours_params, lr=0.05, momentum=0.9, optim_bits=32)
    theirs = case.torch_cls(theirs_params, lr=0.05, momentum=0.9)
    schedules = [
        CyclicLR(o, 0.01, 0.05, step_size_up=3, base_momentum=0.0, max_momentum=0.9)
        for o in (ours, theirs)
    ]
    seen = []
    for seed in range(12):
        for optimizer, params, schedule in zip(
            (ours, theirs), (ours_params, theirs_params), schedules, strict=True
        ):
            train(optimizer, params, [seed])
            schedule.step()
        seen.append(ours.param_groups[0]["momentum"])
        for p, q in zip(ours_params, theirs_params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert min(seen) == 0.0
    assert math.isclose(max(seen), 0.9)


@pytest.mark.parametrize("case", RESTING, ids=lambda case: case.cls.__name__)
@pytest.mark.parametrize("optim_bits", [8, 32])
def test_a_checkpoint_of_a_resting_buffer(case: OptimizerCase, optim_bits: int) -> None:
    """It is saved, loaded and goes on; a parameter that comes then has a buffer, too."""
    options = {"min_8bit_size": SMALL, "optim_bits": optim_bits, "momentum": 0.9}
    params, other_params = make_params(), make_params()
    optimizer, other = case.make(params, **options), case.make(other_params, **options)
    train(optimizer, params, [0])
    optimizer.param_groups[0]["momentum"] = 0.0
    train(optimizer, params, [1])
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0]["momentum"] == 0.0
    for p, q in zip(params, other_params, strict=True):
        q.data.copy_(p)
    late = [p.detach().clone().requires_grad_() for p in params[:1]]
    for o, ps in ((optimizer, params), (other, other_params)):
        train(o, ps, [2])
        o.param_groups[0]["momentum"] = 0.5
        train(o, ps, [3])
    assert_same_training(optimizer, other)
    other.param_groups[0]["momentum"] = 0.0
    other.param_groups[0]["params"].append(late[0])
    train(other, [*other_params, *late], [4])
    assert set(other.state[late[0]]) == set(other.state[other_params[0]])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", RESTING, ids=lambda case: case.cls.__name__)
def test_a_compiled_step_whose_momentum_comes_to_0(case: OptimizerCase) -> None:
    """Three graphs at most: torch.compile looks at a momentum that it finds to be 0."""
    from torch._dynamo.testing import CompileCounterWithBackend

    compiled, eager = (
        case.make(make_params(), momentum=0.9, min_8bit_size=SMALL) for _ in range(2)
    )
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(compiled.step, fullgraph=True, backend=counter)
    for seed, momentum in enumerate([0.9, 0.5, 0.0, 0.0, 0.3, 0.0, 0.8]):
        for optimizer in (compiled, eager):
            optimizer.param_groups[0]["momentum"] = momentum
        step_with(compiled, step, seed)
        step_with(eager, eager.step, seed)
        assert_same_training(compiled, eager)
    assert counter.frame_count <= 3
