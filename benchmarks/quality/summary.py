"""What the records of the runs say, in numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
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
)

Record = dict[str, Any]  # {"run": Run.identity(), "result": ...}
Place = tuple[str, str, str, str, float]  # study, task, row, column, lr


@dataclass(frozen=True)
class Cell:
    """The runs of one place in a table, by seed."""

    results: dict[int, dict[str, Any]]

    @property
    def losses(self) -> dict[int, float]:
        """Held-out loss by seed, of runs that have not diverged."""
        finished = {s: r for s, r in self.results.items() if not r.get("diverged", True)}
        return {seed: result["held_out"] for seed, result in finished.items()}

    @property
    def diverged(self) -> int:
        """Runs that diverged."""
        return sum(result.get("diverged", False) for result in self.results.values())

    @property
    def errors(self) -> list[str]:
        """Why runs failed."""
        return sorted({r["error"] for r in self.results.values() if "error" in r})


NOTHING = Cell({})


class Cells:
    """Records, sorted into cells."""

    def __init__(self, records: Iterable[Record]) -> None:
        found: dict[Place, dict[int, dict[str, Any]]] = {}
        for record in records:
            run = record["run"]
            place = run["study"], run["task"], run["row"], run["column"], run["lr"]
            found.setdefault(place, {})[run["seed"]] = record["result"]
        self._cells = {place: Cell(results) for place, results in found.items()}

    def get(self, study: str, task: str, row: str, column: str, lr: float) -> Cell:
        """The cell of a place, empty if nothing was recorded there."""
        return self._cells.get((study, task, row, column, lr), NOTHING)

    def lrs(self, study: str) -> list[float]:
        """The learning rates in a study, ascending."""
        return sorted({place[4] for place in self._cells if place[0] == study})

    def values(self, study: str, position: int) -> list[Any]:
        """What stands at a position of the places in a study: each once, in order of records."""
        return list(dict.fromkeys(place[position] for place in self._cells if place[0] == study))


def spread(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    values = list(values)
    mean = fmean(values) if values else None
    return mean, stdev(values) if len(values) > 1 else None


def differences(one: Cell, other: Cell) -> list[float]:
    """Losses of one cell minus those of another, of the seeds that both have."""
    ours, theirs = one.losses, other.losses
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


# --- the numbers --------------------------------------------------------------------------------


def _numbers(cell: Cell) -> dict[str, Any]:
    mean, deviation = spread(cell.losses.values())
    numbers = {"runs": len(cell.results), "diverged": cell.diverged, "mean": mean, "std": deviation}
    return {**numbers, "errors": cell.errors} if cell.errors else numbers


def _compared(cell: Cell, reference: Cell) -> dict[str, Any]:
    """A cell, and how it differs from a reference over the seeds that both have."""
    mean, deviation = spread(differences(cell, reference))
    return {**_numbers(cell), "difference": mean, "difference_std": deviation}


def within_spread(eight: Cell, thirty_two: Cell) -> bool | None:
    """Whether the 8-bit mean is no more than a standard deviation of 32-bit from its mean.

    Over the seeds that both have; None below two of them. A diverged 8-bit run is not within.
    """
    if any(seed in thirty_two.losses for seed in eight.results.keys() - eight.losses.keys()):
        return False
    shared = eight.losses.keys() & thirty_two.losses.keys()
    if len(shared) < 2:
        return None
    mean, deviation = spread(thirty_two.losses[seed] for seed in shared)
    difference = fmean(differences(eight, thirty_two))
    assert mean is not None
    assert deviation is not None
    return abs(difference) <= deviation


def family_rows(cells: Cells) -> list[dict[str, Any]]:
    """A row for each task and rule that something was recorded of."""
    rows = []
    for task in cells.values("family", 1):
        for rule in FAMILY:
            of = {s: cells.get("family", task, rule.name, s, rule.lr[task]) for s in SOURCES}
            if any(cell.results for cell in of.values()):
                exact = of[OURS_32BIT]
                rows.append(
                    {
                        "task": task,
                        "rule": rule.name,
                        "lr": rule.lr[task],
                        "sources": {s: _compared(c, exact) for s, c in of.items() if c.results},
                        "within_spread": within_spread(of[OURS_8BIT], exact),
                    }
                )
    return rows


def ablation_rows(cells: Cells) -> list[dict[str, Any]]:
    """A row for each codec and kind of embedding: over all learning rates, and each of them."""
    rows = []
    lrs = cells.lrs("ablation")
    for codec in (REFERENCE, LIBRARY, *CODECS):
        for embeddings in EMBEDDINGS:
            by_lr = {}
            for lr in lrs:
                cell = cells.get("ablation", "gpt", codec, embeddings, lr)
                exact = cells.get("ablation", "gpt", REFERENCE, next(iter(EMBEDDINGS)), lr)
                if cell.results:
                    by_lr[str(lr)] = _compared(cell, exact)
            if by_lr:
                runs = sum(of["runs"] for of in by_lr.values())
                diverged = sum(of["diverged"] for of in by_lr.values())
                row = {"codec": codec, "embeddings": embeddings, "runs": runs, "by_lr": by_lr}
                rows.append({**row, "diverged": diverged, "share_diverged": diverged / runs})
    return rows


def rounding_rows(cells: Cells) -> list[dict[str, Any]]:
    """A row for each decay rate and way of rounding; errors of the update by step."""
    rows = []
    for row in cells.values("rounding", 2):
        for lr in cells.lrs("rounding"):
            exact = cells.get("rounding", "gpt", row, OURS_32BIT, lr)
            for column in (OURS_32BIT, *ROUNDINGS):
                cell = cells.get("rounding", "gpt", row, column, lr)
                if not cell.results:
                    continue
                errors: dict[int, list[float]] = {}
                for result in cell.results.values():
                    for step, error in result.get("update_error", ()):
                        errors.setdefault(step, []).append(error)
                ratios = [
                    r["stored_over_exact"]
                    for r in cell.results.values()
                    if "stored_over_exact" in r
                ]
                rows.append(
                    {
                        "row": row,
                        "rounding": column,
                        **_compared(cell, exact),
                        "update_error": {step: spread(errors[step]) for step in sorted(errors)},
                        "stored_over_exact": [fmean(one) for one in zip(*ratios, strict=True)],
                    }
                )
    return rows


def summarize(planned: list[Run], records: list[Record]) -> dict[str, Any]:
    """All that the result file says about the runs of a plan; other records do not count."""
    wanted = [run.identity() for run in planned]
    known = [record for record in records if record["run"] in wanted]
    cells = Cells(known)
    machines = []
    for record in known:
        if record["machine"] not in machines:
            machines.append(record["machine"])
    return {
        "runs_planned": len(planned),
        "runs_recorded": len({repr(record["run"]) for record in known}),
        "hours": sum(record["result"].get("seconds", 0.0) for record in known) / 3600,
        "machines": machines,
        "steps": {run.study + "/" + run.task: run.steps for run in planned},
        "family": family_rows(cells),
        "ablation": ablation_rows(cells),
        "rounding": rounding_rows(cells),
    }
