"""What a step takes, every way of loading takes: learning rates below 0, numbers of numpy."""

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, all_bits, bits, make_params, set_grads, through_file, train
from optim_table import OptimizerCase, every_8bit, every_optimizer
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR

from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors, to_torch

Road = Callable[[torch.nn.Module, Optimizer, Any, Path], None]


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = make_params(shapes=[(3, 300), (5,)])


def by_state_dict(model: torch.nn.Module, old: Optimizer, new: Any, folder: Path) -> None:
    new.load_state_dict(through_file(old.state_dict()))


def by_safetensors(model: torch.nn.Module, old: Optimizer, new: Any, folder: Path) -> None:
    save_safetensors(old, folder / "file")
    load_safetensors(new, folder / "file")


def by_dcp(model: torch.nn.Module, old: Optimizer, new: Any, folder: Path) -> None:
    saved = {"optimizer": get_optimizer_state_dict(model, old)}
    dcp.save(saved, checkpoint_id=folder / "dcp", no_dist=True)
    load_dcp(model, new, folder / "dcp", no_dist=True)


def by_full_state_dict(model: torch.nn.Module, old: Optimizer, new: Any, folder: Path) -> None:
    set_optimizer_state_dict(model, new, get_optimizer_state_dict(model, old))


ROADS: tuple[Road, ...] = (by_state_dict, by_safetensors, by_dcp, by_full_state_dict)


@every_optimizer()
def test_a_schedule_that_ends_below_0(case: OptimizerCase, tmp_path: Path) -> None:
    """LinearLR's last rate is -5.55e-21 in place of 0, and a tensor in place of a number."""
    for number, as_tensor in enumerate((False, True)):
        model = Model()

        def rate(as_tensor: bool = as_tensor) -> Any:
            return torch.tensor(0.1, dtype=torch.float64) if as_tensor else 0.1

        optimizer = case.make(model.named_parameters(), lr=rate(), min_8bit_size=SMALL)
        schedule = LinearLR(optimizer, 0.1, 0.0, 4)
        for seed in range(6):
            train(optimizer, model.parameters(), [seed])
            schedule.step()
        assert float(optimizer.param_groups[0]["lr"]) < 0
        for road in ROADS:
            loaded = case.make(model.named_parameters(), lr=rate(), min_8bit_size=SMALL)
            folder = tmp_path / f"{number}{road.__name__}"
            folder.mkdir()
            road(model, optimizer, loaded, folder)
            assert float(loaded.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
            assert all_bits(loaded)["states"] == all_bits(optimizer)["states"]
            train(loaded, model.parameters(), [9])


@every_optimizer()
def test_a_step_and_a_load_take_any_finite_rate(case: OptimizerCase) -> None:
    """And refuse the same ones; a new group cannot begin below 0."""
    params = make_params(shapes=[(3, 300)])
    optimizer = case.make(params, min_8bit_size=SMALL)
    for rate in (-0.5, -1e30, 0.0, 3.0, float("nan"), float("inf"), -float("inf")):
        optimizer.param_groups[0]["lr"] = 0.1
        train(optimizer, params, [0])
        saved = optimizer.state_dict()
        optimizer.param_groups[0]["lr"] = saved["param_groups"][0]["lr"] = rate
        set_grads(params, 1)
        takes: list[bool] = []
        loaded = case.make(params, min_8bit_size=SMALL)
        for act in (optimizer.step, lambda to=loaded, saved=saved: to.load_state_dict(saved)):
            try:
                act()
                takes.append(True)
            except (RuntimeError, ValueError):
                takes.append(False)
        assert takes == [abs(rate) < float("inf")] * 2, rate
    with pytest.raises(ValueError, match="lr: expected a finite number >= 0"):
        case.make(params, lr=-0.5)
    with pytest.raises(ValueError, match="lr: expected a finite number >= 0"):
        optimizer.add_param_group({"params": make_params(shapes=[(2,)]), "lr": -5.55e-21})


@every_optimizer()
def test_checkpoints_of_torch_optim_with_such_a_rate(case: OptimizerCase) -> None:
    if case.torch_cls is None:
        pytest.skip("torch.optim has no such class")
    params = make_params(shapes=[(5,)])
    theirs = case.torch_cls(params, lr=0.1)
    schedule = LinearLR(theirs, 0.1, 0.0, 4)
    for seed in range(6):
        train(theirs, params, [seed])
        schedule.step()
    ours = case.cls(params)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"] < 0
    train(ours, params, [9])
    theirs.load_state_dict(to_torch(ours))
    assert theirs.param_groups[0]["lr"] < 0


def numpy_options(case: OptimizerCase) -> dict[str, Any]:
    """Every option with a number or a flag, as numpy's scalar of its kind."""

    def of_numpy(value: Any) -> Any:
        if isinstance(value, bool):
            return np.bool_(value)
        if isinstance(value, int):
            return np.int64(value)
        if isinstance(value, float):
            return np.float32(value)
        if isinstance(value, tuple):
            return tuple(of_numpy(v) for v in value)
        return value

    defaults = case.make(make_params(shapes=[(2,)])).defaults
    names = [k for k in defaults if k not in ("state_version", "decoupled_weight_decay")]
    options = {name: of_numpy(defaults[name]) for name in names}
    assert any(isinstance(v, np.generic) for v in options.values())
    return {**options, "min_8bit_size": np.int64(SMALL)}


def is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return type(value) in (bool, int, float, str)


@every_optimizer()
def test_numbers_of_numpy(case: OptimizerCase, tmp_path: Path) -> None:
    """At construction and set later; files of them load with weights_only=True, by every road."""
    options, model = numpy_options(case), Model()
    twin = Model()
    plain = case.make(twin.named_parameters(), min_8bit_size=SMALL)
    optimizer = case.make(model.named_parameters(), **options)
    for group in optimizer.param_groups:
        group.update(options)
    # Of a float32, the number that it is.
    for name, value in options.items():
        if name in plain.defaults and name != "min_8bit_size":
            plain.param_groups[0][name] = (
                tuple(v.item() for v in value) if isinstance(value, tuple)
                else value.item() if isinstance(value, np.generic) else value
            )  # fmt: skip
    train(optimizer, model.parameters(), [0])
    train(plain, twin.parameters(), [0])
    optimizer.param_groups[0]["lr"] = np.float32(0.25)  # a schedule's, after the step
    optimizer.param_groups[0]["betas_of_others"] = np.float64(0.25)
    group = optimizer.state_dict()["param_groups"][0]
    assert all(is_plain(v) for k, v in group.items() if k not in ("params", "param_names"))
    for road in ROADS:
        loaded = case.make(model.named_parameters(), min_8bit_size=SMALL)
        folder = tmp_path / road.__name__
        folder.mkdir()
        road(model, optimizer, loaded, folder)
        assert loaded.param_groups[0]["lr"] == 0.25
        assert all_bits(loaded)["states"] == all_bits(plain)["states"]
    assert [bits(p) for p in model.parameters()] == [bits(p) for p in twin.parameters()]


@every_optimizer()
def test_a_pickled_checkpoint_with_numbers_of_numpy(case: OptimizerCase) -> None:
    """Of an older version, or of torch.optim, which leaves them as they are."""
    params = make_params(shapes=[(5,), (3, 300)])
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(numpy_options(case))
    saved["state"][0]["step"] = np.int64(1)
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded = case.make(params, min_8bit_size=SMALL)
    loaded.load_state_dict(torch.load(file, weights_only=False))
    through_file(loaded.state_dict())
    assert all_bits(loaded)["states"] == all_bits(optimizer)["states"]


@every_8bit()
def test_a_schedule_of_numpy(case: OptimizerCase) -> None:
    """LambdaLR multiplies by what it is given."""
    params = make_params(shapes=[(3, 300)])
    optimizer = case.make(params, lr=0.1, min_8bit_size=SMALL)
    schedule = LambdaLR(optimizer, lambda n: np.float32(0.5) ** n)
    for seed in range(3):
        train(optimizer, params, [seed])
        schedule.step()
        saved = through_file(optimizer.state_dict())
        assert type(saved["param_groups"][0]["lr"]) is float
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.0125)
