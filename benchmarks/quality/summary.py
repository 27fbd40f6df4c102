"""What the records of the runs say, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

from benchmarks.quality.runs import (
    CODECS,
    EMBEDDINGS,
    FAMILY,
    LIBRARY,
    OURS_8BIT,
    OURS_32BIT,
    REFERENCE,
    ROUNDINGS,
    SOURCES,
    Run,
)  # fmt: skip

Record = dict[str, Any]  # {"run": Run.identity(), "result": ...}
Cell = dict[int, dict[str, Any]]  # the results of one place in a table, by seed
Place = tuple[str, str, str, str, float]  # study, task, row, column, lr


def sort_into_cells(records: Iterable[Record]) -> dict[Place, Cell]:
    """The results by place; within a place a later record of a seed counts."""
    cells: dict[Place, Cell] = {}
    for record in records:
        run = record["run"]
        place = run["study"], run["task"], run["row"], run["column"], run["lr"]
        cells.setdefault(place, {})[run["seed"]] = record["result"]
    return cells


def _values(cells: dict[Place, Cell], study: str, position: int) -> list[Any]:
    """What stands at a position of the places in a study: each once, in order of records."""
    return list(dict.fromkeys(place[position] for place in cells if place[0] == study))


def _losses(cell: Cell) -> dict[int, float]:
    """Held-out loss by seed, of runs that have not diverged."""
    return {s: r["held_out"] for s, r in cell.items() if not r.get("diverged", True)}


def _differences(cell: Cell, reference: Cell) -> list[float]:
    """Losses of one cell minus those of another, of the seeds that both have."""
    ours, theirs = _losses(cell), _losses(reference)
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def spread(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    values = list(values)
    mean = fmean(values) if values else None
    return mean, stdev(values) if len(values) > 1 else None


def _compared(cell: Cell, reference: Cell) -> dict[str, Any]:
    """A cell, and how it differs from a reference over the seeds that both have."""
    mean, deviation = spread(_losses(cell).values())
    diverged = sum(result.get("diverged", False) for result in cell.values())
    numbers = {"runs": len(cell), "diverged": diverged, "mean": mean, "std": deviation}
    errors = sorted({result["error"] for result in cell.values() if "error" in result})
    if errors:
        numbers["errors"] = errors
    mean, deviation = spread(_differences(cell, reference))
    return {**numbers, "difference": mean, "difference_std": deviation}


def within_spread(eight: Cell, thirty_two: Cell) -> bool | None:
    """Whether the 8-bit mean is no more than a standard deviation of 32-bit from its mean.

    Over the seeds that both have; None below two of them. A diverged 8-bit run is not within.
    """
    ours, theirs = _losses(eight), _losses(thirty_two)
    if any(seed in theirs for seed in eight.keys() - ours.keys()):
        return False
    shared = ours.keys() & theirs.keys()
    if len(shared) < 2:
        return None
    return abs(fmean(_differences(eight, thirty_two))) <= stdev(theirs[seed] for seed in shared)


def _family_rows(cells: dict[Place, Cell]) -> list[dict[str, Any]]:
    """A row for each task and rule that something was recorded of."""
    rows = []
    for task in _values(cells, "family", 1):
        for rule in FAMILY:
            lr = rule.lr[task]
            of = {s: cells.get(("family", task, rule.name, s, lr), {}) for s in SOURCES}
            if any(of.values()):
                exact = of[OURS_32BIT]
                sources = {s: _compared(cell, exact) for s, cell in of.items() if cell}
                verdict = within_spread(of[OURS_8BIT], exact)
                row = {"task": task, "rule": rule.name, "lr": lr}
                rows.append({**row, "sources": sources, "within_spread": verdict})
    return rows


def _ablation_rows(cells: dict[Place, Cell]) -> list[dict[str, Any]]:
    """A row for each codec and kind of embedding: over all learning rates, and each of them."""
    rows = []
    for codec in (REFERENCE, LIBRARY, *CODECS):
        for embeddings in EMBEDDINGS:
            by_lr = {}
            for lr in sorted(_values(cells, "ablation", 4)):
                cell = cells.get(("ablation", "gpt", codec, embeddings, lr), {})
                exact = cells.get(("ablation", "gpt", REFERENCE, next(iter(EMBEDDINGS)), lr), {})
                if cell:
                    by_lr[str(lr)] = _compared(cell, exact)
            if by_lr:
                runs = sum(of["runs"] for of in by_lr.values())
                diverged = sum(of["diverged"] for of in by_lr.values())
                row = {"codec": codec, "embeddings": embeddings, "runs": runs, "by_lr": by_lr}
                rows.append({**row, "diverged": diverged, "share_diverged": diverged / runs})
    return rows


def _rounding_rows(cells: dict[Place, Cell]) -> list[dict[str, Any]]:
    """A row for each decay rate and way of rounding; errors of the update by step."""
    rows = []
    for row in _values(cells, "rounding", 2):
        for lr in sorted(_values(cells, "rounding", 4)):
            exact = cells.get(("rounding", "gpt", row, OURS_32BIT, lr), {})
            for column in (OURS_32BIT, *ROUNDINGS):
                cell = cells.get(("rounding", "gpt", row, column, lr), {})
                if not cell:
                    continue
                errors: dict[int, list[float]] = {}
                for step, error in (e for r in cell.values() for e in r.get("update_error", ())):
                    errors.setdefault(step, []).append(error)
                ratios = [r["stored_over_exact"] for r in cell.values() if "stored_over_exact" in r]
                found = {"row": row, "rounding": column, **_compared(cell, exact)}
                found["update_error"] = {step: spread(errors[step]) for step in sorted(errors)}
                found["stored_over_exact"] = [fmean(one) for one in zip(*ratios, strict=True)]
                rows.append(found)
    return rows


def summarize(planned: list[Run], records: list[Record]) -> dict[str, Any]:
    """All that the result file says about the runs of a plan; other records do not count."""
    wanted = [run.identity() for run in planned]
    known = [record for record in records if record["run"] in wanted]
    cells = sort_into_cells(known)
    machines: list[Any] = []
    for record in known:
        if record["machine"] not in machines:
            machines.append(record["machine"])
    return {
        "runs_planned": len(planned),
        "runs_recorded": len({repr(record["run"]) for record in known}),
        "hours": sum(record["result"].get("seconds", 0.0) for record in known) / 3600,
        "machines": machines,
        "steps": {run.study + "/" + run.task: run.steps for run in planned},
        "family": _family_rows(cells),
        "ablation": _ablation_rows(cells),
        "rounding": _rounding_rows(cells),
    }
