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

from benchmarks.process import Worker
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
    """One contender on one tensor list: what its process told, and its time in each round."""

    contender: Contender
    batch: int = 0
    skipped: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    rounds: dict[int, float] = field(default_factory=dict)  # round -> median seconds of its turn

    @property
    def name(self) -> str:
        return self.contender.name


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
        for worker in (worker for workers in self._workers.values() for worker in workers):
            worker.stop()
        self._workers = {}

    def _ask(self, rows: list[Row], method: str, *arguments: Any) -> list[tuple[Row, list[Any]]]:
        """Calls a method in all rows' processes at a time; the answers. Who fails is skipped."""
        rows = [row for row in rows if row.skipped is None]
        for worker in (worker for row in rows for worker in self._workers[row.name]):
            worker.send(method, *arguments)
        end, found = time.monotonic() + self._device.timeout, []
        for row in rows:
            answers = []
            for worker in self._workers[row.name]:
                error, result = worker.receive(end - time.monotonic())
                answers.append(result)
                if error is not None:  # ends the other ranks, too, which may wait for this one
                    self._skip(row, error)
            if row.skipped is None:
                found.append((row, answers))
        return found

    def _skip(self, row: Row, reason: str) -> None:
        """Leaves a row out from now on, for the first reason told, and ends its processes."""
        if row.skipped is None:
            row.skipped = reason
            say(f"  skipping {row.name}: {reason}")
            for worker in self._workers.pop(row.name, []):
                worker.stop()

    def _set_up(self, rows: list[Row], tensors: TensorList, dtype: str) -> None:
        """Starts the processes that do not run, and has all take their first steps.

        On a GPU all at a time, since some compile on the CPU; there one would disturb the others.
        """
        for some in [rows] if self._device.kind != "cpu" else [[row] for row in rows]:
            for one in (row.contender for row in some if row.name not in self._workers):
                environment = {"OMP_NUM_THREADS": str(self._threads), "TORCHAO8_CPU": one.cpu_path}
                shared = one, self._device, self._threads, self._ranks, next(self._places)
                self._workers[one.name] = [
                    Worker(Stepper, *shared, rank, environment=environment, source=one.source)
                    for rank in range(self._ranks)
                ]
            for row, answers in self._ask(some, "set_up", tensors, dtype):
                row.info = {**answers[0], "bits": [answer["bits"] for answer in answers]}

    def _turns(self, rows: list[Row]) -> None:
        for number in range(self.plan.rounds):
            if self.plan.late() and number >= MIN_ROUNDS:
                break
            first = number % len(rows)
            for row in rows[first:] + rows[:first]:
                if row.skipped is None and number in self.plan.turns(row.info["step_s"]):
                    time.sleep(self._device.settle_s)
                    for _, seconds in self._ask([row], "turn", self.plan.turn):
                        row.rounds[number] = max(seconds)  # ranks run at the same time

    def _measure(self, rows: list[Row], tensors: TensorList, dtype: str) -> None:
        self._set_up(rows, tensors, dtype)
        for row in rows:
            step_s = row.info.get("step_s", 0.0)
            if len(self.plan.turns(step_s)) < MIN_ROUNDS:
                budget = f"the budget of {self.plan.budget:.0f} s"
                self._skip(row, f"{MIN_ROUNDS} steps of {step_s:.1f} s take more than {budget}")
        self._turns(rows)
        for row in rows:
            if len(row.rounds) < MIN_ROUNDS:
                self._skip(row, f"only {len(row.rounds)} rounds within the time limit")
            for _, answers in self._ask([row], "finish", next(self._places)):
                row.info |= answers[0]

    def batches(
        self, chosen: Sequence[Contender], everywhere: Sequence[Contender],
        tensors: TensorList, itemsize: int,
    ) -> list[list[Contender]]:  # fmt: skip
        """Splits contenders into batches that fit into memory beside what runs in every batch.

        Those that fit into none are left out.
        """
        device = self._device

        def need(one: Contender) -> int:
            if one in MEMORY:
                return int(device.process_bytes + 1.5 * device.buffer_bytes)  # 3 buffers in all
            return int(device.process_bytes + tensors.numel * (2 * itemsize + one.state_bytes))

        room = int(device.usable_share * device.free_bytes()) - sum(map(need, everywhere))
        batches: list[list[Contender]] = [[]]
        for one in chosen:
            if sum(map(need, batches[-1])) + need(one) > room and batches[-1]:
                batches.append([])
            if need(one) <= room:
                batches[-1].append(one)
        return batches

    def measure(
        self, chosen: Sequence[Contender], everywhere: Sequence[Contender],
        tensors: TensorList, dtype: str,
    ) -> list[Row]:  # fmt: skip
        """Measures one tensor list with one dtype: a row for each contender and batch it is in.

        The contenders `everywhere` run in every batch, and stand first in it.
        """
        say(f"{tensors.label}, {dtype}")
        present = [one for one in chosen if installed(one.package)]
        rows = [Row(one, skipped=f"{one.package} is not installed")
                for one in chosen if one not in present]  # fmt: skip
        itemsize = getattr(torch, dtype).itemsize
        for number, batch in enumerate(self.batches(present, everywhere, tensors, itemsize)):
            if number == 0 or not self.plan.late():
                some = [Row(one, number) for one in [*everywhere, *batch]]
                self._measure(some, tensors, dtype)
                rows += some
        reason = "it did not fit into memory, or the time limit has passed"
        known = {row.name for row in rows}
        return rows + [Row(one, skipped=reason) for one in present if one.name not in known]

    def count_launches(self, rows: list[Row], tensors: TensorList, dtype: str) -> None:
        """Counts the kernel launches of a step of measured rows.

        For a last pass: a profiler slows down the process that it was in.
        """
        measured = [row for row in rows if row.skipped is None and row.contender not in MEMORY]
        for batch in sorted({row.batch for row in measured}):
            if not self.plan.late():
                again = {row.name: row for row in measured if row.batch == batch}
                counted = [Row(row.contender) for row in again.values()]
                self._set_up(counted, tensors, dtype)
                for row, answers in self._ask(counted, "launches"):
                    again[row.name].info["launches"] = answers[0]
