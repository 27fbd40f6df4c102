"""Our state as that of torch.optim, for the classes that it has."""

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers import SMALL, bits, make_params, set_grads, train
from optim_table import OPTIMIZERS, OptimizerCase, Options, every_option_set
from test_optim import oracle_step
from torch import Tensor

from torchao8 import SGD, AdamW, AdamW8bit, RMSprop8bit, ops
from torchao8.checkpoint import to_torch
from torchao8.optim._state.spec import State

ADAM = (State("exp_avg", signed=True), State("exp_avg_sq", signed=False))
AMSGRAD = (*ADAM, State("max_exp_avg_sq", signed=False))


def clones(params: list[Any]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_torch_goes_on_from_our_state(cls: Any, amsgrad: bool, device: str) -> None:
    """With the bits of a torch optimizer that was given the same moments by hand."""
    params = make_params(device=device)
    ours = cls(params, lr=0.01, min_8bit_size=SMALL, amsgrad=amsgrad, weight_decay=0.1)
    train(ours, params, range(3))
    converted, by_hand = clones(params), clones(params)
    theirs = torch.optim.AdamW(converted)
    theirs.load_state_dict(to_torch(ours))
    reference = torch.optim.AdamW(by_hand, lr=0.01, amsgrad=amsgrad, weight_decay=0.1)
    for p, q in zip(params, by_hand, strict=True):
        state = reference.state[q] = {"step": torch.tensor(3.0)}
        for name, signed, *_ in AMSGRAD if amsgrad else ADAM:
            state[name] = moment(ours.state[p], name, signed)
    train(theirs, converted, range(3, 6))
    train(reference, by_hand, range(3, 6))
    assert [bits(p) for p in converted] == [bits(p) for p in by_hand]


def moment(state: dict[str, Tensor], name: str, signed: bool) -> Tensor:
    if name in state:
        return state[name].clone()
    return ops.dynamic_map(signed).to(state["step"].device)[
        state[f"{name}_codes"].int()
    ] * elementwise(state[f"{name}_scale"], state[f"{name}_codes"])


def elementwise(scale: Tensor, codes: Tensor) -> Tensor:
    """The scale of each element: of codes that are all 1.0."""
    return ops.dequantize_blockwise(torch.full_like(codes, 255), scale)


def test_options_and_names_go_to_torch() -> None:
    params = make_params(torch.bfloat16, shapes=[(8, 16), (3,)])
    named = [{"params": [("w", params[0])], "lr": 0.5}, {"params": [("b", params[1])]}]
    ours = AdamW8bit(named, eps=1e-6, betas=(0.8, 0.9), fused=True, min_8bit_size=SMALL)
    ours.param_groups[0]["initial_lr"] = 7.0
    train(ours, params, [0])
    saved_dict = to_torch(ours)
    plain = set(torch.optim.AdamW([torch.ones(1)]).param_groups[0])
    assert set(saved_dict["param_groups"][0]) == plain | {"param_names", "initial_lr"}
    assert set(saved_dict["param_groups"][1]) == plain | {"param_names"}
    assert saved_dict["state"][0]["exp_avg"].dtype == torch.float32
    theirs = torch.optim.AdamW([{"params": [("w", params[0])]}, {"params": [("b", params[1])]}])
    theirs.load_state_dict(saved_dict)
    first, second = theirs.param_groups
    assert (first["lr"], second["lr"], first["initial_lr"]) == (0.5, 1e-3, 7.0)
    assert (first["eps"], first["betas"], first["weight_decay"]) == (1e-6, (0.8, 0.9), 0.01)
    assert (first["fused"], first["foreach"], first["param_names"]) == (None, None, ["w"])
    train(theirs, params, [1])


def test_what_goes_to_torch_is_a_copy() -> None:
    params = make_params()
    ours = AdamW8bit(params, min_8bit_size=SMALL)
    assert to_torch(ours)["state"] == {}
    train(ours, params, [0])
    before = [{k: bits(v) for k, v in state.items()} for state in ours.state.values()]
    for state in to_torch(ours)["state"].values():
        for value in state.values():
            value.fill_(7)
    assert [{k: bits(v) for k, v in state.items()} for state in ours.state.values()] == before


# -- the whole family --------------------------------------------------------------------------


@every_option_set(of_torch=True)
def test_the_next_step_is_ours(case: OptimizerCase, options: Options) -> None:
    """Of torch, after our state in 8 and in 32 bits; and back again, with every bit of 32."""
    assert case.torch_cls is not None
    options = {**case.base, **options}
    for optim_bits in (8, 32):
        params = make_params(shapes=[(3, 300), (4, 6, 9, 5), (5,)])
        source = case.cls(params, optim_bits=optim_bits, min_8bit_size=SMALL, **options)
        train(source, params, range(3))
        converted = to_torch(source)
        copies = clones(params)
        theirs = case.torch_cls(copies)
        theirs.load_state_dict(copy.deepcopy(converted))
        same = clones(params)
        ours = case.cls(same, optim_bits=32)  # of 32 bits: there is no rounding in the way
        ours.load_state_dict(copy.deepcopy(converted))
        ours._init_states()  # SGD without momentum has none in torch
        for index, q in enumerate(same):
            for state in ours._states(ours.param_groups[0]):
                assert bits(ours.state[q][state.name]) == bits(
                    converted["state"][index][state.name]
                )
        for name in options:
            assert theirs.param_groups[0][name] == options[name]
        set_grads(copies, 3)
        set_grads(same, 3)
        exact = [oracle_step(case, ours, q) for q in same]
        theirs.step()
        ours.step()
        for p, q, step in zip(copies, same, exact, strict=True):
            # Each is within the oracle's count of roundings.
            assert ((p - q).abs() <= 2 * step.param_error + 1e-30).all()


@pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS if c.torch_cls is not None], ids=lambda c: c.cls.__name__
)
def test_numbers_that_codes_stand_for_go_to_torch(case: OptimizerCase) -> None:
    """All states that the class can have, by the map; no history of norms."""
    params = make_params(shapes=[(3, 300), (5,)])
    optimizer = case.make(params, min_8bit_size=SMALL, percentile_clipping=50, **case.full)
    train(optimizer, params, range(2))
    converted = to_torch(optimizer)
    names = [state.name for state in optimizer._states(optimizer.param_groups[0])]
    steps = [] if case.rule in ("sgd", "muon") else ["step"]
    for i, p in enumerate(params):
        state = converted["state"][i]
        assert sorted(state) == sorted([*steps, *names])
        for name in names:
            want = moment(optimizer.state[p], name, case.is_signed(name))
            if name == "square_avg":  # test_variances_of_8_bits_stay_above_0
                want = torch.where(state[name] > want, state[name], want)
            assert bits(state[name]) == bits(want)


def test_before_the_first_step() -> None:
    """What each class of torch starts from: Adagrad has state then, SGD must have no buffer."""
    for case in OPTIMIZERS:
        if case.torch_cls is None:
            continue
        starts = {"initial_accumulator_value": 0.5} if case.rule == "adagrad" else {}
        for with_state in (False, True):
            params = make_params(shapes=[(3, 300), (5,)], matrices=case.matrices)
            source = case.make(params, min_8bit_size=SMALL, **starts)
            if with_state:
                source._init_states()
            theirs = case.torch_cls(params, **case.base)
            theirs.load_state_dict(to_torch(source))
            fresh = make_params(shapes=[(3, 300), (5,)], matrices=case.matrices)
            reference = case.torch_cls(fresh, **case.base, **starts)
            for group in reference.param_groups:
                if "decoupled_weight_decay" in group:
                    group["weight_decay"] = theirs.param_groups[0]["weight_decay"]
            train(theirs, params, range(2))
            train(reference, fresh, range(2))
            assert [bits(p) for p in params] == [bits(p) for p in fresh], case.cls.__name__


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_variances_of_8_bits_stay_above_0(momentum: float) -> None:
    """Of centered RMSprop: rounded apart, the mean square may fall below the square of the mean.

    In 8 bits the rule puts a floor under the difference. In 32 bits, here and in torch, the root of
    it would be 0 or NaN.
    """
    options = {"centered": True, "momentum": momentum, "alpha": 0.5}
    (p,) = params = make_params(shapes=[(8, 256)])
    source = RMSprop8bit(params, min_8bit_size=SMALL, **options)
    gradient = torch.linspace(0.5, 1.0, 2048).reshape(8, 256)
    for _ in range(20):
        p.grad = gradient.clone()
        source.step()
    squares, means = (
        ops.dequantize_blockwise(
            source.state[p][f"{name}_codes"], source.state[p][f"{name}_scale"], signed=signed
        )
        for name, signed in (("square_avg", False), ("grad_avg", True))
    )
    low = squares - means**2 < squares / 64
    assert low.any()
    assert (squares < means**2).any()  # or this test would show nothing
    ours = type(source).__mro__[1](clones(params), **options)  # type: ignore[call-arg]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours.load_state_dict(copy.deepcopy(source.state_dict()))
    theirs = torch.optim.RMSprop(clones(params))
    theirs.load_state_dict(to_torch(source))
    for optimizer in (ours, theirs):
        (q,) = optimizer.param_groups[0]["params"]
        mended = optimizer.state[q]["square_avg"]
        assert torch.equal(mended[~low], squares[~low])
        floor = mended / 64 * (1 - 2.0**-14)  # the difference loses up to 6 bits of 24
        assert (mended - means**2 >= floor)[low].all()
        assert torch.equal(optimizer.state[q]["grad_avg"], means)
        old = q.detach().clone()
        q.grad = gradient.clone()
        optimizer.step()
        # u = g / sqrt(variance), and the variance is no less than a half of v / 64; the buffer
        # holds such updates.
        assert ((q - old).abs() <= 0.01 * (2 * 64) ** 0.5 * (20 if momentum else 1)).all()


@pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS if c.torch_cls is None], ids=lambda c: c.cls.__name__
)
def test_classes_that_torch_lacks(case: OptimizerCase) -> None:
    name = case.cls.__name__
    assert not hasattr(torch.optim, name.removesuffix("8bit"))
    known = [c.__name__ for c in dict.fromkeys(c.torch_cls for c in OPTIMIZERS) if c is not None]
    names = f"{', '.join(sorted(known)[:-1])} or {max(known)}"
    match = f"expected {names}, in .* got {name}; torch.optim has no {name.removesuffix('8bit')}$"
    with pytest.raises(NotImplementedError, match=match):
        to_torch(case.make(make_params()))


def test_sgd_without_a_buffer_has_no_state_in_torch() -> None:
    params = make_params()
    optimizer = SGD(params, lr=0.5, weight_decay=0.1)
    train(optimizer, params, [0])
    assert to_torch(optimizer)["state"] == {}
