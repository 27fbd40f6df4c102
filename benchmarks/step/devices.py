"""What differs between a CPU and a GPU: memory, timing, the profiler, defaults of the options."""

from __future__ import annotations

import contextlib
import ctypes
import gc
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
from torch.utils import collect_env
from torch.utils.benchmark import Timer

from benchmarks.reporting import describe_machine, kibibytes
from benchmarks.step.contenders import QUICK
from benchmarks.step.tensor_lists import LISTS

Step = Callable[[], object]

_ALONE_S = 0.05  # for steps one by one, which tell the host's time
_QUEUED_S = 0.004  # of the host's time that is queued at once: it enqueues some 1,000 kernels in it
# What nvidia-smi is asked for; MHz, W and degrees Celsius.
_CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,temperature.gpu"


class Cpu:
    """The CPU, and what the classes of other devices replace."""

    kind = "cpu"
    lists = LISTS["cpu"]
    settle_s = 0.05  # before a turn: until the last one's OpenMP threads have stopped spinning
    process_bytes = 1 << 29  # of a process besides its tensors
    buffer_bytes = 1 << 29  # of a memory job's buffer, at most: far more than a cache holds
    usable_share = 0.9  # of the free memory
    timeout = 600.0  # seconds for whatever a process does; some compile in the first step
    # What an option is if it is not given.
    defaults: ClassVar[dict[str, Any]] = {
        "list": ["gpt2"], "rounds": 15, "turn": 0.25, "budget": 60.0, "time_limit": math.inf,
    }  # fmt: skip
    quick: ClassVar[dict[str, Any]] = {  # the same with --quick
        "list": ["gpt2"], "rounds": 5, "turn": 0.1, "budget": 10.0, "time_limit": math.inf,
    }  # fmt: skip

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.result_name = f"step-{name}"  # how the names of result files begin

    def describe(self, threads: int) -> dict[str, Any]:
        """What a timing depends on, for the result file."""
        return describe_machine(threads)

    def clocks(self) -> dict[str, str] | None:
        """Clocks, power and temperature at this moment; None where nothing tells them."""
        return None

    def free_bytes(self) -> int:
        """Memory for processes that step; a guess where it is not known."""
        return kibibytes("/proc/meminfo", "MemAvailable") or 8 << 30

    # -- for a process that steps --------------------------------------------------------------

    def start(self) -> None:
        """Makes the device ready, so that no later step pays for it."""

    def seconds_of_step(self, step: Step, turn: float) -> float:
        """The median of the steps that fit into `turn` seconds, after one or a few untimed ones."""
        return _timer(step).blocked_autorange(min_run_time=turn).median

    def captured(self, step: Step) -> Step:
        """Replays of a graph of a step, of which one was taken before."""
        raise NotImplementedError(f"{self.kind} has no graphs")

    def times_alone(self, step: Step) -> dict[str, float | None]:
        """Seconds of the host and of the device for a step; nothing where they are the same."""
        return {}

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
    process_bytes = 1 << 29
    usable_share = 0.95
    timeout = 120.0
    # Everything must be over in three minutes.
    defaults: ClassVar[dict[str, Any]] = {
        "list": ["all"], "rounds": 9, "turn": 0.05, "budget": 10.0, "time_limit": 150.0,
    }  # fmt: skip
    quick: ClassVar[dict[str, Any]] = {
        "list": [*QUICK], "rounds": 5, "turn": 0.03, "budget": 3.0, "time_limit": 40.0,
    }  # fmt: skip

    def __init__(self, name: str) -> None:
        self.device = torch.device("cuda", torch.device(name).index or 0)
        if torch.version.cuda is None:
            raise ValueError(f"torch {torch.__version__} is built without CUDA")
        found = torch.cuda.device_count()
        if self.device.index >= found:
            raise ValueError(f"there is no GPU {self.device.index}: torch finds {found}")
        from torchao8 import ops

        if ops.CUDA_EXTENSION_FILE is None:
            raise ValueError(f"torchao8 has no CUDA kernels: {ops.CUDA_MISSING}")
        gpu = torch.cuda.get_device_properties(self.device)
        self.result_name = re.sub(r"[^a-z0-9]+", "-", gpu.name.lower()).strip("-")
        self.buffer_bytes = min(1 << 31, gpu.total_memory // 32)  # 2 GiB on a large card

    def describe(self, threads: int) -> dict[str, Any]:
        gpu = torch.cuda.get_device_properties(self.device)
        names = ("name", "major", "minor", "multi_processor_count", "total_memory", "L2_cache_size")
        described = {name: getattr(gpu, name, None) for name in names}
        described["driver"] = collect_env.get_nvidia_driver_version(collect_env.run)
        described["before"] = self.clocks()
        # The host's part in a step shows where tensors are small.
        return {**describe_machine(threads), "gpu": described}

    def clocks(self) -> dict[str, str] | None:
        smi = shutil.which("nvidia-smi")
        if smi is None:
            return None
        # torch may see fewer GPUs than there are, under other numbers.
        uuid = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
        asked = [smi, f"--id={uuid}", f"--query-gpu={_CLOCKS}", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return dict(zip(_CLOCKS.split(","), told.stdout.strip().split(", "), strict=False))

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def start(self) -> None:
        torch.cuda.set_device(self.device)
        torch.ones(1, device=self.device)
        torch.cuda.synchronize()

    def seconds_of_step(self, step: Step, turn: float) -> float:
        """The mean of steps that are enqueued without waiting, with one wait at the end.

        So a step takes what the GPU takes for it or what the host takes to enqueue it, whichever is
        longer, as in a training loop that waits for nothing.
        """
        trial = _timer(step).timeit(3).mean
        return _timer(step).timeit(max(1, int(turn / trial))).mean

    def captured(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return graph.replay

    # What a test replaces: a clock, a wait for the GPU, work for it that takes so many seconds at
    # least, and an event.
    now: Callable[[], float] = staticmethod(time.perf_counter)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def occupy(self, seconds: float) -> None:
        torch.cuda._sleep(int(3e9 * seconds))  # cycles; no GPU has 3 GHz

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def times_alone(self, step: Step) -> dict[str, float | None]:
        """What a step takes the host if the GPU is idle, and the GPU if the host is ahead of it.

        The host: until the call returns, where nothing was enqueued before. The GPU: between events
        around a few steps that were all enqueued before it began with the first. None for the GPU
        if that cannot be: the step waits for it, or starts more kernels than the queue holds.
        """
        gc.collect()
        gc.disable()
        try:
            host = self._host_seconds(step)
            return {"host_s": host, "device_s": self._device_seconds(step, host)}
        finally:
            gc.enable()

    def _host_seconds(self, step: Step) -> float:
        times: list[float] = []
        deadline = self.now() + _ALONE_S
        while len(times) < 5 or self.now() < deadline:
            self.wait()
            begin = self.now()
            step()
            times.append(self.now() - begin)
        self.wait()
        return median(times)

    def _device_seconds(self, step: Step, host: float) -> float | None:
        # What did not fit into the queue, or took the host longer than foreseen, may fit in fewer
        # steps and with more time.
        for most, times in ((20, 2), (4, 4), (1, 8)):
            count = max(1, min(most, int(_QUEUED_S / host)))
            self.occupy(times * count * host + 1e-4)
            begin = self.mark()
            for _ in range(count):
                step()
            ahead, end = not begin.query(), self.mark()
            self.wait()
            if ahead:
                return begin.elapsed_time(end) * 1e-3 / count
        return None

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


def _timer(step: Step) -> Timer:
    """torch's timer: it waits for a GPU, and sets the garbage collector off."""
    return Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())


def count_kernels(events: Iterable[Any]) -> int:
    """Kernels among a profiler's events: not the copies and fills, waits and named regions."""
    return sum(
        event.device_type == DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith(("Memcpy", "Memset"))
        and not event.name.endswith(" Sync")
        for event in events
    )


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
