"""What happens to DTensors between two steps: a kept plan does what a fresh one does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL, bits
from ranks import run_ranks
from sharded import distributed_param, set_global_grads
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import torchao8

SHAPES = ((8, 300), (40, 70), (12, 512), (700,), (6, 4))


def make(cls: Any, mesh: DeviceMesh, **options: Any) -> Any:
    """Shards of rows and of columns, a replica, and a plain parameter; half of it in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    placements = ([Shard(0)], [Shard(0)], [Shard(1)], [Shard(0)], [Replicate()])
    params = [
        distributed_param(torch.randn(shape, generator=generator).to(dtype), mesh, placement)
        for dtype in (torch.float32, torch.bfloat16)
        for shape, placement in zip(SHAPES, placements, strict=True)
    ]
    params.append(torch.nn.Parameter(torch.randn(5, 100, generator=generator)))
    return cls(params, min_8bit_size=SMALL, lr=0.1, weight_decay=0.1, **options)


def params_of(optimizer: Any) -> list[Any]:
    return list(optimizer.param_groups[0]["params"])


def no_change(optimizer: Any) -> None:
    pass


def partial_grads(optimizer: Any) -> None:
    """Gradients as sums that the ranks have not added up yet, which a step does."""
    p = params_of(optimizer)[1]
    value = torch.full((40, 70), 0.25)
    p.grad = None
    p.grad = DTensor.from_local(value, p.device_mesh, [Partial()], run_check=False)


def new_local_tensor(optimizer: Any) -> None:
    """As FSDP2 does after a model has moved."""
    p = params_of(optimizer)[0]
    p._local_tensor = p._local_tensor.detach().clone().add_(1)


def other_local_dtype(optimizer: Any) -> None:
    p = params_of(optimizer)[0]
    p.grad = None
    new = torch.nn.Parameter(
        DTensor.from_local(p._local_tensor.bfloat16(), p.device_mesh, p.placements, run_check=False)
    )
    torch.utils.swap_tensors(p, new)


def new_placement(optimizer: Any) -> None:
    """A parameter and its state, from rows to replicas."""
    p = params_of(optimizer)[0]
    p.grad = None
    state = optimizer.state[p]
    for key, value in state.items():
        if isinstance(value, DTensor):
            state[key] = value.redistribute(p.device_mesh, [Replicate()])
    torch.utils.swap_tensors(
        p, torch.nn.Parameter(p.detach().redistribute(p.device_mesh, [Replicate()]))
    )


def cloned_state(optimizer: Any) -> None:
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def new_local_state(optimizer: Any) -> None:
    """As tools that take a local tensor of state to the host and back."""
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, DTensor):
                value._local_tensor = value._local_tensor.clone()


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(optimizer.state_dict())


def no_gradient(optimizer: Any) -> None:
    params_of(optimizer)[1].grad = None


# Each with whether the plan goes on holding.
CHANGES: dict[str, tuple[Callable[[Any], None], bool]] = {
    "nothing": (no_change, True),
    "partial gradients": (partial_grads, False),
    "a new local tensor": (new_local_tensor, True),
    "another dtype": (other_local_dtype, False),
    "another placement": (new_placement, False),
    "cloned state": (cloned_state, False),
    "new local state": (new_local_state, True),
    "a load": (loaded, False),
    "no gradient": (no_gradient, False),
}
AT_EVERY_STEP = ("partial gradients", "no gradient")


def whole_bits(optimizer: Any) -> list[Any]:
    def whole(t: Tensor) -> bytes:
        return bits(t.full_tensor() if isinstance(t, DTensor) else t)

    return [
        (whole(p), {key: whole(value) for key, value in optimizer.state[p].items()})
        for p in params_of(optimizer)
    ]


def check(rank: int, world_size: int, cls: Any, options: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for name, (change, keeps) in CHANGES.items():
        ends = []
        for fresh in (False, True):
            optimizer = make(cls, mesh, **options)
            kept = None
            for seed in range(5):
                set_global_grads(params_of(optimizer), seed)
                if seed == 2 or (seed > 2 and name in AT_EVERY_STEP):
                    change(optimizer)
                optimizer._plan = None if fresh else optimizer._plan
                for p in params_of(optimizer):  # a swapped parameter has lost its gradient
                    if p.grad is None and name != "no gradient":
                        value = torch.full(p.shape, 0.25, dtype=p.dtype)
                        p.grad = distribute_tensor(value, mesh, p.placements, src_data_rank=None)
                optimizer.step()
                kept = optimizer._plan if seed == 1 else kept
            assert fresh or (optimizer._plan is kept) == keeps, name
            ends.append(whole_bits(optimizer))
        assert ends[0] == ends[1], name


@pytest.mark.parametrize(
    "options", [{}, {"stochastic_rounding": True}, {"block_wise": False}], ids=["", "rounds", "one"]
)
@pytest.mark.parametrize("cls", [torchao8.AdamW8bit, torchao8.SGD])
def test_a_kept_plan_does_what_a_fresh_one_does(cls: Any, options: dict[str, Any]) -> None:
    run_ranks(2, check, cls, options)
