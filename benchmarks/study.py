"""What the studies of quality and of formats share: options, the choice of runs, the report.

A study makes many runs, each of which has a label and is recorded when it ends, see
:mod:`benchmarks.records`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from benchmarks import reporting
from benchmarks.records import Record, Records


class Run(Protocol):
    @property
    def label(self) -> str:
        """What --only matches."""

    @property
    def task(self) -> str: ...


AnyRun = TypeVar("AnyRun", bound=Run)


def parser(doc: str | None, name: str, quick: str, labels: str) -> argparse.ArgumentParser:
    """A parser with the options of every study.

    Args:
        name: of the study, and of its result files.
        quick: what --quick does.
        labels: examples of patterns.
    """
    made = reporting.parser(doc, name)
    add = made.add_argument
    add("--quick", action="store_true", help=quick)
    only = f"runs whose label matches, as {labels}"
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help=only)
    add("--list", action="store_true", help="print the labels of the runs, and end")
    add("--report", action="store_true", help="make no run; write the result files")
    records = Path("runs") / name / "records.jsonl"
    add("--records", type=Path, default=records, help="file of records (%(default)s)")
    add("--threads", type=reporting.at_least(int, 1), default=1, help="of torch (1)")
    return made


def choose(
    made: argparse.ArgumentParser, args: argparse.Namespace, runs: Iterable[AnyRun], digits: str
) -> list[AnyRun]:
    """The runs that --only names; ends the program where they cannot be made.

    Args:
        digits: the task that needs scikit-learn's digits.
    """
    chosen = [run for run in runs if any(fnmatchcase(run.label, one) for one in args.only)]
    if not chosen:
        made.error(f"--only: {' '.join(args.only)} matches no run; see --list")
    makes = not (args.list or args.report)
    if makes and any(run.task == digits for run in chosen) and not reporting.installed("sklearn"):
        made.error("the digits need scikit-learn: pip install scikit-learn")
    return chosen


def carry_out(
    args: argparse.Namespace,
    chosen: Sequence[AnyRun],
    make: Callable[[Sequence[AnyRun], Records, dict[str, Any]], None],
    summarize: Callable[[list[Record]], dict[str, Any]],
    page: Callable[[dict[str, Any]], str],
    packages: Sequence[str],
) -> None:
    """Lists the runs, makes those that are missing, or writes the report of those recorded.

    Args:
        make: makes runs, which it adds to the records with a description of the machine.
        summarize, page: what the result files hold.
        packages: whose versions the description has.
    """
    if args.list:
        print(*dict.fromkeys(run.label for run in chosen), sep="\n")
        return
    records = Records(args.records)
    if args.report:
        summary = summarize(list(records.values()))
        path = reporting.write_results(args, summary)
        path.with_suffix(".md").write_text(page(summary))
        print(f"{page(summary)}\nwrote {path} and {path.with_suffix('.md')}")
        return
    torch.set_num_threads(args.threads)
    machine = {
        "cpu": reporting.describe_machine(args.threads)["cpu"],
        "threads": args.threads,
        "versions": reporting.versions(packages),
    }
    make(chosen, records, machine)
