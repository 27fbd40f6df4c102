"""How `benchmarks.step` shows its measurements: records of the result file, and tables of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.reporting import format_table
from benchmarks.step.contenders import MEMORY, Contender
from benchmarks.step.rounds import Row, ratios
from benchmarks.step.tensor_lists import TensorList


def _record(row: Row, numel: int, fastest: Row | None, copy: Row, kind: str) -> dict[str, Any]:
    """A row as it goes to the result file; times in ms, rates in GB/s (1e9 bytes)."""
    found: dict[str, Any] = {"name": row.name, "label": row.contender.label}
    if row.skipped is not None:
        return {**found, "skipped": row.skipped, "batch": row.batch}
    times, info = [1e3 * t for t in row.rounds.values()], row.info
    low, middle, high = quantiles(times, n=4, method="inclusive")
    rate = info["moved_bytes"] / middle / 1e6
    is_step = row.contender not in MEMORY
    shared = ratios(row.rounds, fastest.rounds) if fastest and is_step else []
    of_copy = None
    if is_step and copy.rounds:
        of_copy = rate / (copy.info["moved_bytes"] / median(copy.rounds.values()) / 1e9)
    found |= {
        "ms": middle,
        "ms_quartiles": [low, high],
        "ms_min": min(times),
        "speedup": median(shared) if shared else None,
        "rounds": len(times),
        "ms_of_rounds": times,
        "first_step_s": info["first_step_s"],
        "moved_bytes_per_parameter": info["moved_bytes"] / numel if is_step else None,
        "gb_per_s": rate,
        "share_of_copy_rate": of_copy,
        "state_bytes_per_parameter": info["state_bytes"] / numel if is_step else None,
        "peak_extra_bytes": info["peak_extra_bytes"] if is_step else None,
        "batch": row.batch,
    }
    if kind == "cpu":
        return {**found, "cpu_path": info["path"]}
    return {**found, "buckets": info["buckets"], "launches": info.get("launches")}


@dataclass
class Case:
    """What is measured at a time: contenders and rivals on a list of tensors of one dtype.

    Speed-ups are over the fastest of the rivals of a batch, which are in every batch.
    """

    list_name: str
    tensors: TensorList
    dtype: str
    rivals: list[Contender]
    rule: str | None
    rows: list[Row]

    def record(self, kind: str) -> dict[str, Any]:
        """What the result file says, for this kind of device."""
        records, fastest = [], None
        for number in sorted({row.batch for row in self.rows}):
            some = [row for row in self.rows if row.batch == number]
            timed = [row for row in some if row.contender in self.rivals and row.skipped is None]
            if timed:
                fastest = min(timed, key=lambda row: median(row.rounds.values()))
            copy = next((row for row in some if row.name == "copy"), Row(MEMORY[0]))
            records += [_record(row, self.tensors.numel, fastest, copy, kind) for row in some]
        # What is in every batch stands once above the others; the memory rates and the rest below.
        memory = {one.name for one in MEMORY}
        shared = memory | {one.name for one in self.rivals}
        records.sort(key=lambda r: (r["batch"] > 0 and r["name"] in shared, r["name"] in memory))
        return {
            **({} if self.rule is None else {"rule": self.rule}),
            "fastest": fastest.name if fastest else "",
            "list": self.list_name,
            "label": self.tensors.label,
            "tensors": len(self.tensors.shapes),
            "parameters": self.tensors.numel,
            "dtype": self.dtype,
            "rows": records,
        }


def title(case: dict[str, Any]) -> str:
    """What a table or panel is about, in a line."""
    rule = f"{case['rule']}, " if "rule" in case else ""
    return f"{rule}{case['label']}, {case['dtype']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _mebibytes(value: float | None) -> str:
    return "" if value is None else format(value / 2**20, ".1f")


def milliseconds(value: float) -> str:
    """Three digits, and no exponent for times of a second and more."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


# Between the columns of both devices, "path" is the CPU's and the two after "state" the GPU's.
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms": lambda row: milliseconds(row["ms"]),
    "quartiles": lambda row: " - ".join(milliseconds(value) for value in row["ms_quartiles"]),
    "speed-up": lambda row: _number(row["speedup"], ".2f"),
    "path": lambda row: row["cpu_path"] or "",
    "GB/s": lambda row: _number(row["gb_per_s"], ".1f"),
    "of copy": lambda row: _number(row["share_of_copy_rate"], ".0%"),
    "moved B/param": lambda row: _number(row["moved_bytes_per_parameter"], ".2f"),
    "state B/param": lambda row: _number(row["state_bytes_per_parameter"], ".3f"),
    "launches": lambda row: _number(row["launches"], "d"),
    "buckets": lambda row: _number(row["buckets"], "d"),
    "peak extra MiB": lambda row: _mebibytes(row["peak_extra_bytes"]),
    "rounds": lambda row: str(row["rounds"]),
}


def table(case: dict[str, Any]) -> str:
    """The rows of a case as a table, and below it who was skipped and why."""
    several = any(row["batch"] > 0 for row in case["rows"])
    on_gpu = any("launches" in row for row in case["rows"])
    unknown = ("path",) if on_gpu else ("launches", "buckets")
    names = [name for name in _COLUMNS if name not in unknown]
    lines, notes = [], []
    for row in case["rows"]:
        label = f"{row['label']} (batch {row['batch'] + 1})" if several else row["label"]
        if "skipped" in row:
            notes.append(f"skipped: {label}: {row['skipped']}")
        else:
            lines.append([label, *(_COLUMNS[name](row) for name in names)])
    return "\n".join([format_table([case.get("rule", "AdamW"), *names], lines), *notes])


def rules_table(cases: list[dict[str, Any]]) -> str:
    """A line for each rule of the family: 8-bit state against the fastest form of torch."""
    lines = []
    for case in cases:
        rows = {row["name"]: row for row in case["rows"] if "ms" in row}
        fastest = rows.get(case["fastest"])
        ours = rows.get(f"{case['rule'].lower()}-8bit")
        if ours is not None and fastest is not None:
            times = [milliseconds(row["ms"]) for row in (ours, fastest)]
            speedup = _number(ours["speedup"], ".2f")
            lines.append([ours["label"], fastest["label"], case["dtype"], *times, speedup])
    return format_table(["8-bit", "fastest", "", "8-bit, ms", "ms", "speed-up"], lines, left=3)
