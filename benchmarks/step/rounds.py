"""How steps are measured: processes that take turns in rounds, in batches that fit into memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.reporting import installed
from benchmarks.step.contenders import CONTENDERS, MEMORY_JOBS, Contender
from benchmarks.step.devices import Cpu
from benchmarks.step.job import Stepper
from benchmarks.step.process import Worker, WorkerError
from benchmarks.step.tensor_lists import TensorList, tensor_list

MIN_ROUNDS = 3  # fewer give no median


@dataclass(frozen=True)
class Plan:
    """How long to measure; `deadline`, of time.monotonic(), is when to come to an end."""

    rounds: int
    turn: float
    budget: float
    setup_timeout: float
    deadline: float = math.inf

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def takes_part(self, number: int, step_s: float) -> bool:
        """Whether a contender has a turn in a round: a slow one sits out some, evenly."""
        rounds = int(min(self.rounds, max(self.budget // step_s, MIN_ROUNDS)))
        return (number + 1) * rounds // self.rounds > number * rounds // self.rounds


@dataclass
class Row:
    """One contender on one tensor list: what it is, and what was measured."""

    name: str
    label: str
    skipped: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, float] = field(default_factory=dict)  # round -> median seconds of its turn
    peak_extra_bytes: int | None = None

    def skip(self, reason: str) -> None:
        """Leaves it out from now on."""
        self.skipped = reason
        say(f"  skipping {self.name}: {reason}")

    def rate(self) -> float:
        """Bytes that must move, over time, in GB/s (1e9 bytes)."""
        rate: float = self.info["moved_bytes"] / median(self.rounds.values()) / 1e9
        return rate

    def record(self, numel: int, baseline: Row, copy: Row, kind: str) -> dict[str, Any]:
        """The row as it goes to the result file; times in ms, rates in GB/s."""
        row: dict[str, Any] = {"name": self.name, "label": self.label}
        if self.skipped is not None:
            return {**row, "skipped": self.skipped}
        times = list(self.rounds.values())
        quarter, _, three_quarters = quantiles(times, n=4, method="inclusive")
        row |= {"cpu_path": self.info["path"]} if kind == "cpu" else {}
        row |= {
            "ms": median(times) * 1e3,
            "ms_quartiles": [quarter * 1e3, three_quarters * 1e3],
            "ms_min": min(times) * 1e3,
            "speedup": None,
            "rounds": len(times),
            "ms_of_rounds": [t * 1e3 for t in times],
            "first_step_s": self.info["first_step_s"],
            "moved_bytes_per_parameter": None,
            "gb_per_s": self.rate(),
            "share_of_copy_rate": None,
            "state_bytes_per_parameter": None,
            "peak_extra_bytes": None,
        }
        if self.name not in MEMORY_JOBS:
            row["speedup"] = speed_over(self.rounds, baseline.rounds)
            row["moved_bytes_per_parameter"] = self.info["moved_bytes"] / numel
            row["share_of_copy_rate"] = self.rate() / copy.rate() if copy.rounds else None
            row["state_bytes_per_parameter"] = self.info["state_bytes"] / numel
            row["peak_extra_bytes"] = self.peak_extra_bytes
        return row if kind == "cpu" else {**row, "buckets": self.info["buckets"], "launches": None}


def speed_over(ours: dict[int, float], theirs: dict[int, float]) -> float | None:
    """How many times as fast as `theirs`: the median of the ratios in the rounds of both."""
    shared = [theirs[i] / t for i, t in ours.items() if i in theirs]
    return median(shared) if shared else None


def say(text: str) -> None:
    """Tells the person who waits."""
    print(text, file=sys.stderr, flush=True)


class Bench:
    """Measures tensor lists on one device; holds a process for each contender until `close`."""

    make_stepper: Any = Stepper

    def __init__(self, device: Cpu, name: str, threads: int, plan: Plan) -> None:
        self._device = device
        self._spec = (name, threads)
        self.plan = plan
        self._workers: dict[str, Worker] = {}

    def close(self) -> None:
        """Ends all processes."""
        for worker in self._workers.values():
            worker.stop()
        self._workers = {}

    # -- talking to processes ------------------------------------------------------------------

    def _ask(
        self, rows: list[Row], timeout: float, method: str, *arguments: Any
    ) -> list[tuple[Row, Any]]:
        """Calls a method in all rows' processes at a time; the answers. Who fails is skipped."""
        rows = [row for row in rows if row.skipped is None]
        for row in rows:
            self._workers[row.name].send(method, *arguments)
        start, answers = time.monotonic(), []
        for row in rows:
            try:
                left = timeout - (time.monotonic() - start)
                answers.append((row, self._workers[row.name].receive(left)))
            except WorkerError as error:
                row.skip(str(error))
                self._clear(row)
        return answers

    def _clear(self, row: Row) -> None:
        """Has what a failed row held given back; ends the process if it cannot even do that."""
        self._workers[row.name].send("free")
        try:
            self._workers[row.name].receive(60)
        except WorkerError:
            self._workers[row.name].stop()

    def _start(self, rows: list[Row]) -> None:
        """Starts the processes that do not run; one that ended gets another for the next list."""
        device, threads = self._spec
        for row in rows:
            if row.name not in self._workers or not self._workers[row.name].alive:
                path = CONTENDERS[row.name].cpu_path if row.name in CONTENDERS else None
                self._workers[row.name] = Worker(
                    self.make_stepper, row.name, device, threads,
                    threads=threads, environment={"TORCHAO8_CPU": path},
                )  # fmt: skip
            self._workers[row.name].send("ready")
        for row in rows:
            try:
                self._workers[row.name].receive(self.plan.setup_timeout)
            except WorkerError as error:
                row.skip(f"did not start: {error}")

    # -- the steps of a measurement ------------------------------------------------------------

    def _set_up(self, rows: list[Row], list_name: str, dtype: str) -> None:
        timeout = self.plan.setup_timeout
        if self.plan.deadline != math.inf:
            timeout = min(timeout, max(self.plan.deadline - time.monotonic(), 15))
        # On a GPU all at a time, since some compile on the CPU; there one would disturb the others.
        for some in [rows] if self._device.kind != "cpu" else [[row] for row in rows]:
            self._start([row for row in some if row.skipped is None])
            arguments = list_name, self._device.layers(), dtype
            for row, info in self._ask(some, timeout, "set_up", *arguments):
                row.info = info

    def _finish(self, rows: list[Row]) -> None:
        for row in rows:
            if row.skipped is None and len(row.rounds) < MIN_ROUNDS:
                row.skip(f"only {len(row.rounds)} rounds within the time limit")
        for row in rows:
            step_s = row.info.get("step_s", 0.0)
            for _, peak in self._ask([row], 60 + 20 * step_s, "peak_extra_bytes"):
                row.peak_extra_bytes = peak

    def _measure(self, rows: list[Row], list_name: str, dtype: str) -> None:
        self._set_up(rows, list_name, dtype)
        for row in rows:
            if row.skipped is None and MIN_ROUNDS * row.info["step_s"] > self.plan.budget:
                self._ask([row], 60, "free")
                row.skip(
                    f"a step takes {row.info['step_s']:.1f} s: {MIN_ROUNDS} of them would take "
                    f"more than the budget of {self.plan.budget:.0f} s"
                )
        for number in range(self.plan.rounds):
            if self.plan.late() and number >= MIN_ROUNDS:
                break
            first = number % len(rows)
            for row in rows[first:] + rows[:first]:
                if row.skipped is None and self.plan.takes_part(number, row.info["step_s"]):
                    time.sleep(self._device.settle_s)
                    timeout = 60 + 20 * (self.plan.turn + row.info["step_s"])
                    for _, seconds in self._ask([row], timeout, "turn", self.plan.turn):
                        row.rounds[number] = seconds
        self._finish(rows)

    def batches(
        self,
        chosen: list[Contender],
        everywhere: list[Contender],
        tensors: TensorList,
        itemsize: int,
    ) -> tuple[list[list[Contender]], list[Row]]:
        """Splits contenders into batches that fit into memory beside what runs in every batch.

        Also returns rows for those that fit into none.
        """
        device = self._device

        def need(one: Contender) -> int:
            held = tensors.numel * (2 * itemsize + one.state_bytes)
            return int(device.process_bytes + held + tensors.largest * one.temporary_bytes)

        buffers = 3 * device.buffer_bytes()
        always = sum(map(need, everywhere)) + 2 * device.process_bytes + buffers
        room = int(device.usable_share * device.free_bytes()) - always
        batches: list[list[Contender]] = [[]]
        too_large = []
        for one in chosen:
            if need(one) > room:
                reason = f"needs {need(one) / 1e9:.0f} GB of memory, of {room / 1e9:.0f} free"
                too_large.append(Row(one.name, one.label, skipped=reason))
                continue
            if sum(map(need, batches[-1])) + need(one) > room:
                batches.append([])
            batches[-1].append(one)
        return batches, too_large

    # -- what the command line asks for --------------------------------------------------------

    def case(
        self, chosen: Sequence[Contender], rivals: list[Contender], list_name: str, dtype: str
    ) -> dict[str, Any]:
        """Measures one tensor list with one parameter dtype; returns its part of the result.

        `rivals` run in every batch. Speed-ups are over the fastest of them, in the same rounds.
        """
        tensors = tensor_list(list_name, self._device.layers())
        say(f"{tensors.label}, {dtype}")
        present = [one for one in chosen if installed(one.package)]
        left_out = [Row(one.name, one.label, f"{one.package} is not installed")
                    for one in chosen if one not in present]  # fmt: skip
        if self._device.kind != "cpu":  # before its memory is counted: processes take some of it
            self._start([Row(c.name, c.label) for c in [*rivals, *present]])
        itemsize = getattr(torch, dtype).itemsize
        batches, too_large = self.batches(present, rivals, tensors, itemsize)
        left_out += too_large
        first: list[dict[str, Any]] = []
        repeated: list[dict[str, Any]] = []
        fastest = Row("", "")
        for number, batch in enumerate(batches):
            if number > 0 and self.plan.late():
                reason = "left out: the time limit has passed"
                left_out += [Row(one.name, one.label, skipped=reason) for one in batch]
                continue
            memory = [Row(name, label) for name, label in MEMORY_JOBS.items()]
            theirs, ours = ([Row(c.name, c.label) for c in some] for some in (rivals, batch))
            self._measure([*memory, *theirs, *ours], list_name, dtype)
            timed = [row for row in theirs if row.skipped is None]
            fastest = min(timed, key=lambda r: median(r.rounds.values()), default=Row("", ""))
            for row in [*theirs, *ours, *memory]:
                record = row.record(tensors.numel, fastest, memory[0], self._device.kind)
                shared = row not in ours
                place = repeated if shared and number > 0 else first
                place.append({**record, "batch": number})
        # The memory's rates behind the optimizers, whatever batch these are of.
        first.sort(key=lambda record: record["name"] in MEMORY_JOBS)
        skipped = [{"name": r.name, "label": r.label, "skipped": r.skipped, "batch": 0}
                   for r in left_out]  # fmt: skip
        return {
            "fastest": fastest.name,
            "list": list_name,
            "label": tensors.label,
            "tensors": len(tensors.shapes),
            "parameters": tensors.numel,
            "dtype": dtype,
            "rows": [*first, *repeated, *skipped],
        }

    def count_launches(self, case: dict[str, Any]) -> None:
        """Writes the kernel launches of a step into the rows of a case.

        For a last pass: a profiler slows down the process that it was in.
        """
        measured = [r for r in case["rows"] if "ms" in r and r["name"] not in MEMORY_JOBS]
        for batch in sorted({record["batch"] for record in measured}):
            if self.plan.late():
                break
            records = {r["name"]: r for r in measured if r["batch"] == batch}
            rows = [Row(name, name) for name in records]
            self._set_up(rows, case["list"], case["dtype"])
            for row, count in self._ask(rows, 30, "launches"):
                records[row.name]["launches"] = count
