"""What `train_gpt.py` measures besides the loss, and how it shows the results."""

import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch

matplotlib.use("Agg")  # draws to a file, also where there is no display
import matplotlib.pyplot as plt

STATUS = Path("/proc/self/status")
# glibc reads these when a process starts, and then returns freed memory to the system at once.
# Otherwise the heap keeps tens of megabytes, not always as many, and hides how optimizers differ.
EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
NOTES = """Peak memory: of a new process that takes three training steps; on the CPU all of its
resident memory, Python and PyTorch included. Step: median time of the optimizer's compiled step."""


@dataclass
class Result:
    """One row of the table."""

    name: str
    losses: list[float]
    held_out: list[tuple[int, float]]
    optimizer_bytes: float
    peak_bytes: int | None  # None if not measured
    step_ms: float | None  # None if not measured


def _percent(share: float) -> str:
    """With its sign, unless it rounds to 0."""
    text = f"{100 * share:+.2f}%"
    return "0.00%" if text in ("+0.00%", "-0.00%") else text


def peak_memory(device: str, work: Callable[..., object], *arguments: Any) -> int | None:
    """Return the peak memory in bytes of a new process that does some work.

    On a CUDA device, it is the memory of all live tensors. On the CPU, it is the resident memory of
    the process, Python and PyTorch included; None if the system does not report it.
    """
    # A new process, because one that has done other work keeps some of its memory.
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, EXACT_MALLOC), ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(_peak_memory_here, device, work, *arguments).result()


def _peak_memory_here(device: str, work: Callable[..., object], *arguments: Any) -> int | None:
    work(*arguments)
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: its maximum starts from what the parent process used.
    lines = STATUS.read_text().splitlines() if STATUS.exists() else []
    peaks = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return peaks[0] * 1024 if peaks else None


def median_ms(calls: dict[str, Callable[[], object]], device: str, rounds: int) -> dict[str, float]:
    """Time the calls in turn, so that a busy moment of the machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def table(results: list[Result]) -> str:
    """Return the results as a Markdown table; the others are compared with the first."""
    header = ["optimizer", "held-out loss", "difference", "optimizer state"]
    units = ["", "nats per byte", "", "bytes per parameter"]
    timed = results[0].step_ms is not None
    if timed:
        header += ["peak memory", "step"]
        units += ["MB", "ms"]
    reference = results[0].held_out[-1][1]
    rows = [header, units]
    for result in results:
        loss = result.held_out[-1][1]
        rows.append(
            [
                result.name,
                f"{loss:.4f}",
                _percent(loss / reference - 1),
                f"{result.optimizer_bytes:.2f}",
            ]
        )
        if timed:
            peak = result.peak_bytes
            rows[-1] += [
                "not known" if peak is None else f"{peak / 1e6:.1f}",
                f"{result.step_ms:.2f}",
            ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    rule = ["-" * (width - 1) + ":" for width in widths]
    rule[0] = "-" * widths[0]
    lines = [rows[0], rule, *rows[1:]]
    drawn = ["| " + " | ".join(map(_pad, line, widths)) + " |" for line in lines]
    return "\n".join([*drawn, "", NOTES] if timed else drawn)


def _pad(cell: str, width: int) -> str:
    numeric = cell[:1] in "+-0123456789"
    return cell.rjust(width) if numeric else cell.ljust(width)


def machine(device: str) -> str:
    """Return the processor and the versions of the measurement."""
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return f"{processor}; torch {torch.__version__}, Python {platform.python_version()}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def command() -> str:
    return shlex.join(["python", *sys.argv])


def plot(results: list[Result], path: Path) -> None:
    """Draw the loss curves, and below them how far each run is from the first."""
    figure, (curves, differences) = plt.subplots(
        2, 1, figsize=(8, 8), sharex=True, height_ratios=[2, 1], layout="constrained"
    )
    reference = dict(results[0].held_out)
    for number, result in enumerate(results):
        # The curves nearly coincide, so each one is drawn thinner than those below it.
        style = {"color": f"C{number}", "marker": "o", "linewidth": 2 * (len(results) - number)}
        style["markersize"] = 3 + style["linewidth"]
        steps, held_out = zip(*result.held_out, strict=True)
        curves.plot(steps, held_out, label=f"{result.name}, held out", **style)
        curves.plot(result.losses, color=f"C{number}", alpha=0.4, linewidth=0.6)
        percent = [100 * (loss / reference[step] - 1) for step, loss in result.held_out]
        differences.plot(steps, percent, **style)
    curves.set_ylabel("loss (nats per byte); thin: training batches")
    curves.legend()
    differences.set_ylabel(f"held-out loss against\n{results[0].name} (%)")
    differences.set_xlabel("step")
    figure.savefig(path, dpi=120)
    plt.close(figure)
