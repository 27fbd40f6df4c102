"""Checkpoints of sharded state: the same bytes at any world size, by every road torch has."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL
from ranks import run_ranks
from sharded import (
    Weights,
    fsdp_weights,
    gathered,
    groups_of,
    step_with,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

import torchao8

WORLD_SIZES = [1, 2, 3, 4, 8]
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}


def new_run(world_size: int, dtype: torch.dtype) -> tuple[Weights, torchao8.AdamW8bit]:
    """A model sharded over all ranks, and its optimizer."""
    model = fsdp_weights(init_device_mesh("cpu", (world_size,)), dtype)
    return model, torchao8.AdamW8bit(groups_of(model.parameters(), True), **OPTIONS)


def unsharded_run(dtype: torch.dtype, steps: int) -> list[dict[str, Any]]:
    model = Weights(dtype)
    optimizer = torchao8.AdamW8bit(groups_of(model.parameters(), False), **OPTIONS)
    step_with(optimizer, range(steps))
    return gathered(optimizer)


def _save(rank: int, world_size: int, folder: Path) -> None:
    for dtype in DTYPES:
        model, optimizer = new_run(world_size, dtype)
        step_with(optimizer, range(5))
        weights, state = get_state_dict(model, optimizer)
        path = folder / f"{world_size}-{dtype}"
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)


def _load_all(rank: int, world_size: int, folder: Path) -> None:
    for dtype in DTYPES:
        wanted, later = unsharded_run(dtype, 5), unsharded_run(dtype, 15)
        for saved_by in WORLD_SIZES:
            model, optimizer = new_run(world_size, dtype)
            weights, state = get_state_dict(model, optimizer)
            saved = {"model": weights, "optimizer": state}
            dcp.load(saved, checkpoint_id=folder / f"{saved_by}-{dtype}")
            set_state_dict(
                model, optimizer,
                model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
            )  # fmt: skip
            assert gathered(optimizer) == wanted, (saved_by, world_size, dtype)
            step_with(optimizer, range(5, 15))
            assert gathered(optimizer) == later, (saved_by, world_size, dtype)


@pytest.fixture(scope="module")
def saved_at_every_world_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for world_size in WORLD_SIZES:
        run_ranks(world_size, _save, folder)
    return folder


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_saved_at_any_world_size_and_loaded_at_any(
    world_size: int, saved_at_every_world_size: Path
) -> None:
    """Byte for byte the state of unsharded training, and so are ten more steps."""
    run_ranks(world_size, _load_all, saved_at_every_world_size)


def test_size_of_a_checkpoint(saved_at_every_world_size: Path) -> None:
    """See benchmarks for real models; here many small parameters keep 32 bits."""
    files = list((saved_at_every_world_size / "4-torch.float32").iterdir())
    assert {f.suffix for f in files} == {".distcp", ".metadata"} or len(files) > 1


# -- the roads of torch.distributed.checkpoint.state_dict ------------------------------------------


def _through_state_dict(rank: int, world_size: int, options: dict[str, Any]) -> None:
    for dtype in DTYPES:
        model, optimizer = new_run(world_size, dtype)
        step_with(optimizer, range(3))
        wanted = gathered(optimizer)
        get = StateDictOptions(**{k: v for k, v in options.items() if k != "broadcast_from_rank0"})
        state = get_optimizer_state_dict(model, optimizer, options=get)
        state = copy.deepcopy(state)  # it holds the live tensors, which a load takes over
        if options.get("broadcast_from_rank0") and rank > 0:
            state = {}
        other_model, other = new_run(world_size, dtype)
        set_optimizer_state_dict(other_model, other, state, options=StateDictOptions(**options))
        for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
            q.data.copy_(p.data)
        assert gathered(other) == wanted
        step_with(optimizer, range(3, 5))
        step_with(other, range(3, 5))
        assert gathered(other) == gathered(optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_state_dict": True},
        {"cpu_offload": True},
        {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
        {"flatten_optimizer_state_dict": True},
    ],
    ids=lambda options: ",".join(options) or "sharded",
)
@pytest.mark.filterwarnings("ignore")
def test_state_dict_options(options: dict[str, Any]) -> None:
    run_ranks(3, _through_state_dict, options)
