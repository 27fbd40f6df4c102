"""Shows that 8-bit state trains: held-out losses over seeds, against 32-bit state.

    python -m benchmarks.quality             # hours on one core; may be stopped and started again
    python -m benchmarks.quality --report    # what is recorded so far

Three studies. `family`: every optimizer with 32-bit and with 8-bit state, torch.optim's and
bitsandbytes' own where there are such, on a small GPT and on handwritten digits. `ablation`: AdamW
with a linear or a dynamic map, a scale per tensor or per block, 8-bit or 32-bit embeddings, as in
"8-bit Optimizers via Block-wise Quantization" (Dettmers et al., 2022). `rounding`: second moments
rounded to nearest and stochastically, with the error of the update beside the loss.

A run is a line in a file of records, written when it ends; a run that is recorded is not made
again. The order is that of the studies above, and seed by seed within each.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch

from benchmarks import reporting
from benchmarks.quality.report import page, summarize
from benchmarks.quality.runs import FULL, QUICK, Run, attempt, plan
from benchmarks.records import Records


def make_runs(runs: list[Run], records: Records, machine: dict[str, Any]) -> None:
    """Makes those of the runs that have no result yet."""
    missing = [run for run in runs if not records.has(run)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them recorded", flush=True)
    for number, run in enumerate(missing, 1):
        result = attempt(run)
        records.add(run, result, machine)
        text = result.get("error") or f"{result['held_out']} in {result['seconds']:.1f} s"
        print(f"{number} of {len(missing)}: {run.label}, lr {run.lr:g}: {text}", flush=True)


def _parse(argv: Iterable[str] | None) -> tuple[argparse.Namespace, list[Run]]:
    parser = reporting.parser(__doc__, "quality")
    add = parser.add_argument
    add("--quick", action="store_true", help="a few steps of tiny models, two seeds: seconds")
    only = "runs whose label matches, as 'family/gpt/*' or '*/AdamW/8-bit/seed 0'"
    add("--only", nargs="+", default=["*"], metavar="PATTERN", help=only)
    add("--list", action="store_true", help="print the labels of the runs, and end")
    add("--report", action="store_true", help="make no run; write the result files")
    records = Path("runs/quality/records.jsonl")
    add("--records", type=Path, default=records, help="file of records (%(default)s)")
    add("--threads", type=reporting.at_least(int, 1), default=1, help="of torch (1)")
    args = parser.parse_args(argv)
    runs = plan(QUICK if args.quick else FULL)
    chosen = [run for run in runs if any(fnmatchcase(run.label, one) for one in args.only)]
    if not chosen:
        parser.error(f"--only: {' '.join(args.only)} matches no run; see --list")
    of_digits = not (args.list or args.report) and any(run.task == "digits" for run in chosen)
    if of_digits and not reporting.installed("sklearn"):
        parser.error("the digits need scikit-learn: pip install scikit-learn")
    return args, chosen


def main(argv: Iterable[str] | None = None) -> None:
    args, chosen = _parse(argv)
    if args.list:
        print(*dict.fromkeys(run.label for run in chosen), sep="\n")
        return
    records = Records(args.records)
    if args.report:
        summary = summarize(chosen, list(records.values()))
        path = reporting.write_results(args, summary)
        path.with_suffix(".md").write_text(page(summary))
        print(f"{page(summary)}\nwrote {path} and {path.with_suffix('.md')}")
        return
    torch.set_num_threads(args.threads)
    machine = {
        "cpu": reporting.describe_machine(args.threads)["cpu"],
        "threads": args.threads,
        "versions": reporting.versions(["torchao8", "bitsandbytes", "scikit-learn"]),
    }
    make_runs(chosen, records, machine)


if __name__ == "__main__":
    main()
