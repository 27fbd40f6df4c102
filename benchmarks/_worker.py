"""A process that holds one optimizer (or one pair of buffers) and runs it when told to.

`step.py` starts one of these for each contender and lets them take turns, so that runs stay
interleaved although libraries live in processes of their own: some choose their code path once a
process, some bring a thread pool, and peak memory can only be told of a whole process.

Requests and replies are one line of JSON each, on standard input and standard output. The first
request says which contender this is; each one gets a reply, with "error" in it if it failed, and
with "fatal" if the process ends because of it.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _contenders import CONTENDERS
from _devices import Cpu, open_device
from _lists import TensorList, tensor_list
from torch import Tensor

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
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            for tensor in _plain_tensors(value):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class OptimizerJob:
    """Parameters with gradients, and one optimizer over them."""

    def __init__(
        self, contender: str, tensors: TensorList, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.contender = chosen = CONTENDERS[contender]
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
        self.path = self._code_path(device, chosen.package, chosen.cpu_path)

    @staticmethod
    def _code_path(device: torch.device, package: str, wanted: str | None) -> str | None:
        if device.type != "cpu" or package != "torchao8":
            return None
        path = _CPU_PATHS[torch.ops.torchao8.cpu_capability()]
        if wanted is not None and path != wanted:
            raise RuntimeError(f"this machine cannot run the {wanted} path (it runs {path})")
        return path

    def _sample(self) -> list[Tensor]:
        return [param.detach().flatten()[:64].clone() for param in self.params]

    def describe(self) -> dict[str, Any]:
        """What is known after a step: the code path, and the bytes that a step moves."""
        state = state_bytes(self.optimizer)
        params = sum(param.nbytes for param in self.params)
        # A step reads each parameter, gradient and state byte, and writes all but the gradients.
        moved = 3 * params + 2 * state
        return {
            "path": self.path,
            "state_bytes": state,
            "moved_bytes": moved,
            "buckets": self._buckets(),
        }

    def _buckets(self) -> int | None:
        """How many calls of its op a step of torchao8 makes: one for each dtype and format."""
        if self.contender.package != "torchao8":
            return None
        state = self.optimizer.state
        return len({(param.dtype, tuple(sorted(state[param]))) for param in self.params})

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
        buffers = {"copy": 2, "scale": 1}[kind]
        if device.kind == "cpu":
            # As much data as torch's fused step touches on this list, so that both run in the same
            # level of cache or out of it.
            touched = 4 * tensors.numel * dtype.itemsize
            floats = min(touched // buffers, device.buffer_bytes()) // 4
        else:
            floats = device.buffer_bytes() // 4
        source = torch.ones(floats, device=device.device)
        target = torch.zeros(floats, device=device.device) if kind == "copy" else source
        self.moved = 2 * source.nbytes  # read once, written once
        self.step: Callable[[], object] = lambda: source.mul_(1.0)
        if kind == "copy":
            self.step = lambda: target.copy_(source)

    def describe(self) -> dict[str, Any]:
        """As that of an optimizer."""
        return {"path": None, "state_bytes": 0, "moved_bytes": self.moved, "buckets": None}

    def check(self) -> None:
        """There is nothing to check."""


class Server:
    """Does what it is asked to, with one job at a time."""

    def __init__(self, spec: dict[str, Any]) -> None:
        torch.set_num_threads(spec["threads"])
        self.device = open_device(spec["device"])
        self.device.start()
        self.contender = spec["contender"]
        if self.contender in CONTENDERS:
            importlib.import_module(CONTENDERS[self.contender].package)
        self.job: OptimizerJob | MemoryJob | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request."""
        do = request["do"]
        if do == "set up":
            return self._set_up(request)
        if do == "free":
            return self.free()
        assert self.job is not None
        if do == "run":
            steps, warm_up = request["steps"], request["warm_up"]
            return {"seconds": self.device.timed_steps(self.job.step, steps, warm_up)}
        if do == "launches":
            return {"launches": self.device.launches(self.job.step), **self.free()}
        if do == "finish":
            peak = self.device.peak_extra_bytes(self.job.step)
            self.job.check()
            return {"peak_extra_bytes": peak, **self.free()}
        raise ValueError(f"unknown request {do!r}")

    def _set_up(self, request: dict[str, Any]) -> dict[str, Any]:
        self.job = None
        tensors = tensor_list(request["list"], request["layers"])
        dtype = getattr(torch, request["dtype"])
        if self.contender in CONTENDERS:
            self.job = OptimizerJob(self.contender, tensors, dtype, self.device.device)
        else:
            self.job = MemoryJob(self.contender, tensors, dtype, self.device)
        timed = self.device.timed_steps
        first = timed(self.job.step, 1, warm_up=False)[0]  # makes state; some compile
        second = timed(self.job.step, 1, warm_up=False)[0]
        return {**self.job.describe(), "first_step_s": first, "step_s": second}

    def free(self) -> dict[str, Any]:
        """Lets go of the job, and of the memory it had; says what is still held."""
        self.job = None
        self.device.free()
        return {"held_bytes": self.device.held_bytes()}


def _message(error: Exception) -> str:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"{type(error).__name__}: {first_line}"


def _serve(
    make_server: Callable[[dict[str, Any]], Server],
    requests: Iterator[str],
    reply: Callable[[dict[str, Any]], None],
) -> None:
    try:
        server = make_server(json.loads(next(requests)))
        reply({"ready": True})
    except Exception as error:  # whatever a library raises is a result: the parent reports it
        traceback.print_exc()
        reply({"error": _message(error), "fatal": True})
        return
    for line in requests:
        try:
            answer = server.answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": _message(error), "fatal": False}
        if "error" in answer:
            try:  # here, where no traceback keeps the job's tensors alive
                server.device.finish_steps()
                server.free()
            except Exception:  # a GPU's context does not outlive an invalid access
                traceback.print_exc()
                answer["fatal"] = True
        reply(answer)
        if answer.get("fatal"):
            return


def main(make_server: Callable[[dict[str, Any]], Server] = Server) -> None:
    """Serves the process that started this one."""
    # Libraries print to standard output; replies go to a copy of it that they do not know.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(message: dict[str, Any]) -> None:
        sys.stderr.flush()
        print(json.dumps(message), file=replies, flush=True)

    _serve(make_server, iter(sys.stdin), reply)


if __name__ == "__main__":
    main()
