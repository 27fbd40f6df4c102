"""What the records of the runs say, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

from benchmarks.quality.runs import EMBEDDINGS, OURS_32BIT, REFERENCE, Run

Record = dict[str, Any]  # {"run": Run.identity(), "result": ...}
Results = dict[int, dict[str, Any]]  # the results of one place in a table, by seed
Place = tuple[str, str, str, str, float]  # study, task, row, column, lr


def reference(place: Place) -> Place:
    """The 32-bit runs that those of a place are compared with."""
    study, task, row, _, lr = place
    if study == "ablation":
        return study, task, REFERENCE, next(iter(EMBEDDINGS)), lr
    return study, task, row, OURS_32BIT, lr


def _losses(results: Results) -> dict[int, float]:
    """Held-out loss by seed, of runs that have not diverged."""
    return {s: r["held_out"] for s, r in results.items() if not r.get("diverged", True)}


def spread(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    values = list(values)
    mean = fmean(values) if values else None
    return mean, stdev(values) if len(values) > 1 else None


def cell(results: Results, exact: Results) -> dict[str, Any]:
    """The numbers of a place, and how they differ from the 32-bit runs of the same seeds.

    `within_spread` says whether the mean difference is no more than a standard deviation of the
    32-bit runs: None below two seeds, and a run that diverged is not within.
    """
    ours, theirs = _losses(results), _losses(exact)
    shared = sorted(ours.keys() & theirs.keys())
    mean, deviation = spread(ours.values())
    difference, of_difference = spread(ours[seed] - theirs[seed] for seed in shared)
    within = None
    if any(seed in theirs for seed in results.keys() - ours.keys()):
        within = False
    elif difference is not None and len(shared) > 1:
        within = abs(difference) <= stdev(theirs[seed] for seed in shared)
    errors: dict[int, list[float]] = {}
    for step, error in (e for r in results.values() for e in r.get("update_error", ())):
        errors.setdefault(step, []).append(error)
    ratios = [r["stored_over_exact"] for r in results.values() if "stored_over_exact" in r]
    return {
        "runs": len(results),
        "diverged": sum(result.get("diverged", False) for result in results.values()),
        "mean": mean,
        "std": deviation,
        "difference": difference,
        "difference_std": of_difference,
        "within_spread": within,
        "errors": sorted({result["error"] for result in results.values() if "error" in result}),
        "update_error": {step: spread(errors[step]) for step in sorted(errors)},
        "stored_over_exact": [fmean(one) for one in zip(*ratios, strict=True)],
    }


def summarize(planned: list[Run], records: list[Record]) -> dict[str, Any]:
    """All that the result file says about the runs of a plan; other records do not count.

    `cells` has one of each place that something was recorded of, in the order of the plan. Within
    a place a later record of a seed counts.
    """
    wanted = [run.identity() for run in planned]
    known = [record for record in records if record["run"] in wanted]
    places: dict[Place, Results] = {}
    for run in planned:
        places.setdefault((run.study, run.task, run.row, run.column, run.lr), {})
    machines: list[Any] = []
    for record in known:
        run = record["run"]
        place = run["study"], run["task"], run["row"], run["column"], run["lr"]
        places[place][run["seed"]] = record["result"]
        machines += [record["machine"]] if record["machine"] not in machines else []
    names = ("study", "task", "row", "column", "lr")
    return {
        "runs_planned": len(planned),
        "runs_recorded": len({repr(record["run"]) for record in known}),
        "hours": sum(record["result"].get("seconds", 0.0) for record in known) / 3600,
        "machines": machines,
        "steps": {run.study + "/" + run.task: run.steps for run in planned},
        "cells": [
            {
                **dict(zip(names, place, strict=True)),
                **cell(results, places.get(reference(place), {})),
            }
            for place, results in places.items()
            if results
        ],
    }
