"""Saves that are killed half-way: what then lies at the path is whole, or does not load as if.

A process saves one state after another, and is killed at a random moment. Every tensor of a state
is full of its number, so that a mixture of two would show.

- ``save_safetensors`` replaces the old file when the new one is whole: after the first save, the
  path holds a state that was saved, always.
- ``torch.save`` overwrites the file in place. It writes a zip archive, whose directory comes last:
  one that was cut off does not load, and the state before is lost. Save to another name, and
  rename.
- ``torch.distributed.checkpoint.save`` writes a folder, ``.metadata`` last (by renaming): a folder
  without it does not load. Each save needs a folder of its own, as here. In a folder that is
  overwritten the old ``.metadata`` stays valid while the data change below it, which loads as a
  mixture.
"""

import itertools
import pickle
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import forking_context
from torch.distributed.checkpoint.api import CheckpointException
from torch.optim import Optimizer

from torchao8 import AdamW8bit
from torchao8.checkpoint import load_safetensors, save_safetensors

KILLS = 4  # in `make test`, and as many others in `make test-all`
LONGEST = 0.2  # seconds from the first save to the kill: several saves
TIMEOUT = 120.0  # seconds: of the start and the first save, on a machine that is busy

# Some 25 MB of state: a save takes about ten milliseconds.
SHAPES = [(1000, 2000)] * 6 + [(300, 700), (50,)]

Save = Callable[[Optimizer, Path, int], None]


def make() -> AdamW8bit:
    """With state in both formats."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = AdamW8bit(params, lr=0.0)
    optimizer.step()
    return optimizer


def fill(optimizer: Optimizer, number: int) -> None:
    """State number 1 to 255: every value of every tensor, and an option."""
    optimizer.param_groups[0]["lr"] = float(number)
    for state in optimizer.state.values():
        for value in state.values():
            value.fill_(number)


def number_of(optimizer: Optimizer) -> int:
    """The number of the state, which must be of one piece."""
    numbers = {optimizer.param_groups[0]["lr"]}
    for state in optimizer.state.values():
        for value in state.values():
            numbers |= {value.min().item(), value.max().item()}
    assert len(numbers) == 1, f"a mixture of the states {sorted(numbers)}"
    return int(numbers.pop())


def save_with_safetensors(optimizer: Optimizer, folder: Path, number: int) -> None:
    save_safetensors(optimizer, folder / "state")


def save_with_torch(optimizer: Optimizer, folder: Path, number: int) -> None:
    torch.save(optimizer.state_dict(), folder / "state")


def save_with_dcp(optimizer: Optimizer, folder: Path, number: int) -> None:
    dcp.save(
        {"optimizer": optimizer.state_dict()}, checkpoint_id=folder / str(number), no_dist=True
    )


def keep_saving(connection: Any, save: Save, folder: Path) -> None:
    """Tells the number of each state that has been saved, until the process is killed."""
    torch.set_num_threads(1)
    optimizer = make()
    for number in range(1, 256):
        fill(optimizer, number)
        save(optimizer, folder, number)
        connection.send(number)
    connection.send(None)  # all of them, before the kill came
    time.sleep(TIMEOUT)


def saved_until_killed(save: Save, folder: Path, seconds: float) -> int:
    """The last state that was saved whole, of a process killed so long after the first one."""
    context = forking_context()
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=keep_saving, args=(theirs, save, folder), daemon=True)
    process.start()
    theirs.close()
    last = 0
    try:
        assert ours.poll(TIMEOUT), "no first save"
        time.sleep(seconds)
    finally:
        process.kill()
        process.join()
    try:
        while (number := ours.recv()) is not None:
            last = number
    except EOFError:
        pass
    assert last > 0, "the process died before its first save"
    return last


def moments(seed: int) -> list[float]:
    rng = random.Random(seed)
    return [rng.uniform(0, LONGEST) for _ in range(KILLS)]


twice = pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.thorough)])


@twice
def test_save_safetensors_keeps_a_whole_file(seed: int, tmp_path: Path) -> None:
    """The last state that was saved, or the next one; beside it only what was under way."""
    pytest.importorskip("safetensors", reason="no safetensors: pip install safetensors")
    for seconds in moments(seed):
        last = saved_until_killed(save_with_safetensors, tmp_path, seconds)
        optimizer = make()
        load_safetensors(optimizer, tmp_path / "state")
        assert number_of(optimizer) in (last, last + 1)
        others = [path for path in tmp_path.iterdir() if path.name != "state"]
        assert len(others) <= 1
        for path in others:
            assert path.match(".state.*.tmp")
            shutil.rmtree(path)


@twice
def test_torch_save_loads_whole_or_not(seed: int, tmp_path: Path) -> None:
    for seconds in moments(seed):
        last = saved_until_killed(save_with_torch, tmp_path, seconds)
        optimizer = make()
        try:
            saved = torch.load(tmp_path / "state", weights_only=True)
        except Exception:
            continue
        optimizer.load_state_dict(saved)
        assert number_of(optimizer) in (last, last + 1)
    # And one that nobody kills does load, or the test above would say nothing.
    source, optimizer = make(), make()
    fill(source, 7)
    save_with_torch(source, tmp_path, 7)
    optimizer.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert number_of(optimizer) == 7


def test_torch_save_that_was_cut_off_does_not_load(tmp_path: Path) -> None:
    """What the test above meets by chance, at 100 places and in each of the last bytes."""
    params = [torch.nn.Parameter(torch.ones(70, 70))]
    torch.save(AdamW8bit(params).state_dict(), tmp_path / "state")
    whole = (tmp_path / "state").read_bytes()
    places = random.Random(0).sample(range(len(whole)), 100)
    for length in itertools.chain(places, range(len(whole) - 30, len(whole))):
        (tmp_path / "state").write_bytes(whole[:length])
        with pytest.raises((RuntimeError, EOFError, pickle.UnpicklingError)):
            torch.load(tmp_path / "state", weights_only=True)


@twice
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_dcp_folders_load_whole_or_not(seed: int, tmp_path: Path) -> None:
    """Those that were done load; the one under way loads if it has its metadata."""
    for turn, seconds in enumerate(moments(seed)):
        folder = tmp_path / str(turn)
        folder.mkdir()
        last = saved_until_killed(save_with_dcp, folder, seconds)
        for number in {1, last}:
            assert load_with_dcp(folder / str(number)) == number
        following = folder / str(last + 1)
        if (following / ".metadata").exists():
            assert load_with_dcp(following) == last + 1
        elif following.exists():
            with pytest.raises(CheckpointException):
                load_with_dcp(following)
        assert not (folder / str(last + 2)).exists()
        shutil.rmtree(folder)


def load_with_dcp(folder: Path) -> int:
    optimizer = make()
    state = {"optimizer": optimizer.state_dict()}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    optimizer.load_state_dict(state["optimizer"])
    return number_of(optimizer)
