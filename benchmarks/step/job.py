"""What a process of `benchmarks.step` holds: an optimizer, or buffers that tell the memory rate."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.step.contenders import MEMORY_JOBS, Contender, contender
from benchmarks.step.devices import Cpu, open_device
from benchmarks.step.tensor_lists import TensorList, tensor_list

_CPU_PATHS = ("scalar", "avx2", "avx512")  # what torchao8's cpu_capability() counts


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


class OptimizerJob:
    """Parameters with gradients, and one optimizer over them."""

    def __init__(
        self, chosen: Contender, tensors: TensorList, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.chosen = chosen
        generator = torch.Generator(device).manual_seed(0)
        self.params: list[Tensor] = []
        for shape in tensors.shapes:
            param = torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            with torch.no_grad():
                param.normal_(std=0.02, generator=generator)
                param.grad = torch.empty_like(param).normal_(std=1e-3, generator=generator)
            self.params.append(param)
        self.optimizer = chosen.build(self.params)
        self.step: Callable[[], object] = self.optimizer.step
        if chosen.compiled:
            self.step = torch.compile(self.optimizer.step)
        self.samples = self._sample()
        self.path = None
        if device.type == "cpu" and chosen.package == "torchao8":
            self.path = _CPU_PATHS[torch.ops.torchao8.cpu_capability()]
            if self.path != (chosen.cpu_path or self.path):
                reason = f"this machine cannot run the {chosen.cpu_path} path (it runs {self.path})"
                raise RuntimeError(reason)

    def _sample(self) -> list[Tensor]:
        return [param.detach().flatten()[:64].clone() for param in self.params]

    def describe(self) -> dict[str, Any]:
        """What is known after a step: the code path, and the bytes that a step moves."""
        state = state_bytes(self.optimizer)
        params = sum(param.nbytes for param in self.params)
        # How many calls of its op a step of torchao8 makes: one for each dtype and format.
        formats = {(p.dtype, tuple(sorted(self.optimizer.state[p]))) for p in self.params}
        return {
            "path": self.path,
            "state_bytes": state,
            # A step reads parameters, gradients and state, and writes all but the gradients.
            "moved_bytes": 3 * params + 2 * state,
            "buckets": len(formats) if self.chosen.package == "torchao8" else None,
        }

    def check(self) -> None:
        """Raises if a parameter has not moved or is no number: then nothing was measured."""
        for i, (old, new) in enumerate(zip(self.samples, self._sample(), strict=True)):
            if torch.equal(old, new) or not torch.isfinite(new).all():
                raise RuntimeError(f"after the run parameter {i} is unchanged or not finite")


class MemoryJob:
    """The machine's memory rate: `copy` copies a buffer, `scale` multiplies one in place.

    A copy by a CPU also reads the lines it is about to overwrite unless it bypasses the caches,
    which no count of its own bytes shows; a step works in place, like `scale`.
    """

    def __init__(self, kind: str, tensors: TensorList, dtype: torch.dtype, device: Cpu) -> None:
        nbytes = device.buffer_bytes()
        if device.kind == "cpu":
            # As much data as torch's fused step touches on this list, so that both run in the same
            # level of cache or out of it.
            touched = 4 * tensors.numel * dtype.itemsize
            nbytes = min(touched // (2 if kind == "copy" else 1), nbytes)
        source = torch.ones(nbytes // 4, device=device.device)
        target = torch.zeros_like(source) if kind == "copy" else source
        self.moved = 2 * source.nbytes  # read once, written once
        self.step: Callable[[], object] = lambda: source.mul_(1.0)
        if kind == "copy":
            self.step = lambda: target.copy_(source)

    def describe(self) -> dict[str, Any]:
        """As that of an optimizer."""
        return {"path": None, "state_bytes": 0, "moved_bytes": self.moved, "buckets": None}

    def check(self) -> None:
        """There is nothing to check."""


class Stepper:
    """Steps one contender, or runs one memory job, over one tensor list after the other."""

    def __init__(self, name: str, device: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._name = name
        self._device = open_device(device)
        self._device.start()
        self._job: OptimizerJob | MemoryJob | None = None
        if name not in MEMORY_JOBS:
            importlib.import_module(contender(name).package)

    def ready(self) -> None:
        """Nothing: once this is answered, libraries are imported and the device is at hand."""

    def set_up(self, list_name: str, layers: int, dtype_name: str) -> dict[str, Any]:
        """Makes the tensors of a list and takes the first steps."""
        self.free()
        tensors, dtype = tensor_list(list_name, layers), getattr(torch, dtype_name)
        if self._name in MEMORY_JOBS:
            self._job = MemoryJob(self._name, tensors, dtype, self._device)
        else:
            chosen = contender(self._name)
            self._job = OptimizerJob(chosen, tensors, dtype, self._device.device)
        first = self._device.seconds_of_first_step(self._job.step)  # makes state; some compile
        step_s = self._device.seconds_of_step(self._job.step, 0.0)
        return {**self._job.describe(), "first_step_s": first, "step_s": step_s}

    @property
    def _step(self) -> Callable[[], object]:
        assert self._job is not None
        return self._job.step

    def turn(self, seconds: float) -> float:
        """The median time of the steps that fit into these seconds."""
        return self._device.seconds_of_step(self._step, seconds)

    def peak_extra_bytes(self) -> int | None:
        """How far memory rises during a step; checks that the steps did what they are for."""
        peak = self._device.peak_extra_bytes(self._step)
        assert self._job is not None
        self._job.check()
        self.free()
        return peak

    def launches(self) -> int | None:
        """Kernels that a step starts."""
        count = self._device.launches(self._step)
        self.free()
        return count

    def free(self) -> None:
        """Lets go of the tensors, and of the memory they had."""
        self._job = None
        self._device.free()
