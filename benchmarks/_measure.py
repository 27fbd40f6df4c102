"""How `step.py` measures: rounds of turns, in batches that fit into memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from _common import installed
from _contenders import BASELINE, CONTENDERS, MEMORY_JOBS, Contender
from _devices import Cpu
from _family import Rule
from _lists import TensorList, tensor_list
from _tables import in_order
from _workers import Worker, WorkerError, Workers

MIN_ROUNDS = 3  # fewer give no median
_SLOW_S = 0.5  # a step this long needs no untimed one before it
_LEAK_BYTES = 1 << 28  # a worker that holds more between two lists is replaced


@dataclass(frozen=True)
class Plan:
    """How long to measure. `deadline`, of time.monotonic(), is when to come to an end."""

    repeats: int
    turn: float
    budget: float
    setup_timeout: float
    deadline: float = math.inf

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline


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

    def record(
        self, numel: int, baseline: Row, copy_rate: float | None, kind: str
    ) -> dict[str, Any]:
        """The row as it goes to the result file; times in ms, rates in GB/s (1e9 bytes)."""
        row: dict[str, Any] = {"name": self.name, "label": self.label}
        if self.skipped is not None:
            return {**row, "skipped": self.skipped}
        times = list(self.rounds.values())
        quarter, _, three_quarters = quantiles(times, n=4, method="inclusive")
        shared = [baseline.rounds[i] / t for i, t in self.rounds.items() if i in baseline.rounds]
        optimizer = self.name not in MEMORY_JOBS
        rate = self.rate()
        path = {"cpu_path": self.info["path"]} if kind == "cpu" else {}
        on_device = {} if kind == "cpu" else {"buckets": self.info["buckets"], "launches": None}
        return {
            **row,
            **path,
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
            **on_device,
        }

    def rate(self) -> float:
        """Bytes that must move, over time, in GB/s."""
        return self.info["moved_bytes"] / median(self.rounds.values()) / 1e9


def say(text: str) -> None:
    """Tells the person who waits."""
    print(text, file=sys.stderr, flush=True)


class Bench:
    """Measures tensor lists on one device."""

    def __init__(self, device: Cpu, workers: Workers, plan: Plan) -> None:
        self._device = device
        self._workers = workers
        self._plan = plan

    # -- talking to workers --------------------------------------------------------------------

    def _ask(
        self, rows: list[Row], request: dict[str, Any], timeout: Callable[[Row], float]
    ) -> list[tuple[Row, dict[str, Any]]]:
        """Sends a request to all rows at a time; the replies. A row that fails is dropped."""
        asked, replies = [], []
        for row in rows:
            if row.worker is None:
                continue
            try:
                row.worker.send(request)
                asked.append(row)
            except WorkerError as error:
                self._drop(row, error)
        start = time.monotonic()
        for row in asked:
            assert row.worker is not None
            try:
                replies.append((row, row.worker.receive(timeout(row), start)))
            except WorkerError as error:
                self._drop(row, error)
        return replies

    def _drop(self, row: Row, error: WorkerError) -> None:
        assert row.worker is not None
        row.skipped = str(error)
        say(f"  skipping {row.name}: {error}")
        if "Error" in row.skipped:
            say(row.worker.log_tail())
        row.worker = None
        if not self._device.keeps_workers:
            self._workers.stop(row.name)
        elif error.fatal:
            self._workers.bury(row.name, row.skipped)

    def _release(self, row: Row, held_bytes: int) -> None:
        """The row is done with its worker."""
        row.worker = None
        if not self._device.keeps_workers or held_bytes > _LEAK_BYTES:
            self._workers.stop(row.name)

    def _together(self, rows: list[Row]) -> list[list[Row]]:
        """Rows that may work at the same time where nothing is timed."""
        return [rows] if self._device.keeps_workers else [[row] for row in rows]

    # -- the steps of a measurement ------------------------------------------------------------

    def _set_up(self, rows: list[Row], list_name: str, dtype: str) -> None:
        """Has workers set up the list, those that stay all at a time; a failure marks the row."""
        request = {
            "do": "set up",
            "list": list_name,
            "layers": self._device.layers(),
            "dtype": dtype,
        }
        timeout = self._plan.setup_timeout
        if self._plan.deadline != math.inf:
            timeout = min(timeout, max(self._plan.deadline - time.monotonic(), 15))
        for together in self._together(rows):
            if not self._device.keeps_workers:
                say(f"  setting up {together[0].name}")
            failed = self._workers.ensure([row.name for row in together], timeout)
            for row in together:
                row.skipped = failed.get(row.name)
                row.worker = None if row.skipped else self._workers[row.name]
            for row, info in self._ask(together, request, lambda _: timeout):
                row.info = info

    def _try_out(self, row: Row) -> None:
        """Times a few steps, one row alone, for how many fit into a turn."""
        if self._device.trial_steps:
            request = {"do": "run", "steps": self._device.trial_steps, "warm_up": True}
            for _, reply in self._ask([row], request, lambda _: self._plan.setup_timeout):
                row.info["step_s"] = median(reply["seconds"])
        if row.worker is not None and MIN_ROUNDS * row.info["step_s"] > self._plan.budget:
            reason = (
                f"a step takes {row.info['step_s']:.1f} s: {MIN_ROUNDS} of them would take more "
                f"than the budget of {self._plan.budget:.0f} s"
            )
            self._give_up(row, reason)

    def _give_up(self, row: Row, reason: str) -> None:
        """Drops a row whose worker is well."""
        say(f"  skipping {row.name}: {reason}")
        for _, reply in self._ask([row], {"do": "free"}, lambda _: 60):
            self._release(row, reply["held_bytes"])
        row.skipped = reason

    def _take_turn(self, row: Row, number: int) -> None:
        """Round `number`: as many steps as fit into one turn."""
        repeats, step_s = self._plan.repeats, row.info["step_s"]
        rounds = int(min(repeats, max(self._plan.budget // step_s, MIN_ROUNDS)))
        if (number + 1) * rounds // repeats == number * rounds // repeats:
            return  # a slow contender sits out some rounds, evenly
        steps = max(1, min(200, int(self._plan.turn / step_s)))
        time.sleep(self._device.settle_s)
        request = {"do": "run", "steps": steps, "warm_up": step_s < _SLOW_S}
        for _, reply in self._ask([row], request, lambda _: 60 + 20 * (steps + 1) * step_s):
            row.rounds[number] = median(reply["seconds"])

    def _finish(self, rows: list[Row]) -> None:
        for row in rows:
            if row.worker is not None and len(row.rounds) < MIN_ROUNDS:
                self._give_up(row, f"only {len(row.rounds)} rounds within the time limit")
        request = {"do": "finish"}
        for together in self._together(rows):
            for row, reply in self._ask(together, request, lambda r: 60 + 20 * r.info["step_s"]):
                row.peak_extra_bytes = reply["peak_extra_bytes"]
                self._release(row, reply["held_bytes"])

    def _measure_batch(self, rows: list[Row], list_name: str, dtype: str) -> None:
        self._set_up(rows, list_name, dtype)
        for row in rows:
            if row.worker is not None:
                self._try_out(row)
        for number in range(self._plan.repeats):
            if self._plan.late() and number >= MIN_ROUNDS:
                break
            turn = number % len(rows)
            for row in rows[turn:] + rows[:turn]:
                if row.worker is not None:
                    self._take_turn(row, number)
            if not self._device.keeps_workers:
                say(f"  round {number + 1} of {self._plan.repeats}")
        self._finish(rows)

    def _batches(
        self, contenders: list[Contender], tensors: TensorList, itemsize: int
    ) -> tuple[list[list[Contender]], list[Row]]:
        """Splits contenders into batches that fit into memory beside what runs in every batch.

        Also returns rows for those that fit into none.
        """
        device = self._device

        def need(contender: Contender) -> int:
            state, temporary = contender.needs[device.kind]
            held = tensors.numel * (2 * itemsize + state)
            return int(device.process_bytes + held + tensors.largest * temporary)

        buffers = 3 * device.buffer_bytes()
        always = need(CONTENDERS[BASELINE]) + 2 * device.process_bytes + buffers
        room = int(device.usable_share * device.free_bytes()) - always
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

    # -- what step.py calls --------------------------------------------------------------------

    def case(self, contenders: list[Contender], list_name: str, dtype: str) -> dict[str, Any]:
        """Measures one tensor list with one parameter dtype; returns its part of the result."""
        tensors = tensor_list(list_name, self._device.layers())
        say(f"{tensors.label}, {dtype}")
        absent = [one for one in contenders if not installed(one.package)]
        present = [one for one in contenders if one not in absent and one.name != BASELINE]
        left_out = [
            Row(one.name, one.label, skipped=f"{one.package} is not installed") for one in absent
        ]
        if self._device.keeps_workers:  # before memory is counted: they take some just to be there
            names = [BASELINE, *MEMORY_JOBS, *(one.name for one in present)]
            self._workers.ensure(names, self._plan.setup_timeout)
        batches, too_large = self._batches(present, tensors, getattr(torch, dtype).itemsize)
        left_out += too_large
        records = []
        for number, batch in enumerate(batches):
            if number > 0 and self._plan.late():
                reason = "left out: the time limit has passed"
                left_out += [Row(one.name, one.label, skipped=reason) for one in batch]
                continue
            memory = [Row(name, label) for name, label in MEMORY_JOBS.items()]
            baseline = Row(BASELINE, CONTENDERS[BASELINE].label)
            rows = [baseline, *(Row(one.name, one.label) for one in batch)]
            self._measure_batch([*memory, *rows], list_name, dtype)
            copy = next(row for row in memory if row.name == "copy")
            copy_rate = copy.rate() if copy.rounds else None
            for row in rows + memory:
                record = row.record(tensors.numel, baseline, copy_rate, self._device.kind)
                records.append({**record, "batch": number})
        for row in left_out:
            records.append({**row.record(0, row, None, self._device.kind), "batch": 0})
        return {
            "list": list_name,
            "label": tensors.label,
            "tensors": len(tensors.shapes),
            "parameters": tensors.numel,
            "dtype": dtype,
            "rows": in_order(records),
        }

    def rule_case(self, rule: Rule, list_name: str, dtype: str) -> dict[str, Any]:
        """Measures a rule on one tensor list: 8-bit state, and each form in which torch has it.

        All of them in the same rounds. Speed-ups are over the form with the smallest median time.
        """
        tensors = tensor_list(list_name, self._device.layers())
        kind = self._device.kind
        say(f"{rule.name}, {tensors.label}, {dtype}")
        rivals = [Row(name, CONTENDERS[name].label) for name in rule.rivals(kind, dtype)]
        ours = Row(rule.ours, CONTENDERS[rule.ours].label)
        memory = [Row(name, label) for name, label in MEMORY_JOBS.items()]
        self._measure_batch([*memory, *rivals, ours], list_name, dtype)
        timed = [row for row in rivals if row.rounds and row.skipped is None]
        fastest = min(timed, key=lambda row: median(row.rounds.values()), default=Row("", ""))
        copy = next(row for row in memory if row.name == "copy")
        copy_rate = copy.rate() if copy.rounds else None
        return {
            "rule": rule.name,
            "fastest": fastest.name,
            "list": list_name,
            "label": tensors.label,
            "tensors": len(tensors.shapes),
            "parameters": tensors.numel,
            "dtype": dtype,
            "rows": [
                {**row.record(tensors.numel, fastest, copy_rate, kind), "batch": 0}
                for row in [ours, *rivals, *memory]
            ],
        }

    def count_launches(self, case: dict[str, Any]) -> None:
        """Writes the kernel launches of a step into the rows of a case.

        For a last pass: a profiler slows down the process that it was in.
        """
        measured = [r for r in case["rows"] if "ms" in r and r["name"] not in MEMORY_JOBS]
        counts: dict[str, int | None] = {}
        for batch in sorted({record["batch"] for record in measured}):
            if self._plan.late():
                break
            names = [r["name"] for r in measured if r["batch"] == batch and r["name"] not in counts]
            rows = [Row(name, name) for name in names]
            self._set_up(rows, case["list"], case["dtype"])
            for row, reply in self._ask(rows, {"do": "launches"}, lambda _: 30):
                counts[row.name] = reply["launches"]
                self._release(row, reply["held_bytes"])
        for record in measured:
            record["launches"] = counts.get(record["name"])
