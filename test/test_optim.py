"""What the optimizers compute, against float64 and against torch.optim; and which ops they call."""

import copy
import warnings
from typing import Any

import pytest
import reference
import reference_rules
import torch
from helpers import SMALL, all_bits, assert_same_training, make_params, set_grads, train
from optim_table import OF_ELEMENTS, OptimizerCase, Options, every_optimizer, every_option_set
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchao8 import AdamW8bit, Lion, Lion8bit
from torchao8.optim.base import LowPrecisionOptimizer

DTYPES = [
    pytest.param(torch.float32, torch.float32, id="float32"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bfloat16"),
    pytest.param(torch.float16, torch.float16, id="float16"),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16-grad-float32"),
    pytest.param(torch.float32, torch.bfloat16, id="float32-grad-bfloat16"),
]


class CountOps(TorchDispatchMode):
    """Counts the calls of the library's ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "torchao8":
            self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


def moment(
    case: OptimizerCase, state: dict[str, Tensor], name: str, block_size: int = 256
) -> Tensor:
    """A state in float64, from either format, by the oracle's decoder."""
    if name in state:
        return state[name].double()
    codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
    return reference.dequantize(codes, scale, block_size, signed=case.is_signed(name))


def oracle_step(
    case: OptimizerCase, optimizer: LowPrecisionOptimizer, p: Tensor
) -> reference_rules.Result:
    """What the next step does to a parameter."""
    state, group = on_cpu(optimizer.state[p]), optimizer.param_groups[0]
    names = [s.name for s in optimizer._states(group)]
    assert p.grad is not None
    return reference_rules.RULES[case.rule](
        p.detach().cpu().double(),
        p.grad.cpu().double(),
        {name: moment(case, state, name) for name in names},
        int(state["step"]) + 1,
        group,
        any(key.endswith("_codes") for key in state),
    )


def on_cpu(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a parameter where the oracle computes."""
    return {key: value.cpu() for key, value in state.items()}


def check_stored(
    state: dict[str, Tensor],
    name: str,
    want: Tensor,
    error: Tensor,
    *,
    signed: bool,
    stochastic: bool,
    block_size: int = 256,
) -> None:
    """A stored state is the oracle's, but for float32 rounding and that of its format."""
    if name in state:
        assert ((state[name].double() - want).abs() <= error + 1e-44).all()
        return
    codes, scale = state[f"{name}_codes"].long(), state[f"{name}_scale"]
    want_scale = reference.block_scale(want, block_size)
    # Which of two elements that differ by rounding alone is the extreme one is anybody's guess, and
    # with it the sign of the scale: the magnitudes must agree, and an element must be at 1.0.
    block_error = reference.block_scale(error, block_size)
    assert ((scale.abs() - want_scale.abs()).abs() <= block_error).all()
    per_element = reference.expand_scale(scale.double(), tuple(codes.shape), block_size)
    codebook = reference.dynamic_map(signed)
    decoded = codebook[codes] * per_element
    if not stochastic:
        nearest = reference.nearest_code(
            torch.where(per_element == 0, 0, want / per_element), signed
        )
        if not signed:
            # What float32 does not take for 0 gets a code above 0.
            nearest[(want + error > 0) & (nearest == 0) & (codes == 1)] = 1
        least = (codebook[nearest] * per_element - want).abs()
        assert ((decoded - want).abs() <= least + 2 * error + 1e-44).all()
    else:
        # One of the two codes around the value: it lies between the neighbours of the code. There
        # is no -1.0, so that down to there a value gets the last negative code.
        below, above = codebook[(codes - 1).clamp_min(0)], codebook[(codes + 1).clamp_max(255)]
        if signed:
            below = torch.where(codes == 0, -1.0, below)
        ends = below * per_element, above * per_element  # in this order if the scale is positive
        assert (torch.minimum(*ends) <= want + error).all()
        assert (torch.maximum(*ends) >= want - error).all()
    if not signed:
        assert (codes[(want > 0) & (per_element > 0)] > 0).all()


@every_option_set()
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES)
def test_each_step_is_that_of_the_oracle(
    case: OptimizerCase,
    options: Options,
    dtype: torch.dtype,
    grad_dtype: torch.dtype,
    device: str,
) -> None:
    """Each step is repeated in float64 from the state before it, so that no error adds up."""
    params = make_params(dtype, device=device)
    rounding = "nearest" if options.get("amsgrad") else "stochastic"
    optimizer = case.make(params, **options, min_8bit_size=SMALL, state_rounding=rounding)
    unit = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    for step in range(3):
        set_grads(params, step, grad_dtype)
        if step == 2:
            params[0].grad.zero_()  # type: ignore[union-attr]
        if step == 0:
            optimizer._init_states()
        expected = [oracle_step(case, optimizer, p) for p in params]
        optimizer.step()
        for p, want in zip(params, expected, strict=True):
            state = on_cpu(optimizer.state[p])
            # The float32 result is rounded once more to the dtype: half a unit in the last place.
            limit = want.param_error + unit * want.param.abs() + torch.finfo(dtype).smallest_normal
            assert ((p.detach().cpu().double() - want.param).abs() <= limit).all()
            assert state["step"] == step + 1
            for name, value in want.states.items():
                signed = case.is_signed(name)
                check_stored(
                    state,
                    name,
                    value,
                    want.errors[name],
                    signed=signed,
                    stochastic=rounding == "stochastic" and case.is_stochastic(name),
                )


@every_option_set(of_torch=True)
def test_checkpoints_of_torch_optim(case: OptimizerCase, options: Options) -> None:
    """Their state is loaded as it is in 32 bits, and rounded to 8; the options come with it."""
    assert case.torch_cls is not None
    options = {**case.base, **options}
    params = make_params()
    theirs = case.torch_cls(params, **options)
    for step in range(3):
        set_grads(params, step)
        theirs.step()
    for optim_bits in (32, 8):
        same = [p.detach().clone().requires_grad_() for p in params]
        ours = case.cls(same, optim_bits=optim_bits, min_8bit_size=SMALL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the rounding
            ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        for name in options:
            assert ours.param_groups[0][name] == theirs.param_groups[0][name]
        for p, q in zip(params, same, strict=True):
            for state in ours._states(ours.param_groups[0]):
                want = theirs.state[p][state.name]
                if state.name in ours.state[q]:
                    assert torch.equal(ours.state[q][state.name], want)
                else:
                    kept = moment(case, ours.state[q], state.name)
                    scale = reference.expand_scale(
                        reference.block_scale(want, 256).abs(), tuple(want.shape), 256
                    )
                    assert ((kept - want).abs() <= scale * 0.9 / 128).all()
        set_grads(same, 3)
        ours._init_states()  # of SGD without momentum, whose checkpoint has none
        exact = [oracle_step(case, ours, q) for q in same]
        ours.step()
        if optim_bits == 32:
            copies = [p.detach().clone().requires_grad_() for p in params]
            again = case.torch_cls(copies, **options)
            again.load_state_dict(copy.deepcopy(theirs.state_dict()))
            set_grads(copies, 3)
            again.step()
            for p, q, want in zip(copies, same, exact, strict=True):
                # Each is as near to the exact step as the oracle's count of roundings allows. It
                # takes them of the addends: a buffer and an update that cancel leave a change that
                # is smaller than the error of either.
                assert ((p - q).abs() <= 2 * want.param_error + 1e-30).all()


@every_optimizer(OF_ELEMENTS)  # of a matrix: test_muon.py
@pytest.mark.parametrize("optim_bits", [8, 32])
def test_a_bad_gradient_stays_where_it_is(
    case: OptimizerCase, optim_bits: int, device: str
) -> None:
    """Its element keeps its bits, its neighbours take the step of the oracle."""
    params = make_params(device=device)
    options = case.known({"amsgrad": True, "weight_decay": 0.1, "eps": 1e-2})
    optimizer = case.make(params, optim_bits=optim_bits, min_8bit_size=SMALL, **options)
    train(optimizer, params, range(2))
    set_grads(params, 2)
    for p in params:
        assert p.grad is not None
        spoiled = p.grad.view(-1)[1::7]
        values = torch.tensor([float("nan"), float("inf"), -float("inf")], device=device)
        spoiled.copy_(values.repeat(spoiled.numel() // 3 + 1)[: spoiled.numel()])
    before = [p.detach().clone() for p in params]
    states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    expected = [oracle_step(case, optimizer, p) for p in params]
    optimizer.step()
    for p, old, old_state, want in zip(params, before, states, expected, strict=True):
        bad = ~p.grad.isfinite()  # type: ignore[union-attr]
        assert torch.equal(p.detach()[bad], old[bad])
        assert not torch.equal(p.detach(), old)
        limit = want.param_error + torch.finfo(torch.float32).smallest_normal
        assert ((p.detach().cpu().double() - want.param).abs() <= limit).all()
        for name in set(want.states) - set(case.scalars):
            if name in old_state:
                assert torch.equal(optimizer.state[p][name][bad], old_state[name][bad])
            else:
                assert optimizer.state[p][f"{name}_scale"].isfinite().all()


def test_lion_moves_nothing_by_the_sign_of_zero(device: str) -> None:
    """An element without gradient and momentum: bits, in both formats; -0.0 is as good as 0.0."""
    for optim_bits in (8, 32):
        params = make_params(device=device)
        optimizer = Lion(params, lr=0.1, optim_bits=optim_bits, min_8bit_size=SMALL)
        for p in params:
            p.grad = torch.zeros_like(p)
            p.grad.view(-1)[::3] = -0.0
        before = [p.detach().clone() for p in params]
        optimizer.step()
        assert all(torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True))


@pytest.mark.parametrize("lr_as_tensor", [False, True])
@every_option_set(of_torch=True, cases=OF_ELEMENTS)  # of matrices: test_muon.py
def test_training_follows_torch_optim(
    case: OptimizerCase, options: Options, lr_as_tensor: bool, device: str
) -> None:
    """With 32-bit state, as near to torch.optim in float64 as torch.optim in float32 is.

    The two float32 runs round at different places, so "as near" means within a factor of four and
    a few units in the last place, in the largest error of a parameter after 20 steps. Torch's runs
    are on the CPU.
    """
    assert case.torch_cls is not None
    options = {**case.base, **options}
    if lr_as_tensor:
        options = {**options, "lr": torch.tensor(options.get("lr", 1e-3), dtype=torch.float64)}
    exact = [p.detach().double().requires_grad_() for p in make_params()]
    theirs, ours = make_params(), make_params(device=device)
    runs = [
        (case.torch_cls(exact, **options), exact),
        (case.torch_cls(theirs, **options), theirs),
        (case.make(ours, **options, optim_bits=32), ours),
    ]
    for step in range(20):
        for optimizer, params in runs:
            set_grads(params, step)
            optimizer.step()
    for want, near, got in zip(exact, theirs, ours, strict=True):
        allowed = 4 * (near - want).abs().max() + 4 * 2.0**-23 * want.abs().max()
        assert (got.cpu() - want).abs().max() <= allowed


@every_optimizer()
def test_states_and_where_they_apply(case: OptimizerCase, device: str) -> None:
    """The keys, dtypes and shapes of the state, for parameters on both sides of each limit."""
    shapes = [
        (64, 64),
        (63, 65),
        (4096,),
        (4095,),
        (512, 8),
        (256, 16),
        (256, 15),
        (),
        (16, 16, 3, 30),
    ]
    quantized = [True, False, True, False, True, True, False, False, True]
    params = make_params(torch.bfloat16, shapes, device=device)
    optimizer = case.make(params, optim_bits=8)
    train(optimizer, params, [0])
    for p, in_8bit in zip(params, quantized, strict=True):
        state = optimizer.state[p]
        assert list(state) == case.state_keys(8 if in_8bit else 32)
        assert (state["step"].dtype, state["step"].shape) == (torch.float32, ())
        for name, _ in case.states:
            if in_8bit:
                codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
                assert (codes.dtype, codes.shape) == (torch.uint8, p.shape)
                assert (scale.dtype, scale.shape) == (
                    torch.float32,
                    reference.scale_shape(tuple(p.shape), 256),
                )
            else:
                assert (state[name].dtype, state[name].shape) == (torch.float32, p.shape)
        assert all(type(value) is Tensor and value.is_contiguous() for value in state.values())
        assert all(value.device == p.device for value in state.values())


@every_optimizer()
def test_bytes_of_state(case: OptimizerCase, device: str) -> None:
    """A byte for each state and a scale for a block of 256 in 8 bits, four bytes in 32."""
    params = make_params(shapes=[(512, 1024), (8192,)], device=device)
    optimizer = case.make(params)
    train(optimizer, params, [0])
    numbers = ("step", *case.scalars)
    size = sum(v.nbytes for s in optimizer.state.values() for k, v in s.items() if k not in numbers)
    per_param = size / sum(p.numel() for p in params)
    n = len(case.states)
    assert n <= per_param <= 1.02 * n if case.optim_bits == 8 else per_param == 4 * n


@every_optimizer()
def test_one_op_call_for_each_bucket(case: OptimizerCase, device: str) -> None:
    """A bucket is what shares dtypes and the format of the state; groups are apart."""
    params = make_params(shapes=[(64, 64)] * 6 + [(3,)] * 2, device=device)
    halves = make_params(torch.bfloat16, [(64, 64)] * 3, device=device)
    optimizer = case.make([{"params": params[:4]}, {"params": params[4:] + halves}], optim_bits=8)
    set_grads(params + halves[:2], 0)
    set_grads(halves[2:], 0, torch.float32)
    with CountOps() as ops:
        optimizer.step()
    # First group: one. Second: float32 in 8 and in 32 bits, bfloat16 with both dtypes of gradients.
    # Norms of all parameters come before, and a trust ratio for each group; or a look for matrices
    # with a bad gradient.
    before = {
        "lars": ["sum_squares", "norms", *["lars_trust_ratios"] * 2],
        "lamb": [*["lamb_update_sums"] * 5, "sum_squares", "norms"],
        "muon": ["matrix_factors"],
    }
    expected = [*before.get(case.rule, ()), *[case.step_op] * 5]
    assert ops.calls == [f"torchao8::{name}" for name in expected]
    assert {p: int(optimizer.state[p]["step"]) for p in params + halves} == dict.fromkeys(
        params + halves, 1
    )


@pytest.mark.parametrize("in_two_groups", [False, True])
def test_one_step_count_for_two_parameters_is_refused(in_two_groups: bool) -> None:
    """Two op calls would count it twice, and the second would read what the first has counted."""
    params = make_params(shapes=[(64, 64), (3,)])
    groups = [{"params": p} for p in params] if in_two_groups else params
    optimizer = AdamW8bit(groups)
    train(optimizer, params, [0])
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"]
    set_grads(params, 1)
    before = all_bits(optimizer)
    with pytest.raises(RuntimeError, match=r"'step' of parameter 0 and parameter 1: expected"):
        optimizer.step()
    assert all_bits(optimizer) == before
    optimizer.state[params[1]]["step"] = optimizer.state[params[0]]["step"].clone()
    train(optimizer, params, [1])
    assert [int(optimizer.state[p]["step"]) for p in params] == [2, 2]


@every_optimizer()
def test_buckets_do_not_change_the_result(case: OptimizerCase, device: str) -> None:
    """All parameters in one optimizer or each in its own: the same bits."""
    together, alone = make_params(device=device), make_params(device=device)
    whole = case.make(together, min_8bit_size=SMALL, weight_decay=0.1)
    parts = [case.make([p], min_8bit_size=SMALL, weight_decay=0.1) for p in alone]
    for step in range(3):
        set_grads(together, step)
        set_grads(alone, step)
        for optimizer in [whole, *parts]:
            optimizer.step()
    joined = case.make(alone)
    joined.state.update({p: o.state[p] for p, o in zip(alone, parts, strict=True)})
    assert_same_training(whole, joined)


@every_optimizer()
def test_strides_do_not_change_the_result(case: OptimizerCase, device: str) -> None:
    """Transposed, sliced and expanded parameters and gradients, against their contiguous copies."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape).to(device)

    def pair(p: Tensor) -> tuple[Tensor, Tensor]:
        return p.detach().requires_grad_(), p.detach().clone(
            memory_format=torch.contiguous_format
        ).requires_grad_()

    views = [
        randn(70, 90).t(),
        randn(90, 141)[:, ::2],
        randn(5001)[1:],
        randn(2, 40, 5, 30).permute(0, 3, 1, 2),
        randn(10, 20, 12, 3).to(memory_format=torch.channels_last),
    ]
    pairs = [pair(view) for view in views if case.takes(view)]
    strided, plain = [a for a, _ in pairs], [b for _, b in pairs]
    grads = [
        randn(70, 90).t(),
        randn(90, 1).expand(90, 71),
        randn(10000)[::2],
        randn(30, 2, 5, 40).permute(1, 0, 3, 2),
        randn(10, 20, 12, 3),
    ]
    grads = [grad for grad, view in zip(grads, views, strict=True) if case.takes(view)]
    options = {"weight_decay": 0.1, **({"higher_dims": "batch"} if case.matrices else {})}
    first, second = case.make(strided, **options), case.make(plain, **options)
    for _ in range(2):
        for p, q, grad in zip(strided, plain, grads, strict=True):
            p.grad, q.grad = grad, grad.contiguous()
        first.step()
        second.step()
    assert_same_training(first, second)


@every_optimizer()
def test_nearest_and_stochastic_rounding_differ(case: OptimizerCase, device: str) -> None:
    """state_rounding and seed reach the op, and without 8-bit state they do nothing."""

    def run(**options: Any) -> dict[str, Any]:
        params = make_params(device=device)
        optimizer = case.make(params, min_8bit_size=SMALL, **options)
        train(optimizer, params, range(3))
        return all_bits(optimizer)["states"]

    default, nearest = run(), run(state_rounding="nearest")
    seeds = run(seed=1), run(seed=1), run(seed=-(2**63))
    assert default == run(state_rounding="stochastic", seed=0)
    assert seeds[0] == seeds[1]
    distinct = {str(x) for x in (default, nearest, seeds[0], seeds[2])}
    # Where all states are rounded to nearest anyway, none of these does anything.
    rounds = case.optim_bits == 8 and any(case.is_stochastic(name) for name, _ in case.states)
    assert len(distinct) == (4 if rounds else 1)


@every_optimizer()
@pytest.mark.parametrize("block_size", [64, 2048])
def test_block_size(case: OptimizerCase, block_size: int, device: str) -> None:
    """The scales have the shape that the block size asks for, and the step uses it."""
    params = make_params(shapes=[(3, 5000), (6000,), (20, 40, 5)], device=device)
    optimizer = case.make(params, optim_bits=8, block_size=block_size, state_rounding="nearest",
                         min_8bit_size=0)  # fmt: skip
    set_grads(params, 0)
    first = case.make(params, optim_bits=32)
    first._init_states()
    fresh = {p: oracle_step(case, first, p) for p in params}
    optimizer.step()
    for p in params:
        state = on_cpu(optimizer.state[p])
        shape = reference.scale_shape(tuple(p.shape), block_size)
        for name, signed in case.states:
            assert state[f"{name}_scale"].shape == shape
            # After one step the state follows from the gradient alone. Rounding is to half of the
            # map's widest gap, which is between the last code and the first of the next decade.
            scale = reference.expand_scale(
                state[f"{name}_scale"].double().abs(), tuple(p.shape), block_size
            )
            want = fresh[p].states[name]
            stored = moment(case, state, name, block_size)
            gap = 0.9 / 128 if signed else 0.9 / 256
            assert ((stored - want).abs() <= scale * gap * (1 + 1e-5)).all()


def test_gradient_magnitudes_cover_the_map() -> None:
    """The tests above mean little unless codes of several decades come up."""
    params = make_params()
    optimizer = AdamW8bit(params, min_8bit_size=SMALL)
    train(optimizer, params, range(2))
    codes = torch.cat([
        state["exp_avg_sq_codes"].flatten() for state in optimizer.state.values()
        if "exp_avg_sq_codes" in state
    ])  # fmt: skip
    assert codes.unique().numel() > 150


@pytest.mark.parametrize("cls", [Lion, Lion8bit])
def test_lion_does_not_round_lr_to_the_dtype_of_the_gradient(cls: Any, device: str) -> None:
    """Every bfloat16 from 2^-9 up to 1 moves by lr itself; bfloat16 would make it 0.00100708."""
    lr = 0.001
    positive = torch.arange(0x3B00, 0x3F80, dtype=torch.int16).view(torch.bfloat16)
    p = torch.nn.Parameter(positive.to(device, copy=True))
    p.grad = torch.ones_like(p)
    cls([p], lr=lr, min_8bit_size=0).step()
    want = (positive.double() - lr).bfloat16()
    assert torch.equal(p.detach().cpu(), want)
    rounded = torch.tensor(lr).bfloat16().double()
    assert not torch.equal((positive.double() - rounded).bfloat16(), want)
