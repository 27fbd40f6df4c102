"""What a timed process holds: an optimizer, or buffers that tell the memory rate."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.benchmark import timer

from benchmarks.step.contenders import MEMORY, Contender
from benchmarks.step.devices import Cpu
from benchmarks.step.tensor_lists import TensorList

_STEPS_FOR_BITS = 5


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a state value: a tensor itself, or those that a wrapper holds."""
    if not isinstance(value, Tensor):
        for held in getattr(value, "__dict__", {}).values():
            if isinstance(held, Tensor):
                yield from _plain_tensors(held)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    else:
        yield value


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, each storage counted once."""
    values = (value for state in optimizer.state.values() for value in state.values())
    storages = (t.untyped_storage() for value in values for t in _plain_tensors(value))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of tensors (of DTensors, of this rank's part)."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = _local(tensor.detach()).contiguous()
        found.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class OptimizerJob:
    """Parameters with gradients, and one optimizer over them."""

    def __init__(
        self, chosen: Contender, tensors: TensorList, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._chosen = chosen
        sharded = chosen.tensors != "whole"
        mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
        generator = torch.Generator(device).manual_seed(0)

        def values(shape: tuple[int, ...], std: float) -> Tensor:
            """Random numbers; on several ranks this rank's of them."""
            value = torch.empty(shape, dtype=dtype, device=device)
            value.normal_(std=std, generator=generator)
            if mesh is not None:
                value = distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)
            return _local(value).clone() if chosen.tensors == "shard" else value

        self.params: list[Tensor] = []
        for shape in tensors.shapes:
            param, grad = torch.nn.Parameter(values(shape, 0.02)), values(shape, 1e-3)
            if isinstance(grad, DTensor):
                # As fully_shard makes them: a gradient has the very spec of its parameter.
                grad = DTensor(grad.to_local(), param._spec, requires_grad=False)
            param.grad = grad
            self.params.append(param)
        self.optimizer = chosen.build(self.params)
        group = self.optimizer.param_groups[0]
        if chosen.tensors == "shard" and "min_8bit_size" in group:
            group["min_8bit_size"] //= (
                dist.get_world_size()
            )  # a shard has 8-bit state where its DTensor has
        step = self.optimizer.step
        self.step: Callable[[], object] = torch.compile(step) if chosen.mode == "compiled" else step
        self._samples = self._sample()

    def _sample(self) -> list[Tensor]:
        return [_local(param.detach()).flatten()[:64].clone() for param in self.params]

    def describe(self) -> dict[str, Any]:
        """What is known after a step: the code path, and the bytes that a step moves."""
        state = state_bytes(self.optimizer)
        params = sum(_local(param).nbytes for param in self.params)
        # A step reads parameters, gradients and state, and writes all but the gradients.
        found = {"state_bytes": state, "moved_bytes": 3 * params + 2 * state}
        if self._chosen.package == "torchao8":
            # How many calls of its op a step makes: one for each dtype and format.
            formats = {(p.dtype, tuple(sorted(self.optimizer.state[p]))) for p in self.params}
            found["buckets"] = len(formats)
            if not self.params[0].is_cuda:
                from torchao8 import ops

                path = ops.cpu_capability()
                if path != (self._chosen.cpu_path or path):
                    lacking = f"this machine cannot run the {self._chosen.cpu_path} path"
                    raise RuntimeError(f"{lacking} (it runs {path})")
                found["cpu_path"] = path
        return found

    def bits(self) -> dict[str, str]:
        """Hashes of the parameters and of each state after a few steps from the start."""
        for _ in range(_STEPS_FOR_BITS):
            self.step()
            for p in self.params:  # in place: a compiled step would be compiled for new tensors
                _local(p.grad).mul_(-0.7)
        states = self.optimizer.state_dict()["state"]
        names = sorted({name for state in states.values() for name in state})
        digests = {
            name: digest(torch.as_tensor(states[i][name]) for i in states if name in states[i])
            for name in names
        }
        return {"parameters": digest(self.params), **digests}

    def check(self) -> None:
        """Raises if a parameter has not moved or is no number: then nothing was measured."""
        for i, (old, new) in enumerate(zip(self._samples, self._sample(), strict=True)):
            if old.numel() and (torch.equal(old, new) or not torch.isfinite(new).all()):
                raise RuntimeError(f"after the run parameter {i} is unchanged or not finite")


class MemoryJob:
    """The machine's memory rate: `copy` copies a buffer, `scale` multiplies one in place.

    A copy by a CPU also reads the lines it is about to overwrite unless it bypasses the caches,
    which no count of its own bytes shows; a step works in place, like `scale`.
    """

    def __init__(self, kind: str, tensors: TensorList, dtype: torch.dtype, device: Cpu) -> None:
        nbytes = device.buffer_bytes
        if device.kind == "cpu":
            # As much data as torch's fused step touches on this list, so that both run in the same
            # level of cache or out of it.
            touched = 4 * tensors.numel * dtype.itemsize
            nbytes = min(touched // (2 if kind == "copy" else 1), nbytes)
        self._source = torch.ones(nbytes // 4, device=device.device)
        self._target = torch.zeros_like(self._source) if kind == "copy" else None

    def step(self) -> None:
        if self._target is None:
            self._source.mul_(1.0)
        else:
            self._target.copy_(self._source)

    def describe(self) -> dict[str, Any]:
        return {"moved_bytes": 2 * self._source.nbytes}  # read once, written once

    def check(self) -> None:
        """Buffers stay as they are."""


class Stepper:
    """Steps one contender, or runs one memory job, over one tensor list after the other.

    `rank` of `ranks` such processes shares out the tensors, over the file `store`.
    """

    def __init__(
        self, chosen: Contender, device: Cpu, threads: int, ranks: int, store: str, rank: int
    ) -> None:
        torch.set_num_threads(threads)
        self._chosen = chosen
        self._device = device
        self._device.start()
        self._job: Any = None
        if chosen.where:
            found = importlib.import_module(chosen.package).__file__
            if chosen.source and not Path(str(found)).is_relative_to(chosen.source):
                raise RuntimeError(f"{found} was imported, not torchao8 of {chosen.source}")
        if ranks > 1:
            where = f"file://{store}"
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)

    def set_up(self, tensors: TensorList, dtype_name: str) -> dict[str, Any]:
        """Makes the tensors of a list and takes the first steps."""
        dtype = getattr(torch, dtype_name)
        if self._chosen in MEMORY:
            self._job = MemoryJob(self._chosen.name, tensors, dtype, self._device)
        else:
            self._job = OptimizerJob(self._chosen, tensors, dtype, self._device.device)
        bits = self._job.bits() if self._chosen.source else None  # before any other step
        start = timer()
        self._job.step()  # makes state; some compile
        if self._chosen.mode == "graph":
            self._job.step = self._device.captured(self._job.step)
        first = timer() - start
        step_s = self._device.seconds_of_step(self._job.step, 0.0)
        return {**self._job.describe(), "first_step_s": first, "step_s": step_s, "bits": bits}

    def turn(self, seconds: float) -> float:
        return self._device.seconds_of_step(self._job.step, seconds)

    def finish(self, folder: str) -> dict[str, Any]:
        """What is told after all turns; checks that the steps did what they are for.

        `saved_bytes` are those of the files of state that torch.distributed.checkpoint writes.
        """
        step = self._job.step
        found: dict[str, Any] = {"peak_extra_bytes": self._device.peak_extra_bytes(step)}
        found |= self._device.times_alone(step)
        self._job.check()
        if self._chosen.tensors == "DTensor":
            dcp.save({"state": self._job.optimizer.state_dict()["state"]}, checkpoint_id=folder)
            dist.barrier()
            found["saved_bytes"] = sum(file.stat().st_size for file in Path(folder).iterdir())
        self._free()
        return found

    def launches(self) -> int | None:
        found = self._device.launches(self._job.step)
        self._free()
        return found

    def _free(self) -> None:
        self._job = None
        self._device.free()
