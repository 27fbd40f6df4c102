"""Times two commits and torch's fused AdamW side by side, and compares their bits.

    python -m benchmarks.compare OLD               # a commit against the working tree as it is
    python -m benchmarks.compare OLD NEW --list gpt2 small
    python -m benchmarks.compare OLD --sharded     # DTensors on two ranks, host time

Each commit is checked out and built once, under build/compare/<hash>; the working tree is built in
place. Every optimizer has a process of its own, in which torchao8 is imported from its build, and
they take turns, in an order that rotates. Ratios are of speed, in the same round: above 1, what is
named first takes less time. `bits` says whether the parameters and every state of both commits have
the same bits after five steps on seeded gradients.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
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

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from benchmarks import reporting
from benchmarks.step.contenders import contender
from benchmarks.step.devices import Cpu
from benchmarks.step.process import Worker, WorkerError
from benchmarks.step.rounds import say
from benchmarks.step.tensor_lists import GROUPS, TINY, Shape, tensor_list

ROOT = Path(__file__).resolve().parent.parent
BUILDS = ROOT / "build" / "compare"
LISTS = ("gpt2", "small", "tiny")
OPTIMIZERS = {"AdamW": "32bit", "AdamW8bit": "8bit"}  # class: contender
SIDES = ("old", "new", "torch")
STEPS_FOR_BITS = 5
REPLY_S = 900.0  # some compile


# --- the two builds -----------------------------------------------------------------------------


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"compare: git {' '.join(arguments)}: {done.stderr.strip()}")
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


# --- in a process of one optimizer --------------------------------------------------------------


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def digest(tensors: Iterable[Tensor]) -> str:
    """A hash of the bits of tensors (of DTensors, of this rank's part)."""
    found = hashlib.sha256()
    for tensor in tensors:
        plain = _local(tensor.detach()).contiguous()
        found.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
        found.update(plain.view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


class Job:
    """An optimizer over the tensors of a list.

    `kind` says what they are: "whole", or, on several ranks, "DTensor" (sharded by rows) or "shard"
    (copies of this rank's shards). A shard keeps 8-bit state where its DTensor does.
    """

    def __init__(self, name: str, shapes: list[Shape], dtype: torch.dtype, kind: str) -> None:
        self.kind = kind
        self.mesh = None if kind == "whole" else init_device_mesh("cpu", (dist.get_world_size(),))
        generator = torch.Generator().manual_seed(0)
        self.params = []
        for shape in shapes:
            p = torch.nn.Parameter(self._values(shape, dtype, 0.02, generator))
            p.grad = self._values(shape, dtype, 1e-2, generator)
            self.params.append(p)
        chosen = contender(name)
        self.optimizer = chosen.build(list(self.params))
        group = self.optimizer.param_groups[0]
        if kind == "shard" and "min_8bit_size" in group:
            group["min_8bit_size"] //= dist.get_world_size()
        step = self.optimizer.step
        self.step: Any = torch.compile(step) if chosen.compiled else step

    def _values(
        self, shape: Shape, dtype: torch.dtype, size: float, generator: torch.Generator
    ) -> Tensor:
        """Numbers that follow from the generator; on several ranks, this rank's of them."""
        value = torch.empty(shape, dtype=dtype).normal_(std=size, generator=generator)
        if self.mesh is not None:
            value = distribute_tensor(value, self.mesh, [Shard(0)], src_data_rank=None)
        return _local(value).clone() if self.kind == "shard" else value

    def bits(self) -> dict[str, str]:
        """Hashes of the parameters and of each state after a few steps from the start."""
        for _ in range(STEPS_FOR_BITS):
            self.step()
            for p in self.params:  # in place: a compiled step would be compiled for new tensors
                _local(p.grad).mul_(-0.7)
        states = self.optimizer.state_dict()["state"]
        names = sorted({name for state in states.values() for name in state})
        digests = {
            name: digest(torch.as_tensor(states[i][name]) for i in states if name in states[i])
            for name in names
        }
        return {"parameters": digest(self.params), **digests}


class Contestant:
    """One optimizer of one build, alone or as a rank; a job for each kind of tensors."""

    def __init__(self, name: str, threads: int, rank: int, ranks: int, store: str) -> None:
        torch.set_num_threads(threads)
        self._name = name
        self._device = Cpu("cpu")
        self._jobs: dict[str, Job] = {}
        self._package = importlib.import_module(contender(name).package)
        if ranks > 1:
            where = f"file://{store}"
            dist.init_process_group("gloo", init_method=where, rank=rank, world_size=ranks)

    def source(self) -> str:
        """The file that the optimizer's package was imported from."""
        return str(self._package.__file__)

    def set_up(self, list_name: str, dtype: str, kind: str) -> dict[str, str]:
        """Makes a job; the bits of its first steps, which make state and may compile."""
        shapes = tensor_list(list_name).shapes
        job = Job(self._name, shapes, getattr(torch, dtype), kind)
        bits = job.bits()
        self._jobs[kind] = job
        return bits

    def turn(self, seconds: float, kind: str) -> float:
        """The median time of the steps that fit into these seconds."""
        return self._device.seconds_of_step(self._jobs[kind].step, seconds)

    def free(self) -> None:
        """Lets go of all jobs."""
        self._jobs = {}
        self._device.free()


# --- one case: a list, a dtype, a kind of step --------------------------------------------------


@dataclass
class Lane:
    """One optimizer of one build on one kind of tensors; a worker for each rank."""

    side: str  # of SIDES
    optimizer: str
    kind: str
    workers: list[Worker]
    rounds: dict[int, float] = field(default_factory=dict)
    bits: list[dict[str, str]] = field(default_factory=list)
    skipped: str | None = None


def ask(lanes: list[Lane], method: str, *arguments: Any) -> list[tuple[Lane, list[Any]]]:
    """Asks lanes at the same time, all ranks of each; the answers of those that did not fail."""
    asked = [lane for lane in lanes if lane.skipped is None]
    for lane in asked:
        for worker in lane.workers:
            worker.send(method, *arguments)
    found = []
    for lane in asked:
        answers = []
        for worker in lane.workers:
            try:
                answers.append(worker.receive(REPLY_S))
            except WorkerError as error:
                lane.skipped = str(error)
        if lane.skipped is None:
            found.append((lane, answers))
        else:
            say(f"  {lane.side} {lane.optimizer}, {lane.kind}: {lane.skipped}")
    return found


def start(
    sources: dict[str, Path], args: argparse.Namespace, compiled: bool, folder: str
) -> list[Lane]:
    """Starts the processes: of torch, and of each optimizer on both sides."""
    ranks, threads = (args.ranks, 1) if args.sharded else (1, args.threads)
    chosen = [("torch", "AdamW(fused=True)", "torch")]
    for name, ours in OPTIMIZERS.items():
        chosen += [(side, name, ours + "-compiled" * compiled) for side in sources]
    lanes = []
    for side, name, ours in chosen:
        store = f"{folder}/{side}-{ours}"
        workers = [
            Worker(Contestant, ours, threads, rank, ranks, store,
                   threads=threads, source=sources.get(side))
            for rank in range(ranks)
        ]  # fmt: skip
        kinds = ("DTensor", "shard") if args.sharded else ("whole",)
        lanes += [Lane(side, name, kind, workers) for kind in kinds]
    for lane, (found, *_) in ask([lane for lane in lanes if lane.kind != "shard"], "source"):
        source = sources.get(lane.side)
        if source is not None and not Path(found).is_relative_to(source):
            raise SystemExit(f"{found} was imported, not torchao8 of {source}")
    return lanes


def measure(lanes: list[Lane], list_name: str, dtype: str, rounds: int, turn: float) -> None:
    """Sets up a list in all lanes and times them in turns."""
    for lane in lanes:
        lane.rounds, lane.bits, lane.skipped = {}, [], None
    for kind in dict.fromkeys(lane.kind for lane in lanes):
        for lane, answers in ask([lane for lane in lanes if lane.kind == kind],
                                 "set_up", list_name, dtype, kind):  # fmt: skip
            lane.bits = answers
    for number in range(rounds):
        first = number % len(lanes)
        for lane in lanes[first:] + lanes[:first]:
            time.sleep(Cpu.settle_s)
            for _, seconds in ask([lane], "turn", turn, lane.kind):
                lane.rounds[number] = max(seconds)  # ranks run at the same time
    ask(lanes, "free")


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
            names = {side: name if side != "torch" else "AdamW(fused=True)" for side in SIDES}
            of = {side: by_place[side, name, kind] for side, name in names.items()}
            row: dict[str, Any] = {
                "optimizer": name,
                "tensors": kind,
                "ms": {s: 1e3 * median(x.rounds.values()) for s, x in of.items() if x.rounds},
                "new over old": speed(of["new"], of["old"]),
                "new over torch": speed(of["new"], of["torch"]),
                "old over torch": speed(of["old"], of["torch"]),
                "bits": same_bits(of["old"], of["new"]),
                "skipped": {s: x.skipped for s, x in of.items() if x.skipped},
                "ms_of_rounds": {s: [1e3 * t for t in x.rounds.values()] for s, x in of.items()},
            }
            if kind == "DTensor":
                for side, lane in of.items():
                    plain = by_place[side, names[side], "shard"]
                    row[_dtensor_column(side)] = speed(plain, lane)
            found.append(row)
    return found


def _dtensor_column(side: str) -> str:
    return f"{side}: time of DTensors over shards"


def _ratio(value: dict[str, float] | None) -> str:
    return "" if value is None else "{median:.2f} ({low:.2f} - {high:.2f})".format(**value)


def table(cases: list[dict[str, Any]]) -> str:
    """All rows; below them, what was left out and why."""
    ratios = ["new over old", "new over torch", "old over torch"]
    sharded = any(row["tensors"] == "DTensor" for case in cases for row in case["rows"])
    if sharded:
        ratios = [*ratios[:2], *(_dtensor_column(side) for side in SIDES)]
    unit = "us a tensor" if sharded else "ms"
    headers = ["", "dtype", "step", "optimizer", "tensors", *(f"{s}, {unit}" for s in SIDES)]
    headers += [*ratios, "bits"]
    lines = []
    left_out: dict[str, list[str]] = {}
    for case in cases:
        for row in case["rows"]:
            scale = 1e3 / case["tensors"] if sharded else 1.0
            times = [row["ms"].get(side) for side in SIDES]
            line = [case["label"], case["dtype"], case["step"], row["optimizer"], row["tensors"]]
            line += ["" if t is None else f"{scale * t:.3g}" for t in times]
            lines.append([*line, *(_ratio(row.get(name)) for name in ratios), row["bits"]])
            for side, why in row["skipped"].items():
                where = f"{row['optimizer']}, {row['tensors']}, {case['label']}, {case['dtype']}"
                left_out.setdefault(f"left out, {side}, {case['step']}: {why}", []).append(where)
    notes = [f"{why} ({'; '.join(dict.fromkeys(where))})" for why, where in left_out.items()]
    return "\n".join([reporting.format_table(headers, lines, left=5), *notes])


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
    add("--ranks", type=reporting.at_least(int, 2), default=2, help="of --sharded (2)")
    add("--rounds", type=reporting.at_least(int, 2), default=31, help="turns of each (31)")
    add(
        "--turn",
        type=reporting.at_least(float, 0),
        default=0.05,
        help="seconds of steps in a turn (0.05)",
    )
    add(
        "--threads",
        type=reporting.at_least(int, 1),
        default=reporting.usable_cores(),
        help="threads (all cores)",
    )
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
    watch, cases = reporting.CpuWatch(), []
    for compiled in (False, True) if args.compiled else (False,):
        step = "compiled" if compiled else "eager"
        with tempfile.TemporaryDirectory() as folder:
            lanes = start(sources, args, compiled, folder)
            try:
                for list_name in args.lists:
                    tensors = tensor_list(list_name)
                    for dtype in args.dtypes:
                        say(f"{tensors.label}, {dtype}, {step}")
                        measure(lanes, list_name, dtype, args.rounds, args.turn)
                        case = {"list": list_name, "label": tensors.label, "dtype": dtype}
                        count = len(tensors.shapes)
                        cases.append({**case, "tensors": count, "step": step, "rows": rows(lanes)})
            finally:
                for worker in (worker for lane in lanes for worker in lane.workers):
                    worker.stop()
    for line in watch.warning():
        say(line)
    print(f"old: {names['old']}, new: {names['new']}\n{table(cases)}")
    threads = 1 if args.sharded else args.threads
    record = {
        "device": {**reporting.describe_machine(threads), "cpu_taken_by_others": watch.shares()},
        "versions": reporting.versions([]),
        **names,
        "new_commit": _git("rev-parse", args.new or "HEAD"),
        "rounds": args.rounds,
        "ranks": args.ranks if args.sharded else 1,
        "cases": cases,
    }
    name = args.name or f"compare-{names['old']}-{names['new'].replace(' ', '-')}"
    print(f"wrote {reporting.write_results(name, record, args.out)}")


if __name__ == "__main__":
    main()
