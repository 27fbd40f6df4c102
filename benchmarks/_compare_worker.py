"""A process of `compare.py`: one optimizer of one build, as a rank of its own or of several.

Beside what `_worker.py` answers it can step over DTensors and over copies of their shards, one job
each, and tell the bits that an optimizer computes.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from _contenders import CONTENDERS
from _lists import Shape, tensor_list
from _worker import Server, main
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.benchmark import Timer

STEPS_FOR_BITS = 5


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of tensors (of DTensors, of this rank's part)."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = _local(tensor.detach()).contiguous()
        found.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Job:
    """An optimizer over the tensors of a list.

    `kind` says what they are: "whole", or, on several ranks, "DTensor" (sharded by rows) or "shard"
    (copies of this rank's shards). A shard keeps 8-bit state where its DTensor does.
    """

    def __init__(self, contender: str, shapes: list[Shape], dtype: torch.dtype, kind: str) -> None:
        self.kind = kind
        self.mesh = None if kind == "whole" else init_device_mesh("cpu", (dist.get_world_size(),))
        generator = torch.Generator().manual_seed(0)
        self.params = []
        for shape in shapes:
            p = torch.nn.Parameter(self._values(shape, dtype, 0.02, generator))
            p.grad = self._values(shape, dtype, 1e-2, generator)
            self.params.append(p)
        chosen = CONTENDERS[contender]
        self.optimizer = chosen.build(list(self.params))
        group = self.optimizer.param_groups[0]
        if kind == "shard" and "min_8bit_size" in group:
            group["min_8bit_size"] //= dist.get_world_size()
        self.step: Callable[[], object] = self.optimizer.step
        if chosen.compiled:
            self.step = torch.compile(self.optimizer.step)

    def _values(
        self, shape: Shape, dtype: torch.dtype, size: float, generator: torch.Generator
    ) -> Tensor:
        """Numbers that follow from the generator; on several ranks, this rank's of them."""
        value = torch.empty(shape, dtype=dtype).normal_(std=size, generator=generator)
        if self.mesh is not None:
            value = distribute_tensor(value, self.mesh, [Shard(0)], src_data_rank=None)
        return _local(value).clone() if self.kind == "shard" else value

    def bits(self) -> dict[str, str]:
        """Hashes of the parameters and of each state after a few steps from the start."""
        for _ in range(STEPS_FOR_BITS):
            self.step()
            for p in self.params:  # in place: a compiled step would be compiled for new tensors
                _local(p.grad).mul_(-0.7)
        states = self.optimizer.state_dict()["state"]
        names = sorted({name for state in states.values() for name in state})
        digests = {
            name: _digest(torch.as_tensor(states[i][name]) for i in states if name in states[i])
            for name in names
        }
        return {"parameters": _digest(self.params), **digests}


class CompareServer(Server):
    """Answers `compare.py`; holds a job for each kind of tensors."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self.jobs: dict[str, Job] = {}
        if spec["ranks"] > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{spec['store']}",
                rank=spec["rank"],
                world_size=spec["ranks"],
            )

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if request["do"] == "set up":
            shapes = tensor_list(request["list"]).shapes
            kind = request["kind"]
            job = Job(self.contender, shapes, getattr(torch, request["dtype"]), kind)
            bits = job.bits()  # these are also the first steps, which make state and may compile
            self.jobs[kind] = job
            package = importlib.import_module(CONTENDERS[self.contender].package)
            return {"bits": bits, "source": str(package.__file__)}
        if request["do"] == "run":
            timer = Timer(
                "step()",
                globals={"step": self.jobs[request["kind"]].step},
                num_threads=torch.get_num_threads(),
            )
            return {"seconds": timer.blocked_autorange(min_run_time=request["turn"]).median}
        return super().answer(request)

    def free(self) -> dict[str, Any]:
        self.jobs = {}
        return super().free()


if __name__ == "__main__":
    main(CompareServer)
