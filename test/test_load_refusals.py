"""A checkpoint that one rank refuses: all ranks raise, none waits, nothing changes."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import SMALL, make_params
from ranks import run_ranks
from sharded import Weights, distributed_param, gathered, step_with
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import torchao8
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors

OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}
StateDict = dict[str, Any]


def damage_nan(saved: StateDict) -> None:
    scale = saved["state"][0].get("exp_avg_scale", saved["state"][0].get("exp_avg"))
    scale.to_local().fill_(float("nan"))


def damage_keys(saved: StateDict) -> None:
    saved["state"][0].popitem()


def damage_stray_key(saved: StateDict) -> None:
    saved["state"][1]["sum"] = torch.ones(1)


def damage_option(saved: StateDict) -> None:
    saved["param_groups"][0]["lr"] = float("nan")


def damage_version(saved: StateDict) -> None:
    saved["param_groups"][0]["state_version"] = 2


def damage_size(saved: StateDict) -> None:
    saved["param_groups"][0]["params"].pop()


def damage_shape(saved: StateDict) -> None:
    saved["state"][0]["step"] = torch.ones(2)


DAMAGES: dict[str, tuple[Callable[[StateDict], None], str]] = {
    "nan": (damage_nan, "of parameter 0: expected finite numbers"),
    "keys": (damage_keys, "state of parameter 0: expected the keys"),
    "stray key": (damage_stray_key, "state of parameter 1: expected the keys"),
    "option": (damage_option, "lr: expected"),
    "version": (damage_version, "state_version"),
    "size": (damage_size, "doesn't match the size"),
    "shape": (damage_shape, "step of parameter 0: expected torch.float32 of shape []"),
}
SHAPES = ((6, 512), (40, 70))


def new_run(cls: Any, world_size: int, dim: int = 0) -> Any:
    mesh = init_device_mesh("cpu", (world_size,))
    params = [
        distributed_param(p, mesh, [Shard(dim if p.shape == (6, 512) else 0)])
        for p in make_params(shapes=SHAPES)
    ]
    return cls(params, **OPTIONS)


def assert_all_refuse(rank: int, optimizer: Any, load: Callable[[], None], message: str) -> None:
    """Rank 1 says why, the others that another one does; or the same, where they got to see it."""
    before = gathered(optimizer), copy.deepcopy(optimizer.param_groups[0]["lr"])
    with pytest.raises((ValueError, OSError)) as raised:
        load()
    said = str(raised.value)
    assert message in said or (rank != 1 and "another rank refused the checkpoint" in said)
    dist.barrier()
    assert (gathered(optimizer), optimizer.param_groups[0]["lr"]) == before


def _refused_by_one(rank: int, world_size: int, name: str) -> None:
    """As it is kept here, in another precision, and in other placements."""
    damage, message = DAMAGES[name]
    for source, target, dim in (
        (torchao8.AdamW8bit, torchao8.AdamW8bit, 0),
        (torchao8.AdamW8bit, torchao8.AdamW, 0),
        (torchao8.AdamW, torchao8.AdamW8bit, 0),
        (torchao8.AdamW8bit, torchao8.AdamW8bit, 1),
        (torchao8.AdamW, torchao8.AdamW8bit, 1),
    ):
        saver, optimizer = new_run(source, world_size), new_run(target, world_size, dim)
        step_with(saver, [0])
        step_with(optimizer, [1])
        saved = copy.deepcopy(saver.state_dict())
        if rank == 1:
            damage(saved)
        assert_all_refuse(rank, optimizer, lambda: optimizer.load_state_dict(saved), message)  # noqa: B023


def _refused_by_type(rank: int, world_size: int) -> None:
    optimizer = new_run(torchao8.AdamW8bit, world_size)
    step_with(optimizer, [0])
    saved = None if rank == 1 else copy.deepcopy(optimizer.state_dict())
    assert_all_refuse(
        rank, optimizer, lambda: optimizer.load_state_dict(saved), "expected a dict, got NoneType"
    )


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for another rank waits for ever: no need to see it for minutes."""
    monkeypatch.setattr(ranks, "TIMEOUT", 60.0)


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("name", list(DAMAGES))
def test_refused_by_one(name: str) -> None:
    run_ranks(2, _refused_by_one, name)


@pytest.mark.usefixtures("soon")
def test_refused_by_one_that_has_no_dict() -> None:
    run_ranks(2, _refused_by_type)


# -- files -------------------------------------------------------------------------------------


def _missing_files(rank: int, world_size: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    model = Weights(shapes=SHAPES)
    for name, p in model.named_parameters():
        setattr(model, name, distributed_param(p, mesh, [Shard(0)]))
    optimizer = torchao8.AdamW8bit(model.parameters(), **OPTIONS)
    step_with(optimizer, [0])
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder / "0")
    if rank == 0:
        whole = torchao8.AdamW8bit(make_params(shapes=SHAPES), **OPTIONS)
        step_with(whole, [0])
        save_safetensors(whole, folder / "0.safetensors")
    dist.barrier()
    assert_all_refuse(
        rank, optimizer, lambda: load_dcp(model, optimizer, folder / str(rank)), "No such file"
    )
    assert_all_refuse(
        rank,
        optimizer,
        lambda: load_safetensors(optimizer, folder / f"{rank}.safetensors"),
        "No such file",
    )


@pytest.mark.usefixtures("soon")
def test_files_that_one_rank_lacks(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="no safetensors: pip install safetensors")
    run_ranks(2, _missing_files, tmp_path)


# -- several meshes ----------------------------------------------------------------------------


def _stages(rank: int, world_size: int) -> None:
    """Two pipeline stages of two ranks: one parameter on all four, and one of the first stage."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    shared, own = make_params(shapes=[(40, 70), (20, 70)])
    params = [distributed_param(shared, mesh, [Replicate(), Shard(0)])]
    if rank < 2:
        params.append(distributed_param(own, mesh["dp"], [Shard(0)]))
    optimizer = torchao8.AdamW8bit(params, **OPTIONS)
    step_with(optimizer, [0])
    before = gathered(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert gathered(optimizer) == before
    # In the first stage alone: the second one hears of it over the mesh that both share.
    saved = copy.deepcopy(optimizer.state_dict())
    if rank == 1:
        damaged = saved["state"][1]["exp_avg_scale"]
        assert isinstance(damaged, DTensor)
        damaged.to_local().fill_(float("nan"))
    assert_all_refuse(
        rank, optimizer, lambda: optimizer.load_state_dict(saved), "exp_avg_scale of parameter 1"
    )


@pytest.mark.usefixtures("soon")
def test_ranks_with_different_meshes() -> None:
    run_ranks(4, _stages)
