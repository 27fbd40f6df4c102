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

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks import study
from benchmarks.quality.report import page, summarize
from benchmarks.quality.runs import FULL, QUICK, Run, attempt, plan
from benchmarks.records import Records


def make_runs(runs: Sequence[Run], records: Records, machine: dict[str, Any]) -> None:
    """Makes those of the runs that have no result yet."""
    missing = [run for run in runs if not records.has(run)]
    print(f"{len(runs)} runs, {len(runs) - len(missing)} of them recorded", flush=True)
    for number, run in enumerate(missing, 1):
        result = attempt(run)
        records.add(run, result, machine)
        text = result.get("error") or f"{result['held_out']} in {result['seconds']:.1f} s"
        print(f"{number} of {len(missing)}: {run.label}, lr {run.lr:g}: {text}", flush=True)


def main(argv: Iterable[str] | None = None) -> None:
    quick = "a few steps of tiny models, two seeds: seconds"
    labels = "'family/gpt/*' or '*/AdamW/8-bit/seed 0'"
    parser = study.parser(__doc__, "quality", quick, labels)
    args = parser.parse_args(argv)
    chosen = study.choose(parser, args, plan(QUICK if args.quick else FULL), digits="digits")
    packages = ("torchao8", "bitsandbytes", "scikit-learn")
    study.carry_out(args, chosen, make_runs, partial(summarize, chosen), page, packages)


if __name__ == "__main__":
    main()
