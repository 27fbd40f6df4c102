"""The contract of torch.optim.Optimizer: hooks, closures, groups, schedulers, GradScaler, frozen
and swapped parameters."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, assert_same_training, bits, make_params, set_grads, train
from optim_table import OptimizerCase, every_adam, every_optimizer
from torch import Tensor

from torchao8 import AdamW, AdamW8bit, ops


def scalar(state: dict[str, Tensor]) -> float:
    return float(state["step"])


@every_optimizer()
def test_the_signature_names_every_option(case: OptimizerCase) -> None:
    """Trainers and configuration tools ask a class whether it has ``fused``, and for defaults."""
    signature = inspect.signature(case.cls).parameters
    defaults = case.cls(make_params()).defaults
    fixed = {"state_version", *({"decoupled_weight_decay"} - set(signature))}
    assert set(signature) == {"params", *defaults} - fixed
    for name in set(signature) - {"params"}:
        default = signature[name].default
        if default is None:  # checkpoint tools take none
            default = {"adjust_lr_fn": "original"}.get(name, False)
        assert defaults[name] == default, name
    with pytest.raises(TypeError, match="unexpected keyword argument 'blocksize'"):
        case.cls(make_params(), blocksize=64)


@every_optimizer()
def test_arguments_by_position(case: OptimizerCase) -> None:
    """Those of torch.optim; then, of Adam with 8 bits, those of bitsandbytes."""
    kinds = inspect.signature(case.cls).parameters.items()
    ours = [name for name, p in kinds if p.kind is p.POSITIONAL_OR_KEYWORD]
    if case.rule == "adam" and case.optim_bits == 8:
        last = ["optim_bits", "min_8bit_size", "percentile_clipping", "block_wise", "is_paged"]
        given = (1e-2, (0.5, 0.6), 1e-3, 0.25, True, 32, 7, 50, False, True)
        group = case.cls(make_params(), *given, page_dir="").param_groups[0]
        assert tuple(group[name] for name in ours[1:]) == given
        assert ours[-5:] == last
        ours = ours[:-5]
    if case.torch_cls is not None:
        assert ours == list(inspect.signature(case.torch_cls).parameters)[: len(ours)]


@every_optimizer()
def test_states_are_those_of_the_op(case: OptimizerCase) -> None:
    """What a class declares of a state is what the rule does with it."""
    (family,) = (family for family in ops.FAMILIES if family.step_op == case.cls._op)
    of_op = {state.name: state for state in family.states}
    states = case.cls._states({**case.make(make_params()).defaults, **case.full})
    assert [s.name for s in states] == [name for name in of_op if name in {s.name for s in states}]
    for state in states:
        declared = of_op[state.name]
        assert (state.signed, state.is_scalar) == (declared.signed, declared.scalar)


@every_optimizer()
def test_hooks(case: OptimizerCase, device: str) -> None:
    """Step hooks run in order around the step, and a pre-hook may change the arguments."""
    params = make_params(device=device)
    optimizer = case.make(params)
    set_grads(params, 0)
    before = bits(params[0])
    events: list[tuple[str, bool]] = []
    optimizer.register_step_pre_hook(
        lambda o, args, kwargs: events.append(("pre", bits(params[0]) == before))
    )
    optimizer.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: 7), {}))
    optimizer.register_step_post_hook(
        lambda o, args, kwargs: events.append(("post", bits(params[0]) == before))
    )
    assert optimizer.step() == 7
    assert events == [("pre", True), ("post", False)]


@every_optimizer()
def test_closure(case: OptimizerCase, device: str) -> None:
    """The closure is positional, runs with gradients enabled, and its value is returned."""
    p = torch.nn.Parameter(torch.ones(1, 3, device=device))
    optimizer = case.make([p], lr=0.1, weight_decay=0)
    grad = torch.tensor([[1.0, 2.0, 3.0]], device=device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * grad).sum()
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss.detach()) == 6.0
    q = torch.nn.Parameter(torch.ones(1, 3, device=device))
    q.grad = grad
    case.make([q], lr=0.1, weight_decay=0).step()
    assert bits(p) == bits(q) != bits(torch.ones(3))


@every_optimizer()
def test_a_write_is_seen_by_autograd(case: OptimizerCase, device: str) -> None:
    """A backward through a parameter that a step has changed since must raise, as in torch."""
    params = make_params(device=device)
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    stale = (params[0] ** 2).sum()
    versions = [p._version for p in params]
    optimizer.step()
    assert all(p._version > v for p, v in zip(params, versions, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


@every_optimizer()
def test_hints_are_accepted_and_kept_as_bools(case: OptimizerCase, device: str) -> None:
    """fused, foreach and capturable choose nothing; checkpoint tools would choke on None."""
    hints = ({}, {"foreach": True}, {"fused": False, "capturable": True}, {"fused": True})
    results = []
    for options in hints:
        params = make_params(device=device)
        group = {"params": params, "foreach": None, "fused": options.get("fused")}
        optimizer = case.make([group], **options)
        train(optimizer, params, range(2))
        results.append(all_bits(optimizer)["params"])
        names = ("foreach", "fused", "capturable", "differentiable")
        assert all(type(optimizer.param_groups[0][name]) is bool for name in names)
        assert all(type(optimizer.defaults[name]) is bool for name in names)
    assert all(result == results[0] for result in results)


@every_optimizer()
def test_group_values_pass_through_checkpoint_tools(case: OptimizerCase) -> None:
    """Numbers, bools, strings, tensors, and tuples of them."""
    optimizer = case.make(make_params(), lr=torch.tensor(1e-3))
    for key, value in optimizer.param_groups[0].items():
        if key != "params":
            parts = value if isinstance(value, tuple) else (value,)
            assert all(isinstance(part, (int, float, str, Tensor)) for part in parts), key


@every_optimizer()
def test_groups_have_their_own_options(case: OptimizerCase, device: str) -> None:
    """Two groups with different options, one of them added later: as two optimizers."""
    first = {"lr": 0.1, "weight_decay": 0.2, "betas": (0.5, 0.6), "optim_bits": 32}
    second = {"lr": 0.01, "eps": 1e-3, "maximize": True, "amsgrad": True, "optim_bits": 8,
              "min_8bit_size": 0, "block_size": 64, "state_rounding": "nearest"}  # fmt: skip
    first, second = case.known(first), case.known(second)
    a, b = make_params(device=device), make_params(seed=1, device=device)
    joint = case.make([{"params": a, **first}])
    train(joint, a, [0])
    joint.add_param_group({"params": iter(b), **second})
    c, d = make_params(device=device), make_params(seed=1, device=device)
    apart = case.make(c, **first), case.make(d, **second)
    train(apart[0], c, [0])
    for step in (1, 2):
        set_grads(a, step)
        set_grads(b, step + 5)
        set_grads(c, step)
        set_grads(d, step + 5)
        joint.step()
        for optimizer in apart:
            optimizer.step()
    both = case.make([{"params": c}, {"params": d}])
    both.state.update({**apart[0].state, **apart[1].state})
    assert_same_training(joint, both)
    for name, _ in case.more_states:
        assert f"{name}_codes" in joint.state[b[0]]
    assert list(joint.state[a[1]]) == case.state_keys(32)


@every_optimizer()
def test_named_parameters(case: OptimizerCase, device: str) -> None:
    layers = [torch.nn.Linear(70, 80, bias=False), torch.nn.Linear(80, 90, bias=False)]
    model = torch.nn.Sequential(*layers).to(device)
    optimizer = case.make(model.named_parameters())
    model(torch.randn(2, 70).to(device)).sum().backward()
    optimizer.step()
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["0.weight", "1.weight"]
    assert len(optimizer.state) == 2


@every_optimizer()
def test_unknown_group_keys_are_kept(case: OptimizerCase, device: str) -> None:
    """Schedulers and trainers store their own in the groups."""
    params = make_params(device=device)
    optimizer = case.make([{"params": params, "name": "body", "initial_lr": 0.3}])
    train(optimizer, params, [0])
    state = optimizer.state_dict()
    other = case.make(make_params(device=device))
    other.load_state_dict(state)
    assert other.param_groups[0]["name"] == "body"
    assert other.param_groups[0]["initial_lr"] == 0.3


@every_optimizer()
def test_frozen_parameters(case: OptimizerCase, device: str) -> None:
    """Of any dtype; they keep their bits and get no state until they are thawed."""
    params = make_params(device=device)
    frozen = params[1].requires_grad_(False)
    zeros = torch.zeros(4096, dtype=torch.uint8, device=device)
    codes = torch.nn.Parameter(zeros, requires_grad=False)
    optimizer = case.make([*params, codes], weight_decay=0.5)
    before = bits(frozen)
    train(optimizer, [p for p in params if p.requires_grad], range(2))
    assert bits(frozen) == before
    assert frozen not in optimizer.state
    assert codes not in optimizer.state
    frozen.requires_grad_(True)
    train(optimizer, params, [2])
    assert bits(frozen) != before
    assert scalar(optimizer.state[frozen]) == 1
    assert scalar(optimizer.state[params[0]]) == 3


@every_optimizer()
def test_late_first_gradient(case: OptimizerCase, device: str) -> None:
    """Every trainable parameter has its state after the first step, and is at step 0 until its
    gradient comes; then the bits are those of an optimizer that has just been made."""
    params = make_params(device=device)
    late = params[0]
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params[1:], range(2))
    assert set(optimizer.state) == set(params)
    scalars = {s.name: s.initial for s in optimizer._states(optimizer.defaults) if s.is_scalar}
    assert set(scalars) == set(case.scalars)
    for key, value in optimizer.state[late].items():
        is_signed = key.endswith("_codes") and case.is_signed(key.removesuffix("_codes"))
        assert (value == (127 if is_signed else scalars.get(key, 0))).all(), key
    assert bits(late) == bits(make_params(device=device)[0])
    train(optimizer, params, [2])

    fresh = make_params(device=device)[:1]
    other = case.make(fresh, min_8bit_size=SMALL)
    train(other, fresh, [2])
    assert bits(late) == bits(fresh[0])
    assert scalar(optimizer.state[late]) == 1


@every_optimizer()
def test_parameters_swapped_in_after_construction(case: OptimizerCase, device: str) -> None:
    """accelerate replaces the parameters in the groups before the first step."""
    optimizer = case.make(make_params(torch.bfloat16, device=device), min_8bit_size=SMALL)
    swapped = make_params(device=device)
    optimizer.param_groups[0]["params"] = swapped
    train(optimizer, swapped, range(2))
    params = make_params(device=device)
    plain = case.make(params, min_8bit_size=SMALL)
    train(plain, params, range(2))
    assert_same_training(optimizer, plain)


@every_optimizer()
def test_options_are_read_at_every_step(case: OptimizerCase, device: str) -> None:
    changes = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 1.0, "weight_decay": 0.3, "maximize": True}
    for name, value in case.known(changes).items():
        changed, same = make_params(device=device), make_params(device=device)
        a, b = case.make(changed), case.make(same)
        train(a, changed, [0])
        train(b, same, [0])
        a.param_groups[0][name] = value
        train(a, changed, [1])
        train(b, same, [1])
        assert all_bits(a)["params"] != all_bits(b)["params"], name


SCHEDULERS: dict[str, Any] = {
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "one cycle, which writes betas": lambda o: torch.optim.lr_scheduler.OneCycleLR(
        o, max_lr=0.1, total_steps=8
    ),
    "sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [
            torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
            torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
        ],
        milestones=[3],
    ),
}


@every_adam()
@pytest.mark.parametrize("kind", ["float", "float32", "float64"])
@pytest.mark.parametrize("scheduler", list(SCHEDULERS))
def test_lr_schedulers(case: OptimizerCase, kind: str, scheduler: str, device: str) -> None:
    """The same groups as torch.optim at every step, and with 32-bit state the same training."""

    def run(cls: type[torch.optim.Optimizer], **options: Any) -> tuple[list[Any], list[Tensor]]:
        params = make_params(device=device)
        lr: float | Tensor = 0.05
        if kind != "float":
            lr = torch.tensor(lr, dtype=getattr(torch, kind), device=device)
        optimizer = cls(params, lr=lr, **options)
        schedule = SCHEDULERS[scheduler](optimizer)
        seen = []
        for step in range(7):
            train(optimizer, params, [step])
            schedule.step()
            group = optimizer.param_groups[0]
            assert isinstance(group["lr"], Tensor) == (kind != "float")
            seen.append((float(group["lr"]), group["betas"]))
        return seen, params

    theirs, want = run(case.torch_cls)
    ours, got = run(case.cls, optim_bits=32)
    assert ours == theirs
    # 7 steps of at most lr 0.1 each, and rounding of a few units in the last place at each.
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@every_optimizer()
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensor_lr(
    case: OptimizerCase, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    """A tensor of one element, of any shape, steps as the number does, and stays in its group."""
    lr = torch.full(shape, 2.0**-7, dtype=dtype, device=device)
    tensors, numbers = make_params(device=device), make_params(device=device)
    a, b = case.make(tensors, lr=lr), case.make(numbers, lr=2.0**-7)
    train(a, tensors, range(2))
    train(b, numbers, range(2))
    assert_same_training(a, b)
    assert a.param_groups[0]["lr"] is lr


def scaled_run(
    case: OptimizerCase, device: str, fused: bool, overflow: bool, clip: bool = False
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler]:
    """Two steps under a GradScaler, the second with an infinite gradient if ``overflow``."""
    params = make_params(device=device)
    optimizer = case.make(params, fused=fused, min_8bit_size=SMALL)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))
    for step in range(2):
        set_grads(params, step, scale=1024.0)
        if overflow and step == 1:
            assert params[0].grad is not None
            params[0].grad[1, 2] = float("inf")
        if clip:
            scaler.unscale_(optimizer)
        before = all_bits(optimizer)
        scaler.step(optimizer)
        if overflow and step == 1:
            after = all_bits(optimizer)
            assert after["params"] == before["params"]
            assert after["states"] == before["states"]
        scaler.update()
    return optimizer, scaler


@every_optimizer()
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_grad_scaler(case: OptimizerCase, fused: bool, clip: bool, device: str) -> None:
    """A scale of a power of two leaves the bits as they are, whoever divides by it."""
    optimizer, _ = scaled_run(case, device, fused, overflow=False, clip=clip)
    params = make_params(device=device)
    plain = case.make(params, min_8bit_size=SMALL)
    train(plain, params, range(2))
    assert_same_training(optimizer, plain)


@every_optimizer()
@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler_skips_a_step_that_overflows(
    case: OptimizerCase, fused: bool, device: str
) -> None:
    """Nothing changes, not even the count of steps, and the scale backs off."""
    optimizer, scaler = scaled_run(case, device, fused, overflow=True)
    steps = {scalar(state) for state in optimizer.state.values()}
    assert steps == {1.0}
    assert scaler.get_scale() == 512.0


@every_optimizer()
def test_fused_opts_in_to_amp_scaling(case: OptimizerCase) -> None:
    """As in torch.optim: only then does GradScaler hand over, and Lightning refuses to clip."""
    assert case.make(make_params(), fused=True)._step_supports_amp_scaling
    assert not case.make(make_params())._step_supports_amp_scaling


def test_zero_gradients_and_zero_lr_change_nothing(device: str) -> None:
    """torch.distributed.checkpoint makes the state by such a step."""
    for cls in (AdamW, AdamW8bit):
        params = make_params(device=device)
        optimizer = cls(params, lr=0.0, min_8bit_size=SMALL)
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert [bits(p) for p in params] == [bits(p) for p in make_params(device=device)]
        for state in optimizer.state.values():
            for key, value in state.items():
                zero = 127 if key == "exp_avg_codes" else 1 if key == "step" else 0
                assert (value == zero).all(), key


@every_optimizer()
def test_a_step_without_any_gradient_is_told_once(case: OptimizerCase) -> None:
    """As of an optimizer made before fully_shard, whose parameters are no longer the model's."""
    optimizer = case.make(make_params(), lr=0.1)
    with pytest.warns(UserWarning, match="found no gradient on any of its 8 parameters") as caught:
        optimizer.step()
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        frozen = case.make([p.requires_grad_(False) for p in make_params()], lr=0.1)
        frozen.step()
