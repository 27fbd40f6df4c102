"""Step time and memory of 8-bit and 32-bit AdamW, side by side.

Every contender lives in a process of its own and they take turns, in an order that rotates, so that
a machine whose speed drifts slows all of them alike. A row's time is the median over its turns; its
speed-up is the median of the ratios to torch's fused AdamW in the same round. The machine's memory
rate is measured by two more contenders in the same rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from _common import (
    RESULTS,
    CpuWatch,
    describe_machine,
    installed,
    meminfo,
    usable_cores,
    versions,
    write_results,
)
from _contenders import BASELINE, CONTENDERS, MAX_BUFFER_BYTES, MEMORY_JOBS, TENSOR_LISTS, Contender
from _report import draw, in_order, table, title

PACKAGES = ("torchao8", "bitsandbytes", "torchao", "deepspeed")
_MIN_ROUNDS = 3  # fewer give no median
_SLOW_S = 0.5  # a step this long needs no untimed one before it
_SETTLE_S = 0.05  # until the last one's OpenMP threads have stopped spinning
_PROCESS_BYTES = 1 << 29  # of a worker besides its tensors
_BUSY_SHARE = 0.03  # of the CPU time; with more gone elsewhere, timings are doubtful


class WorkerError(RuntimeError):
    """A worker failed or did not answer in time; the message says which."""


class Worker:
    """A process that runs one contender's steps on request; `_worker.py` is its program."""

    def __init__(self, spec: dict[str, Any]) -> None:
        env = dict(os.environ, OMP_NUM_THREADS=str(spec["threads"]))
        env.pop("TORCHAO8_CPU", None)
        if spec["cpu_path"] is not None:
            env["TORCHAO8_CPU"] = spec["cpu_path"]
        # Where a library compiles code at run time, ninja stands beside the interpreter.
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        self._log = tempfile.TemporaryFile()  # stop() closes it
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            bufsize=0,
            start_new_session=True,  # so that what it starts can be stopped with it
        )
        self.send(spec)

    def send(self, request: dict[str, Any]) -> None:
        """Sends a request; WorkerError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
        except BrokenPipeError:
            raise WorkerError(f"the process ended (exit status {self._process.wait()})") from None

    def receive(self, timeout: float) -> dict[str, Any]:
        """The next reply; WorkerError if there is none within `timeout` seconds."""
        pipe = self._process.stdout
        assert pipe is not None
        if not select.select([pipe], [], [], timeout)[0]:
            raise WorkerError(f"no answer within {timeout:.0f} s")
        line = pipe.readline()
        if not line:
            raise WorkerError(f"the process ended (exit status {self._process.wait()})")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def log_tail(self, lines: int = 12) -> str:
        """The end of what a failed process wrote to standard error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)  # the traceback follows the reply
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ends the process and whatever it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()


@dataclass
class Row:
    """One contender on one tensor list: what it is, and what was measured."""

    name: str
    label: str
    skipped: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, float] = field(default_factory=dict)  # round -> median seconds of its turn
    peak_extra_bytes: int | None = None
    worker: Worker | None = None

    def record(self, numel: int, baseline: Row, copy_rate: float | None) -> dict[str, Any]:
        """The row as it goes to the result file; times in ms, rates in GB/s (1e9 bytes)."""
        row: dict[str, Any] = {"name": self.name, "label": self.label}
        if self.skipped is not None:
            return {**row, "skipped": self.skipped}
        times = list(self.rounds.values())
        quarter, _, three_quarters = quantiles(times, n=4, method="inclusive")
        shared = [baseline.rounds[i] / t for i, t in self.rounds.items() if i in baseline.rounds]
        optimizer = self.name not in MEMORY_JOBS
        rate = self.rate()
        return {
            **row,
            "cpu_path": self.info["path"],
            "ms": median(times) * 1e3,
            "ms_quartiles": [quarter * 1e3, three_quarters * 1e3],
            "ms_min": min(times) * 1e3,
            "speedup": median(shared) if optimizer and shared else None,
            "rounds": len(times),
            "ms_of_rounds": [t * 1e3 for t in times],
            "first_step_s": self.info["first_step_s"],
            "moved_bytes_per_parameter": self.info["moved_bytes"] / numel if optimizer else None,
            "gb_per_s": rate,
            "share_of_copy_rate": rate / copy_rate if copy_rate and optimizer else None,
            "state_bytes_per_parameter": self.info["state_bytes"] / numel if optimizer else None,
            "peak_extra_bytes": self.peak_extra_bytes if optimizer else None,
        }

    def rate(self) -> float:
        """Bytes that must move, over time, in GB/s."""
        return self.info["moved_bytes"] / median(self.rounds.values()) / 1e9


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _start(row: Row, list_name: str, dtype: str, args: argparse.Namespace) -> None:
    """Starts the row's worker and waits for its first two steps; a failure marks the row."""
    contender = CONTENDERS.get(row.name)
    if contender is not None and not installed(contender.package):
        row.skipped = f"{contender.package} is not installed"
        return
    spec = {
        "contender": row.name,
        "list": list_name,
        "dtype": dtype,
        "threads": args.threads,
        "cpu_path": contender.cpu_path if contender is not None else None,
    }
    _say(f"  setting up {row.name}")
    row.worker = Worker(spec)
    try:
        row.info = row.worker.receive(args.setup_timeout)
        if _MIN_ROUNDS * row.info["step_s"] > args.budget:
            raise WorkerError(
                f"a step takes {row.info['step_s']:.1f} s: {_MIN_ROUNDS} of them would take more "
                f"than the budget of {args.budget:.0f} s"
            )
    except WorkerError as error:
        _drop(row, error)


def _drop(row: Row, error: WorkerError) -> None:
    assert row.worker is not None
    row.skipped = str(error)
    _say(f"  skipping {row.name}: {error}")
    if "Error" in row.skipped:
        _say(row.worker.log_tail())
    row.worker.stop()
    row.worker = None


def _rounds_within(row: Row, args: argparse.Namespace) -> int:
    return int(min(args.repeats, max(args.budget // row.info["step_s"], _MIN_ROUNDS)))


def _take_turn(row: Row, number: int, args: argparse.Namespace) -> None:
    """Round `number`: as many steps as fit into one turn."""
    rounds = _rounds_within(row, args)
    if (number + 1) * rounds // args.repeats == number * rounds // args.repeats:
        return  # a slow contender sits out some rounds, evenly
    assert row.worker is not None
    steps = max(1, min(200, int(args.turn / row.info["step_s"])))
    time.sleep(_SETTLE_S)
    request = {"do": "run", "steps": steps, "warm_up": row.info["step_s"] < _SLOW_S}
    try:
        row.worker.send(request)
        reply = row.worker.receive(60 + 20 * (steps + 1) * row.info["step_s"])
    except WorkerError as error:
        _drop(row, error)
        return
    row.rounds[number] = median(reply["seconds"])


def _finish(row: Row) -> None:
    if row.worker is None:
        return
    try:
        row.worker.send({"do": "finish"})
        reply = row.worker.receive(60 + 20 * row.info["step_s"])
        row.peak_extra_bytes = reply["peak_extra_bytes"]
    except WorkerError as error:
        _drop(row, error)
        return
    row.worker.stop()
    row.worker = None


def _measure_batch(rows: list[Row], list_name: str, dtype: str, args: argparse.Namespace) -> None:
    try:
        for row in rows:
            _start(row, list_name, dtype, args)
        for number in range(args.repeats):
            turn = number % len(rows)
            for row in rows[turn:] + rows[:turn]:
                if row.worker is not None:
                    _take_turn(row, number, args)
            _say(f"  round {number + 1} of {args.repeats}")
        for row in rows:
            _finish(row)
    finally:
        for row in rows:
            if row.worker is not None:
                row.worker.stop()


def _batches(
    contenders: list[Contender], list_name: str, dtype: str
) -> tuple[list[list[Contender]], list[Row]]:
    """Splits contenders into batches that fit into memory beside what runs in every batch.

    Also returns rows for those that fit into none.
    """
    tensors = TENSOR_LISTS[list_name]
    itemsize = getattr(torch, dtype).itemsize

    def need(contender: Contender) -> int:
        held = tensors.numel * (2 * itemsize + contender.state)
        return _PROCESS_BYTES + held + tensors.largest * contender.temporary

    buffers = 3 * MAX_BUFFER_BYTES
    always = need(CONTENDERS[BASELINE]) + 2 * _PROCESS_BYTES + buffers
    room = int(0.9 * (meminfo("MemAvailable") or 8 << 30)) - always
    batches: list[list[Contender]] = [[]]
    too_large = []
    used = 0
    for contender in contenders:
        if need(contender) > room:
            reason = f"needs {need(contender) / 1e9:.0f} GB of memory, of {room / 1e9:.0f} free"
            too_large.append(Row(contender.name, contender.label, skipped=reason))
            continue
        if used + need(contender) > room:
            batches.append([])
            used = 0
        batches[-1].append(contender)
        used += need(contender)
    return batches, too_large


def measure(
    contenders: list[Contender], list_name: str, dtype: str, args: argparse.Namespace
) -> dict[str, Any]:
    """Measures one tensor list with one parameter dtype; returns its part of the result file."""
    tensors = TENSOR_LISTS[list_name]
    _say(f"{tensors.label}, {dtype}")
    others = [contender for contender in contenders if contender.name != BASELINE]
    batches, too_large = _batches(others, list_name, dtype)
    records = []
    for number, batch in enumerate(batches):
        memory = [Row(name, label) for name, label in MEMORY_JOBS.items()]
        baseline = Row(BASELINE, CONTENDERS[BASELINE].label)
        rows = [baseline, *(Row(contender.name, contender.label) for contender in batch)]
        _measure_batch([*memory, *rows], list_name, dtype, args)
        copy = next(row for row in memory if row.name == "copy")
        copy_rate = copy.rate() if copy.rounds else None
        rows += memory + (too_large if number == 0 else [])
        batch_records = [row.record(tensors.numel, baseline, copy_rate) for row in rows]
        records += [{**record, "batch": number} for record in batch_records]
    return {
        "list": list_name,
        "label": tensors.label,
        "tensors": len(tensors.shapes),
        "parameters": tensors.numel,
        "dtype": dtype,
        "rows": in_order(records),
    }


def _chosen(args: argparse.Namespace, list_name: str) -> list[Contender]:
    if args.contenders is None:
        return [one for one in CONTENDERS.values() if list_name in one.lists]
    names = dict.fromkeys([BASELINE, *args.contenders])  # speed-ups are ratios to it
    return [CONTENDERS[name] for name in names]


def _positive(kind: type) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
        return value

    return parse


def _parser() -> argparse.ArgumentParser:
    lists = "\n".join(f"  {name:15}{one.label}" for name, one in TENSOR_LISTS.items())
    names = "\n".join(
        f"  {one.name:15}{one.label}" + ("" if one.lists else "  (only when named)")
        for one in CONTENDERS.values()
    )
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"lists:\n{lists}\n\ncontenders:\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--list", choices=[*TENSOR_LISTS, "all"], default="gpt2", help="tensors to step over (gpt2)"
    )
    add(
        "--dtype",
        choices=["float32", "bfloat16", "both"],
        default="both",
        help="dtype of parameters and gradients (both)",
    )
    add("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help="which (below)")
    add("--repeats", type=_positive(int), default=15, help="rounds of turns, at least 3 (15)")
    add("--turn", type=_positive(float), default=0.25, help="seconds of steps in a turn (0.25)")
    add(
        "--budget",
        type=_positive(float),
        default=60,
        help="seconds of steps per row; who needs more for 3 rounds is skipped (60)",
    )
    add(
        "--setup-timeout",
        type=_positive(float),
        default=600,
        help="seconds for a contender's first two steps, some compile in them (600)",
    )
    add("--threads", type=_positive(int), default=usable_cores(), help="threads (all cores)")
    add("--device", default="cpu", help="device to run on; only cpu so far")
    add("--name", help="name of the result files (step-DEVICE-LIST)")
    add("--out", type=Path, default=RESULTS, help="folder of the result files")
    add("--no-plot", action="store_true", help="draw no PNG")
    return parser


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.device != "cpu":
        parser.error(f"--device: this benchmark runs on cpu only so far, got {args.device!r}")
    if args.repeats < _MIN_ROUNDS:
        parser.error(f"--repeats: must be at least {_MIN_ROUNDS}, got {args.repeats}")
    if not args.no_plot and not installed("matplotlib"):
        parser.error("the plot needs matplotlib: install it, or give --no-plot")
    if args.name is None:
        args.name = f"step-{args.device}" + ("" if args.list == "all" else f"-{args.list}")
    return args


def main(argv: Iterable[str] | None = None) -> None:
    """Runs the benchmark with the command line `argv` (of the process if None)."""
    args = _parse(argv)
    torch.set_num_threads(args.threads)
    machine = describe_machine(args.threads)
    dtypes = ["float32", "bfloat16"] if args.dtype == "both" else [args.dtype]
    lists = list(TENSOR_LISTS) if args.list == "all" else [args.list]
    watch = CpuWatch()
    cases = []
    for list_name in lists:
        for dtype in dtypes:
            case = measure(_chosen(args, list_name), list_name, dtype, args)
            cases.append(case)
            print(f"\n{title(case)}, {args.threads} threads\n{table(case)}\n", flush=True)
    machine["cpu_taken_by_others"] = shares = watch.shares()
    if shares is not None and sum(shares.values()) > _BUSY_SHARE:
        _say(
            f"the machine was not quiet: other processes took {shares['others']:.0%} of the CPU "
            f"time, a hypervisor {shares['stolen']:.0%}"
        )
    record = {"device": machine, "versions": versions(PACKAGES), "cases": cases}
    print(f"wrote {write_results(args.name, record, args.out)}")
    if not args.no_plot:
        picture = args.out / f"{args.name}.png"
        draw(cases, machine, picture)
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
