"""accelerate: one process, and FSDP2 on two."""

import os
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
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, load_fsdp_model


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


def at_start(**options: Any) -> Accelerator:
    """An accelerator of one process of several, as the first of a program."""
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = (
        os.environ["RANK"],
        os.environ["WORLD_SIZE"],
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, **options)


def fsdp2() -> Accelerator:
    """An accelerator that shards with FSDP2, on the CPU.

    accelerate leaves its FSDP2 plugin aside where the processes train on the CPU, without a word,
    and wraps the model in DDP. So that its code for FSDP2 runs here, the kind of distributed
    training is set by hand.
    """
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        cpu_ram_efficient_loading=False,
        auto_wrap_policy="size_based_wrap",
        min_num_params=8192,
        state_dict_type="SHARDED_STATE_DICT",
    )
    accelerator = at_start(fsdp_plugin=plugin)
    accelerator.state.fsdp_plugin = plugin
    for state in (accelerator.state, PartialState()):  # each copies from the other
        state.distributed_type = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def of_rank(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """The bits of this rank, of a model that must be sharded."""
    from torch.distributed.tensor import DTensor

    inner = runs.unwrapped(optimizer)
    params = {p for group in inner.param_groups for p in group["params"]}
    assert params == set(model.parameters())
    assert all(isinstance(p, DTensor) for p in params)
    tensors = {name: p.detach().to_local() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key, value in inner.state[p].items():
            local = value.to_local() if isinstance(value, DTensor) else value
            tensors[f"{name}.{key}"] = local
    return {name: tensor.clone() for name, tensor in tensors.items()}


def resume_sharded(rank: int, world_size: int, ours: bool, folder: str) -> None:
    cls = torchao8.AdamW8bit if ours else torch.optim.AdamW
    accelerator = fsdp2()
    model, optimizer, data = prepared(cls, accelerator, in_groups=True)
    train(accelerator, model, optimizer, data)
    accelerator.save_state(folder)
    train(accelerator, model, optimizer, data)
    end = of_rank(model, optimizer)
    assert any(name.endswith(".exp_avg_codes") for name in end) == ours

    accelerator = fsdp2()
    model, optimizer, data = prepared(cls, accelerator, in_groups=True)
    accelerator.load_state(folder)
    train(accelerator, model, optimizer, data)
    runs.assert_same(end, of_rank(model, optimizer))


@pytest.mark.parametrize("ours", [False, True])
def test_fsdp2_resumes_to_the_bit(ours: bool, tmp_path: Path) -> None:
    run_ranks(2, resume_sharded, ours, str(tmp_path / "saved"))


def to_8_bits(rank: int, world_size: int, folder: str) -> list[float]:
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
    error = (decoded - of_torch[name]).abs().max() / of_torch[name].abs().max()
    assert error < 0.02, error
    train(accelerator, model, optimizer, data)
    assert int(state["step"]) == 6
    return [float(error)]


def test_a_sharded_run_of_torch_goes_on_in_8_bits(tmp_path: Path) -> None:
    """The optimizer's folder of a checkpoint of accelerate is one that ``load_dcp`` reads."""
    run_ranks(2, to_8_bits, str(tmp_path / "saved"))


def ddp_without_a_word(rank: int, world_size: int) -> str:
    accelerator = at_start(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    model, _, _ = prepared(torchao8.AdamW8bit, accelerator)
    return type(model).__name__


def test_on_the_cpu_accelerate_itself_makes_ddp() -> None:
    """If this fails, accelerate has mended it: let ``fsdp2`` take its own way, and tell so in
    docs/use-with/accelerate.md."""
    assert run_ranks(2, ddp_without_a_word) == ["DistributedDataParallel"] * 2
