"""Models sharded in several ways, the same gradients for all of them, and their gathered bits."""

import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from helpers import bits, make_params, set_grads
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

# Rows that no world size divides, fewer rows than ranks, vectors, rows of two dimensions, and of
# more than a block. With min_8bit_size=SMALL, matrices are quantized but for (5, 10), and for
# (300, 3) where it is sharded.
SHAPES = ((7, 300), (40, 70), (700,), (3, 6, 9, 5), (13, 3, 400), (5, 10), (300, 3), (1, 513))


class Weights(nn.Module):
    """A model that is nothing but its parameters, w0, w1, ..."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, shapes: Iterable[Sequence[int]] = SHAPES
    ) -> None:
        super().__init__()
        for i, p in enumerate(make_params(dtype, shapes)):
            self.register_parameter(f"w{i}", p)


def fsdp_weights(mesh: DeviceMesh | None, dtype: torch.dtype = torch.float32) -> Weights:
    """Sharded by FSDP2 over a mesh: of one dimension, or of two, the first of which replicates."""
    model = Weights(dtype)
    return model if mesh is None else fully_shard(model, mesh=mesh)


def distributed(value: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has, placed as a parameter is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def distributed_param(value: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    return nn.Parameter(distribute_tensor(value.detach(), mesh, placements, src_data_rank=None))


def set_global_grads(params: Iterable[Tensor], seed: int) -> None:
    """The gradients of ``set_grads`` for parameters of these global shapes, each rank its part."""
    params = list(params)
    whole = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype)) for p in params]
    set_grads(whole, seed)
    for p, q in zip(params, whole, strict=True):
        p.grad = distributed(q.grad, p)


def step_with(
    optimizer: torch.optim.Optimizer,
    seeds: Iterable[int],
    step: Callable[[], Any] | None = None,
) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for seed in seeds:
        set_global_grads(params, seed)
        (step or optimizer.step)()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gathered(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Bits of each parameter and of its state, as one device would hold them."""
    return [
        {"param": bits(whole(p))}
        | {
            k: (v.dtype, tuple(v.shape), bits(whole(v)))
            for k, v in optimizer.state.get(p, {}).items()
        }
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def of_rank(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Bits of what lies on this rank, and where: to compare two that are sharded alike."""
    return [
        {
            key: (
                str(value.dtype),
                value.shape,
                getattr(value, "placements", None),
                bits_here(value),
            )
            for key, value in {"param": p.detach(), **optimizer.state.get(p, {})}.items()
        }
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def ends_of(optimizer: torch.optim.Optimizer) -> bytes:
    """The parameters of an unsharded optimizer and their states, for :func:`assert_shards_of`.

    Made once, and given to all ranks: tensors that are pickled would be shared between processes.
    """
    ends = [
        {"param": p.detach(), **optimizer.state.get(p, {})}
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    file = io.BytesIO()
    torch.save(ends, file)
    return file.getvalue()


def assert_shards_of(optimizer: torch.optim.Optimizer, ends: bytes, where: Any) -> None:
    """What lies on this rank has the bits of its part of the unsharded ``ends``.

    Without a collective: asked of every rank, it says as much as :func:`gathered`, for less.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, wanted in zip(params, torch.load(io.BytesIO(ends), weights_only=True), strict=True):
        found = {"param": p.detach(), **optimizer.state.get(p, {})}
        assert found.keys() == wanted.keys(), where
        for key, value in found.items():
            part = distributed(wanted[key], value)
            assert (value.dtype, value.shape) == (part.dtype, part.shape), (where, key)
            assert bits_here(value) == bits_here(part), (where, key)


def bits_here(value: Tensor) -> bytes:
    return bits(value.to_local() if isinstance(value, DTensor) else value)


def groups_of(params: Iterable[Tensor], sharded: bool) -> list[dict[str, Any]]:
    """Groups under which unsharded parameters get the state that sharded ones have.

    Sharded vectors keep 32 bits, and so do matrices of few columns, so where nothing is sharded an
    option must say so.
    """
    params = list(params)
    thin = [p for p in params if p.ndim == 1 or p.shape[1:].numel() < 16]
    others = [p for p in params if not any(p is q for q in thin)]
    return [{"params": others}, {"params": thin} | ({} if sharded else {"optim_bits": 32})]
