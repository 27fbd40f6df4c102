"""Checkpoints and results of earlier versions, in test/data/saved_before: both stay to the bit.

A failure here is a checkpoint that users cannot load any more, or a training run that ends with
other bits than before. The files are not made again to let it pass.
"""

import copy
import lzma
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import needs_kernels
from optim_table import OPTIMIZERS, OptimizerCase, every_optimizer
from saved_before import (
    FOLDER,
    OTHER_FORMATS,
    STEPS,
    differences,
    file_of,
    make_optimizer,
    named,
    read,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import torchao8

CLASSES = [case.cls.__name__ for case in OPTIMIZERS if not case.is_new]
LAYOUT = ("optim_bits", "min_8bit_size", "block_size", "block_wise")

# On a GPU the paged ones take a few megabytes of managed memory.
with_and_without_pages = pytest.mark.parametrize(
    "prefix", ["", pytest.param("Paged", marks=pytest.mark.paged_cuda)]
)
every_class = pytest.mark.parametrize("name", CLASSES)


def but_paging(prefix: str) -> tuple[str, ...]:
    """The option in which a Paged class differs from that whose file it shares."""
    return ("is_paged",) if prefix else ()


def new_optimizer(saved: dict[str, Any], cls: Any, device: str) -> Optimizer:
    """With the parameters that were saved and no option of the run but those of the layout, which
    no checkpoint brings."""
    values = iter(saved["params"])
    groups = []
    for group in saved["optimizer"]["param_groups"]:
        params = [next(values).clone().to(device).requires_grad_() for _ in group["params"]]
        groups.append({"params": params, **{name: group[name] for name in LAYOUT}})
    optimizer: Optimizer = cls(groups, lr=0.75, seed=8)
    return optimizer


def load(saved: dict[str, Any], cls: Any, device: str) -> Optimizer:
    optimizer = new_optimizer(saved, cls, device)
    optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))  # it takes tensors over
    return optimizer


# -- every optimizer ---------------------------------------------------------------------------


def test_every_class_of_the_table_has_a_file() -> None:
    assert {path.name.removesuffix(".pt.xz") for path in FOLDER.glob("*.pt.xz")} == set(CLASSES)


@every_optimizer()
def test_the_file_has_every_state(case: OptimizerCase) -> None:
    """In both precisions; under all of the options that were made for it here."""
    if case.is_new:
        pytest.skip("it has no file yet")
    file = read(file_of(case.cls.__name__))
    state = file["after"][STEPS[0]]["optimizer"]["state"]
    keys = set().union(*state.values())
    assert keys >= set(case.state_keys(case.optim_bits, *(name for name, _ in case.more_states)))
    assert keys >= {*case.state_keys(8), *case.state_keys(32), "grad_norms"}
    groups = file["run"]["groups"]
    assert {group.get("block_wise", True) for group in groups} == {False, True}
    assert any(group.get("stochastic_rounding") for group in groups)


@needs_kernels
@with_and_without_pages
@every_class
def test_a_new_run_ends_as_before(name: str, prefix: str, device: str) -> None:
    """Parameters, state and options, defaults included."""
    file = read(file_of(name))
    optimizer, done = make_optimizer(file["run"], prefix, device), 0
    for step in STEPS:
        train(optimizer, range(done + 1, step + 1))
        done = step
        assert differences(optimizer, file["after"][step], but_paging(prefix)) == []


@needs_kernels
@with_and_without_pages
@every_class
def test_a_checkpoint_of_before_loads_and_goes_on(name: str, prefix: str, device: str) -> None:
    first, last = STEPS
    after = read(file_of(name))["after"]
    optimizer = load(after[first], getattr(torchao8, prefix + name), device)
    assert differences(optimizer, after[first], but_paging(prefix)) == []
    train(optimizer, range(first + 1, last + 1))
    assert differences(optimizer, after[last], but_paging(prefix)) == []


# -- other formats -----------------------------------------------------------------------------


def assert_goes_on(optimizer: Optimizer, after: dict[int, Any]) -> None:
    first, last = STEPS
    assert differences(optimizer, after[first]) == []
    train(optimizer, range(first + 1, last + 1))
    assert differences(optimizer, after[last]) == []


def new_model(device: str) -> tuple[nn.Module, Any, dict[int, Any]]:
    """A model with the parameters that were saved, its optimizer with some other options, and what
    was saved."""
    file = read(file_of("AdamW8bit", OTHER_FORMATS))
    model, optimizer = named(file["run"], device)
    with torch.no_grad():
        for p, value in zip(model.parameters(), file["after"][STEPS[0]]["params"], strict=True):
            p.copy_(value)
    for group in optimizer.param_groups:
        group.update(lr=0.75, seed=8)
    return model, optimizer, file["after"]


@needs_kernels
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("name", ["AdamW8bit", "RMSprop8bit"])
def test_a_pickle_of_before(name: str, copied: bool) -> None:
    """It names the module of the class, torchao8.optim.adam: this must stay importable."""
    path = OTHER_FORMATS / f"{name}.pickle.xz"
    optimizer = pickle.loads(lzma.decompress(path.read_bytes()))
    assert type(optimizer) is getattr(torchao8, name)
    optimizer = copy.deepcopy(optimizer) if copied else optimizer
    assert_goes_on(optimizer, read(file_of(name, OTHER_FORMATS))["after"])


@needs_kernels
def test_a_safetensors_file_of_before(device: str) -> None:
    pytest.importorskip("safetensors", reason="no safetensors: pip install safetensors")
    model, optimizer, after = new_model(device)
    path = OTHER_FORMATS / "AdamW8bit.safetensors"
    torchao8.checkpoint.load_safetensors(optimizer, path, model=model)
    assert_goes_on(optimizer, after)


@needs_kernels
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("by_torch", [False, True])
def test_a_dcp_folder_of_before(by_torch: bool, device: str, tmp_path: Path) -> None:
    """By load_dcp, and by torch's own functions, which read into the live state."""
    with zipfile.ZipFile(OTHER_FORMATS / "AdamW8bit.dcp.zip") as packed:
        packed.extractall(tmp_path)
    model, optimizer, after = new_model(device)
    if by_torch:
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        for group in state["optimizer"]["param_groups"]:
            del group[
                "state_format"
            ]  # newer than the folder, in which torch wants all that is here
        dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
    else:
        torchao8.checkpoint.load_dcp(model, optimizer, tmp_path, no_dist=True)
    assert_goes_on(optimizer, after)


# -- the comparison ----------------------------------------------------------------------------


def flip_a_bit(saved: dict[str, Any]) -> None:
    saved["optimizer"]["state"][0]["exp_avg_codes"].view(-1)[77] ^= 1


def flip_the_last_bit_of_a_scale(saved: dict[str, Any]) -> None:
    saved["optimizer"]["state"][1]["exp_avg_sq_scale"].view(torch.int32)[0] ^= 1


def swap_two_states(saved: dict[str, Any]) -> None:
    state = saved["optimizer"]["state"][0]
    first, second = "exp_avg_codes", "exp_avg_sq_codes"
    state[first], state[second] = state[second], state[first]


def round_to_nearest(saved: dict[str, Any]) -> None:
    for group in saved["optimizer"]["param_groups"]:
        group["state_rounding"] = "nearest"


def round_parameters_to_nearest(saved: dict[str, Any]) -> None:
    for group in saved["optimizer"]["param_groups"]:
        group["stochastic_rounding"] = False


def change_the_seed(saved: dict[str, Any]) -> None:
    for group in saved["optimizer"]["param_groups"]:
        group["seed"] += 1


def forget_the_norms(saved: dict[str, Any]) -> None:
    for state in saved["optimizer"]["state"].values():
        if "grad_norms" in state:
            state["grad_norms"].fill_(-1.0)


@pytest.mark.parametrize(
    ("damage", "where"),
    [
        (flip_a_bit, "exp_avg_codes of parameter 0"),
        (flip_the_last_bit_of_a_scale, "exp_avg_sq_scale of parameter 1"),
        (swap_two_states, "exp_avg_codes of parameter 0"),
        (round_to_nearest, "exp_avg_sq_codes of parameter 0"),
        (round_parameters_to_nearest, "parameter 7 (torch.bfloat16"),
        (change_the_seed, "exp_avg_sq_codes of parameter 0"),
        (forget_the_norms, "grad_norms of parameter 7"),
    ],
)
def test_the_comparison_sees(damage: Callable[[dict[str, Any]], None], where: str) -> None:
    """What was changed in a checkpoint: once it is loaded, or after two more steps."""
    first, last = STEPS
    after = read(file_of("AdamW8bit"))["after"]
    changed = copy.deepcopy(after[first])
    damage(changed)
    optimizer = load(changed, torchao8.AdamW8bit, "cpu")
    found = differences(optimizer, after[first])
    train(optimizer, range(first + 1, last + 1))
    found += differences(optimizer, after[last])
    assert any(line.startswith(where) for line in found), found
