"""What the records of the runs say: numbers for the result file, and a page of tables."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, stdev
from typing import Any

from benchmarks.quality.moments import PERCENTILES
from benchmarks.quality.runs import (
    EMBEDDINGS,
    OURS_4BIT,
    OURS_8BIT,
    OURS_32BIT,
    OURS_MULAW,
    REFERENCE,
    SOURCES,
    TORCHAO_4BIT,
    Run,
)
from benchmarks.reporting import format_table

Record = dict[str, Any]  # {"run": Run.identity(), "result": ...}
Cells = list[dict[str, Any]]
Results = dict[int, dict[str, Any]]  # the results of one place in a table, by seed
COMPARED = (OURS_8BIT, OURS_MULAW, OURS_4BIT, TORCHAO_4BIT)  # with 32-bit state
PLACE = ("study", "task", "row", "column", "lr")
Place = tuple[Any, ...]


def reference(place: Place) -> Place:
    """The 32-bit runs that those of a place are compared with."""
    study, task, row, _, lr = place
    if study == "ablation":
        return study, task, REFERENCE, next(iter(EMBEDDINGS)), lr
    return study, task, row, OURS_32BIT, lr


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
    ours, theirs = (
        {seed: r["held_out"] for seed, r in runs.items() if not r.get("diverged", True)}
        for runs in (results, exact)
    )
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
    places: dict[Place, Results] = {tuple(run[n] for n in PLACE): {} for run in wanted}
    for record in known:
        place = tuple(record["run"][name] for name in PLACE)
        places[place][record["run"]["seed"]] = record["result"]
    return {
        "runs_planned": len(planned),
        "runs_recorded": len({repr(record["run"]) for record in known}),
        "hours": sum(record["result"].get("seconds", 0.0) for record in known) / 3600,
        "machines": list({repr(r["machine"]): r["machine"] for r in known}.values()),
        "steps": {run.study + "/" + run.task: run.steps for run in planned},
        "cells": [
            dict(zip(PLACE, place, strict=True)) | cell(results, places.get(reference(place), {}))
            for place, results in places.items()
            if results
        ],
    }


# --- the page ------------------------------------------------------------------------------------


def _plus_minus(mean: float | None, deviation: float | None, form: str = ".4f") -> str:
    if mean is None:
        return ""
    return format(mean, form) + ("" if deviation is None else f" ± {deviation:.4f}")


def _loss(cell: dict[str, Any] | None) -> str:
    if cell is None or cell["errors"]:
        return "fails" if cell else ""
    diverged = f" ({cell['diverged']} of {cell['runs']} diverged)" if cell["diverged"] else ""
    return (_plus_minus(cell["mean"], cell["std"]) + diverged).strip()


def _difference(cell: dict[str, Any] | None) -> str:
    return _plus_minus(cell["difference"], cell["difference_std"], "+.4f") if cell else ""


def groups(cells: Cells, study: str, names: tuple[str, ...], column: str) -> dict[Any, Any]:
    """The cells of a study as {values of `names`: {value of `column`: cell}}."""
    found: dict[Any, Any] = {}
    for cell in cells:
        if cell["study"] == study:
            found.setdefault(tuple(cell[name] for name in names), {})[cell[column]] = cell
    return found


def family_table(cells: Cells) -> str:
    """The family: losses, a line for each task and rule, and the differences from 32-bit state of
    each format; below them, why runs failed."""
    rows = groups(cells, "family", ("task", "row", "lr"), "column")
    sources = [source for source in SOURCES if any(source in of for of in rows.values())]
    compared = [source for source in COMPARED if source in sources]
    lines, differences, notes = [], [], []
    for (task, rule, lr), of in rows.items():
        seeds = str(max(cell["runs"] for cell in of.values()))
        losses = [_loss(of.get(source)) for source in sources]
        lines.append([task, rule, f"{lr:g}", *losses, seeds])
        told = [text for source in compared for text in _verdict(of.get(source))]
        differences.append([task, rule, *told])
        notes += [f"{source} fails on {task}, {rule}: {error}"
                  for source, cell in of.items() for error in cell["errors"]]  # fmt: skip
    tables = [format_table(["task", "rule", "lr", *sources, "seeds"], lines, left=2)]
    if compared:
        headers = [text for source in compared for text in (f"{source} - 32-bit", "within")]
        tables.append(format_table(["task", "rule", *headers], differences, left=2))
    return "\n\n".join([*tables, *dict.fromkeys(notes)])


def _verdict(cell: dict[str, Any] | None) -> tuple[str, str]:
    within = cell and cell["within_spread"]
    return _difference(cell), {None: "", True: "yes", False: "no"}[within]


def ablation_table(cells: Cells) -> str:
    """The ablation: the share of diverged runs, and what the others lose to 32-bit state."""
    rows = groups(cells, "ablation", ("row", "column"), "lr")
    lrs = sorted({lr for by_lr in rows.values() for lr in by_lr})
    headers = ["state", "embeddings", "diverged", *(f"loss over 32-bit, lr {lr}" for lr in lrs)]
    lines = []
    for (codec, embeddings), by_lr in rows.items():
        diverged, runs = (sum(cell[n] for cell in by_lr.values()) for n in ("diverged", "runs"))
        exact = codec == REFERENCE
        texts = [(_loss if exact else _difference)(by_lr.get(lr)) for lr in lrs]
        bits = "" if exact else embeddings
        lines.append([codec, bits, f"{diverged / runs:.0%} of {runs}", *texts])
    return format_table(headers, lines, left=2)


def rounding_table(cells: Cells) -> str:
    """Ways of rounding: loss, and the error of the update at a few steps."""
    cells = [cell for cell in cells if cell["study"] == "rounding"]
    steps = sorted({step for cell in cells for step in cell["update_error"]})
    shown = sorted({steps[round(q * (len(steps) - 1))] for q in (0, 0.25, 0.5, 1)}) if steps else []
    names = "/".join(f"{100 * q:.0f}" for q in PERCENTILES)
    headers = ["", "second moments", "held-out loss", "over 32-bit"]
    headers += [*(f"error at {step}" for step in shown), f"stored/exact v, percentile {names}"]
    lines = []
    for cell in cells:
        difference = "" if cell["column"] == OURS_32BIT else _difference(cell)
        errors = [_plus_minus(*cell["update_error"].get(step, (None, None))) for step in shown]
        ratios = " / ".join(f"{ratio:.2f}" for ratio in cell["stored_over_exact"])
        lines.append([cell["row"], cell["column"], _loss(cell), difference, *errors, ratios])
    return format_table(headers, lines, left=2)


_SECTIONS = {
    "family": (
        "Every optimizer",
        """Held-out loss at the end, in nats: mean ± standard deviation over seeds. A seed
gives the same parameters and the same batches to all. The second table has the mean and deviation
of the differences of the same seed, and whether that mean is within one deviation of the 32-bit
runs. "8-bit" is the dynamic map, "8-bit mulaw" the option state_format="mulaw". MuonAdamW is Muon
for the hidden matrices and AdamW for the rest: torch.optim has two optimizers for it.""",
        family_table,
    ),
    "ablation": (
        "The codec: what blocks, the dynamic map and 32-bit embeddings are for",
        """AdamW on the GPT, beta2 0.999. Rows "emulated" are `torch.optim.AdamW` whose
moments are quantized and dequantized after every step, to nearest, in plain PyTorch: a second
moment may become zero, and blocks are of the flattened tensor. A run has diverged if its loss was
not finite or ended above that of a guess; differences are of the other runs, for the same seed.""",
        ablation_table,
    ),
    "rounding": (
        "Second moments, to nearest and stochastically",
        """AdamW8bit on the GPT. The error is that of the update, relative, in the L2 norm,
against float32 moments that are fed the same gradients: mean ± standard deviation over seeds.""",
        rounding_table,
    ),
}


def page(summary: dict[str, Any]) -> str:
    """The result as Markdown."""
    machines = "; ".join(
        ", ".join([m["cpu"], *(f"{k} {v}" for k, v in m["versions"].items() if v)])
        for m in summary["machines"]
    )
    runs = f"{summary['runs_recorded']} of {summary['runs_planned']} runs"
    hours = f"{summary['hours']:.1f} hours of one core"
    parts = [
        "# Training with 8-bit state: what it costs in loss",
        f"`python -m benchmarks.quality`, {runs}, {hours} ({machines}).",
    ]
    for name, (title, text, table) in _SECTIONS.items():
        if any(cell["study"] == name for cell in summary["cells"]):
            steps = ", ".join(f"{k.split('/')[1]} {n:,}" for k, n in summary["steps"].items()
                              if k.startswith(name + "/"))  # fmt: skip
            parts += [f"## {title}", f"{text} Steps: {steps}.", table(summary["cells"])]
    return "\n\n".join(parts) + "\n"
