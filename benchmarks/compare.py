"""Times two commits and torch's fused AdamW side by side, and compares their bits.

    python -m benchmarks.compare OLD               # a commit against the working tree as it is
    python -m benchmarks.compare OLD NEW --list gpt2 small
    python -m benchmarks.compare OLD --sharded     # DTensors on two ranks, host time, checkpoints

Each commit is checked out and built once, under build/compare/<hash>; the working tree is built in
place. Every optimizer has a process of its own, in which torchao8 is imported from its build. Those
of AdamW, and then those of AdamW8bit, take turns with torch's, in an order that rotates. Ratios are
of speed, in the same round: above 1, the row takes less time than what it is compared with. `bits`
says whether the parameters and every state of both commits have the same bits after five steps on
seeded gradients.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks import reporting
from benchmarks.step.contenders import BASELINE, CONTENDERS, Contender
from benchmarks.step.devices import Cpu
from benchmarks.step.rounds import Bench, Plan, Row, ratios
from benchmarks.step.tensor_lists import LISTS, list_names, tensor_lists

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ROOT / "build" / "compare"
OPTIMIZERS = {"AdamW": "32bit", "AdamW8bit": "8bit"}  # class: contender
SIDES = ("new", "old", "torch")  # each is compared with those behind it


# --- the two builds -----------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _build(tree: Path, objects: Path) -> None:
    """Builds the extension of a source tree in place."""
    reporting.say(f"building {tree}")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    command += ["--build-temp", str(objects / "temp"), "--build-lib", str(objects / "lib")]
    # The build starts ninja, which pip installs beside the interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=tree, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}{done.stderr[-4000:]}\n{tree} does not build")


def source_of(revision: str | None) -> tuple[str, Path]:
    """The name and the directory of a built commit; of the working tree if there is no revision."""
    if revision is None:
        _build(ROOT, ROOT / "build" / "env")
        return "working tree", ROOT
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}")[:12]
    tree, built = BUILDS / commit, BUILDS / f"{commit}.built"
    if not built.exists():
        if not (tree / "setup.py").exists():
            # --force: `make clean` removes such trees, and git still has them in its list.
            _git("worktree", "add", "--force", "--detach", str(tree), commit)
        _build(tree, tree / "build")
        built.touch()
    return commit, tree


# --- a comparison -------------------------------------------------------------------------------


def contenders(name: str, sources: dict[str, Path], kinds: tuple[str, ...]) -> list[Contender]:
    """An optimizer of both sides and torch's, on each kind of tensors; its side comes first."""
    sides = {side: replace(CONTENDERS[name], source=str(tree)) for side, tree in sources.items()}
    sides["torch"] = CONTENDERS[BASELINE]
    return [replace(chosen, name=f"{side} {name} {kind}", tensors=kind)
            for side, chosen in sides.items() for kind in kinds]  # fmt: skip


def speed(of: Row, over: Row) -> dict[str, float] | None:
    """How many times as fast as another a row is: median and quartiles over rounds."""
    found = ratios(of.rounds, over.rounds)
    if len(found) < 2 or of.batch != over.batch:  # rounds of two batches have nothing in common
        return None
    low, middle, high = quantiles(found, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def same_bits(old: Row, new: Row) -> str:
    """ "yes", or what differs; "" if one of them was not run."""
    if not old.info or not new.info:
        return ""
    pairs = list(zip(old.info["bits"], new.info["bits"], strict=True))
    names = sorted({name for pair in pairs for bits in pair for name in bits})
    wrong = [n for n in names if any(one.get(n) != other.get(n) for one, other in pairs)]
    return "yes" if not wrong else f"no: {', '.join(wrong)}"


def compared(optimizer: str, rows: list[Row]) -> list[dict[str, Any]]:
    """The rows of the result file about an optimizer: one for each kind of tensors and side."""
    of = {(row.contender.tensors, row.name.split()[0]): row for row in rows}
    found = []
    for (kind, side), row in sorted(of.items(), key=lambda item: item[0][0]):
        one = {"optimizer": optimizer, "tensors": kind, "side": side}
        if row.skipped is not None:
            found.append({**one, "skipped": row.skipped})
            continue
        times = [1e3 * seconds for seconds in row.rounds.values()]
        one |= {"ms": median(times), "ms_of_rounds": times}
        others = SIDES[SIDES.index(side) + 1 :]
        one |= {f"over {other}": speed(row, of[kind, other]) for other in others}
        if kind == "DTensor":
            # Of times, not of speeds: what a DTensor costs beside its shard.
            one["time over shards"] = speed(of["shard", side], row)
            one["saved_bytes"] = row.info["saved_bytes"]
        if side == "new":
            one["bits"] = same_bits(of[kind, "old"], row)
        found.append(one)
    return found


def table(cases: list[dict[str, Any]]) -> str:
    """All rows; below them, what was left out and why."""
    sharded = any(row["tensors"] == "DTensor" for case in cases for row in case["rows"])
    names = ["over old", "over torch", *["time over shards"] * sharded]
    headers = ["", "dtype", "step", "optimizer", "tensors", "side"]
    headers += ["us a tensor" if sharded else "ms", *names, *["MB saved"] * sharded, "bits"]
    lines, left_out = [], []
    for case, row in ((one, row) for one in cases for row in one["rows"]):
        line = [case["label"], case["dtype"], case["step"]]
        line += [row["optimizer"], row["tensors"], row["side"]]
        if "skipped" in row:
            left_out.append(f"left out, {', '.join(line)}: {row['skipped']}")
            continue
        line.append(format(row["ms"] * (1e3 / case["tensors"] if sharded else 1.0), ".3g"))
        ratios = (row.get(name) for name in names)
        line += ["{median:.2f} ({low:.2f} - {high:.2f})".format(**r) if r else "" for r in ratios]
        if sharded:
            line.append(f"{row['saved_bytes'] / 1e6:.1f}" if "saved_bytes" in row else "")
        lines.append([*line, row.get("bits", "")])
    return "\n".join([reporting.format_table(headers, lines, left=6), *left_out])


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = reporting.parser(__doc__)
    add = parser.add_argument
    add("old", help="a git revision")
    add("new", nargs="?", help="a git revision (the working tree as it is)")
    lists = "gpt2 small tiny; tiny if --sharded, block if --compiled"
    reporting.add_timing(parser, "31", "0.05", lists)
    parser.set_defaults(rounds=31, turn=0.05)
    add("--compiled", action="store_true", help="torch.compile's steps too, beside eager ones")
    add("--sharded", action="store_true", help="DTensors, and copies of their shards, on gloo")
    add("--ranks", type=reporting.at_least(int, 2), default=2, help="of --sharded (2)")
    args = parser.parse_args(argv)
    if args.sharded and args.compiled:
        parser.error("--compiled: expected without --sharded, which times the host of eager steps")
    # Older commits take minutes to compile a step over 148 tensors, and hours over 1,000.
    default = (
        ["tiny"] if args.sharded else ["block"] if args.compiled else ["gpt2", "small", "tiny"]
    )
    try:
        args.lists = list_names(args.list or default, LISTS["cpu"])
    except ValueError as error:
        parser.error(f"--list: {error}")
    return args


def measure(args: argparse.Namespace, sources: dict[str, Path]) -> list[dict[str, Any]]:
    """The cases of the result file: for each list, dtype and kind of step."""
    ranks, threads = (args.ranks, 1) if args.sharded else (1, args.threads)
    kinds = ("DTensor", "shard") if args.sharded else ("whole",)
    plan, cases = Plan(args.rounds, args.turn, budget=60.0), []
    for step, suffix in [("eager", ""), ("compiled", "-compiled")][: 1 + args.compiled]:
        with Bench(Cpu("cpu"), threads, plan, ranks) as bench:
            for list_name, dtype in itertools.product(args.lists, args.dtype):
                tensors, found = tensor_lists()[list_name], []
                for optimizer, name in OPTIMIZERS.items():
                    chosen = contenders(name + suffix, sources, kinds)
                    found += compared(optimizer, bench.measure(chosen, [], tensors, dtype))
                case = {"list": list_name, "label": tensors.label, "dtype": dtype, "step": step}
                cases.append({**case, "tensors": len(tensors.shapes), "rows": found})
    return cases


def main(argv: Iterable[str] | None = None) -> None:
    """Runs the comparison with the command line `argv` (of the process if None)."""
    args = _parse(argv)
    named = {"old": source_of(args.old), "new": source_of(args.new)}
    names = {side: name for side, (name, _) in named.items()}
    watch = reporting.CpuWatch()
    cases = measure(args, {side: tree for side, (_, tree) in named.items()})
    print(f"old: {names['old']}, new: {names['new']}\n{table(cases)}")
    machine = reporting.describe_machine(1 if args.sharded else args.threads)
    record = {
        "device": {**machine, "cpu_taken_by_others": watch.shares()},
        "versions": reporting.versions([]),
        **names,
        "new_commit": _git("rev-parse", args.new or "HEAD"),
        "rounds": args.rounds,
        "ranks": args.ranks if args.sharded else 1,
        "cases": cases,
    }
    args.name = args.name or f"compare-{names['old']}-{names['new'].replace(' ', '-')}"
    print(f"wrote {reporting.write_results(args, record)}")


if __name__ == "__main__":
    main()
