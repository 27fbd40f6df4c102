"""What the records say: numbers for the result file, and a page of tables."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from benchmarks.reporting import format_table

Record = dict[str, Any]


def summarize(records: list[Record]) -> dict[str, Any]:
    """A cell for each task, beta2 and shadow: means over seeds, by step."""
    places: dict[tuple[str, float, str], list[Record]] = {}
    for record in records:
        run = record["run"]
        places.setdefault((run["task"], run["beta2"], run["shadow"]), []).append(record)
    cells = []
    for (task, beta2, shadow), some in places.items():
        # Up to where the shortest of them goes.
        rows = zip(*(record["result"]["update"] for record in some), strict=False)
        means = [[fmean(values) for values in zip(*row, strict=True)] for row in rows]
        cells.append(
            {
                "task": task,
                "beta2": beta2,
                "shadow": shadow,
                "seeds": len(some),
                "loss": fmean(record["result"]["loss"] for record in some),
                "elements": some[0]["result"]["elements"],
                "update": [[int(step), *values] for step, *values in means],
            }
        )
    return {
        "machines": list({repr(r["machine"]): r["machine"] for r in records}.values()),
        "hours": sum(record["result"]["seconds"] for record in records) / 3600,
        "tasks": {r["run"]["task"]: r["run"]["of"] for r in records},
        "cells": cells,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The errors of one task, a line for each beta2 and shadow."""
    steps = sorted({row[0] for cell in cells for row in cell["update"]})
    headers = ["beta2", "state", *(f"error at {step:,}" for step in steps)]
    headers += ["along the exact update", "largest element"]
    lines = []
    for cell in cells:
        errors = {step: error for step, error, *_ in cell["update"]}
        shown = [f"{errors[step]:.4f}" if step in errors else "" for step in steps]
        _, _, along, largest = cell["update"][-1]
        lines.append([f"{cell['beta2']}", cell["shadow"], *shown, f"{along:.3f}", f"{largest:.2f}"])
    return format_table(headers, lines, left=2)


def page(summary: dict[str, Any]) -> str:
    """The result as Markdown."""
    machines = "; ".join(
        ", ".join([m["cpu"], *(f"{k} {v}" for k, v in m["versions"].items() if v)])
        for m in summary["machines"]
    )
    parts = [
        "# The error of the update, by format of state",
        f"`python -m benchmarks.formats`, {summary['hours']:.1f} hours of one core ({machines}).",
        """AdamW, the moments in each format, the gradients those of one training with 32-bit state.
The error is that of the update against one of float32 moments, relative, in the L2 norm. "Along the
exact update" is the update's share in its direction, 1 if it is neither too long nor too short;
"largest element" is that of the update divided by the learning rate. Both are of the last step that
a line has.""",
    ]
    for task in dict.fromkeys(cell["task"] for cell in summary["cells"]):
        cells = [cell for cell in summary["cells"] if cell["task"] == task]
        sizes = ", ".join(f"{name} {value}" for name, value in _flat(summary["tasks"][task]))
        loss = "" if cells[0]["loss"] != cells[0]["loss"] else f"; loss {cells[0]['loss']:.4f}"
        about = f"{cells[0]['elements']:,} elements; {sizes}{loss}."
        parts += [f"## {task}", about, table(cells)]
    return "\n\n".join(parts) + "\n"


def _flat(task: dict[str, Any]) -> list[tuple[str, Any]]:
    """The sizes of a task, those of its model among them."""
    found: list[tuple[str, Any]] = []
    for name, value in task.items():
        found += _flat(value) if isinstance(value, dict) else [(name, value)]
    return found
