"""torchtitan: its container of optimizers, its schedules and its checkpoints, sharded by FSDP2.

Its trainer needs a GPU. What of it meets an optimizer runs here on two processes.
"""

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torchao8
from torchao8.checkpoint import load_dcp

pytest.importorskip("torchtitan", reason="no torchtitan: make test-clients")

from torchtitan.components.checkpoint import CheckpointManager
from torchtitan.components.optimizer import (
    LRSchedulersContainer,
    ParamGroupConfig,
    default_adamw,
)

from torchao8.integrations.torchtitan import OptimizersContainer, adamw8bit

Config = OptimizersContainer.Config


class Run:
    """A sharded model with what torchtitan's trainer makes for it."""

    def __init__(self, config: Any, folder: str) -> None:
        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        self.model = fully_shard(runs.Net(), mesh=mesh)
        self.optimizers = config.build(model_parts=[self.model])
        self.schedules = LRSchedulersContainer.Config(warmup_steps=2).build(
            optimizers=self.optimizers, training_steps=6
        )
        self.checkpoints = CheckpointManager.Config(
            enable=True, folder="checkpoints", interval=3, last_save_model_only=False
        ).build(
            dataloader=None,
            model_parts=[self.model],
            optimizers=self.optimizers,
            lr_schedulers=self.schedules,
            states={},
            sd_adapter=None,
            base_folder=folder,
        )
        self.checkpoints.states.pop("dataloader")

    def train(self, steps: range) -> None:
        data = runs.batches(6)
        for step in steps:
            x, y = data[step]
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizers.step()
            self.schedules.step()
            self.optimizers.zero_grad()

    def end(self) -> dict[str, torch.Tensor]:
        tensors = {}
        for optimizer in self.optimizers:
            for p, state in optimizer.state.items():
                (name,) = (n for n, q in self.model.named_parameters() if q is p)
                assert isinstance(p, DTensor)
                for key, value in {"": p.detach(), **state}.items():
                    local = value.to_local() if isinstance(value, DTensor) else value
                    tensors[f"{name}.{key}"] = local.clone()
        return tensors


def resume(rank: int, world_size: int, config: Any, ours: bool, folder: str) -> None:
    whole = Run(config, folder)
    whole.train(range(3))
    assert whole.checkpoints.save(3)
    whole.train(range(3, 6))
    end = whole.end()
    assert any(name.endswith(".exp_avg_codes") for name in end) == ours
    assert end.keys() >= {f"{name}." for name, _ in whole.model.named_parameters()}

    halved = Run(config, folder)
    assert halved.checkpoints.load(3)
    halved.train(range(3, 6))
    runs.assert_same(end, halved.end())


@pytest.mark.parametrize("ours", [False, True])
def test_resumes_to_the_bit(ours: bool, tmp_path: Path) -> None:
    config = adamw8bit(lr=1e-2) if ours else default_adamw(lr=1e-2, fused=False)
    run_ranks(2, resume, config, ours, str(tmp_path))


def to_8_bits(rank: int, world_size: int, folder: str) -> None:
    of_torch = Run(default_adamw(lr=1e-2, fused=False), folder)
    of_torch.train(range(3))
    of_torch.checkpoints.save(3)
    (theirs,) = of_torch.optimizers
    first = theirs.state[of_torch.model.second.weight]["exp_avg"].full_tensor()

    run = Run(adamw8bit(lr=1e-3), folder)
    run.checkpoints.exclude_from_loading = ["optimizer"]
    assert run.checkpoints.load(3)
    (optimizer,) = run.optimizers
    load_dcp(run.model, optimizer, f"{folder}/checkpoints/step-3")
    state = optimizer.state[run.model.second.weight]
    ours = torchao8.dequantize_blockwise(
        state["exp_avg_codes"].full_tensor(), state["exp_avg_scale"].full_tensor()
    )
    assert (ours - first).abs().max() < 0.02 * first.abs().max()
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}
    run.train(range(3, 6))
    assert {int(state["step"]) for state in optimizer.state.values()} == {6}


def test_a_run_of_torch_goes_on_in_8_bits(tmp_path: Path) -> None:
    run_ranks(2, to_8_bits, str(tmp_path))


def mixed() -> Any:
    """Vectors with torch's AdamW, the last matrix with ours in 32 bits, others with Lion."""
    options = {"lr": 1e-3, "weight_decay": 0.1}
    return Config(
        implementation="for-loop",
        param_groups=[
            ParamGroupConfig(
                pattern="bias", optimizer_name="AdamW", optimizer_kwargs={**options, "lr": 1e-2}
            ),
            ParamGroupConfig(
                pattern="last", optimizer_name="torchao8.AdamW", optimizer_kwargs=options
            ),
            ParamGroupConfig(
                pattern=".*",
                optimizer_name="torchao8.Lion8bit",
                optimizer_kwargs={**options, "block_size": 128},
            ),
        ],
    )


def test_groups_of_several_optimizers() -> None:
    container = mixed().build(model_parts=[runs.Net()])
    classes = [type(optimizer) for optimizer in container]
    assert classes == [torch.optim.AdamW, torchao8.AdamW, torchao8.Lion8bit]
    (lion,) = list(container)[2].param_groups
    assert (lion["lr"], lion["weight_decay"], lion["block_size"]) == (1e-3, 0.1, 128)
    (model,) = container.model_parts
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    x, y = runs.batches(1)[0]
    nn.functional.cross_entropy(model(x), y).backward()
    container.step()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


def test_the_numbers_are_those_of_default_adamw() -> None:
    (theirs,) = default_adamw(lr=1e-3, weight_decay=0.2).param_groups
    (ours,) = adamw8bit(lr=1e-3, weight_decay=0.2).param_groups
    assert ours.optimizer_kwargs == theirs.optimizer_kwargs
    assert (ours.pattern, ours.optimizer_name) == (theirs.pattern, "torchao8.AdamW8bit")


def test_a_name_that_is_none_of_ours_is_refused() -> None:
    config = Config(
        param_groups=[ParamGroupConfig(pattern=".*", optimizer_name="torchao8.AdamW8bits")]
    )
    with pytest.raises(ValueError, match=r"optimizer_name: expected .*'torchao8.AdamW8bits'"):
        config.build(model_parts=[runs.Net()])
    config.param_groups[0].optimizer_name = "Nothing"
    with pytest.raises(NotImplementedError, match="Nothing"):
        config.build(model_parts=[runs.Net()])
