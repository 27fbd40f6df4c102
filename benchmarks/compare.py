"""Times two commits and torch's fused AdamW side by side, and compares their bits.

    python benchmarks/compare.py OLD               # a commit against the working tree as it is
    python benchmarks/compare.py OLD NEW --list gpt2 --compiled
    python benchmarks/compare.py OLD --sharded     # DTensors on two ranks, host time

Each commit is checked out and built once, under build/compare/<hash>; the working tree is built in
place. Every optimizer has a process of its own, in which torchao8 is imported from its build, and
they take turns, in an order that rotates. Ratios are of speed, in the same round: above 1, what is
named first takes less time. `bits` says whether the parameters and every state of both commits have
the same bits after five steps on seeded gradients.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from _common import CpuWatch, describe_machine, format_table, usable_cores, versions, write_results
from _lists import GROUPS, TINY, tensor_list
from _measure import say
from _workers import Worker, WorkerError

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ROOT / "build" / "compare"
PROGRAM = Path(__file__).with_name("_compare_worker.py")
LISTS = ("gpt2", "small", "tiny")
OPTIMIZERS = {"AdamW": "32bit", "AdamW8bit": "8bit"}  # class: contender
SETTLE_S = 0.05  # before a turn: until the last one's OpenMP threads have stopped spinning
REPLY_S = 900.0  # some compile


# --- the two builds -----------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare.py: git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def _build(tree: Path, objects: Path) -> None:
    """Builds the extension of a source tree in place."""
    say(f"building {tree}")
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


# --- one case: a list, a dtype, a kind of step --------------------------------------------------


@dataclass
class Lane:
    """One optimizer of one build, and its times by round; a worker for each rank."""

    side: str  # "old", "new" or "torch"
    optimizer: str
    kind: str
    workers: list[Worker]
    rounds: dict[int, float] = field(default_factory=dict)
    bits: list[dict[str, str]] = field(default_factory=list)
    skipped: str | None = None

    def skip(self, why: str) -> None:
        """Leaves it out of this case."""
        self.skipped = why
        say(f"  {self.side} {self.optimizer}, {self.kind}: {why}")


def ask(lanes: list[Lane], request: dict[str, Any]) -> list[tuple[Lane, list[dict[str, Any]]]]:
    """Asks lanes at the same time, all ranks of each; the replies of those that did not fail.

    A process that fails lets go of all that it has set up, so that every lane on it is left out.
    """
    for lane in lanes:
        if lane.skipped is None:
            try:
                for worker in lane.workers:
                    worker.send({**request, "kind": lane.kind})
            except WorkerError as error:  # it had ended before
                lane.skip(str(error))
    found = []
    for lane in [lane for lane in lanes if lane.skipped is None]:
        replies = []
        for worker in lane.workers:
            try:
                replies.append(worker.receive(REPLY_S))
            except WorkerError as error:
                lane.skip(str(error))
        if lane.skipped is None:
            found.append((lane, replies))
    return found


def _lanes(
    sources: dict[str, Path], args: argparse.Namespace, compiled: bool, folder: str
) -> list[Lane]:
    """Starts the processes: of torch, and of each optimizer on both sides."""
    ranks = args.ranks if args.sharded else 1
    suffix = "-compiled" if compiled else ""
    chosen = [("torch", "AdamW(fused=True)", "torch", ROOT)]
    for name, contender in OPTIMIZERS.items():
        for side, source in sources.items():
            chosen.append((side, name, contender + suffix, source))
    lanes = []
    for side, name, contender, source in chosen:
        spec = {"contender": contender, "device": "cpu", "cpu_path": None, "source": str(source)}
        spec |= {"threads": 1 if args.sharded else args.threads, "ranks": ranks}
        spec["store"] = f"{folder}/{side}-{contender}"
        workers = [Worker({**spec, "rank": rank}, PROGRAM) for rank in range(ranks)]
        for kind in ("DTensor", "shard") if args.sharded else ("whole",):
            lanes.append(Lane(side, name, kind, workers))
    for lane in {id(lane.workers): lane for lane in lanes}.values():
        for worker in lane.workers:
            worker.receive(REPLY_S)
    return lanes


def measure(
    lanes: list[Lane],
    sources: dict[str, Path],
    list_name: str,
    dtype: str,
    rounds: int,
    turn: float,
) -> None:
    """Sets up a list in all lanes and times them in turns."""
    for lane in lanes:
        lane.rounds, lane.bits, lane.skipped = {}, [], None
    request = {"do": "set up", "list": list_name, "dtype": dtype}
    for kind in dict.fromkeys(lane.kind for lane in lanes):
        for lane, replies in ask([lane for lane in lanes if lane.kind == kind], request):
            lane.bits = [reply["bits"] for reply in replies]
            source, found = sources.get(lane.side), replies[0]["source"]
            if source is not None and not Path(found).is_relative_to(source):
                raise SystemExit(f"{found} was imported, not torchao8 of {source}")
        failed = {id(lane.workers): lane.skipped for lane in lanes if lane.skipped}
        for lane in lanes:
            lane.skipped = failed.get(id(lane.workers))
    for number in range(rounds):
        first = number % len(lanes)
        for lane in lanes[first:] + lanes[:first]:
            time.sleep(SETTLE_S)
            for _, replies in ask([lane], {"do": "run", "turn": turn}):
                # Ranks run at the same time; the slowest counts.
                lane.rounds[number] = max(reply["seconds"] for reply in replies)
    ask(lanes, {"do": "free"})


# --- what comes out -----------------------------------------------------------------------------


def speed(of: Lane, over: Lane) -> dict[str, float] | None:
    """How many times as fast as another a lane is: median and quartiles over rounds."""
    ratios = [over.rounds[i] / t for i, t in of.rounds.items() if i in over.rounds]
    if len(ratios) < 2:
        return None
    low, middle, high = quantiles(ratios, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def same_bits(old: Lane, new: Lane) -> str:
    """ "yes", or what differs; "" if one of them was not run."""
    if not old.bits or not new.bits:
        return ""
    pairs = list(zip(old.bits, new.bits, strict=True))
    names = sorted({name for pair in pairs for bits in pair for name in bits})
    wrong = [n for n in names if any(one.get(n) != other.get(n) for one, other in pairs)]
    return "yes" if not wrong else f"no: {', '.join(wrong)}"


def rows(lanes: list[Lane]) -> list[dict[str, Any]]:
    """A row for each optimizer, and each kind of tensors."""
    by_place = {(lane.side, lane.optimizer, lane.kind): lane for lane in lanes}
    found = []
    for name in OPTIMIZERS:
        for kind in dict.fromkeys(lane.kind for lane in lanes):
            old, new = by_place["old", name, kind], by_place["new", name, kind]
            torch = by_place["torch", "AdamW(fused=True)", kind]
            three = {"old": old, "new": new, "torch": torch}
            row: dict[str, Any] = {
                "optimizer": name,
                "tensors": kind,
                "ms": {s: 1e3 * median(x.rounds.values()) for s, x in three.items() if x.rounds},
                "new over old": speed(new, old),
                "new over torch": speed(new, torch),
                "old over torch": speed(old, torch),
                "bits": same_bits(old, new),
                "skipped": {s: x.skipped for s, x in three.items() if x.skipped},
                "ms_of_rounds": {s: [1e3 * t for t in x.rounds.values()] for s, x in three.items()},
            }
            if kind == "DTensor":
                for side in three:
                    whose = by_place[side, three[side].optimizer, "shard"]
                    row[_dtensor_column(side)] = speed(whose, three[side])
            found.append(row)
    return found


def _dtensor_column(side: str) -> str:
    return f"{side}: time of DTensors over shards"


def _ratio(value: dict[str, float] | None) -> str:
    return "" if value is None else "{median:.2f} ({low:.2f} - {high:.2f})".format(**value)


def table(cases: list[dict[str, Any]]) -> str:
    """All rows; below them, what was left out and why."""
    sides = ("old", "new", "torch")
    ratios = ["new over old", "new over torch", "old over torch"]
    sharded = any(row["tensors"] == "DTensor" for case in cases for row in case["rows"])
    if sharded:
        ratios = [*ratios[:2], *(_dtensor_column(side) for side in sides)]
    unit = "us a tensor" if sharded else "ms"
    headers = ["", "dtype", "step", "optimizer", "tensors", *(f"{s}, {unit}" for s in sides)]
    headers += [*ratios, "bits"]
    lines = []
    left_out: dict[str, list[str]] = {}
    for case in cases:
        for row in case["rows"]:
            scale = 1e3 / case["tensors"] if sharded else 1.0
            times = [row["ms"].get(side) for side in sides]
            line = [case["label"], case["dtype"], case["step"], row["optimizer"], row["tensors"]]
            line += ["" if t is None else f"{scale * t:.3g}" for t in times]
            lines.append([*line, *(_ratio(row.get(name)) for name in ratios), row["bits"]])
            for side, why in row["skipped"].items():
                where = f"{row['optimizer']}, {row['tensors']}, {case['label']}, {case['dtype']}"
                left_out.setdefault(f"left out, {side}, {case['step']}: {why}", []).append(where)
    notes = [f"{why} ({'; '.join(dict.fromkeys(where))})" for why, where in left_out.items()]
    return "\n".join([format_table(headers, lines, left=5), *notes])


def _at_least(kind: type, least: float) -> Any:
    def parse(text: str) -> Any:
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return value

    return parse


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("old", help="a git revision")
    add("new", nargs="?", help="a git revision (the working tree as it is)")
    every = ", ".join([*LISTS, "block", *TINY])
    add("--list", nargs="+", choices=every.split(", "), metavar="LIST",
        help=f"of {every} (gpt2 small tiny; tiny if --sharded, block if --compiled)")  # fmt: skip
    add("--dtype", default="float32,bfloat16", help="of parameters and gradients (%(default)s)")
    add("--compiled", action="store_true", help="torch.compile's steps too, beside eager ones")
    add("--sharded", action="store_true", help="DTensors, and copies of their shards, on gloo")
    add("--ranks", type=_at_least(int, 2), default=2, help="of --sharded (2)")
    add("--rounds", type=_at_least(int, 2), default=31, help="turns of each (31)")
    add("--turn", type=_at_least(float, 0), default=0.05, help="seconds of steps in a turn (0.05)")
    add("--threads", type=_at_least(int, 1), default=usable_cores(), help="threads (all cores)")
    add("--name", help="name of the result file (compare-OLD-NEW)")
    add("--out", type=Path, default=BUILDS, help="folder of the result file (build/compare)")
    args = parser.parse_args(argv)
    args.dtypes = args.dtype.split(",")
    for dtype in args.dtypes:
        if dtype not in ("float32", "bfloat16"):
            parser.error(f"--dtype: expected float32, bfloat16 or both with a comma, got {dtype!r}")
    if args.sharded and args.compiled:
        parser.error("--compiled: expected without --sharded, which times the host of eager steps")
    # torch.compile takes minutes for a step over 148 tensors, and hours over 1,000.
    default = ["tiny"] if args.sharded else ["block"] if args.compiled else LISTS
    chosen = args.list or default
    args.lists = [name for one in chosen for name in GROUPS.get(one, (one,))]
    return args


def main(argv: Iterable[str] | None = None) -> None:
    """Runs the comparison with the command line `argv` (of the process if None)."""
    args = _parse(argv)
    named = {"old": source_of(args.old), "new": source_of(args.new)}
    sources = {side: tree for side, (_, tree) in named.items()}
    names = {side: name for side, (name, _) in named.items()}
    watch = CpuWatch()
    cases = []
    for compiled in (False, True) if args.compiled else (False,):
        with tempfile.TemporaryDirectory() as folder:
            lanes = _lanes(sources, args, compiled, folder)
            try:
                for list_name in args.lists:
                    tensors = tensor_list(list_name)
                    for dtype in args.dtypes:
                        step = "compiled" if compiled else "eager"
                        say(f"{tensors.label}, {dtype}, {step}")
                        measure(lanes, sources, list_name, dtype, args.rounds, args.turn)
                        case = {"list": list_name, "label": tensors.label, "dtype": dtype}
                        count = len(tensors.shapes)
                        cases.append({**case, "tensors": count, "step": step, "rows": rows(lanes)})
            finally:
                for lane in lanes:
                    for worker in lane.workers:
                        worker.stop()
    print(f"old: {names['old']}, new: {names['new']}\n{table(cases)}")
    threads = 1 if args.sharded else args.threads
    record = {
        "device": {**describe_machine(threads), "cpu_taken_by_others": watch.shares()},
        "versions": versions([]),
        **names,
        "new_commit": _git("rev-parse", args.new or "HEAD"),
        "rounds": args.rounds,
        "ranks": args.ranks if args.sharded else 1,
        "cases": cases,
    }
    name = args.name or f"compare-{names['old']}-{names['new'].replace(' ', '-')}"
    print(f"wrote {write_results(name, record, args.out)}")


if __name__ == "__main__":
    main()
