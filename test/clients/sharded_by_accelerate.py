"""FSDP2 by accelerate on ranks of the CPU, for accelerate itself and for the Trainer, which has it.

Each rank is a process of its own, so what is changed here is gone with it.
"""

import os
from typing import Any

import runs
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor


def be_one_of_several_ranks() -> None:
    """Tells accelerate of the process group that there is."""
    os.environ["LOCAL_RANK"] = os.environ["RANK"]
    os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]


def force_fsdp2() -> None:
    """Lets accelerate shard with FSDP2 on the CPU.

    It leaves its FSDP2 plugin aside there, without a word, and wraps the model in DDP. Here its
    state says FSDP as soon as it is given a plugin; all else is accelerate's own code.
    """
    be_one_of_several_ranks()
    make = AcceleratorState.__init__

    def make_with_fsdp(self: AcceleratorState, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if options.get("fsdp_plugin") is not None:
            self.fsdp_plugin = options["fsdp_plugin"]
            for state in (self, PartialState()):  # each copies from the other
                state.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = make_with_fsdp


def of_rank(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    """The bits of this rank, of a model that must be sharded."""
    inner = runs.unwrapped(optimizer)
    params = {p for group in inner.param_groups for p in group["params"]}
    assert params == set(model.parameters())
    assert all(isinstance(p, DTensor) for p in params)
    tensors = {}
    for name, p in model.named_parameters():
        for key, value in {"": p.detach(), **inner.state[p]}.items():
            local = value.to_local() if isinstance(value, DTensor) else value
            tensors[f"{name}.{key}"] = local.clone()
    has_codes = any(name.endswith("_codes") for name in tensors)
    assert has_codes == type(inner).__module__.startswith("torchao8.")
    return tensors
