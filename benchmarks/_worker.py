"""A process that holds one optimizer (or one pair of buffers) and runs it when told to.

`step.py` starts one of these for each contender and lets them take turns, so that runs stay
interleaved although libraries live in processes of their own: some choose their code path once a
process, some bring a thread pool, and peak memory can only be told of a whole process.

Requests and replies are one line of JSON each, on standard input and standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from _contenders import CONTENDERS, MAX_BUFFER_BYTES, TENSOR_LISTS
from torch import Tensor

_CPU_PATHS = ("scalar", "avx2", "avx512")  # what torchao8's cpu_capability() counts


def _plain_tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in a state value: a tensor itself, or those that a subclass wraps."""
    if not isinstance(value, Tensor):
        return
    if hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain_tensors(getattr(value, name))
    else:
        yield value


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all tensors in the optimizer's state, each storage counted once."""
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain_tensors(value):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _status_bytes(field: str) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if match:
            return int(match.group(1)) * 1024
    return None


def peak_extra_bytes(function: Callable[[], object]) -> int | None:
    """How far the process's resident memory rises above its present size while `function` runs.

    Where the kernel can reset the high-water mark (Linux), what the allocator keeps for reuse is
    given back first, so that temporaries of earlier calls do not hide those of this one. Elsewhere
    only a rise above every earlier peak can be seen; 0 then says little, and None is returned.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        earlier = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        function()
        risen = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - earlier
        return risen * 1024 if risen > 0 else None
    before = _status_bytes("VmRSS")
    function()
    peak = _status_bytes("VmHWM")
    return None if before is None or peak is None else max(peak - before, 0)


class OptimizerJob:
    """Parameters with gradients, and one optimizer over them."""

    def __init__(self, contender: str, tensor_list: str, dtype: torch.dtype) -> None:
        chosen = CONTENDERS[contender]
        generator = torch.Generator().manual_seed(0)
        self.params: list[Tensor] = []
        for shape in TENSOR_LISTS[tensor_list].shapes:
            param = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
            with torch.no_grad():
                param.normal_(std=0.02, generator=generator)
                param.grad = torch.empty_like(param).normal_(std=1e-3, generator=generator)
            self.params.append(param)
        self.optimizer = chosen.build(self.params)
        self.step: Callable[[], object] = self.optimizer.step
        if chosen.compiled:
            self.step = torch.compile(self.optimizer.step)
        self.samples = self._sample()
        self.path = self._code_path(chosen.package, chosen.cpu_path)

    @staticmethod
    def _code_path(package: str, wanted: str | None) -> str | None:
        if package != "torchao8":
            return None
        path = _CPU_PATHS[torch.ops.torchao8.cpu_capability()]
        if wanted is not None and path != wanted:
            raise RuntimeError(f"this machine cannot run the {wanted} path (it runs {path})")
        return path

    def _sample(self) -> list[Tensor]:
        return [param.detach().flatten()[:64].clone() for param in self.params]

    def describe(self) -> dict[str, Any]:
        state = state_bytes(self.optimizer)
        params = sum(param.nbytes for param in self.params)
        # A step reads each parameter, gradient and state byte, and writes all but the gradients.
        return {"path": self.path, "state_bytes": state, "moved_bytes": 3 * params + 2 * state}

    def check(self) -> None:
        """Raises if a parameter has not moved or is no number: then nothing was measured."""
        for i, (old, new) in enumerate(zip(self.samples, self._sample(), strict=True)):
            if torch.equal(old, new) or not torch.isfinite(new).all():
                raise RuntimeError(f"after the run parameter {i} is unchanged or not finite")


class MemoryJob:
    """The machine's memory rate: `copy` copies a buffer, `scale` multiplies one in place.

    A copy also reads the lines it is about to overwrite unless it bypasses the caches, which no
    count of its own bytes shows; a step works in place, like `scale`.
    """

    def __init__(self, kind: str, tensor_list: str, dtype: torch.dtype) -> None:
        # As much data as torch's fused step touches on this list, so that both run in the same
        # level of cache or out of it.
        touched = 4 * TENSOR_LISTS[tensor_list].numel * dtype.itemsize
        buffers = {"copy": 2, "scale": 1}[kind]
        floats = min(touched // buffers, MAX_BUFFER_BYTES) // 4
        source = torch.ones(floats)
        target = torch.zeros(floats) if kind == "copy" else source
        self.moved = 2 * source.nbytes  # read once, written once
        self.step: Callable[[], object] = lambda: source.mul_(1.0)
        if kind == "copy":
            self.step = lambda: target.copy_(source)

    def describe(self) -> dict[str, Any]:
        return {"path": None, "state_bytes": 0, "moved_bytes": self.moved}

    def check(self) -> None:
        pass


def timed_steps(step: Callable[[], object], count: int, warm_up: bool) -> list[float]:
    """Seconds of `count` calls of `step`, after one untimed call if `warm_up`."""
    seconds = []
    gc.collect()
    gc.disable()
    try:
        if warm_up:
            step()
        for _ in range(count):
            start = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds


def _set_up(spec: dict[str, Any]) -> OptimizerJob | MemoryJob:
    torch.set_num_threads(spec["threads"])
    dtype = getattr(torch, spec["dtype"])
    if spec["contender"] in CONTENDERS:
        return OptimizerJob(spec["contender"], spec["list"], dtype)
    return MemoryJob(spec["contender"], spec["list"], dtype)


def _serve(requests: Iterator[str], reply: Callable[[dict[str, Any]], None]) -> None:
    job = _set_up(json.loads(next(requests)))
    first = timed_steps(job.step, 1, warm_up=False)[0]  # makes state; some compile
    second = timed_steps(job.step, 1, warm_up=False)[0]
    reply({**job.describe(), "first_step_s": first, "step_s": second})
    for line in requests:
        request = json.loads(line)
        if request["do"] == "run":
            seconds = timed_steps(job.step, request["steps"], request["warm_up"])
            reply({"seconds": seconds})
        elif request["do"] == "finish":
            peak = peak_extra_bytes(job.step)
            job.check()
            reply({"peak_extra_bytes": peak})


def main() -> None:
    # Libraries print to standard output; replies go to a copy of it that they do not know.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=replies, flush=True)

    try:
        _serve(iter(sys.stdin), reply)
    except Exception as error:  # whatever a library raises is a result: the parent reports it
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reply({"error": f"{type(error).__name__}: {first_line}"})
        raise


if __name__ == "__main__":
    main()
