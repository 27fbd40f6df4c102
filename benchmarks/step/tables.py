"""How `benchmarks.step` shows its measurements: records of the result file, and tables of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

from benchmarks.reporting import format_table
from benchmarks.step.contenders import MEMORY, MUON_BASELINES, Contender
from benchmarks.step.rounds import Row, ratios
from benchmarks.step.tensor_lists import TensorList


def _rate(row: Row) -> float:
    """GB/s (1e9 bytes) of the median round."""
    return float(row.info["moved_bytes"] / median(row.rounds.values()) / 1e9)


def _alone(
    host: float, device: float | None, moved: float, copy: Row | None
) -> dict[str, float | str | None]:
    """Times of the host and of the device for a step; the longer one decides how fast steps are."""
    found: dict[str, float | str | None] = {"host_ms": 1e3 * host, "device_ms": None}
    if device is not None:
        rate = moved / device / 1e9
        share = rate / _rate(copy) if copy and copy.rounds else None
        found |= {"device_ms": 1e3 * device, "device_share_of_copy_rate": share}
    decides = "not known" if device is None else "host" if host > device else "device"
    return {**found, "decided_by": decides}


def _record(row: Row, numel: int, fastest: Row | None, copy: Row | None) -> dict[str, Any]:
    """A row as it goes to the result file; times in ms. A memory rate has no more than times."""
    found = {"name": row.name, "label": row.contender.label, "batch": row.batch}
    if row.skipped is not None:
        return {**found, "skipped": row.skipped}
    times, info = [1e3 * t for t in row.rounds.values()], row.info
    low, middle, high = quantiles(times, n=4, method="inclusive")
    found |= {
        "ms": middle,
        "ms_quartiles": [low, high],
        "ms_min": min(times),
        "rounds": len(times),
        "ms_of_rounds": times,
        "first_step_s": info["first_step_s"],
        "gb_per_s": _rate(row),
    }
    if row.contender in MEMORY:
        return found
    if "host_s" in info:
        found |= _alone(info["host_s"], info["device_s"], info["moved_bytes"], copy)
    shared = ratios(row.rounds, fastest.rounds) if fastest else []
    return {
        **found,
        "speedup": median(shared) if shared else None,
        "share_of_copy_rate": _rate(row) / _rate(copy) if copy and copy.rounds else None,
        "moved_bytes_per_parameter": info["moved_bytes"] / numel,
        "state_bytes_per_parameter": info["state_bytes"] / numel,
        **{name: info.get(name) for name in ("cpu_path", "buckets", "launches")},
        "peak_extra_bytes": info["peak_extra_bytes"],
    }


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

    def record(self) -> dict[str, Any]:
        """What the result file says."""
        records, fastest = [], None
        for number in sorted({row.batch for row in self.rows}):
            some = [row for row in self.rows if row.batch == number]
            timed = [row for row in some if row.contender in self.rivals and row.skipped is None]
            fastest = min(timed, key=lambda row: median(row.rounds.values()), default=fastest)
            copy = next((row for row in some if row.name == "copy"), None)
            records += [_record(row, self.tensors.numel, fastest, copy) for row in some]
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


def milliseconds(value: float) -> str:
    """Three digits, and no exponent for times of a second and more."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


# Column: key of a record, and its text.
_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "ms": ("ms", milliseconds),
    "quartiles": ("ms_quartiles", lambda values: " - ".join(map(milliseconds, values))),
    "host ms": ("host_ms", milliseconds),
    "device ms": ("device_ms", milliseconds),
    "decides": ("decided_by", str),
    "speed-up": ("speedup", "{:.2f}".format),
    "path": ("cpu_path", str),
    "GB/s": ("gb_per_s", "{:.1f}".format),
    "of copy": ("share_of_copy_rate", "{:.0%}".format),
    "device of copy": ("device_share_of_copy_rate", "{:.0%}".format),
    "moved B/param": ("moved_bytes_per_parameter", "{:.2f}".format),
    "state B/param": ("state_bytes_per_parameter", "{:.3f}".format),
    "launches": ("launches", str),
    "buckets": ("buckets", str),
    "peak extra MiB": ("peak_extra_bytes", lambda value: f"{value / 2**20:.1f}"),
    "rounds": ("rounds", str),
}


def table(case: dict[str, Any]) -> str:
    """The rows of a case, in the columns that any has; below it who was skipped and why."""
    several = any(row["batch"] > 0 for row in case["rows"])
    timed = [row for row in case["rows"] if "skipped" not in row]
    columns = {name: column for name, column in _COLUMNS.items()
               if any(row.get(column[0]) is not None for row in timed)}  # fmt: skip
    lines, notes = [], []
    for row in case["rows"]:
        label = f"{row['label']} (batch {row['batch'] + 1})" if several else row["label"]
        if "skipped" in row:
            notes.append(f"skipped: {label}: {row['skipped']}")
        else:
            values = [(row.get(key), form) for key, form in columns.values()]
            lines.append([label, *("" if v is None else form(v) for v, form in values)])
    return "\n".join([format_table([rule_of(case), *columns], lines), *notes])


def rule_of(case: dict[str, Any]) -> str:
    """The update rule whose step is timed."""
    return str(case.get("rule", "Muon" if case["list"] in MUON_BASELINES else "AdamW"))


def of_rule(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The rows of a rule with 8-bit state and of torch's fastest form, where both were timed."""
    rows = {row["name"]: row for row in case["rows"] if "ms" in row}
    # Its name also says what format of state and what path it was told to take.
    ours = [row for name, row in rows.items() if name.startswith(f"{case['rule'].lower()}-8bit")]
    fastest = rows.get(case["fastest"])
    return (ours[0], fastest) if ours and fastest else None


def rules_table(cases: list[dict[str, Any]]) -> str:
    """A line for each rule of the family: 8-bit state against the fastest form of torch."""
    lines = []
    for case in cases:
        if found := of_rule(case):
            ours, fastest = found
            texts = [milliseconds(row["ms"]) for row in found]
            speedup = f"{ours['speedup']:.2f}" if ours["speedup"] else ""
            lines.append([ours["label"], fastest["label"], case["dtype"], *texts, speedup])
    return format_table(["8-bit", "fastest", "", "8-bit, ms", "ms", "speed-up"], lines, left=3)
