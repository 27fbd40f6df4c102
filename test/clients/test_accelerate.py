"""accelerate: one process, and FSDP2 on two."""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader

import torchao8
from torchao8.checkpoint import load_dcp

pytest.importorskip("accelerate", reason="no accelerate: make test-clients")

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import load_fsdp_model
from sharded_by_accelerate import be_one_of_several_ranks, force_fsdp2, of_rank


def prepared(cls: type, accelerator: Accelerator, in_groups: bool = False) -> tuple[Any, Any, Any]:
    """A model, an optimizer and data; the optimizer of two groups with named parameters, or one."""
    model = runs.Net()
    optimizer = cls(torchao8.param_groups(model) if in_groups else model.parameters(), lr=1e-2)
    samples = [sample for batch in runs.batches(6) for sample in zip(*batch, strict=True)]
    data = DataLoader(samples, batch_size=8)
    return accelerator.prepare(model, optimizer, data)


def train(accelerator: Accelerator, model: Any, optimizer: Any, data: Any) -> None:
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


@runs.both_optimizers
def test_resumes_to_the_bit(cls: type, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, data = prepared(cls, accelerator, in_groups=True)
    train(accelerator, model, optimizer, data)
    accelerator.save_state(tmp_path / "saved")
    train(accelerator, model, optimizer, data)
    end = runs.ended(model, optimizer)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, data = prepared(cls, accelerator, in_groups=True)
    accelerator.load_state(tmp_path / "saved")
    train(accelerator, model, optimizer, data)
    runs.assert_same(end, runs.ended(model, optimizer))


def test_a_run_of_torch_goes_on_in_8_bits(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, data = prepared(torch.optim.AdamW, accelerator)
    train(accelerator, model, optimizer, data)
    accelerator.save_state(tmp_path / "saved")

    accelerator = Accelerator(cpu=True)
    model, optimizer, data = prepared(torchao8.AdamW8bit, accelerator)
    accelerator.load_state(tmp_path / "saved")
    train(accelerator, model, optimizer, data)
    state = optimizer.optimizer.state[model.second.weight]
    assert int(state["step"]) == 12
    assert "exp_avg_codes" in state


# -- FSDP2 ----------------------------------------------------------------------------------------


def at_start(plugin: FullyShardedDataParallelPlugin) -> Accelerator:
    """The first accelerator of a program."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, fsdp_plugin=plugin)


def fsdp2() -> Accelerator:
    accelerator = at_start(
        FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
            auto_wrap_policy="size_based_wrap",
            min_num_params=8192,
            state_dict_type="SHARDED_STATE_DICT",
        )
    )
    assert accelerator.is_fsdp2
    return accelerator


def resume_sharded(rank: int, world_size: int, ours: bool, folder: str) -> None:
    force_fsdp2()
    cls = torchao8.AdamW8bit if ours else torch.optim.AdamW
    accelerator = fsdp2()
    model, optimizer, data = prepared(cls, accelerator, in_groups=True)
    train(accelerator, model, optimizer, data)
    accelerator.save_state(folder)
    train(accelerator, model, optimizer, data)
    end = of_rank(model, optimizer)

    accelerator = fsdp2()
    model, optimizer, data = prepared(cls, accelerator, in_groups=True)
    accelerator.load_state(folder)
    train(accelerator, model, optimizer, data)
    runs.assert_same(end, of_rank(model, optimizer))


@pytest.mark.parametrize("ours", [False, True])
def test_fsdp2_resumes_to_the_bit(ours: bool, tmp_path: Path) -> None:
    run_ranks(2, resume_sharded, ours, str(tmp_path / "saved"))


def to_8_bits(rank: int, world_size: int, folder: str) -> None:
    force_fsdp2()
    accelerator = fsdp2()
    model, optimizer, data = prepared(torch.optim.AdamW, accelerator)
    train(accelerator, model, optimizer, data)
    accelerator.save_state(folder)
    of_torch = {
        name: optimizer.state[p]["exp_avg"].full_tensor() for name, p in model.named_parameters()
    }

    accelerator = fsdp2()
    model, optimizer, data = prepared(torchao8.AdamW8bit, accelerator, in_groups=True)
    load_fsdp_model(accelerator.state.fsdp_plugin, accelerator, model, folder)
    load_dcp(model, runs.unwrapped(optimizer), f"{folder}/optimizer_0")
    weight, name = model.second.weight, "second.weight"
    state = runs.unwrapped(optimizer).state[weight]
    assert int(state["step"]) == 3  # of 6 batches, on 2 ranks
    decoded = torchao8.dequantize_blockwise(
        state["exp_avg_codes"].full_tensor(), state["exp_avg_scale"].full_tensor()
    )
    assert (decoded - of_torch[name]).abs().max() < 0.02 * of_torch[name].abs().max()
    train(accelerator, model, optimizer, data)
    assert int(state["step"]) == 6


def test_a_sharded_run_of_torch_goes_on_in_8_bits(tmp_path: Path) -> None:
    """The optimizer's folder of a checkpoint of accelerate is one that ``load_dcp`` reads."""
    run_ranks(2, to_8_bits, str(tmp_path / "saved"))


def ddp_without_a_word(rank: int, world_size: int) -> str:
    be_one_of_several_ranks()
    accelerator = at_start(FullyShardedDataParallelPlugin(fsdp_version=2))
    model, _, _ = prepared(torchao8.AdamW8bit, accelerator)
    return type(model).__name__


def test_on_the_cpu_accelerate_itself_makes_ddp() -> None:
    """If this fails, accelerate has mended it: nothing must force it then, and
    docs/use-with/accelerate.md can say so."""
    assert run_ranks(2, ddp_without_a_word) == ["DistributedDataParallel"] * 2
