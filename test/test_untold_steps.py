"""State of other libraries that does not tell how many steps it has made.

Lion's of most (lion-pytorch, timm, FlashOptim) has none, and Adam's of apex and DeepSpeed keeps the
number in its group.
"""

import warnings
from typing import Any

import pytest
import torch
from helpers import SMALL, bits, make_params, train
from optim_table import OptimizerCase, every_optimizer
from torch import Tensor

from torchao8 import Adagrad, Lion

SHAPES = ((3, 300), (5,))
# Rules whose steps do not depend on their number, but for the first one of a momentum buffer.
COUNTS_FROM = {"lion": 0, "rmsprop": 0, "adagrad": 0, "sgd": 1, "lars": 1, "muon": 1}


def foreign(case: OptimizerCase, **group: Any) -> dict[str, Any]:
    """Float32 state of a step, without its number."""
    params = make_params(shapes=SHAPES)
    optimizer = case.make(params, optim_bits=32)
    train(optimizer, params, [0])
    state = {
        i: {k: v.clone() for k, v in optimizer.state[p].items() if k != "step"}
        for i, p in enumerate(params)
    }
    saved = {"lr": 0.1, "params": [0, 1], **group}
    if case.rule == "lars":
        saved["trust_coefficient"] = 0.01
    if case.rule == "muon":
        saved["ns_steps"] = 5
    return {"state": state, "param_groups": [saved]}


def load(case: OptimizerCase, saved: dict[str, Any]) -> tuple[Any, list[Tensor], list[str]]:
    params = make_params(shapes=SHAPES)
    optimizer = case.make(params, min_8bit_size=SMALL)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved)
    return optimizer, params, [str(w.message) for w in told if "'step'" in str(w.message)]


@every_optimizer()
@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor([7.0])], ids=repr)
def test_the_group_tells(case: OptimizerCase, step: Any) -> None:
    optimizer, params, told = load(case, foreign(case, step=step))
    if case.rule in ("sgd", "lars", "muon"):  # torch.optim's, whose buffer has no number
        assert [float(optimizer.state[p]["step"]) for p in params] == [1.0, 1.0]
        return
    assert [float(optimizer.state[p]["step"]) for p in params] == [7.0, 7.0]
    assert len(told) == 1
    assert "counted from 7 on" in told[0]
    train(optimizer, params, [1])


@every_optimizer()
def test_nothing_tells(case: OptimizerCase) -> None:
    saved = foreign(case)
    if case.rule not in COUNTS_FROM:
        with pytest.raises(ValueError, match=r"state of parameter 0: expected the keys \['step'"):
            load(case, saved)
        return
    optimizer, params, told = load(case, saved)
    first = float(COUNTS_FROM[case.rule])
    assert [float(optimizer.state[p]["step"]) for p in params] == [first, first]
    assert len(told) == (case.rule not in ("sgd", "lars", "muon"))
    # In 32 bits the numbers of the moments are those that were saved.
    for i, p in enumerate(params):
        for key, value in saved["state"][i].items():
            if key in optimizer.state[p]:
                assert bits(optimizer.state[p][key]) == bits(value)
    train(optimizer, params, [1])


def test_the_next_step_of_lion_is_the_same() -> None:
    """Whatever number it has, at 32 bits."""
    params, twins = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    whole = Lion(params)
    train(whole, params, range(3))
    saved = {
        "state": {i: {"exp_avg": whole.state[p]["exp_avg"].clone()} for i, p in enumerate(params)},
        "param_groups": [{**whole.param_groups[0], "params": [0, 1]}],
    }
    del saved["param_groups"][0]["state_version"]  # type: ignore[attr-defined]
    resumed = Lion(twins)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    with pytest.warns(UserWarning, match="without 'step'") as told:
        resumed.load_state_dict(saved)
    assert len(told) == 1
    train(whole, params, [3])
    train(resumed, twins, [3])
    assert [bits(p) for p in params] == [bits(p) for p in twins]


def test_a_bad_number_of_the_group_tells_nothing() -> None:
    for step in (-1, 0.5, "x", float("nan"), 2**24, torch.ones(2)):
        optimizer = Lion(make_params(shapes=SHAPES))
        saved = {
            "state": {0: {"exp_avg": torch.zeros(3, 300)}},
            "param_groups": [{"lr": 0.1, "params": [0, 1], "step": step}],
        }
        with pytest.warns(UserWarning, match="counted from 0 on"):
            optimizer.load_state_dict(saved)


def test_a_decay_of_the_rate_needs_the_number() -> None:
    optimizer = Adagrad(make_params(shapes=SHAPES), lr_decay=0.1)
    saved = {
        "state": {0: {"sum": torch.zeros(3, 300)}},
        "param_groups": [{"lr": 0.1, "params": [0, 1]}],
    }
    with pytest.raises(ValueError, match=r"expected the keys \['step', 'sum'\], got \['sum'\]"):
        optimizer.load_state_dict(saved)


def test_our_own_state_without_it_is_damaged() -> None:
    params = make_params(shapes=SHAPES)
    optimizer = Lion(params)
    train(optimizer, params, [0])
    saved = optimizer.state_dict()
    saved["state"] = {0: {"exp_avg": saved["state"][0]["exp_avg"]}}
    with pytest.raises(ValueError, match="expected the keys"):
        optimizer.load_state_dict(saved)
