"""How steps are measured: processes that take turns in rounds, in batches that fit into memory."""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.process import Worker, WorkerError
from benchmarks.reporting import installed, say
from benchmarks.step.contenders import MEMORY, Contender
from benchmarks.step.devices import Cpu
from benchmarks.step.job import Stepper
from benchmarks.step.tensor_lists import TensorList

MIN_ROUNDS = 3  # fewer give no median


@dataclass(frozen=True)
class Plan:
    """How long to measure; `deadline`, of time.monotonic(), is when to come to an end."""

    rounds: int
    turn: float
    budget: float
    deadline: float = math.inf

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def turns(self, step_s: float) -> range:
        """The rounds in which a contender has a turn: a slow one sits out some, evenly."""
        return range(0, self.rounds, math.ceil(max(1.0, self.rounds * step_s / self.budget)))


@dataclass
class Row:
    """One contender on one tensor list: what it is, and what was measured."""

    contender: Contender
    batch: int = 0
    skipped: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, float] = field(default_factory=dict)  # round -> median seconds of its turn
    peak_extra_bytes: int | None = None
    saved_bytes: int | None = None
    launches: int | None = None

    @property
    def name(self) -> str:
        """That of the contender."""
        return self.contender.name

    def skip(self, reason: str) -> None:
        """Leaves it out from now on, for the first reason that is told."""
        if self.skipped is None:
            self.skipped = reason
            say(f"  skipping {self.name}: {reason}")


def ratios(ours: dict[int, float], theirs: dict[int, float]) -> list[float]:
    """How many times as fast as `theirs`, in the rounds of both."""
    return [theirs[i] / t for i, t in ours.items() if i in theirs]


class Bench:
    """Measures on one device; holds a process, or one for each rank, for each contender.

    Ends all processes when its context is left.
    """

    def __init__(self, device: Cpu, threads: int, plan: Plan, ranks: int = 1) -> None:
        self.plan = plan
        self._device, self._threads, self._ranks = device, threads, ranks
        self._workers: dict[str, list[Worker]] = {}
        self._folder = tempfile.TemporaryDirectory()
        self._places = (f"{self._folder.name}/{i}" for i in itertools.count())

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def stop(self) -> None:
        """Ends all processes; others are started where they are needed."""
        for name in list(self._workers):
            self._end(name)

    # -- talking to processes ------------------------------------------------------------------

    def _ask(
        self, rows: list[Row], timeout: float, method: str, *arguments: Any
    ) -> list[tuple[Row, list[Any]]]:
        """Calls a method in all rows' processes at a time; the answers. Who fails is skipped."""
        rows = [row for row in rows if row.skipped is None]
        for worker in (worker for row in rows for worker in self._workers[row.name]):
            worker.send(method, *arguments)
        end, found = time.monotonic() + timeout, []
        for row in rows:
            answers = []
            for worker in self._workers[row.name]:
                try:
                    answers.append(worker.receive(end - time.monotonic()))
                except WorkerError as error:
                    row.skip(str(error))
            if row.skipped is None:
                found.append((row, answers))
            else:
                self._end(row.name)
        return found

    def _end(self, name: str) -> None:
        for worker in self._workers.pop(name, []):
            worker.stop()

    def _start(self, rows: list[Row]) -> None:
        """Starts the processes that do not run: one that failed gets another for the next list."""
        for row in rows:
            if row.name not in self._workers:
                one, store = row.contender, next(self._places)
                environment = {"OMP_NUM_THREADS": str(self._threads), "TORCHAO8_CPU": one.cpu_path}
                self._workers[row.name] = [
                    Worker(Stepper, one, self._device, self._threads, rank, self._ranks, store,
                           environment=environment, source=one.source)
                    for rank in range(self._ranks)
                ]  # fmt: skip
        self._ask(rows, self._device.setup_timeout, "ready")

    # -- the steps of a measurement ------------------------------------------------------------

    def _set_up(self, rows: list[Row], tensors: TensorList, dtype: str) -> None:
        left = self.plan.deadline - time.monotonic()
        timeout = min(self._device.setup_timeout, max(left, 15))
        # On a GPU all at a time, since some compile on the CPU; there one would disturb the others.
        for some in [rows] if self._device.kind != "cpu" else [[row] for row in rows]:
            self._start([row for row in some if row.skipped is None])
            for row, answers in self._ask(some, timeout, "set_up", tensors, dtype):
                row.info = {**answers[0], "bits": [answer["bits"] for answer in answers]}

    def _finish(self, rows: list[Row]) -> None:
        for row in rows:
            if row.skipped is None and len(row.rounds) < MIN_ROUNDS:
                row.skip(f"only {len(row.rounds)} rounds within the time limit")
                self._end(row.name)
            timeout = 60 + 20 * row.info.get("step_s", 0.0)
            for _, peaks in self._ask([row], timeout, "peak_extra_bytes"):
                row.peak_extra_bytes = peaks[0]
            if row.contender.tensors == "DTensor":
                for _, sizes in self._ask([row], 600, "saved_bytes", next(self._places)):
                    row.saved_bytes = sizes[0]
            self._ask([row], 60, "free")

    def _measure(self, rows: list[Row], tensors: TensorList, dtype: str) -> None:
        self._set_up(rows, tensors, dtype)
        for row in rows:
            step_s = row.info.get("step_s", 0.0)
            if len(self.plan.turns(step_s)) < MIN_ROUNDS:
                budget = f"the budget of {self.plan.budget:.0f} s"
                row.skip(f"{MIN_ROUNDS} steps of {step_s:.1f} s take more than {budget}")
                self._end(row.name)
        for number in range(self.plan.rounds):
            if self.plan.late() and number >= MIN_ROUNDS:
                break
            first = number % len(rows)
            for row in rows[first:] + rows[:first]:
                if row.skipped is None and number in self.plan.turns(row.info["step_s"]):
                    time.sleep(self._device.settle_s)
                    timeout = 60 + 20 * (self.plan.turn + row.info["step_s"])
                    for _, seconds in self._ask([row], timeout, "turn", self.plan.turn):
                        row.rounds[number] = max(seconds)  # ranks run at the same time
        self._finish(rows)

    def batches(
        self, chosen: Sequence[Contender], everywhere: Sequence[Contender],
        tensors: TensorList, itemsize: int,
    ) -> tuple[list[list[Contender]], list[Row]]:  # fmt: skip
        """Splits contenders into batches that fit into memory beside what runs in every batch.

        Also returns rows for those that fit into none.
        """
        device = self._device

        def need(one: Contender) -> int:
            if one in MEMORY:
                return int(device.process_bytes + 1.5 * device.buffer_bytes())  # 3 buffers in all
            held = tensors.numel * (2 * itemsize + one.state_bytes)
            return int(device.process_bytes + held + tensors.largest * one.temporary_bytes)

        room = int(device.usable_share * device.free_bytes()) - sum(map(need, everywhere))
        batches: list[list[Contender]] = [[]]
        too_large = []
        for one in chosen:
            if need(one) > room:
                reason = f"needs {need(one) / 1e9:.0f} GB of memory, of {room / 1e9:.0f} free"
                too_large.append(Row(one, skipped=reason))
                continue
            if sum(map(need, batches[-1])) + need(one) > room:
                batches.append([])
            batches[-1].append(one)
        return batches, too_large

    # -- what is asked for ---------------------------------------------------------------------

    def measure(
        self, chosen: Sequence[Contender], everywhere: Sequence[Contender],
        tensors: TensorList, dtype: str,
    ) -> list[Row]:  # fmt: skip
        """Measures one tensor list with one dtype: a row for each contender and batch it is in.

        The contenders `everywhere` run in every batch, and stand first in it.
        """
        say(f"{tensors.label}, {dtype}")
        present = [one for one in chosen if installed(one.package)]
        left_out = [Row(one, skipped=f"{one.package} is not installed")
                    for one in chosen if one not in present]  # fmt: skip
        if self._device.kind != "cpu":  # before its memory is counted: processes take some of it
            self._start([Row(one) for one in [*everywhere, *present]])
        itemsize = getattr(torch, dtype).itemsize
        batches, too_large = self.batches(present, everywhere, tensors, itemsize)
        rows: list[Row] = []
        for number, batch in enumerate(batches):
            if number > 0 and self.plan.late():
                reason = "left out: the time limit has passed"
                left_out += [Row(one, skipped=reason) for one in batch]
                continue
            some = [Row(one, number) for one in [*everywhere, *batch]]
            self._measure(some, tensors, dtype)
            rows += some
        return rows + left_out + too_large

    def count_launches(self, rows: list[Row], tensors: TensorList, dtype: str) -> None:
        """Counts the kernel launches of a step of measured rows.

        For a last pass: a profiler slows down the process that it was in.
        """
        measured = [row for row in rows if row.skipped is None and row.contender not in MEMORY]
        for batch in sorted({row.batch for row in measured}):
            if self.plan.late():
                break
            again = {row.name: Row(row.contender) for row in measured if row.batch == batch}
            self._set_up(list(again.values()), tensors, dtype)
            counts = {
                row.name: found[0] for row, found in self._ask([*again.values()], 30, "launches")
            }
            for row in measured:
                if row.batch == batch:
                    row.launches = counts.get(row.name)
            self._ask(list(again.values()), 60, "free")
