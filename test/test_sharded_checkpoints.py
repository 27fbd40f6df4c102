"""Checkpoints of sharded state: the same bytes at any world size, by every road torch has."""

import copy
import functools
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, bits, make_params, params_for
from optim_table import OPTIMIZERS
from ranks import run_ranks
from sharded import (
    Weights,
    assert_shards_of,
    distributed,
    distributed_param,
    ends_of,
    fsdp_weights,
    gathered,
    groups_of,
    of_rank,
    step_with,
    whole,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import torchao8
from torchao8.checkpoint import load_dcp, to_torch
from torchao8.optim.base import LowPrecisionOptimizer

WORLD_SIZES = [1, 2, 3, 4, 8]
DTYPES = (torch.float32, torch.bfloat16)
OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}
CASES = {case.cls.__name__: case for case in OPTIMIZERS}
FLAGSHIP = CASES["AdamW8bit"]
F32, BF16 = DTYPES

# Between 2, 3 and 8 ranks each ordered pair, each with one dtype, such that each of them saves both
# and loads both. Each class of the table is in one of the six, AdamW8bit in all: so each class is
# saved and loaded, and the classes share all code that knows of shards. test_coverage_of_table.py
# watches over it.
PAIRS = ((2, 3, F32), (2, 8, BF16), (3, 2, BF16), (3, 8, F32), (8, 2, F32), (8, 3, BF16))
PLANS = [
    (*pair, tuple({case.cls.__name__: None for case in (FLAGSHIP, *OPTIMIZERS[i :: len(PAIRS)])}))
    for i, pair in enumerate(PAIRS)
]
# What is left of all pairs of world sizes and dtypes, with one class.
OTHER_PLANS = [
    (*pair, (FLAGSHIP.cls.__name__,))
    for pair in itertools.product(WORLD_SIZES, WORLD_SIZES, DTYPES)
    if pair not in PAIRS
]


def new_run(
    world_size: int, dtype: torch.dtype, name: str = "AdamW8bit"
) -> tuple[Weights, LowPrecisionOptimizer]:
    """A model sharded over all ranks, and its optimizer, with all states that the class has."""
    with params_for(CASES[name]):
        model = fsdp_weights(init_device_mesh("cpu", (world_size,)), dtype)
    return model, make(name, groups_of(model.parameters(), True))


def make(name: str, params: Any) -> LowPrecisionOptimizer:
    case = CASES[name]
    return case.make(params, **OPTIONS, **({} if case is FLAGSHIP else case.full))


@functools.cache
def unsharded_run(name: str, dtype: torch.dtype, steps: int) -> bytes:
    with params_for(CASES[name]):
        optimizer = make(name, groups_of(Weights(dtype).parameters(), False))
        step_with(optimizer, range(steps))
    return ends_of(optimizer)


def _save(rank: int, world_size: int, folder: Path, dtype: torch.dtype, names: list[str]) -> None:
    saved = {}
    for name in names:
        model, optimizer = new_run(world_size, dtype, name)
        step_with(optimizer, range(5))
        weights, state = get_state_dict(model, optimizer)
        saved[name] = {"model": weights, "optimizer": state}
    dcp.save(saved, checkpoint_id=folder)


def _load(
    rank: int,
    world_size: int,
    folder: Path,
    dtype: torch.dtype,
    ends: dict[str, tuple[bytes, bytes]],
) -> None:
    runs = {name: new_run(world_size, dtype, name) for name in ends}
    saved = {}
    for name, (model, optimizer) in runs.items():
        weights, state = get_state_dict(model, optimizer)
        saved[name] = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder)
    for name, (model, optimizer) in runs.items():
        set_state_dict(
            model, optimizer,
            model_state_dict=saved[name]["model"], optim_state_dict=saved[name]["optimizer"],
        )  # fmt: skip
        loaded, later = ends[name]
        assert_shards_of(optimizer, loaded, (name, "loaded"))
        step_with(optimizer, range(5, 15))
        assert_shards_of(optimizer, later, (name, "ten more steps"))


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "dtype", "names"),
    [*PLANS, *(pytest.param(*plan, marks=pytest.mark.thorough) for plan in OTHER_PLANS)],
    ids=lambda value: "" if isinstance(value, tuple) else str(value),
)
def test_saved_at_any_world_size_and_loaded_at_any(
    saved_by: int, loaded_by: int, dtype: torch.dtype, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Byte for byte the state of unsharded training, and so are ten more steps."""
    ends = {name: tuple(unsharded_run(name, dtype, steps) for steps in (5, 15)) for name in names}
    run_ranks(saved_by, _save, tmp_path, dtype, names)
    run_ranks(loaded_by, _load, tmp_path, dtype, ends)


# -- the roads of torch.distributed.checkpoint.state_dict ------------------------------------------


def _through_state_dict(rank: int, world_size: int, options: dict[str, Any]) -> None:
    for dtype in DTYPES:
        model, optimizer = new_run(world_size, dtype)
        step_with(optimizer, range(3))
        wanted = of_rank(optimizer)
        get = StateDictOptions(**{k: v for k, v in options.items() if k != "broadcast_from_rank0"})
        state = get_optimizer_state_dict(model, optimizer, options=get)
        state = copy.deepcopy(state)  # it holds the live tensors, which a load takes over
        if options.get("broadcast_from_rank0") and rank > 0:
            state = {}
        other_model, other = new_run(world_size, dtype)
        set_optimizer_state_dict(other_model, other, state, options=StateDictOptions(**options))
        for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
            q.data.copy_(p.data)
        assert of_rank(other) == wanted
        step_with(optimizer, range(3, 5))
        step_with(other, range(3, 5))
        assert of_rank(other) == of_rank(optimizer)


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


# -- other roads -----------------------------------------------------------------------------------


def _asynchronous(rank: int, world_size: int, folder: Path) -> None:
    model, optimizer = new_run(world_size, torch.bfloat16)
    step_with(optimizer, range(3))
    wanted = gathered(optimizer)
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    saving = dcp.async_save(state, checkpoint_id=folder)
    step_with(optimizer, range(3, 6))  # the copy was made before
    saving.result()
    other_model, other = new_run(world_size, torch.bfloat16)
    state = {"optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(other_model, other, state["optimizer"])
    assert _states(gathered(other)) == _states(wanted)


def _states(ends: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in end.items() if k != "param"} for end in ends]


def test_asynchronous_save(tmp_path: Path) -> None:
    run_ranks(2, _asynchronous, tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sharded_checkpoint_loads_without_a_process_group(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """In one process, into plain parameters; vectors keep 32 bits here, as sharded ones do."""
    run_ranks(3, _save, tmp_path, dtype, ["AdamW8bit"])
    model = Weights(dtype)
    optimizer = make("AdamW8bit", groups_of(model.parameters(), False))
    weights, state = get_state_dict(model, optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load({"AdamW8bit": saved}, checkpoint_id=tmp_path, no_dist=True)
    set_state_dict(
        model, optimizer,
        model_state_dict=saved["model"], optim_state_dict=saved["optimizer"],
    )  # fmt: skip
    assert_shards_of(optimizer, unsharded_run("AdamW8bit", dtype, 5), "loaded")


def _whole_into_shards(rank: int, world_size: int) -> None:
    """What one device saved, which every rank has read, without torch.distributed.checkpoint."""
    source = Weights()
    unsharded = torchao8.AdamW8bit(groups_of(source.parameters(), False), **OPTIONS)
    step_with(unsharded, range(3))
    model, sharded = new_run(world_size, torch.float32)
    sharded.load_state_dict(copy.deepcopy(unsharded.state_dict()))
    assert _states(gathered(sharded)) == _states(gathered(unsharded))
    for p, q in zip(source.parameters(), model.parameters(), strict=True):
        q.data.copy_(distributed(p.data, q))
    step_with(unsharded, range(3, 6))
    step_with(sharded, range(3, 6))
    assert gathered(sharded) == gathered(unsharded)


def _shards_into_whole(rank: int, world_size: int) -> None:
    """DTensors are no state of a plain parameter, and the message says what to do."""
    _, sharded = new_run(world_size, torch.float32)
    step_with(sharded, range(1))
    unsharded = torchao8.AdamW8bit(groups_of(Weights().parameters(), False), **OPTIONS)
    with pytest.raises(ValueError, match=r"exp_avg_codes of .*DTensor.*full_state_dict"):
        unsharded.load_state_dict(sharded.state_dict())


def _other_placements(rank: int, world_size: int) -> None:
    """State that is sharded otherwise than the parameter is brought into its placements."""
    mesh = init_device_mesh("cpu", (world_size,))
    (p,) = make_params(shapes=[(6, 512)])
    by_rows, by_columns = (distributed_param(p, mesh, [Shard(d)]) for d in (0, 1))
    first, second = (torchao8.AdamW8bit([q], **OPTIONS) for q in (by_rows, by_columns))
    step_with(first, range(3))
    second.load_state_dict(first.state_dict())
    assert _states(gathered(second)) == _states(gathered(first))
    assert second.state[by_columns]["exp_avg_codes"].placements == (Shard(1),)


def _to_torch(rank: int, world_size: int) -> None:
    """32-bit moments for torch.optim, sharded as the parameters are, and of the same bits."""
    model, sharded = new_run(world_size, torch.float32)
    unsharded = torchao8.AdamW8bit(groups_of(Weights().parameters(), False), **OPTIONS)
    ends = []
    for optimizer in (sharded, unsharded):
        step_with(optimizer, range(3))
        state = to_torch(optimizer)["state"]
        ends.append({i: {k: bits(whole(v)) for k, v in s.items()} for i, s in state.items()})
    assert ends[0] == ends[1]
    theirs = torch.optim.AdamW(groups_of(model.parameters(), True))
    theirs.load_state_dict(to_torch(sharded))
    step_with(theirs, range(3, 5))


@pytest.mark.parametrize(
    "function",
    [_to_torch, _whole_into_shards, _shards_into_whole, _other_placements],
)
def test_load_state_dict(function: Any) -> None:
    run_ranks(2, function)


# -- another format --------------------------------------------------------------------------------


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # as torchtitan saves


def _save_formats(rank: int, world_size: int, folder: Path, flat: bool) -> None:
    model, optimizer = new_run(world_size, torch.bfloat16)
    for name, cls in (("8", torchao8.AdamW8bit), ("32", torchao8.AdamW), ("torch", None)):
        params = groups_of(model.parameters(), True)
        optimizer = torch.optim.AdamW(params, lr=0.03) if cls is None else cls(params, **OPTIONS)
        step_with(optimizer, range(3))
        options = FLAT if flat else None
        state = {"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
        dcp.save(state, checkpoint_id=folder / name)


def _load_formats(rank: int, world_size: int, folder: Path) -> None:
    ends = {}
    for name in ("8", "32", "torch"):
        for cls in (torchao8.AdamW8bit, torchao8.AdamW):
            model, _ = new_run(world_size, torch.bfloat16)
            optimizer = cls(groups_of(model.parameters(), True), **OPTIONS)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                load_dcp(model, optimizer, folder / name)
            told = [str(w.message) for w in caught if "the state of" in str(w.message)]
            same = {"8": torchao8.AdamW8bit}.get(name, torchao8.AdamW) is cls
            assert len(told) == (not same), (name, cls, told)
            assert optimizer.param_groups[0]["lr"] == (0.03 if name == "torch" else 0.01)
            ends[name, cls] = _states(gathered(optimizer))
            step_with(optimizer, range(3, 5))
    for name in ("8", "32", "torch"):
        # 8 bits into 32 are the numbers that 8 bits into 8 stand for; 32 into 8 the nearest codes.
        wide, narrow = ends[name, torchao8.AdamW], ends[name, torchao8.AdamW8bit]
        for a, b in zip(wide, narrow, strict=True):
            assert a["step"] == b["step"]
            if "exp_avg_codes" not in b:
                assert a == b
                continue
            shape = a["exp_avg"][1]
            moment = torch.frombuffer(bytearray(a["exp_avg"][2]), dtype=torch.float32)
            codes, scale = torchao8.quantize_blockwise(moment.view(shape))
            assert bits(codes) == b["exp_avg_codes"][2], name
            assert bits(scale) == b["exp_avg_scale"][2], name


@pytest.mark.parametrize(("flat", "world_size"), [(False, 3), (True, 3), (True, 1)])
def test_a_folder_of_another_precision(tmp_path: Path, flat: bool, world_size: int) -> None:
    """Saved in 8 bits, in 32, and by torch.optim, at one world size; loaded in both at another."""
    run_ranks(2, _save_formats, tmp_path, flat)
    run_ranks(world_size, _load_formats, tmp_path)


def _cut_rows_from_8bit(rank: int, world_size: int, folder: Path) -> None:
    """8-bit state, sharded by rows, into parameters whose rows are cut, and back."""
    mesh = init_device_mesh("cpu", (world_size,))
    ends = []
    for i, dim in enumerate((0, 1, 0)):
        model = Weights(shapes=[(6, 300), (6, 512), (700,)])
        for name, p in list(model.named_parameters()):
            placements = [Shard(min(dim, p.ndim - 1))]
            setattr(model, name, distributed_param(p, mesh, placements))
        optimizer = torchao8.AdamW8bit(model.parameters(), **OPTIONS)
        if i == 0:
            step_with(optimizer, range(3))
        else:
            load_dcp(model, optimizer, folder / str(i - 1))
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.save(state, checkpoint_id=folder / str(i))
        ends.append(_states(gathered(optimizer)))
    assert "exp_avg" in ends[1][0]
    assert "exp_avg_codes" in ends[1][1]
    assert ends[0] == ends[2]  # the codes of decoded codes are the codes


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_other_placements(tmp_path: Path) -> None:
    run_ranks(2, _cut_rows_from_8bit, tmp_path)
