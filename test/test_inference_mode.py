"""State that is made in ``torch.inference_mode()`` is good for steps outside of it."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, all_bits, bits, make_params, set_grads, train
from optim_table import OptimizerCase, every_optimizer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim import Optimizer

import torchao8
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors

OPTIONS: tuple[dict[str, Any], ...] = ({}, {"percentile_clipping": 50}, {"block_wise": False})


def assert_normal(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            assert not value.is_inference(), key


@every_optimizer()
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_first_step(
    case: OptimizerCase, options: dict[str, Any], dtype: torch.dtype, device: str
) -> None:
    """And steps to and fro have the bits of the others."""
    params, twins = (make_params(dtype, device=device) for _ in range(2))
    options = {**options, "min_8bit_size": SMALL, "stochastic_rounding": True}
    optimizer, plain = case.make(params, **options), case.make(twins, **options)
    for seed, inside in enumerate((True, False, True, False)):
        set_grads(params, seed)
        with torch.inference_mode(inside):
            optimizer.step()
        train(plain, twins, [seed])
        assert_normal(optimizer)
    assert all_bits(optimizer)["params"] == all_bits(plain)["params"]
    assert all_bits(optimizer)["states"] == all_bits(plain)["states"]


@pytest.mark.parametrize("is_paged", [False, True])
def test_paged_state(is_paged: bool) -> None:
    params = make_params(shapes=[(4, 50_000), (5,)])
    optimizer = torchao8.AdamW8bit(params, is_paged=is_paged)
    set_grads(params, 0)
    with torch.inference_mode():
        optimizer.step()
    assert_normal(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.load_state_dict(saved)
    assert_normal(optimizer)
    train(optimizer, params, [1])


def by_state_dict(model: torch.nn.Module, old: Any, new: Any, folder: Path) -> None:
    new.load_state_dict(copy.deepcopy(old.state_dict()))


def by_safetensors(model: torch.nn.Module, old: Any, new: Any, folder: Path) -> None:
    save_safetensors(old, folder / "file")
    load_safetensors(new, folder / "file")


def by_dcp(model: torch.nn.Module, old: Any, new: Any, folder: Path) -> None:
    saved = {"optimizer": get_optimizer_state_dict(model, old)}
    dcp.save(saved, checkpoint_id=folder / "dcp", no_dist=True)
    load_dcp(model, new, folder / "dcp", no_dist=True)


@every_optimizer()
@pytest.mark.parametrize("bits_before", [8, 32])
@pytest.mark.parametrize("road", [by_state_dict, by_safetensors, by_dcp])
@pytest.mark.filterwarnings("ignore:.*the state of")  # converted
def test_a_load(
    case: OptimizerCase, bits_before: int, road: Callable[..., None], tmp_path: Path
) -> None:
    """In it, of state that was copied in it, with a conversion and without."""
    model = torch.nn.Linear(300, 3, bias=not case.matrices)
    named = list(model.named_parameters())
    options: dict[str, Any] = {"min_8bit_size": SMALL, "percentile_clipping": 50}
    old = case.make(named, optim_bits=bits_before, **options)
    train(old, model.parameters(), [0])
    new = case.make(named, optim_bits=8, **options)
    with torch.inference_mode():
        road(model, old, new, tmp_path)
    assert_normal(new)
    train(new, model.parameters(), [1])


@every_optimizer()
def test_tensors_that_were_read_in_it(case: OptimizerCase) -> None:
    """torch.load in inference mode, and a load outside of it; a copy of the optimizer."""
    params = make_params()
    old = case.make(params, min_8bit_size=SMALL, percentile_clipping=50)
    train(old, params, [0])
    with torch.inference_mode():
        saved, copied = copy.deepcopy(old.state_dict()), copy.deepcopy(old)
    assert any(isinstance(v, Tensor) and v.is_inference() for v in saved["state"][0].values())
    new = case.make(params, min_8bit_size=SMALL, percentile_clipping=50)
    new.load_state_dict(saved)
    assert_normal(new)
    assert_normal(copied)
    start = [p.detach().clone() for p in params]
    ends = []
    for optimizer in (old, new):  # of the same parameters
        for p, value in zip(params, start, strict=True):
            p.data.copy_(value)
        train(optimizer, params, [1])
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1]
    assert ends[0] != [bits(value) for value in start]
    copies = copied.param_groups[0]["params"]
    train(copied, copies, [1])
    assert [bits(p) for p in copies] == ends[0]


def test_a_compiled_step(fresh_compiler: None) -> None:
    params, twins = make_params(), make_params()
    optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL, percentile_clipping=50)
    plain = torchao8.AdamW8bit(twins, min_8bit_size=SMALL, percentile_clipping=50)
    step = torch.compile(optimizer.step, fullgraph=True)
    for seed, inside in enumerate((True, False, True)):
        set_grads(params, seed)
        with torch.inference_mode(inside):
            step()
        train(plain, twins, [seed])
    assert_normal(optimizer)
    assert [bits(p) for p in params] == [bits(p) for p in twins]
