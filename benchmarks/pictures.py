"""Draws the pictures of the results: ours in blue, other libraries in gray, one subject each.

    python -m benchmarks.pictures --out docs/images    # of the results that are reported
    python -m benchmarks.pictures runs/benchmarks/step-cpu-block.json

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks import reporting
from benchmarks.quality.page import groups
from benchmarks.quality.runs import CODECS, REFERENCE
from benchmarks.step.contenders import BASELINE, MEMORY
from benchmarks.step.tables import milliseconds, title

RESULTS = Path(__file__).resolve().parent / "results"
# What the documentation shows.
SHOWN = ("quality", "step-cpu-gpt2", "step-cpu-gpt2-family", "step-cpu-huge", "step-cpu-small")
OURS, THEIRS, DARK, LIGHT = "tab:blue", "tab:gray", "darkgray", "lightgray"
BAR, _AROUND = 0.3, 0.8  # inches: a bar, and what is around all bars of a panel

Rows = list[dict[str, Any]]
Draw = Callable[[Any], None]  # draws into a panel


def save(path: Path, heading: str, note: str, panels: Sequence[tuple[float, Draw]]) -> None:
    """Writes a picture of panels, one below the other, with their heights in inches."""
    heights = [height for height, _ in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.8 + sum(heights)), height_ratios=heights,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    for panel, (_, draw) in zip(axes[:, 0], panels, strict=True):
        draw(panel)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    figure.suptitle(heading, fontsize=13, fontweight="bold")
    figure.supxlabel(note, fontsize=8, color="dimgray")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"wrote {path}")


def bars(
    subject: str,
    unit: str,
    names: list[str],
    values: list[float],
    notes: list[str],
    ours: list[bool],
) -> tuple[float, Draw]:
    """A panel of horizontal bars, each with its note behind it."""

    def draw(panel: Any) -> None:
        drawn = panel.barh(names, values, color=[OURS if own else THEIRS for own in ours])
        panel.bar_label(drawn, [f" {note}" for note in notes], fontsize=9)
        panel.set_xlim(0, 1.25 * max(values))  # room for the notes
        if max(values) > 10 * min(values) > 0:
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:,g}")
            panel.set_xlim(min(values) / 2, 3 * max(values))
        panel.invert_yaxis()
        panel.set_title(subject, fontsize=10, loc="left")
        panel.set_xlabel(unit + " (logarithmic scale)" * (panel.get_xscale() == "log"), fontsize=9)

    return _AROUND + BAR * len(names), draw


# --- the step -----------------------------------------------------------------------------------


def _machine(record: dict[str, Any]) -> str:
    device, versions = record["device"], record["versions"]
    name = device.get("gpu", {}).get("name") or device["cpu"]
    return f"{name}, {device['threads']} threads, torch {versions['torch']}, {record['date']}"


def _timed(case: dict[str, Any]) -> Rows:
    """The rows of optimizers, torch's once."""
    memory = {one.name for one in MEMORY}
    rows = [r for r in case["rows"] if "ms" in r and r["name"] not in memory]
    return [r for r in rows if r["name"] != BASELINE or r.get("batch", 0) == 0]


def _is_ours(row: dict[str, Any]) -> bool:
    return "torchao8" in row["label"]


def step(record: dict[str, Any], path: Path) -> None:
    """The time of a step: a panel for each list and dtype."""
    panels = []
    for case in record["cases"]:
        rows = _timed(case)
        if rows:
            notes = [f"{milliseconds(r['ms'])} ms" for r in rows]
            names, times = [r["label"] for r in rows], [r["ms"] for r in rows]
            panels.append(
                bars(title(case), "milliseconds per step; less is better", names, times, notes,
                     [_is_ours(r) for r in rows])
            )  # fmt: skip
    save(path, "Time of one AdamW step", _machine(record), panels)


def family(record: dict[str, Any], path: Path) -> None:
    """The speed of every 8-bit optimizer over the same rule of torch: a panel for each dtype."""
    panels = []
    for dtype in dict.fromkeys(case["dtype"] for case in record["cases"]):
        cases = [case for case in record["cases"] if case["dtype"] == dtype]
        pairs = [(case, row) for case in cases for row in _timed(case) if _is_ours(row)]
        pairs = [(case, row) for case, row in pairs if row["speedup"] is not None]
        height, draw = bars(
            f"{cases[0]['label']}, {dtype}",
            "times as fast as torch (line: as fast as torch); more is better",
            [f"{case['rule']}8bit over {_form(case)}" for case, _ in pairs],
            [row["speedup"] for _, row in pairs],
            [f"{row['speedup']:.2f}" for _, row in pairs],
            [True] * len(pairs),
        )

        def with_line(panel: Any, draw: Draw = draw) -> None:
            draw(panel)
            panel.axvline(1, color=THEIRS, linewidth=2, zorder=0)
            for text in panel.texts:  # into the bars, where the line does not cross them
                text.set(color="white", ha="right", position=(-4, 0))

        panels.append((height, with_line))
    save(path, "Speed of 8-bit optimizers against torch's fastest form", _machine(record), panels)


def _form(case: dict[str, Any]) -> str:
    """The fastest form of torch, in short."""
    (label,) = (row["label"] for row in case["rows"] if row["name"] == case["fastest"])
    return (
        str(label).replace(f" {case['rule']}", "").replace("torch._foreach_*", "torch operations")
    )


# --- the quality of training --------------------------------------------------------------------


def _losses(task: str, rows: dict[Any, Any]) -> tuple[float, Draw]:
    """Dots of 8-bit minus 32-bit, in units of the spread of the 32-bit runs."""
    pairs = {name: (of.get("32-bit"), of.get("8-bit")) for (name,), of in rows.items()}
    shown = {name: (exact["std"], eight) for name, (exact, eight) in pairs.items()
             if exact and eight and exact["std"] and eight["difference"] is not None}  # fmt: skip

    def draw(panel: Any) -> None:
        panel.axvspan(-1, 1, color=LIGHT, alpha=0.6, linewidth=0)
        panel.axvline(0, color="black", linewidth=0.8)
        for place, (unit, eight) in enumerate(shown.values()):
            error = (eight["difference_std"] or 0.0) / unit
            panel.errorbar(eight["difference"] / unit, place, xerr=error, fmt="o", color=OURS)
        panel.set_yticks(range(len(shown)), list(shown))
        panel.set_xlim(-2.5, 2.5)
        panel.invert_yaxis()
        panel.set_title(task, fontsize=10, loc="left")
        panel.set_xlabel(
            "loss with 8-bit minus loss with 32-bit state, in standard deviations of 32-bit runs "
            "(gray: one); left is better",
            fontsize=9,
        )

    return _AROUND + BAR * len(shown), draw


def _errors(cells: Rows) -> Draw:
    def draw(panel: Any) -> None:
        for cell in cells:
            errors = cell["update_error"]
            panel.plot(
                [int(step) for step in errors], [mean for mean, _ in errors.values()],
                color=OURS if cell["column"] == "stochastic" else THEIRS,
                linestyle="-" if cell["row"].endswith("0.999") else "--",
                label=f"rounded {'to nearest' if cell['column'] == 'nearest' else 'stochastically'}"
                f", {cell['row']}",
            )  # fmt: skip
        panel.set_ylim(bottom=0)
        panel.set_xlabel("training step", fontsize=9)
        panel.set_ylabel("relative error; less is better", fontsize=9)
        panel.legend(fontsize=9, frameon=False)

    return draw


def _codec(row: str) -> str:
    """The name of a format in full."""
    if row not in CODECS:
        return row
    map_name, scope = CODECS[row]
    return f"{map_name} map, a scale per {scope.removesuffix('s')}"


def _diverged(codecs: dict[Any, Any]) -> tuple[float, Draw]:
    counts = [[sum(c[n] for c in of.values()) for n in ("diverged", "runs")]
              for of in codecs.values()]  # fmt: skip
    return bars(
        "AdamW on a small GPT, three learning rates, five seeds",
        "runs that diverged, percent; less is better",
        [row if row == REFERENCE else f"{_codec(row)}, {column}" for row, column in codecs],
        [100 * diverged / runs for diverged, runs in counts],
        [f"{diverged} of {runs}" for diverged, runs in counts],
        [row.startswith("torchao8") for row, _ in codecs],
    )


def quality(summary: dict[str, Any], folder: Path) -> None:
    """A picture for each study that has runs."""
    cells = summary["cells"]
    machines = "; ".join(f"{m['cpu']}, torch {m['versions']['torch']}" for m in summary["machines"])
    panels = []
    for task, label in (("gpt", "a small GPT"), ("digits", "handwritten digits")):
        of_task = [cell for cell in cells if cell["task"] == task]
        panels.append(_losses(label, groups(of_task, "family", ("row",), "column")))
    if panels := [panel for panel in panels if panel[0] > _AROUND]:
        heading = "Loss after training, 8-bit against 32-bit"
        note = f"mean and deviation over seeds; {machines}"
        save(folder / "quality-family.png", heading, note, panels)
    codecs = groups(cells, "ablation", ("row", "column"), "lr")
    if codecs:
        heading = "Which formats of 8-bit state train"
        save(folder / "quality-codec.png", heading, machines, [_diverged(codecs)])
    rounded = [c for c in cells if c["study"] == "rounding" and c["update_error"]]
    if rounded:
        heading = "Error of a step from 8-bit second moments"
        note = f"against float32 moments of the same gradients; {machines}"
        save(folder / "quality-rounding.png", heading, note, [(3.6, _errors(rounded))])


def main(argv: Iterable[str] | None = None) -> None:
    """Draws with the command line `argv` (of the process if None)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="result files (of results/)")
    parser.add_argument("--out", type=Path, default=reporting.OUT, help="folder (%(default)s)")
    args = parser.parse_args(argv)
    for path in args.files or [RESULTS / f"{name}.json" for name in SHOWN]:
        record = json.loads(path.read_text())
        target = args.out / f"{path.stem.replace('step-cpu', 'step')}.png"
        if "cells" in record:
            quality(record, args.out)
        elif any("rule" in case for case in record.get("cases", ())):
            family(record, target)
        elif "cases" in record and "old" not in record:
            step(record, target)
        else:
            parser.error(f"{path}: expected a result of benchmarks.step or benchmarks.quality")


if __name__ == "__main__":
    main()
