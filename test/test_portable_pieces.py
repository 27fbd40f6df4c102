"""What steps in plain PyTorch operators need of a device: memory, and nothing to wait for."""

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, make_params, needs_kernels, set_grads
from optim_table import OptimizerCase, Options, every_8bit
from portable_steps import portable, step_portably
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchao8
from torchao8 import ops
from torchao8.block_layout import codes_shape
from torchao8.optim._state.spec import NORMS_KEPT
from torchao8.optim._step import clipping
from torchao8.portable import pieces
from torchao8.portable import step as portable_step
from torchao8.portable.formats import dynamic

pytestmark = needs_kernels


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

    def step(in_8bit: bool, one_scale: bool, state_format: str = "dynamic") -> None:
        (family,) = [f for f in ops.FAMILIES if f.step_op == case.cls._op]
        p = torch.empty(40, 700, device="meta")
        grad, count = torch.empty_like(p), torch.empty((), device="meta")
        number = ops.FORMAT_NUMBERS[state_format]
        shape: tuple[int, ...] = codes_shape(p.shape, 256, ops.FORMATS[number].bits)
        state = torch.empty(shape, dtype=torch.uint8 if in_8bit else torch.float32, device="meta")
        values = [[torch.empty((), device="meta") if s.scalar else state] for s in family.states]
        shape = (1,) if one_scale else (40, 3)
        scales = [
            [torch.empty(shape, device="meta")] if in_8bit else []
            for s in family.states
            if not s.scalar
        ]
        numbers = torch.full((len(family.numbers),), 0.5, dtype=torch.float64)
        options: Options = {**dict.fromkeys(family.flags, False), "state_format": number}
        shared = ([p], [grad], values, scales, [count], torch.tensor(0.1, dtype=torch.float64),
                  numbers, count, [torch.empty(2, device="meta")])  # fmt: skip
        found = list(ops.extremes(family.step_op, *shared, **options)) if one_scale else []
        ops.step_(family.step_op, *shared, found, count, **options)
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
        for one_scale in (False, True):
            step(True, one_scale, "mulaw")
        if case.rule in ("adam", "lion", "sgd") and "LA" not in case.cls.__name__:
            step(True, False, "4bit")
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


KINDS = [{"optim_bits": 8}, {"optim_bits": 32}, {"state_format": "mulaw"}, {"optim_bits": 4}]


MAKES = {
    "matrix": lambda: torch.randn(3000, 2048),
    "vector": lambda: torch.randn(5_000_001),
    "other strides": lambda: torch.randn(500, 100, 10, 10).transpose(1, 3),
    "rows with an end": lambda: torch.randn(3, 1_500_001),
}
# Each kind in rows with an end, which need most, and each shape in one of two kinds.
MEASURED: list[Any] = [("rows with an end", kind) for kind in KINDS]
MEASURED += [(make, KINDS[i % 2]) for i, make in enumerate(list(MAKES)[:3])]
MEASURED += [
    pytest.param(make, KINDS[1 - i % 2], marks=pytest.mark.thorough)
    for i, make in enumerate(list(MAKES)[:3])
]


@pytest.mark.parametrize(("make", "kind"), MEASURED, ids=str)
def test_temporaries_do_not_grow_with_the_model(
    make: str, kind: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 MB at most, of a parameter of 20 MB or more with its gradient; three of them."""
    params = [torch.nn.Parameter(MAKES[make]()) for _ in range(3)]
    options: Options = {**kind, "stochastic_rounding": True, "amsgrad": True}
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
        for kind in KINDS:
            options = {**kind, "stochastic_rounding": True}
            optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL, **options)
            for seed in range(2):
                set_grads(params, seed)
                step_portably(optimizer)
            results.append(all_bits(optimizer))
    count = len(KINDS)
    assert results[:count] == results[count : 2 * count] == results[2 * count :]


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


def test_fake_tensors_leave_no_table_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of fake tensors, as tools that estimate memory make, before and after a real one."""

    def step() -> None:
        params = make_params(torch.bfloat16)
        set_grads(params, 0)
        step_portably(torchao8.AdamW8bit(params, min_8bit_size=SMALL, stochastic_rounding=True))

    dynamic.Tables.of.cache_clear()
    for mode in (FakeTensorMode, nullcontext, FakeTensorMode, nullcontext):
        with mode():
            step()
