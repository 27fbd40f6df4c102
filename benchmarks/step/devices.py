"""What differs between a CPU and a GPU: its memory, its timer, its profiler."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch.autograd import DeviceType
from torch.utils.benchmark import Timer

from benchmarks.reporting import describe_machine, kibibytes
from benchmarks.step.tensor_lists import LISTS, llama_layers

Step = Callable[[], object]


class Cpu:
    """The CPU, and what the classes of other devices replace."""

    kind = "cpu"
    lists = LISTS["cpu"]
    settle_s = 0.05  # before a turn: until the last one's OpenMP threads have stopped spinning
    process_bytes = 1 << 29  # of a process besides its tensors
    usable_share = 0.9  # of the free memory
    timeout = 600.0  # seconds for whatever a process does; some compile in the first step
    # What an option is if it is not given.
    defaults: ClassVar[dict[str, Any]] = {
        "list": ["gpt2"], "rounds": 15, "turn": 0.25, "budget": 60.0, "time_limit": math.inf,
    }  # fmt: skip

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)

    # -- for the process that asks -------------------------------------------------------------

    def describe(self, threads: int) -> dict[str, Any]:
        """What a timing depends on, for the result file."""
        return describe_machine(threads)

    def result_name(self) -> str:
        """How the names of result files begin."""
        return f"step-{self.kind}"

    def free_bytes(self) -> int:
        """Memory for processes that step; a guess where it is not known."""
        return kibibytes("/proc/meminfo", "MemAvailable") or 8 << 30

    def buffer_bytes(self) -> int:
        """Size of a memory job's buffer, at most: far more than a cache holds."""
        return 1 << 29

    def layers(self) -> int:
        """Depth of the list "llama"."""
        return 1

    # -- for a process that steps --------------------------------------------------------------

    def start(self) -> None:
        """Makes the device ready, so that no later step pays for it."""

    def seconds_of_first_step(self, step: Step) -> float:
        """Seconds of one call."""
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def seconds_of_step(self, step: Step, turn: float) -> float:
        """The median of the steps that fit into `turn` seconds, after one or a few untimed ones."""
        timer = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=turn).median

    def peak_extra_bytes(self, step: Step) -> int | None:
        """How far the process's resident memory rises above its present size during a step.

        What the allocator keeps for reuse is given back first, so that temporaries of earlier calls
        do not hide those of this one. None where the kernel cannot reset the high-water mark.
        """
        self.free()
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return None
        before = kibibytes("/proc/self/status", "VmRSS")
        step()
        peak = kibibytes("/proc/self/status", "VmHWM")
        return None if before is None or peak is None else max(peak - before, 0)

    def launches(self, step: Step) -> int | None:
        """Kernels that a step starts on the device; None if there is no telling."""
        return None

    def free(self) -> None:
        """Gives back the memory of what is no longer used."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class Cuda(Cpu):
    """A GPU, "cuda" or "cuda:N"."""

    kind = "cuda"
    lists = LISTS["cuda"]
    settle_s = 0.0
    process_bytes = 1 << 28  # they are there when free memory is read, so this is for code
    usable_share = 0.95
    timeout = 80.0
    # Everything must be over in three minutes.
    defaults: ClassVar[dict[str, Any]] = {
        "list": ["all"], "rounds": 9, "turn": 0.05, "budget": 10.0, "time_limit": 150.0,
    }  # fmt: skip

    def __init__(self, name: str) -> None:
        self.index = torch.device(name).index or 0
        self.device = torch.device("cuda", self.index)
        if torch.version.cuda is None:
            raise ValueError(f"torch {torch.__version__} is built without CUDA")
        if self.index >= torch.cuda.device_count():
            found = torch.cuda.device_count()
            raise ValueError(f"there is no GPU {self.index}: torch finds {found}")
        from torchao8 import ops

        if ops.CUDA_EXTENSION_FILE is None:
            raise ValueError(f"torchao8 has no CUDA kernels: {ops.CUDA_MISSING}")

    def describe(self, threads: int) -> dict[str, Any]:
        gpu = torch.cuda.get_device_properties(self.index)
        described = {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "memory_bytes": gpu.total_memory,
            "l2_bytes": getattr(gpu, "L2_cache_size", None),
            "driver": _driver_version(),
        }
        # The host's part in a step shows where tensors are small.
        return {**describe_machine(threads), "gpu": described}

    def result_name(self) -> str:
        name = torch.cuda.get_device_properties(self.index).name.lower()
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-")

    def _total_bytes(self) -> int:
        return int(torch.cuda.get_device_properties(self.index).total_memory)

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.index)[0])

    def buffer_bytes(self) -> int:
        return min(1 << 31, self._total_bytes() // 32)  # 2 GiB on a large card

    def layers(self) -> int:
        # A tenth goes to the processes' contexts, and three buffers to the memory jobs.
        return llama_layers(int(0.9 * self._total_bytes()) - 3 * self.buffer_bytes())

    def start(self) -> None:
        torch.cuda.set_device(self.index)
        torch.ones(1, device=self.device)
        torch.cuda.synchronize()

    def seconds_of_first_step(self, step: Step) -> float:
        def step_and_wait() -> None:
            step()
            torch.cuda.synchronize()

        torch.cuda.synchronize()
        return super().seconds_of_first_step(step_and_wait)

    def seconds_of_step(self, step: Step, turn: float) -> float:
        """The median time between events that lie between steps, enqueued without waiting.

        So a step takes what the GPU takes for it or what the host takes to enqueue it, whichever is
        longer, as in a training loop that waits for nothing.
        """
        trial = median(self._enqueued(step, 3))
        return median(self._enqueued(step, max(1, min(200, int(turn / trial)))))

    def _enqueued(self, step: Step, count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        torch.cuda.synchronize()
        gc.disable()
        try:
            step()
            events[0].record()
            for event in events[1:]:
                step()
                event.record()
            torch.cuda.synchronize()
        finally:
            gc.enable()
        return [start.elapsed_time(end) / 1e3 for start, end in itertools.pairwise(events)]

    def peak_extra_bytes(self, step: Step) -> int | None:
        """How far the memory of tensors rises during a step."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return max(torch.cuda.max_memory_allocated() - before, 0)

    def launches(self, step: Step) -> int | None:
        # Nothing is timed after this, so the profiler may stay in the process. It is taken out by a
        # thread of its own, which is known to collide with the next use.
        os.environ["TEARDOWN_CUPTI"] = "0"
        from torch.profiler import ProfilerActivity, profile

        step()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step()
            torch.cuda.synchronize()
        # None: the profiler saw nothing, since every step starts a kernel.
        return count_kernels(profiler.events() or ()) or None

    def free(self) -> None:
        torch.cuda.synchronize()  # raises where the context did not outlive an error
        gc.collect()
        torch.cuda.empty_cache()


def count_kernels(events: Iterable[Any]) -> int:
    """Kernels among a profiler's events: not the copies and fills, waits and named regions."""
    return sum(
        event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
        and not event.name.endswith(" Sync")
        for event in events
    )


def _driver_version() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(query, capture_output=True, text=True, check=False).stdout.splitlines()
    return lines[0].strip() if lines else None


DEVICES: dict[str, type[Cpu]] = {"cpu": Cpu, "cuda": Cuda}


def open_device(name: str) -> Cpu:
    """The device of this name: "cpu", "cuda" or "cuda:N".

    Raises:
        ValueError: there is no such device, or nothing can run on it.
    """
    kind, _, index = name.partition(":")
    if kind not in DEVICES or (index and (kind == "cpu" or not index.isdigit())):
        raise ValueError(f"expected cpu, cuda or cuda:N, got {name!r}")
    return DEVICES[kind](name)
