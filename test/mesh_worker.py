"""A Llama of 70 billion parameters on large meshes.

Everything lies on the meta device, and the process group is torch's fake one, which answers at once
as any of the ranks. For each mesh a line of JSON is printed with what the parameters and the
optimizer's state are on one of its ranks: the first, a middle or the last one. These are processes
of their own, as torch keeps DTensor specs and with them a mesh as an earlier rank sees it.
"""

import contextlib
import json
import math
import warnings
from typing import Any

import torch
import torch.distributed as dist
from large_worker import peak_memory
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

import torchao8
from torchao8 import sharding

HIDDEN, INNER, KEYS, VOCABULARY = 8192, 28672, 1024, 128256
# Names of the dimensions, and sizes. FSDP splits what tensor parallelism has split.
MESHES: list[dict[str, int]] = [
    {"shard": 8},
    {"shard": 64},
    {"shard": 512},
    {"shard": 2048},
    {"replicate": 2, "shard": 4},
    {"replicate": 8, "shard": 64},
    {"replicate": 4, "shard": 512},
    {"shard": 8, "tensor": 8},
    {"shard": 256, "tensor": 8},
    {"shard": 64, "tensor": 32},
]
COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROWS = ("o_proj", "down_proj")


class Block(nn.Module):
    """Modules under their names; nothing here is ever run."""

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


def layer() -> Block:
    return Block(
        self_attn=Block(
            q_proj=linear(HIDDEN, HIDDEN),
            k_proj=linear(HIDDEN, KEYS),
            v_proj=linear(HIDDEN, KEYS),
            o_proj=linear(HIDDEN, HIDDEN),
        ),
        mlp=Block(
            gate_proj=linear(HIDDEN, INNER),
            up_proj=linear(HIDDEN, INNER),
            down_proj=linear(INNER, HIDDEN),
        ),
        input_layernorm=nn.RMSNorm(HIDDEN),
        post_attention_layernorm=nn.RMSNorm(HIDDEN),
    )


def llama(layers: int) -> Block:
    with torch.device("meta"):
        return Block(
            model=Block(
                embed_tokens=nn.Embedding(VOCABULARY, HIDDEN),
                layers=nn.ModuleList([layer() for _ in range(layers)]),
                norm=nn.RMSNorm(HIDDEN),
            ),
            lm_head=linear(HIDDEN, VOCABULARY),
        ).to(torch.bfloat16)


def shard(model: Block, mesh: DeviceMesh) -> None:
    """As people do it: tensor parallelism first, then FSDP2, a layer at a time."""
    layers: Any = model.get_submodule("model.layers")
    if "tensor" in (mesh.mesh_dim_names or ()):
        for each in layers:
            plan: dict[str, Any] = {f"*.{name}": ColwiseParallel() for name in COLUMNS}
            plan |= {f"*.{name}": RowwiseParallel() for name in ROWS}
            parallelize_module(each, mesh["tensor"], plan)
        ends = {"model.embed_tokens": RowwiseParallel(), "lm_head": ColwiseParallel()}
        parallelize_module(model, mesh["tensor"], ends)
        mesh = mesh["shard"]
    for each in layers:
        fully_shard(each, mesh=mesh)
    fully_shard(model, mesh=mesh)


def facts(p: Any, state: dict[str, Any]) -> dict[str, Any]:
    """What a parameter and its state are on this rank."""
    known: dict[str, Any] = {
        "shape": p.shape,
        "state": {key: [str(t.dtype), t.shape] for key, t in state.items()},
    }
    if sharding.is_dtensor(p):
        place = sharding.shard_rows(p, 256, 8)
        known["local"] = sharding.local(p).shape
        known["local_state"] = {key: sharding.local(t).shape for key, t in state.items()}
        known["place"] = None if place is None else place._asdict()
        _, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
        known["start"] = sum(i * n for i, n in zip(start, p.stride(), strict=True))
        known["mesh"] = p.device_mesh.shape
        known["placements"] = str(p.placements)
    return known


def survey(model: Block) -> dict[str, Any]:
    """The facts of all parameters, and the state dict, under their names."""
    optimizer = torchao8.AdamW8bit(model.parameters())
    with torch.device("meta"):
        optimizer._init_states()
    whole = get_optimizer_state_dict(model, optimizer)["state"]
    estimated = torchao8.estimate(model)
    return {
        "parameters": {n: facts(p, optimizer.state[p]) for n, p in model.named_parameters()},
        "checkpoint": {
            name: {key: [str(t.dtype), t.shape] for key, t in state.items()}
            for name, state in whole.items()
        },
        "state_bytes": sum(
            sharding.local(t).numel() * t.itemsize
            for state in optimizer.state.values()
            for t in state.values()
        ),
        "estimate": vars(estimated) | {"total": vars(estimated.total)},
        "peak_memory": peak_memory(),
    }


def print_survey(mesh: dict[str, int], rank: int, layers: int) -> None:
    """The line of a rank of a mesh; of one process that has no mesh, if it is empty."""
    model = llama(layers)
    if mesh:
        ranks = math.prod(mesh.values())
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        shard(model, init_device_mesh("cpu", tuple(mesh.values()), mesh_dim_names=tuple(mesh)))
    print(json.dumps({"mesh": mesh, "rank": rank, "layers": layers, **survey(model)}), flush=True)
    if mesh:
        dist.destroy_process_group()


def survey_ranks(layers: int, position: str, path: str) -> None:
    """Writes the lines of a position of all meshes, for a process of its own."""
    warnings.simplefilter("ignore")
    with open(path, "w") as file, contextlib.redirect_stdout(file):
        if position == "first":
            print_survey({}, 0, 80)
        for mesh in MESHES:
            ranks = math.prod(mesh.values())
            rank = {"first": 0, "middle": ranks // 2 - 1, "last": ranks - 1}[position]
            # The full depth where it is quick: torch takes a tenth of a second to shard a layer
            # over 2,048 ranks, and all layers are alike.
            print_survey(mesh, rank, 80 if mesh == {"shard": 8} and rank == 0 else layers)
