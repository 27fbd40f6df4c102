"""How `benchmarks.step` shows its measurements: tables for people and a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.reporting import format_table
from benchmarks.step.contenders import BASELINE, MEMORY_JOBS


def title(case: dict[str, Any]) -> str:
    """What a table or panel is about, in a line."""
    rule = f"{case['rule']}, " if "rule" in case else ""
    return f"{rule}{case['label']}, {case['dtype']}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _ms(value: float) -> str:
    """Three digits, and no exponent for times of a second and more."""
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def _mebibytes(value: float | None) -> str:
    return "" if value is None else format(value / 2**20, ".1f")


# Between the columns of both devices, "path" is the CPU's and the two after "state" the GPU's.
_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ms": lambda row: _ms(row["ms"]),
    "quartiles": lambda row: " - ".join(_ms(value) for value in row["ms_quartiles"]),
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
            times = [_ms(row["ms"]) for row in (ours, fastest)]
            speedup = _number(ours["speedup"], ".2f")
            lines.append([ours["label"], fastest["label"], case["dtype"], *times, speedup])
    return format_table(["8-bit", "fastest", "", "8-bit, ms", "ms", "speed-up"], lines, left=3)


def _drawn(row: dict[str, Any]) -> bool:
    repeated = row["name"] == BASELINE and row["batch"] > 0
    return "skipped" not in row and row["name"] not in MEMORY_JOBS and not repeated


def draw(cases: list[dict[str, Any]], machine: str, path: Path) -> None:
    """Draws bars of step times, one panel for each case, to the PNG file `path`.

    `machine` names what they were measured on. Cases in which nothing was measured have no panel;
    if that is so for all of them, there is no file.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    cases = [case for case in cases if any(_drawn(row) for row in case["rows"])]
    if not cases:
        return
    bars_of = [[row for row in case["rows"] if _drawn(row)] for case in cases]
    heights = [len(rows) + 2.5 for rows in bars_of]  # the title and the axis take a few bars' room
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(9, 0.6 + 0.3 * sum(heights)), height_ratios=heights,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, case, rows in zip(panels[:, 0], cases, bars_of, strict=True):
        ours = [row["label"].startswith("torchao8") or "8bit-" in row["name"] for row in rows]
        times = [row["ms"] for row in rows]
        colors = ["tab:blue" if own else "tab:gray" for own in ours]
        bars = panel.barh([row["label"] for row in rows], times, color=colors)
        notes = [f" {_ms(row['ms'])} ms ({_number(row['speedup'], '.2f')}x)" for row in rows]
        panel.bar_label(bars, notes, fontsize=8)
        panel.set_xscale("log")
        low, high = min(times) / 3, max(times)
        panel.set_xlim(low, high * (high / low) ** 0.3)  # room for the notes
        panel.invert_yaxis()
        panel.set_title(title(case), fontsize=10)
        panel.tick_params(labelsize=8)
    family = any("rule" in case for case in cases)
    rival = "the fastest form of torch" if family else "torch.optim.AdamW(fused=True)"
    panels[-1, 0].set_xlabel(f"ms per step, log scale (in brackets: speed-up over {rival})")
    figure.suptitle(f"{'Steps' if family else 'AdamW step'}, {machine}", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
