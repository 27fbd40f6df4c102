"""Paged state through checkpoints and copies, on one rank and on two."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import all_bits, assert_same_training, bits, make_params, through_file
from optim_table import OptimizerCase
from paged import (
    PAGED,
    SHAPES,
    adam,
    assert_paged,
    every_family,
    full_disk,
    held,
    needs_proc,
    paged,
    params_of,
    trained,
)
from ranks import run_ranks
from sharded import Weights, distributed_param, gathered, step_with

import torchao8
from torchao8.optim._state import paging


@every_family()
def test_checkpoints_go_both_ways(case: OptimizerCase) -> None:
    """Byte for byte, and what is loaded lies where the optimizer keeps it."""

    def make(is_paged: bool) -> Any:
        params = make_params(shapes=SHAPES)
        return paged(case, params, seed=4) if is_paged else case.make(params, seed=4)

    saved = {is_paged: trained(make(is_paged)) for is_paged in (True, False)}
    files = {}
    for is_paged, optimizer in saved.items():
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        files[is_paged] = file.getbuffer().nbytes
    assert files[True] == pytest.approx(files[False], abs=2000)  # names of storages, alignment
    for of, to in ((True, False), (False, True), (True, True)):
        optimizer = make(to)
        for p, q in zip(params_of(optimizer), params_of(saved[of]), strict=True):
            p.data.copy_(q)
        optimizer.load_state_dict(through_file(saved[of].state_dict()))
        assert_paged(optimizer, of=PAGED if to else ())
        assert [group["is_paged"] for group in optimizer.param_groups] == [to]
        assert_same_training(optimizer, saved[of])
        trained(optimizer, range(2, 4))
        other = copy.deepcopy(saved[of])
        assert_same_training(optimizer, trained(other, range(2, 4)))


def test_live_state_of_another_optimizer(tmp_path: Path) -> None:
    """Paged state is taken over, as other state is, where it lies in the right place already, and
    moved where it does not."""
    first = trained(adam())
    for cls, options, is_shared in (
        (torchao8.PagedAdamW8bit, {}, True),
        (torchao8.PagedAdamW8bit, {"page_dir": str(tmp_path)}, False),
        (torchao8.AdamW8bit, {}, False),
    ):
        second = adam(cls, **options)
        second.load_state_dict(first.state_dict())
        of = PAGED if cls is torchao8.PagedAdamW8bit else ()
        assert_paged(second, options.get("page_dir", ""), of=of)
        for i in PAGED:
            a, b = (o.state[params_of(o)[i]]["exp_avg_codes"] for o in (first, second))
            assert (a.data_ptr() == b.data_ptr()) == is_shared
            assert torch.equal(a, b)


def test_one_tensor_twice_in_a_checkpoint() -> None:
    """Each gets memory of its own, in pages."""
    optimizer = trained(adam())
    saved = optimizer.state_dict()
    state = saved["state"][2]
    for twice in (state["exp_avg_codes"], state["exp_avg_codes"].clone()):
        saved["state"][2] = {**state, "exp_avg_codes": twice, "exp_avg_sq_codes": twice}
        optimizer.load_state_dict(saved)
        assert_paged(optimizer)
        new = optimizer.state[params_of(optimizer)[2]]
        assert new["exp_avg_codes"].data_ptr() != new["exp_avg_sq_codes"].data_ptr()
        assert bits(new["exp_avg_codes"]) == bits(new["exp_avg_sq_codes"]) == bits(twice)


@needs_proc
def test_a_checkpoint_that_is_refused_leaves_no_pages() -> None:
    optimizer = trained(adam())
    saved = through_file(optimizer.state_dict())
    saved["state"][4]["exp_avg_scale"][0] = torch.nan
    before, memory = all_bits(optimizer), held()
    with pytest.raises(ValueError, match="expected finite numbers"):
        optimizer.load_state_dict(saved)
    assert all_bits(optimizer) == before
    assert held() == memory


def test_old_checkpoints_have_no_such_options(tmp_path: Path) -> None:
    optimizer = trained(adam(page_dir=str(tmp_path)))
    saved = through_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["is_paged"], group["page_dir"]
    optimizer.load_state_dict(saved)
    assert_paged(optimizer, str(tmp_path))


def by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def by_file(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_file])
def test_copies_are_paged_and_apart(duplicate: Callable[[Any], Any], tmp_path: Path) -> None:
    optimizer = trained(adam(page_dir=str(tmp_path)))
    before = all_bits(optimizer)
    other = duplicate(optimizer)
    assert_paged(other, str(tmp_path))
    trained(other, range(2, 4))
    assert all_bits(optimizer)["states"] == before["states"]
    assert_same_training(other, trained(optimizer, range(2, 4)))


def test_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="no safetensors: pip install safetensors")
    from torchao8.checkpoint import load_safetensors, save_safetensors

    optimizer = trained(adam())
    save_safetensors(optimizer, tmp_path / "file.safetensors")
    other = adam()
    for p, q in zip(params_of(other), params_of(optimizer), strict=True):
        p.data.copy_(q)
    load_safetensors(other, tmp_path / "file.safetensors")
    assert_paged(other)
    assert_same_training(other, optimizer)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)
def test_distributed_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``dcp.load`` reads into the pages that are there, ``load_dcp`` into others, not into RAM."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as dcp_state

    from torchao8.checkpoint import load_dcp

    def new_run(cls: Any) -> tuple[Weights, Any]:
        model = Weights(shapes=SHAPES)
        return model, cls(model.parameters(), lr=0.01)

    model, saver = new_run(torchao8.AdamW8bit)
    trained(saver)
    state = dcp_state.get_optimizer_state_dict(model, saver)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    states = all_bits(saver)["states"]

    model, optimizer = new_run(torchao8.PagedAdamW8bit)
    state = dcp_state.get_optimizer_state_dict(model, optimizer)
    tensors = [v for s in optimizer.state.values() for v in s.values()]
    before = {v.data_ptr() for v in tensors if paging.found_in(v) == ""}
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
    dcp_state.set_optimizer_state_dict(model, optimizer, state)
    assert all_bits(optimizer)["states"] == states
    assert_paged(optimizer)
    assert optimizer.param_groups[0]["is_paged"]
    after = {v.data_ptr() for s in optimizer.state.values() for v in s.values()}
    assert len(before) == 4 * len(PAGED)
    assert before <= after

    model, optimizer = new_run(torchao8.PagedAdamW8bit)
    moved: list[Any] = []
    rooms_for = paging.rooms_for

    def seen_rooms_for(wanted: Any) -> Any:
        rooms = rooms_for(wanted)
        moved.extend(rooms)
        return rooms

    monkeypatch.setattr(paging, "rooms_for", seen_rooms_for)
    load_dcp(model, optimizer, tmp_path, no_dist=True)
    assert moved
    assert not any(moved)
    assert_paged(optimizer)
    assert all_bits(optimizer)["states"] == states


# -- sharded ---------------------------------------------------------------------------------------

SHARDED = ((500, 256), (333, 301), (40, 70), (7, 20_000))


def sharded_worker(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (world_size,))

    def make(cls: Any, **options: Any) -> Any:
        params = [
            distributed_param(p, mesh, [Shard(0)]) for p in Weights(shapes=SHARDED).parameters()
        ]
        return cls(params, lr=0.01, **options)

    def where(optimizer: Any) -> list[str | None]:
        states = (list(optimizer.state[p].values()) for p in params_of(optimizer))
        return [paging.found_in(of_p[-1].to_local()) for of_p in states]

    optimizer, plain = make(torchao8.PagedAdamW8bit), make(torchao8.AdamW8bit)
    for each in (optimizer, plain):
        step_with(each, range(2))
    result = {"same": gathered(optimizer) == gathered(plain), "where": where(optimizer)}
    again = make(torchao8.PagedAdamW8bit, page_dir=folder)
    for p, q in zip(params_of(again), params_of(plain), strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(copy.deepcopy(plain.state_dict()))  # small state would be shared
    for each in (again, plain):
        step_with(each, range(2, 4))
    result |= {"loaded": gathered(again) == gathered(plain), "where loaded": where(again)}
    other = copy.deepcopy(again)
    result |= {"copied": gathered(other) == gathered(plain), "where copied": where(other)}
    before = gathered(again)
    if rank == 0:
        os.posix_fallocate = full_disk
    try:
        again.load_state_dict(copy.deepcopy(plain.state_dict()))  # small state would be shared
    except (OSError, ValueError) as error:
        result["refused"] = str(error)
    result["unchanged"] = gathered(again) == before
    return result


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)
def test_two_ranks(tmp_path: Path) -> None:
    """What is paged follows from whole parameters; a rank without space speaks for all of them.

    The second and the last one have less than 100,000 elements on a rank; the last has an uneven
    shard.
    """
    first, second = run_ranks(2, sharded_worker, str(tmp_path))
    assert "No space left on device" in first.pop("refused")
    assert "another rank refused" in second.pop("refused")
    folder = str(tmp_path)
    for result in (first, second):
        assert result == {
            "same": True,
            "where": ["", "", None, ""],
            "loaded": True,
            "where loaded": [folder, folder, None, folder],
            "copied": True,
            "where copied": [folder, folder, None, folder],
            "unchanged": True,
        }
