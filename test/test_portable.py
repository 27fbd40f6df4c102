"""The implementation in plain PyTorch operators, against the kernels and by itself.

It is not the same to the bit: without a fused multiply-add, products are rounded once more. So
parameters lie within the oracle's bounds, and codes may be the next one where a value lies at a
border. State, random numbers and exact sums are the same.
"""

import copy
import math
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import reference
import torch
from helpers import SMALL, all_bits, bits, make_params, set_grads, through_file
from optim_table import (
    OPTIMIZERS,
    OptimizerCase,
    Options,
    every_8bit,
    every_optimizer,
    every_option_set,
)
from ranks import run_ranks
from reference_rules import exact
from test_compile import Compiled
from test_optim import CountOps, moment, on_cpu, oracle_step
from test_sharded_training import _fsdp_against_unsharded, _unsharded
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import torchao8
from torchao8 import ops
from torchao8._implementation import choose_portable
from torchao8.optim._state.spec import NORMS_KEPT
from torchao8.optim._step import clipping
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.portable import codec, compiled, pieces
from torchao8.portable import step as portable_step

pytestmark = pytest.mark.skipif(
    ops.is_portable(torch.device("cpu")), reason="compares with the kernels of the CPU"
)

# Codes that differ: values within rounding, 2^-23 or so, of a border between codes that are at
# least 0.7% of the scale apart. At most 2^-23 / 0.007 = 1.7e-5 of them.
MOST_DIFFERENT = 1e-4


@contextmanager
def portable(device: str = "cpu", compiles: bool = False) -> Iterator[None]:
    before = set(compiled.devices)
    choose_portable(device)
    if not compiles:
        compiled.devices.clear()
    try:
        yield
    finally:
        choose_portable(device, False)
        compiled.devices.update(before)


def step_portably(optimizer: torch.optim.Optimizer, device: str = "cpu") -> None:
    with portable(device):
        optimizer.step()


def copy_state(source: LowPrecisionOptimizer, target: LowPrecisionOptimizer) -> None:
    """Parameters and states, in place."""
    for a, b in zip(source.param_groups, target.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            q.data.copy_(p.data)
            for key, value in source.state[p].items():
                target.state[q][key].copy_(value)


class Differences:
    """Of codes and scales, counted."""

    def __init__(self) -> None:
        self.codes = self.different = self.furthest = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.dtype == torch.uint8:
            distance = (a.int() - b.int()).abs()
            self.codes += distance.numel()
            self.different += int((distance > 0).sum())
            self.furthest = max(self.furthest, int(distance.max()))

    def check(self) -> None:
        assert self.furthest <= 1
        assert self.different <= max(1, MOST_DIFFERENT * self.codes)


def assert_alike(
    case: OptimizerCase,
    theirs: LowPrecisionOptimizer,
    ours: LowPrecisionOptimizer,
    wanted: list[Any],
    unit: float,
    differences: Differences,
) -> None:
    """After a step from the same state.

    Args:
        wanted: what the oracle made of each parameter; none where it knows no bounds.
        unit: of the dtype of the parameters, where that is narrower than float32.
    """
    block_wise = bool(wanted)
    of_kernels, of_operators = (o.param_groups[0]["params"] for o in (theirs, ours))
    for i, (p, q) in enumerate(zip(of_kernels, of_operators, strict=True)):
        p, q = p.detach().cpu(), q.detach().cpu()
        # Each of both is within the oracle's bound, and is rounded once to its dtype, up or
        # down by a unit in the last place if that is stochastic.
        if block_wise:
            limit = 2 * wanted[i].param_error + 2 * unit * p.double().abs() + 1e-37
            assert ((p.double() - q.double()).abs() <= limit).all()
        else:
            torch.testing.assert_close(p, q, rtol=1e-4 + unit, atol=1e-5)
        for key, value in on_cpu(theirs.state[of_kernels[i]]).items():
            other = ours.state[of_operators[i]][key].cpu()
            differences.add(value, other)
            if block_wise and key in wanted[i].errors:
                error = 2 * wanted[i].errors[key] + 1e-37
                assert ((value.double() - other.double()).abs() <= error).all()
            elif key.endswith("_scale"):
                torch.testing.assert_close(value, other, rtol=1e-4, atol=0)
            elif block_wise and key.endswith("_codes"):
                name = key.removesuffix("_codes")
                if case.is_signed(name):
                    continue
                live = wanted[i].states[name] > wanted[i].errors[name]
                scale = ours.state[of_operators[i]][f"{name}_scale"].cpu()
                live &= reference.expand_scale(scale, tuple(live.shape), 256) > 0
                assert (other[live] > 0).all()  # a second moment is never rounded to zero


@every_option_set()
@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        pytest.param(torch.float32, {}, id="float32"),
        pytest.param(torch.float16, {"block_size": 64}, id="float16"),
        pytest.param(torch.bfloat16, {"stochastic_rounding": True}, id="bfloat16"),
        pytest.param(torch.float32, {"block_wise": False}, id="one scale"),
    ],
)
def test_steps_like_the_kernels(
    case: OptimizerCase, options: Options, dtype: torch.dtype, more: Options, device: str
) -> None:
    """Ten steps, each from the same state: no error adds up."""
    of_kernels, of_operators = (make_params(dtype, device=device) for _ in range(2))
    options = {**options, **more, "min_8bit_size": SMALL}
    theirs, ours = (case.make(ps, **options) for ps in (of_kernels, of_operators))
    differences = Differences()
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    for step in range(10):
        for params in (of_kernels, of_operators):
            set_grads(params, step)
        theirs._init_states()
        block_wise = options.get("block_wise", True) and "block_size" not in options
        wanted = [oracle_step(case, theirs, p) for p in of_kernels] if block_wise else []
        theirs.step()
        step_portably(ours, device)
        assert_alike(case, theirs, ours, wanted, unit, differences)
        copy_state(theirs, ours)
    differences.check()


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
@pytest.mark.parametrize("saved_by", ["kernels", "operators"])
def test_state_goes_from_one_to_the_other(case: OptimizerCase, saved_by: str) -> None:
    options = {"min_8bit_size": SMALL, **case.full}
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
@pytest.mark.parametrize("optim_bits", [8, 32])
def test_found_inf_changes_nothing(case: OptimizerCase, optim_bits: int) -> None:
    for options in ({}, {"block_wise": False}):
        params = make_params()
        options = {**options, **case.full, "optim_bits": optim_bits, "min_8bit_size": SMALL}
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


def test_every_op_is_there_on_any_device() -> None:
    """But for those that only CUDA can have."""
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "torchao8::" in n}
    assert len(names) > 20
    missing = {
        name
        for name in names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"torchao8::{name}", "CompositeExplicitAutograd"
        )
    }
    assert missing == {"allocate_managed", "free_managed"}


class NoFloat64(TorchDispatchMode):
    """Refuses what not every device has: float64, and copies that take the bytes at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not (kwargs or {}).get("non_blocking"), func  # MPS reads the host's memory later
        result = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.device.type == "meta":
                assert t.dtype != torch.float64, func
        return result


@every_8bit()
def test_nothing_waits_for_the_device(case: OptimizerCase) -> None:
    """On the device meta, which has no numbers to wait for. Nothing there is float64, either."""

    def step(in_8bit: bool, one_scale: bool) -> None:
        (family,) = [f for f in ops.FAMILIES if f.step_op == case.cls._op]
        p = torch.empty(40, 700, device="meta")
        grad, count = torch.empty_like(p), torch.empty((), device="meta")
        state = torch.empty_like(p, dtype=torch.uint8 if in_8bit else torch.float32)
        values = [[torch.empty((), device="meta") if s.scalar else state] for s in family.states]
        shape = (1,) if one_scale else (40, 3)
        scales = [
            [torch.empty(shape, device="meta")] if in_8bit else []
            for s in family.states
            if not s.scalar
        ]
        numbers = torch.full((len(family.numbers),), 0.5, dtype=torch.float64)
        flags = dict.fromkeys(family.flags, False)
        shared = ([p], [grad], values, scales, [count], torch.tensor(0.1, dtype=torch.float64),
                  numbers, count, [torch.empty(2, device="meta")])  # fmt: skip
        found = list(ops.extremes(family.step_op, *shared, **flags)) if one_scale else []
        ops.step_(family.step_op, *shared, found, count, **flags)
        ops.count_step_([count], count)

    def factors() -> None:
        p, count = torch.empty(40, 700, device="meta"), torch.empty((), device="meta")
        norms = ops.norms(ops.sum_squares([p]))
        history = [torch.empty(NORMS_KEPT, device="meta")]
        clip = clipping.clip_factors_(history, norms, [count], count, 50)
        for cls in (torchao8.LARS, torchao8.LAMB):
            optimizer: Any = cls([torch.nn.Parameter(torch.ones(1))], weight_decay=0.1)
            optimizer._trust_ratios(optimizer.param_groups[0], norms, norms)
        numbers = torch.full((4,), 0.5, dtype=torch.float64)
        pairs = list(torch.stack((clip, clip), 1))
        ops.lamb_update_sums([p], [p], ([p], [p]), ([], []), [count], numbers, count, factors=pairs)

    with portable("meta"), NoFloat64():
        for in_8bit, one_scale in ((True, False), (True, True), (False, False)):
            step(in_8bit, one_scale)
        factors()


class Peak(TorchDispatchMode):
    """The most bytes of new tensors that there were at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._add((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        self._add(result, is_new=True)
        return result

    def _add(self, tensors: Any, is_new: bool) -> None:
        for t in torch.utils._pytree.tree_leaves(tensors):
            if isinstance(t, Tensor) and t.untyped_storage()._cdata not in self.seen:
                self._count(t.untyped_storage(), is_new)

    def _count(self, storage: torch.UntypedStorage, is_new: bool) -> None:
        key, size = storage._cdata, storage.nbytes() if is_new else 0
        self.seen.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@pytest.mark.parametrize("optim_bits", [8, 32])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.randn(3000, 2048), id="matrix"),
        pytest.param(lambda: torch.randn(5_000_001), id="vector"),
        pytest.param(lambda: torch.randn(3, 1_500_001), id="rows with an end"),
        pytest.param(lambda: torch.randn(500, 100, 10, 10).transpose(1, 3), id="other strides"),
    ],
)
def test_temporaries_do_not_grow_with_the_model(
    make: Any, optim_bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MB at most, of a parameter of 20 MB or more with its gradient; three of them."""
    params = [torch.nn.Parameter(make()) for _ in range(3)]
    options: Options = {"optim_bits": optim_bits, "stochastic_rounding": True, "amsgrad": True}
    optimizer = torchao8.AdamW8bit(
        [p.bfloat16().detach().requires_grad_() for p in params], **options
    )
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.randn_like(p)
    optimizer._init_states()
    memory, step_ = Peak(), portable_step.step_

    def measured(*args: Any, **options: Any) -> None:
        with memory:
            step_(*args, **options)

    monkeypatch.setattr(portable_step, "step_", measured)
    step_portably(optimizer)
    assert 1e6 < memory.peak < 64e6


def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do other strides of parameters and gradients, which are cut in another way."""
    results = []
    for piece, other in ((1 << 18, False), (1 << 10, False), (1 << 10, True)):
        monkeypatch.setattr(pieces, "PIECE", piece)
        params = make_params(torch.bfloat16)
        if other:
            for p in params:
                p.data = p.data.t().contiguous().t() if p.dim() == 2 else p.data
        for optim_bits in (8, 32):
            options = {"optim_bits": optim_bits, "stochastic_rounding": True}
            optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL, **options)
            for seed in range(2):
                set_grads(params, seed)
                step_portably(optimizer)
            results.append(all_bits(optimizer))
    assert results[0] == results[2] == results[4]
    assert results[1] == results[3] == results[5]


@pytest.mark.parametrize("optim_bits", [8, 32])
def test_other_strides_that_need_no_copy(optim_bits: int) -> None:
    """Their rows can be had as a view, whose strides differ in the dimension of size 1."""
    values, results = torch.randn(3, 1, 700), []
    for other in (False, True):
        data = values.transpose(0, 2).contiguous().transpose(0, 2) if other else values.clone()
        assert data.is_contiguous() is not other
        params = [torch.nn.Parameter(torch.empty(0))]
        params[0].data = data
        optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL, optim_bits=optim_bits)
        set_grads(params, 0)
        step_portably(optimizer)
        results.append(all_bits(optimizer))
        assert not torch.equal(params[0], values)
    assert results[0] == results[1]


def test_exact_sums_and_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = [0.0, -40.0, 37.0]
    tensors = [
        torch.randn(n, generator=generator) * 10.0 ** (e * torch.rand(n, generator=generator))
        for n in (0, 1, 300, 40_000, 300_000)
        for e in exponents
    ]
    tensors += [torch.randn(300, 700).bfloat16().t(), torch.randn(7, 9).half(), torch.zeros(5)]
    tensors[-4][::5] = math.nan
    tensors[-4][1::5] = -math.inf
    tensors.append(torch.tensor([2.0**-149, 2.0**-126, torch.finfo(torch.float32).max]))
    wanted = ops.sum_squares(tensors)
    with portable():
        rows = ops.sum_squares(tensors)
        assert torch.equal(rows, wanted)
        added = rows[:3].sum(0, keepdim=True)
        norms = ops.norms(torch.cat((rows, added, -added)))
    exact_norms = ops.norms(torch.cat((rows, added, -added)))
    torch.testing.assert_close(
        norms.double(), exact_norms, rtol=2.0**-22, atol=1e-45, equal_nan=True
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [64, 256, 2048])
def test_the_codec_is_the_same_to_the_bit(
    signed: bool, dtype: torch.dtype, block_size: int
) -> None:
    """Scales of every size, those that are none, and blocks that end early."""
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 300), (5000,), (2, 3, 70), (40, 8), (0, 4), (4, 2048), ()):
        for scale in (1.0, 1e-30, 1e-38, 1e-41, 3e38):
            x = (torch.randn(shape, generator=generator) * scale).to(dtype)
            x.view(-1)[::1001] = math.nan
            x.view(-1)[7::999] = math.inf
            options = {"block_size": block_size, "signed": signed}
            wanted = torchao8.quantize_blockwise(x, **options)
            with portable():
                found = torchao8.quantize_blockwise(x, **options)
                back = torchao8.dequantize_blockwise(*wanted, dtype=dtype, **options)
            assert [bits(t) for t in found] == [bits(t) for t in wanted]
            expected = torchao8.dequantize_blockwise(*wanted, dtype=dtype, **options)
            torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # it is deprecated
def test_arguments_that_do_not_fit() -> None:
    """Both implementations refuse them, and name the argument."""
    codes, scale = torchao8.quantize_blockwise(torch.randn(4, 300))
    refused: list[tuple[str, Callable[[], Any]]] = [
        (
            "quantize_blockwise: block_size",
            lambda: torchao8.quantize_blockwise(codes.float(), block_size=100),
        ),
        ("quantize_blockwise: input", lambda: torchao8.quantize_blockwise(codes.double())),
        (
            "quantize_blockwise: input must be dense, got layout torch._mkldnn",
            lambda: torchao8.quantize_blockwise(scale.to_mkldnn()),
        ),
        (
            "quantize_blockwise: input must be dense, got torch.qint8",
            lambda: torchao8.quantize_blockwise(
                torch._empty_affine_quantized((4, 300), scale=1.0, zero_point=0, dtype=torch.qint8)
            ),
        ),
        (
            "dequantize_blockwise: block_size",
            lambda: torchao8.dequantize_blockwise(codes, scale, block_size=32),
        ),
        ("dequantize_blockwise: codes", lambda: torchao8.dequantize_blockwise(codes.int(), scale)),
        ("dequantize_blockwise: codes", lambda: torchao8.dequantize_blockwise(codes.t(), scale)),
        (
            "dequantize_blockwise: scale",
            lambda: torchao8.dequantize_blockwise(codes, scale.view(-1)),
        ),
        (
            "dequantize_blockwise: scale",
            lambda: torchao8.dequantize_blockwise(codes, scale.double()),
        ),
        (
            "dequantize_blockwise: dtype",
            lambda: torchao8.dequantize_blockwise(codes, scale, dtype=torch.float64),
        ),
        (r"sum_squares: tensors\[1\]", lambda: ops.sum_squares([scale, scale.double()])),
        ("norms: sums", lambda: ops.norms(torch.zeros(3, 17, dtype=torch.int64))),
        ("norms: sums", lambda: ops.norms(torch.zeros(3, 18))),
    ]
    for argument, call in refused:
        for implementation in (nullcontext, portable):
            with implementation(), pytest.raises(RuntimeError, match=argument):
                call()


@every_option_set(of_torch=True)
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


def test_a_compiled_piece_steps_like_an_eager_one(fresh_compiler: None) -> None:
    """Once for each kind of tensor, whatever their sizes. Warns of nothing."""
    shapes = [(40, 512), (17, 512), (300, 256), (3000,)]
    pair = []
    for compiles in (True, False):
        params = make_params(shapes=shapes)
        optimizer = torchao8.AdamW8bit(params, min_8bit_size=5000)
        before = len(compiled._compiled)
        with portable(compiles=compiles), warnings.catch_warnings():
            warnings.filterwarnings("error", message="torchao8")
            for seed in range(3):
                set_grads(params, seed)
                optimizer.step()
        assert len(compiled._compiled) - before == (2 if compiles else 0)
        pair.append(optimizer)
    differences = Differences()
    for p, q in zip(*(o.param_groups[0]["params"] for o in pair), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        for key, value in pair[0].state[p].items():
            differences.add(value, pair[1].state[q][key])
    differences.check()


@pytest.mark.thorough
@every_optimizer()
def test_compiled_pieces_of_every_class(
    case: OptimizerCase, fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled once for two sizes; a step is then within the oracle's bounds of an eager one.

    The options are not the defaults: with a small eps, all numbers of RMSprop's first momentum have
    one magnitude but for rounding, which then decides the sign of the scale.
    """
    monkeypatch.setattr(compiled, "_compiled", {})  # SGD's code is that of LARS
    options = {**case.full, **case.options[-1], "min_8bit_size": SMALL}
    pair = [case.make(make_params(shapes=[(40, 512), (17, 512)]), **options) for _ in range(2)]
    eager, compiling = pair
    differences = Differences()
    for seed in range(3):
        for optimizer in pair:
            set_grads(optimizer.param_groups[0]["params"], seed)
        eager._init_states()
        wanted = [oracle_step(case, eager, p) for p in eager.param_groups[0]["params"]]
        step_portably(eager)
        with portable(compiles=True), warnings.catch_warnings():
            warnings.filterwarnings("error", message="torchao8")
            compiling.step()
        assert_alike(case, eager, compiling, wanted, 0.0, differences)
        copy_state(eager, compiling)
    differences.check()
    assert len(compiled._compiled) == 1


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


@pytest.mark.parametrize("fails_at", ["compiling", "first run", "another run"])
def test_a_failure_leaves_nothing_half_written(
    fails_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a first run wrote before it failed is taken back; and code may be compiled again."""
    from torch._dynamo.exc import BackendCompilerFailed

    runs = 0

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


def test_fake_tensors_leave_no_table_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of fake tensors, as tools that estimate memory make, before and after a real one."""

    def step() -> None:
        params = make_params(torch.bfloat16)
        set_grads(params, 0)
        step_portably(torchao8.AdamW8bit(params, min_8bit_size=SMALL, stochastic_rounding=True))

    codec.Tables.of.cache_clear()
    for mode in (FakeTensorMode, nullcontext, FakeTensorMode, nullcontext):
        with mode():
            step()


def test_the_environment_chooses() -> None:
    code = "from torchao8 import ops; import torch; print(ops.is_portable(torch.device('cpu')))"
    for value, expected in (("portable", "True"), ("scalar", "False"), ("", "False")):
        environment = {**os.environ, "TORCHAO8_CPU": value}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        )
        assert run.stdout.strip() == expected, run.stderr
