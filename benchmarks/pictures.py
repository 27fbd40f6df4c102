"""Draws the pictures of the results: ours in blue, other libraries in gray, one subject each.

    python -m benchmarks.pictures --out docs/images    # of the results that are reported
    python -m benchmarks.pictures runs/benchmarks/step-cpu-block.json

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot

from benchmarks import reporting
from benchmarks.quality.report import groups
from benchmarks.quality.runs import CODECS, REFERENCE
from benchmarks.step.contenders import BASELINE, MEMORY, MUON_BASELINES
from benchmarks.step.tables import milliseconds, of_rule, rule_of, title

RESULTS = Path(__file__).resolve().parent / "results"
# What the documentation shows.
SHOWN = ("quality", "step-cpu-gpt2", "step-cpu-gpt2-family", "step-cpu-huge", "step-cpu-small")
OURS, THEIRS, DARK, LIGHT = "tab:blue", "tab:gray", "darkgray", "lightgray"
BAR, _AROUND = 0.3, 0.8  # inches: a bar, and what is around all bars of a panel

Rows = list[dict[str, Any]]


@contextlib.contextmanager
def picture(path: Path, heading: str, note: str, bars_of: Sequence[float]) -> Iterator[list[Any]]:
    """Panels, one below the other, as high as so many bars, to draw into; then writes the PNG."""
    heights = [_AROUND + BAR * count for count in bars_of]
    figure, axes = pyplot.subplots(
        len(heights), 1, figsize=(9, 0.8 + sum(heights)), height_ratios=heights,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    yield list(axes[:, 0])
    for panel in axes[:, 0]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
    figure.suptitle(heading, fontsize=13, fontweight="bold")
    figure.supxlabel(note, fontsize=8, color="dimgray")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    print(f"wrote {path}")


def bars(panel: Any, subject: str, unit: str, rows: list[tuple[str, float, str, bool]]) -> None:
    """Draws horizontal bars: (name, value, note behind it, whether it is ours)."""
    names, values, notes, ours = zip(*rows, strict=True)
    drawn = panel.barh(names, values, color=[OURS if own else THEIRS for own in ours])
    panel.bar_label(drawn, [f" {note}" for note in notes], fontsize=9)
    panel.set_xlim(0, 1.25 * max(values))  # room for the notes
    if max(values) > 10 * min(values) > 0:
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:,g}")
        panel.set_xlim(min(values) / 2, 3 * max(values))
        unit += " (logarithmic scale)"
    panel.invert_yaxis()
    panel.set_title(subject, fontsize=10, loc="left")
    panel.set_xlabel(unit, fontsize=9)


# --- the step -----------------------------------------------------------------------------------


def _machine(record: dict[str, Any]) -> str:
    device, versions = record["device"], record["versions"]
    name = device.get("gpu", {}).get("name") or device["cpu"]
    return f"{name}, {device['threads']} threads, torch {versions['torch']}, {record['date']}"


def _timed(case: dict[str, Any]) -> Rows:
    """The rows of optimizers, torch's once."""
    rows = [r for r in case["rows"] if "ms" in r and r["name"] not in {m.name for m in MEMORY}]
    baseline = MUON_BASELINES.get(case["list"], BASELINE)
    return [r for r in rows if r["name"] != baseline or r.get("batch", 0) == 0]


def step(record: dict[str, Any], path: Path) -> None:
    """The time of a step: a panel for each list and dtype."""
    cases = {title(case): _timed(case) for case in record["cases"] if _timed(case)}
    heights = [len(rows) for rows in cases.values()]
    rules = " or ".join(dict.fromkeys(map(rule_of, record["cases"])))
    with picture(path, f"Time of one {rules} step", _machine(record), heights) as panels:
        for panel, (subject, rows) in zip(panels, cases.items(), strict=True):
            shown = [(r["label"], r["ms"], f"{milliseconds(r['ms'])} ms", "torchao8" in r["label"])
                     for r in rows]  # fmt: skip
            bars(panel, subject, "milliseconds per step; less is better", shown)


def family(record: dict[str, Any], path: Path) -> None:
    """The speed of every 8-bit optimizer over the same rule of torch: a panel for each dtype."""
    found: dict[str, list[tuple[str, float, str, bool]]] = {}
    for case in record["cases"]:
        ours, fastest = of_rule(case) or (None, None)
        if ours and fastest and ours["speedup"] is not None:
            form = fastest["label"].replace(f" {case['rule']}", "")
            name = f"{case['rule']}8bit over {form.replace('torch._foreach_*', 'torch operations')}"
            row = name, ours["speedup"], f"{ours['speedup']:.2f}", True
            found.setdefault(f"{case['label']}, {case['dtype']}", []).append(row)
    heading = "Speed of 8-bit optimizers against torch's fastest form"
    heights = [len(rows) for rows in found.values()]
    with picture(path, heading, _machine(record), heights) as panels:
        for panel, (subject, shown) in zip(panels, found.items(), strict=True):
            unit = "times as fast as torch (line: as fast as torch); more is better"
            bars(panel, subject, unit, shown)
            panel.axvline(1, color=THEIRS, linewidth=2, zorder=0)
            for text in panel.texts:  # into the bars, where the line does not cross them
                text.set(color="white", ha="right", position=(-4, 0))


# --- the quality of training --------------------------------------------------------------------


def _losses(cells: Rows, note: str, path: Path) -> None:
    """Dots of 8-bit minus 32-bit, in units of the spread of the 32-bit runs; a panel for a task."""
    tasks: dict[str, Rows] = {}
    for (task, rule), of in groups(cells, "family", ("task", "row"), "column").items():
        exact, eight = of.get("32-bit"), of.get("8-bit")
        if exact and eight and exact["std"] and eight["difference_std"] is not None:
            tasks.setdefault(task, []).append({**eight, "rule": rule, "unit": exact["std"]})
    if not tasks:
        return
    labels = {"gpt": "a small GPT", "digits": "handwritten digits"}
    heading = "Loss after training, 8-bit against 32-bit"
    with picture(path, heading, note, [len(rows) for rows in tasks.values()]) as panels:
        for panel, (task, rows) in zip(panels, tasks.items(), strict=True):
            panel.axvspan(-1, 1, color=LIGHT, alpha=0.6, linewidth=0)
            panel.axvline(0, color="black", linewidth=0.8)
            means, errors = ([row[n] / row["unit"] for row in rows]
                             for n in ("difference", "difference_std"))  # fmt: skip
            panel.errorbar(means, range(len(rows)), xerr=errors, fmt="o", color=OURS)
            panel.set_yticks(range(len(rows)), [row["rule"] for row in rows])
            panel.set_xlim(-2.5, 2.5)
            panel.invert_yaxis()
            panel.set_title(labels[task], fontsize=10, loc="left")
            panel.set_xlabel(
                "loss with 8-bit minus loss with 32-bit state, in standard deviations of 32-bit "
                "runs (gray: one); left is better",
                fontsize=9,
            )


def _diverged(cells: Rows, note: str, path: Path) -> None:
    """The share of runs that diverged, by the format of the state."""
    shown = []
    for (row, column), of in groups(cells, "ablation", ("row", "column"), "lr").items():
        diverged, runs = (sum(cell[n] for cell in of.values()) for n in ("diverged", "runs"))
        name = row
        if row in CODECS:
            map_name, scope = CODECS[row]
            name = f"{map_name} map, a scale per {scope.removesuffix('s')}"
        name += "" if row == REFERENCE else f", {column}"
        value = 100 * diverged / runs
        shown.append((name, value, f"{diverged} of {runs}", row.startswith("torchao8")))
    if shown:
        with picture(path, "Which formats of 8-bit state train", note, [len(shown)]) as (panel,):
            subject = "AdamW on a small GPT, three learning rates, five seeds"
            bars(panel, subject, "runs that diverged, percent; less is better", shown)


def _errors(cells: Rows, note: str, path: Path) -> None:
    """The error of the update over training, by the rounding of second moments."""
    cells = [cell for cell in cells if cell["study"] == "rounding" and cell["update_error"]]
    if not cells:
        return
    heading = "Error of a step from 8-bit second moments"
    note = f"against float32 moments of the same gradients; {note}"
    with picture(path, heading, note, [9]) as (panel,):
        for cell in cells:
            errors, nearest = cell["update_error"], cell["column"] == "nearest"
            panel.plot(
                [int(step) for step in errors],
                [mean for mean, _ in errors.values()],
                color=THEIRS if nearest else OURS,
                linestyle="-" if cell["row"].endswith("0.999") else "--",
                label=f"rounded {'to nearest' if nearest else 'stochastically'}, {cell['row']}",
            )
        panel.set_ylim(bottom=0)
        panel.set_xlabel("training step", fontsize=9)
        panel.set_ylabel("relative error; less is better", fontsize=9)
        panel.legend(fontsize=9, frameon=False)


def quality(summary: dict[str, Any], folder: Path) -> None:
    """A picture for each study that has runs."""
    machines = "; ".join(f"{m['cpu']}, torch {m['versions']['torch']}" for m in summary["machines"])
    over_seeds = f"mean and deviation over seeds; {machines}"
    _losses(summary["cells"], over_seeds, folder / "quality-family.png")
    _diverged(summary["cells"], machines, folder / "quality-codec.png")
    _errors(summary["cells"], machines, folder / "quality-rounding.png")


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
