"""Keys of others in ``optimizer.state[p]``: of an optimizer around this one, or of a logger.

As in torch.optim they are kept, saved and loaded, and nothing here depends on them.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, all_bits, bits, make_params, set_grads, through_file, train
from optim_table import OPTIMIZERS, OptimizerCase, every_8bit, every_optimizer
from ranks import run_ranks
from sharded import fsdp_weights, step_with
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.optim import Optimizer

import torchao8
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors, to_torch
from torchao8.optim._state.paging import found_in

SHAPES = ((3, 300), (5,), (40, 70))


def others(p: Tensor) -> dict[str, Any]:
    """Slow weights, a count, a float64 norm, a mask: what must keep its dtype and values."""
    return {
        "slow_buffer": p.detach().clone(),
        "seen": 3,
        "norm": torch.tensor(0.1, dtype=torch.float64),
        "mask": p.detach() > 0,
    }


def put(optimizer: Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            optimizer.state[p].update(others(p))


def others_in(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What others keep, with tensors as their dtype, shape and bytes."""
    return [
        {
            key: (value.dtype, value.shape, bits(value)) if isinstance(value, Tensor) else value
            for key, value in optimizer.state[p].items()
            if key in others(p)
        }
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def without_others(optimizer: Optimizer) -> dict[str, Any]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key in others(p):
                optimizer.state[p].pop(key, None)
    return all_bits(optimizer)


def by_pickle(case: OptimizerCase, optimizer: Optimizer, params: list[Any]) -> Optimizer:
    copied: Optimizer = pickle.loads(pickle.dumps(optimizer))
    return copied


def by_copy(case: OptimizerCase, optimizer: Optimizer, params: list[Any]) -> Optimizer:
    return copy.deepcopy(optimizer)


def by_state_dict(case: OptimizerCase, optimizer: Optimizer, params: list[Any]) -> Optimizer:
    loaded = case.make(params, min_8bit_size=SMALL, percentile_clipping=50)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    return loaded


ROADS = (by_state_dict, by_pickle, by_copy)


@every_optimizer()
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_steps_and_checkpoints_keep_them(case: OptimizerCase, first: bool, device: str) -> None:
    """Put there before the first step, or after it; in bfloat16 torch.optim would cast them."""
    params = make_params(torch.bfloat16, SHAPES, device=device)
    twins = make_params(torch.bfloat16, SHAPES, device=device)
    optimizer = case.make(params, min_8bit_size=SMALL, percentile_clipping=50)
    plain = case.make(twins, min_8bit_size=SMALL, percentile_clipping=50)
    if first:
        put(optimizer)
    train(optimizer, params, [0])
    train(plain, twins, [0])
    if not first:
        put(optimizer)
    expected = others_in(optimizer)
    train(optimizer, params, [1])
    train(plain, twins, [1])
    assert others_in(optimizer) == expected
    for road in ROADS:
        fresh = [p.detach().clone().requires_grad_() for p in params]
        loaded = road(case, optimizer, fresh)
        assert others_in(loaded) == expected
        loaded_params = loaded.param_groups[0]["params"]
        train(loaded, loaded_params, [2])
        assert others_in(loaded) == expected
    train(plain, twins, [2])
    assert without_others(loaded)["states"] == all_bits(plain)["states"]


@every_optimizer()
def test_before_the_first_step_they_are_no_state(case: OptimizerCase, device: str) -> None:
    """A checkpoint with nothing else loads, and the first step afterwards is a first one."""
    params, twins = (make_params(shapes=SHAPES, device=device) for _ in range(2))
    optimizer, plain = case.make(params), case.make(twins)
    put(optimizer)
    saved = through_file(optimizer.state_dict())
    loaded = case.make(params)
    loaded.load_state_dict(saved)
    expected = others_in(optimizer)
    assert others_in(loaded) == expected
    train(loaded, params, [0])
    train(plain, twins, [0])
    assert others_in(loaded) == expected
    assert without_others(loaded)["states"] == all_bits(plain)["states"]


def test_beside_paged_state() -> None:
    """They do not go to its pages, as nobody would bring them back for a step."""
    params = make_params(shapes=[(4, 50_000), (5,)])
    optimizer: Optimizer = torchao8.PagedAdamW8bit(params)
    train(optimizer, params, [0])
    put(optimizer)
    loaded = torchao8.PagedAdamW8bit(params)
    loaded.load_state_dict(optimizer.state_dict())
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer)), loaded):
        (p, _) = other.param_groups[0]["params"]
        assert others_in(other) == others_in(optimizer)
        assert found_in(other.state[p]["slow_buffer"]) is None
        assert found_in(other.state[p]["exp_avg_codes"]) == ""
        train(other, other.param_groups[0]["params"], [1])


def test_containers_come_back_as_they_are() -> None:
    """torch.optim makes a string of the second item of such a list."""
    (p,) = params = make_params(torch.bfloat16, [(5,)])
    optimizer = torchao8.Lion8bit(params)
    train(optimizer, params, [0])
    value = {"history": [torch.ones(2, dtype=torch.float64), "x", (1, None)]}
    optimizer.state[p]["log"] = value
    loaded = torchao8.Lion8bit(params)
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    log = loaded.state[p]["log"]
    assert log["history"][1:] == ["x", (1, None)]
    assert bits(log["history"][0]) == bits(value["history"][0])
    assert log["history"][0].dtype == torch.float64


@every_optimizer()
def test_keys_of_other_classes_are_refused(case: OptimizerCase) -> None:
    """A state of this library that the class has not would be one of another class."""
    params = make_params(shapes=[(5,)])
    optimizer = case.make(params)
    train(optimizer, params, [0])
    stray = "exp_avg_slow" if case.rule == "adagrad" else "sum"
    optimizer.state[params[0]][stray] = torch.zeros(5)
    before = all_bits(optimizer)
    set_grads(params, 1)
    with pytest.raises(RuntimeError, match=f"state of parameter 0: expected .*'{stray}'"):
        optimizer.step()
    with pytest.raises(ValueError, match=f"state of parameter 0: expected .*'{stray}'"):
        case.make(params).load_state_dict(optimizer.state_dict())
    assert all_bits(optimizer)["states"] == before["states"]


@every_optimizer()
def test_state_of_an_unknown_optimizer_is_refused(case: OptimizerCase) -> None:
    """All of its keys are others': the moments would begin anew, and nobody would know."""
    params = make_params(shapes=[(5,), (3,)])
    saved = {
        "state": {i: {"m": torch.ones(p.shape), "v": torch.ones(p.shape)} for i, p in
                  enumerate(params)},
        "param_groups": [{"lr": 0.1, "params": [0, 1]}],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"state of parameter 0: expected .*got \['m', 'v'\]"):
        case.make(params).load_state_dict(saved)


# -- files -------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Parameter(make_params(shapes=[(3, 300)])[0].detach())
        self.b = torch.nn.Parameter(make_params(shapes=[(5,)])[0].detach())


def trained_model(case: OptimizerCase) -> tuple[Model, Optimizer]:
    model = Model()
    optimizer = case.make(model.named_parameters(), min_8bit_size=SMALL)
    train(optimizer, model.parameters(), [0])
    put(optimizer)
    return model, optimizer


@every_8bit()
def test_through_safetensors(case: OptimizerCase, tmp_path: Path) -> None:
    model, optimizer = trained_model(case)
    optimizer.state[model.b]["log"] = [torch.ones(2), "x", (0.1, None)]
    save_safetensors(optimizer, tmp_path / "file")
    loaded = case.make(model.named_parameters(), min_8bit_size=SMALL)
    load_safetensors(loaded, tmp_path / "file")
    assert others_in(loaded) == others_in(optimizer)
    log = loaded.state[model.b].pop("log")
    assert log[1:] == ["x", (0.1, None)]
    assert torch.equal(log[0], torch.ones(2))
    del optimizer.state[model.b]["log"]
    assert without_others(loaded)["states"] == without_others(optimizer)["states"]


def test_safetensors_name_what_they_cannot_hold(tmp_path: Path) -> None:
    model, optimizer = trained_model(OPTIMIZERS[2])
    optimizer.state[model.a]["log"] = {"norm": 1.0}
    optimizer.state[model.b]["sparse"] = torch.eye(3).to_sparse()
    with pytest.warns(UserWarning, match=r"a\.log and 1 more in the state") as told:
        save_safetensors(optimizer, tmp_path / "file")
    assert len(told) == 1
    loaded = OPTIMIZERS[2].make(model.named_parameters(), min_8bit_size=SMALL)
    load_safetensors(loaded, tmp_path / "file")
    assert others_in(loaded) == others_in(optimizer)


@every_8bit()
def test_through_dcp(case: OptimizerCase, tmp_path: Path) -> None:
    model, optimizer = trained_model(case)
    saved: Any = get_optimizer_state_dict(model, optimizer)
    dcp.save({"optimizer": saved}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    loaded = case.make(model.named_parameters(), min_8bit_size=SMALL)
    load_dcp(model, loaded, tmp_path / "dcp", no_dist=True)
    assert others_in(loaded) == others_in(optimizer)
    again = case.make(model.named_parameters(), min_8bit_size=SMALL)
    set_optimizer_state_dict(model, again, saved)
    assert others_in(again) == others_in(optimizer)
    assert without_others(loaded)["states"] == without_others(optimizer)["states"]


def test_names_of_a_model_leave_them_alone(tmp_path: Path) -> None:
    """A load by names makes state to ask torch for the names, and takes it away again."""
    model, optimizer = trained_model(OPTIMIZERS[2])
    save_safetensors(optimizer, tmp_path / "file")
    fresh = OPTIMIZERS[2].make(model.parameters(), min_8bit_size=SMALL)
    fresh.state[model.a]["seen"] = 7
    with pytest.raises(ValueError, match="expected groups"):
        load_safetensors(OPTIMIZERS[2].make([model.a]), tmp_path / "file", model=model)
    from torchao8.checkpoint._names import names_of

    assert names_of(model, fresh) == {model.a: "a", model.b: "b"}
    assert {p: dict(s) for p, s in fresh.state.items()} == {model.a: {"seen": 7}}


@every_optimizer()
def test_to_and_from_torch(case: OptimizerCase) -> None:
    if case.torch_cls is None:
        pytest.skip("torch.optim has no such class")
    params = make_params(shapes=SHAPES)
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    put(optimizer)
    theirs = case.torch_cls(params)
    theirs.load_state_dict(to_torch(optimizer))
    assert [theirs.state[p]["seen"] for p in params] == [3] * 3
    for p in params:
        assert bits(theirs.state[p]["slow_buffer"]) == bits(optimizer.state[p]["slow_buffer"])
    train(theirs, params, [1])
    put(theirs)
    back = case.make(params, min_8bit_size=SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 32 bits become 8
        back.load_state_dict(through_file(theirs.state_dict()))
    assert others_in(back) == others_in(theirs)
    train(back, params, [2])


# -- the peers -----------------------------------------------------------------------------------


class Lookahead:
    """timm's, in short: slow weights in the state of the optimizer inside."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0

    def step(self) -> None:
        self.inner.step()
        self.count += 1
        if self.count % 2:
            return
        for group in self.inner.param_groups:
            for p in group["params"]:
                state = self.inner.state[p]
                if "lookahead_slow_buff" not in state:
                    state["lookahead_slow_buff"] = p.detach().clone()
                slow = state["lookahead_slow_buff"]
                slow.add_(p.detach() - slow, alpha=0.5)
                p.data.copy_(slow)


@every_8bit()
def test_lookahead_resumes_to_the_bit(case: OptimizerCase) -> None:
    def run(params: list[Any], optimizer: Lookahead, seeds: range) -> None:
        for seed in seeds:
            set_grads(params, seed)
            optimizer.step()

    params = make_params(shapes=SHAPES)
    whole = Lookahead(case.make(params, min_8bit_size=SMALL))
    run(params, whole, range(3))
    resumed_params = [p.detach().clone().requires_grad_() for p in params]
    resumed = Lookahead(case.make(resumed_params, min_8bit_size=SMALL))
    resumed.inner.load_state_dict(through_file(whole.inner.state_dict()))
    resumed.count = whole.count
    run(params, whole, range(3, 7))
    run(resumed_params, resumed, range(3, 7))
    assert [bits(p) for p in params] == [bits(p) for p in resumed_params]


def test_a_compiled_step_leaves_them_alone(fresh_compiler: None) -> None:
    """One that others put there later, too; the step is traced anew at most once."""
    params, twins = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL)
    plain = torchao8.AdamW8bit(twins, min_8bit_size=SMALL)
    put(optimizer)
    step: Callable[[], Any] = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        set_grads(params, seed)
        step()
        train(plain, twins, [seed])
        for p in params:
            optimizer.state[p]["seen"] = seed
            optimizer.state[p]["late"] = torch.ones(1)
    assert [bits(p) for p in params] == [bits(p) for p in twins]
    assert [optimizer.state[p]["seen"] for p in params] == [3] * 3


# -- sharded -----------------------------------------------------------------------------------


def _roads_of_two_ranks(rank: int, world_size: int, folder: str) -> list[str]:
    """What is wrong with slow weights that went each road, as a shard and as a whole."""
    mesh = init_device_mesh("cpu", (world_size,))

    def make() -> tuple[Any, Any]:
        model = fsdp_weights(mesh)
        return model, torchao8.AdamW8bit(model.named_parameters(), min_8bit_size=SMALL)

    model, optimizer = make()
    step_with(optimizer, range(1))
    for p in model.parameters():
        optimizer.state[p].update(slow_buffer=p.detach().clone(), seen=3)
    options = StateDictOptions(full_state_dict=True)
    full: Any = get_optimizer_state_dict(model, optimizer, options=options)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder)
    order = [name for group in full["param_groups"] for name in group["params"]]
    numbered = {
        "state": {i: full["state"][name] for i, name in enumerate(order)},
        "param_groups": [{**full["param_groups"][0], "params": list(range(len(order)))}],
    }
    wrong = []
    for road in ("whole", "torch", "dcp"):
        other_model, other = make()
        if road == "whole":
            other.load_state_dict(numbered)
        elif road == "torch":  # which loads the keys that are there already, as of torch.optim
            step_with(other, range(1))
            for q in other_model.parameters():
                other.state[q].update(slow_buffer=torch.zeros_like(q), seen=0)
            set_optimizer_state_dict(other_model, other, full, options=options)
        else:
            load_dcp(other_model, other, folder)
        pairs = zip(model.parameters(), other_model.parameters(), strict=True)
        for i, (p, q) in enumerate(pairs):
            slow, expected = other.state[q]["slow_buffer"], optimizer.state[p]["slow_buffer"]
            is_same = getattr(slow, "placements", None) == expected.placements and bits(
                slow.to_local()
            ) == bits(expected.to_local())
            if not is_same or other.state[q]["seen"] != 3:
                wrong.append(f"{road}: parameter {i} on rank {rank}: {type(slow).__name__}")
        step_with(other, range(1, 2))
    return wrong


def test_shards(tmp_path: Path) -> None:
    """What has the shape of a parameter is sharded as it is, wherever it comes from."""
    assert run_ranks(2, _roads_of_two_ranks, str(tmp_path / "dcp")) == [[], []]


# -- what is no key of others, and what no file can hold ------------------------------------------


@every_8bit()
def test_a_parameter_that_lost_its_state_is_refused(case: OptimizerCase) -> None:
    """Keys that nobody knows do not stand for a state that others of the checkpoint have."""
    optimizer = case.make(make_params(), min_8bit_size=SMALL)
    train(optimizer, optimizer.param_groups[0]["params"], [0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] = {f"{key}_x": value for key, value in saved["state"][1].items()}
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match=r"state of parameter 1.*expected the keys .*step_x"):
        optimizer.load_state_dict(saved)
    assert all_bits(optimizer) == before


def test_what_a_file_cannot_hold_is_left_out_as_a_whole(tmp_path: Path) -> None:
    optimizer = torchao8.AdamW8bit(make_params(), min_8bit_size=SMALL)
    params = optimizer.param_groups[0]["params"]
    train(optimizer, params, [0])
    state = optimizer.state[params[0]]
    state.update(
        {
            "half": [torch.ones(2), object()],
            3: 1.0,
            ("a", 1): torch.ones(1),
            "complex": torch.ones(2, dtype=torch.complex128),
            "meta": torch.ones(2, device="meta"),
            "kept": [torch.ones(2), "text"],
        }
    )
    path = tmp_path / "state.safetensors"
    with pytest.warns(UserWarning, match="and 4 more in the state of the optimizer is not saved"):
        save_safetensors(optimizer, path)
    other = torchao8.AdamW8bit(make_params(), min_8bit_size=SMALL)
    load_safetensors(other, path)
    others = other.state[other.param_groups[0]["params"][0]]
    assert set(others) - set(state) == set()
    assert "kept" in others
    assert not others.keys() & {"half", 3, ("a", 1), "complex", "meta"}


def test_the_dict_that_others_hold_stays() -> None:
    optimizer = torchao8.AdamW8bit(make_params(), min_8bit_size=SMALL)
    params = optimizer.param_groups[0]["params"]
    mine = optimizer.state[params[0]]
    mine["slow"] = 1
    train(optimizer, params, [0])
    assert optimizer.state[params[0]] is mine
    assert mine["slow"] == 1
