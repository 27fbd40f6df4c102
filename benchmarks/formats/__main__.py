"""How far updates with quantized state are from exact ones, for formats and their constants.

    python -m benchmarks.formats             # an hour or so of one core; may be stopped
    python -m benchmarks.formats --report    # what is recorded so far

A training with 32-bit state shows its gradients to shadows: AdamW with state in each format. Their
updates are compared with those of float32 moments, at a few steps: relative error in the L2 norm,
the share along the exact update, and the largest element. So all formats see the same gradients,
and a format cannot hide its errors by training otherwise. The tasks are the tutorial's GPT at its
full size, a convolutional net on digits, and noise in blocks of unequal elements; see tasks.py.

A record is what one shadow has told of one task, at one beta2. It is written whenever updates are
compared, so that a stop leaves what there is. A training is made again, from its start, for the
shadows whose records do not reach its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from torch import Tensor

from benchmarks import reporting, study
from benchmarks.formats.report import page, summarize
from benchmarks.formats.shadows import Exact, Shadow, available
from benchmarks.formats.tasks import QUICK, TASKS, Task
from benchmarks.records import Records, key

BETA2 = (0.999, 0.95)
PROBES = (200, 1400, 2600, 5000)
QUICK_PROBES = (2, 4)


@dataclass(frozen=True)
class Run:
    """What one shadow tells of one training."""

    task: str
    of: Task
    seed: int
    probes: tuple[int, ...]
    beta2: float
    shadow: str

    @property
    def label(self) -> str:
        """What --only matches."""
        return f"{self.task}/beta2 {self.beta2}/{self.shadow}/seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        return {**asdict(self), "probes": list(self.probes)}


def plan(tasks: dict[str, Task], probes: tuple[int, ...], seeds: int) -> list[Run]:
    return [
        Run(name, task, seed, probes, beta2, shadow)
        for seed in range(seeds)
        for name, task in tasks.items()
        for beta2 in BETA2
        for shadow in available()
    ]


def compare(updates: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative L2 error, share along the exact update, and the largest element."""
    difference = total = along = largest = 0.0
    for u, e in zip(updates, exact, strict=True):
        u, e = u.double(), e.double()
        difference += (u - e).square().sum().item()
        total += e.square().sum().item()
        along += (u * e).sum().item()
        largest = max(largest, u.abs().max().item())
    return [(difference / total) ** 0.5, along / total, largest]


def watch(runs: list[Run]) -> Iterator[list[dict[str, Any]]]:
    """Makes one training for several runs that differ in their shadows. Gives the results of all
    that have been told so far, at each step at which updates are compared."""
    first, start = runs[0], time.monotonic()
    makers = available()
    shadows: list[Shadow] = []
    exact: dict[float, Exact] = {}
    results: list[dict[str, Any]] = [{"update": []} for _ in runs]
    losses: list[float] = []
    for step, (grads, loss) in enumerate(first.of.gradients(first.probes[-1], first.seed), 1):
        if not exact:
            shadows = [makers[run.shadow](grads, run.beta2) for run in runs]
            exact = {run.beta2: Exact(grads, run.beta2) for run in runs}
        wanted = step in first.probes
        right = {beta2: one.step(grads, wanted) for beta2, one in exact.items()}
        for run, shadow, result in zip(runs, shadows, results, strict=True):
            updates = shadow.step(grads, wanted)
            if wanted:
                result["update"].append([step, *compare(updates, right[run.beta2])])
        losses.append(loss)
        if wanted:
            passed = f"{first.task}, step {step}, loss {loss:.4f}, {time.monotonic() - start:.0f} s"
            print(passed, flush=True)
            for run, result in zip(runs, results, strict=True):
                print("   ", run.label, *(f"{x:.4f}" for x in result["update"][-1][1:]), flush=True)
            about = {
                "loss": fmean(losses[-100:]),
                "elements": sum(g.numel() for g in grads),
                "seconds": (time.monotonic() - start) / len(runs),
            }
            yield [{**result, **about} for result in results]


def is_whole(run: Run, records: Records) -> bool:
    """Whether a run was recorded to its last step."""
    record = records.get(key(run.identity()))
    return record is not None and record["result"]["update"][-1][0] == run.probes[-1]


def make_runs(runs: Sequence[Run], records: Records, machine: dict[str, Any]) -> None:
    """Makes the trainings whose runs are not all recorded, for the shadows that are missing."""
    missing = [run for run in runs if not is_whole(run, records)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them recorded", flush=True)
    together: dict[tuple[str, int], list[Run]] = {}
    for run in missing:
        together.setdefault((run.task, run.seed), []).append(run)
    for some in together.values():
        for results in watch(some):
            for run, result in zip(some, results, strict=True):
                records.add(run, result, machine)


def main(argv: Iterable[str] | None = None) -> None:
    labels = "'gpt/*' or '*/dynamic/seed 0'"
    parser = study.parser(__doc__, "formats", "a few steps of tiny models: seconds", labels)
    seeds = "trainings of a task (1)"
    parser.add_argument("--seeds", type=reporting.at_least(int, 1), default=1, help=seeds)
    args = parser.parse_args(argv)
    tasks, probes = (QUICK, QUICK_PROBES) if args.quick else (TASKS, PROBES)
    chosen = study.choose(parser, args, plan(tasks, probes, args.seeds), digits="conv")
    packages = ("torchao8", "torchao", "scikit-learn")
    study.carry_out(args, chosen, make_runs, summarize, page, packages)


if __name__ == "__main__":
    main()
