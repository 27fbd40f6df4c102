"""Runs the stages of `make gpu`, which stages.py lists, and says what came of each.

    python tools/gpu/run.py --out FOLDER --stages "3 6" --limit 300

Each stage has a time limit, and is cut with all processes that it has started. One that fails does
not stop the others. Results are written after every stage, also where Ctrl-C ends the run:

    log.txt        what all commands printed
    summary.json   the stages: passed, failed, cut, skipped or not begun, with seconds
    figures.json   versions, and what the benchmarks measured
    junit.xml      a suite of the stages, and one for each stage that runs tests
    ncu-*.ncu-rep  the profiles, where there is ncu
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import results as report
import stages as real
from results import Result
from stages import Stage

ROOT = Path(__file__).resolve().parents[2]
GRACE = 4.0  # seconds between the signal that asks a process to end and the one that ends it
LEAST = 5.0  # seconds: with less left, no stage is begun


class Run:
    """A run: where its results go, and the commands that it starts."""

    def __init__(self, args: argparse.Namespace, scratch: Path, log: IO[str]) -> None:
        self.args, self.scratch, self.log = args, scratch, log
        self.figures = scratch / "figures"
        self.figures.mkdir()
        self.end = time.monotonic() + args.limit
        self.results: list[Result] = []
        self.has_gpu = True

    def all(self, chosen: Sequence[Stage]) -> None:
        for stage in chosen:
            try:
                result = self.reason_not_to_begin(stage) or self.stage(stage)
            except KeyboardInterrupt:  # between two commands
                result = Result(stage, "interrupted")
            self.results.append(result)
            print(result.line(), flush=True)
            self.say(result.line())
            report.write(self.args.out, self.results, self.figures)

    def reason_not_to_begin(self, stage: Stage) -> Result | None:
        if any(r.verdict == "interrupted" for r in self.results):
            return Result(stage, "not begun", detail="the run was interrupted")
        if not self.has_gpu:
            return Result(stage, "not begun", detail="there is no GPU")
        loaded = all(r.is_good for r in self.results if r.stage.number == 0)
        if stage.needs_kernels and not loaded:
            return Result(stage, "not begun", detail="the extension does not load")
        if self.seconds_left() < LEAST:
            return Result(stage, "not begun", detail="the time of the whole run was over")
        if stage.program and shutil.which(stage.program) is None:
            return Result(stage, "skipped", detail=f"there is no {stage.program} in PATH")
        return None

    def seconds_left(self) -> float:
        return self.end - time.monotonic() - GRACE

    def stage(self, stage: Stage) -> Result:
        """Runs all its commands, also after one that fails."""
        self.say(f"\n===== stage {stage.number}, {stage.name}: {stage.proves}")
        start, where = time.monotonic(), os.fstat(self.log.fileno()).st_size
        end, verdict = start + min(stage.limit, self.seconds_left()), "passed"
        tests = self.scratch / f"tests-{stage.number}.jsonl"
        for command in stage.commands:
            try:
                status = self.command(command, tests, end - time.monotonic())
                if status != 0:
                    verdict = "failed"
                if stage.number == 0 and status == real.NO_GPU:
                    self.has_gpu = False
            except subprocess.TimeoutExpired:
                verdict = "cut"
            except KeyboardInterrupt:
                verdict = "interrupted"
            if verdict in ("cut", "interrupted"):
                break
        took, records = time.monotonic() - start, report.read_tests(tests)
        detail = report.count_tests(records) or self.last_line(where)
        if verdict == "passed" and records and all(r["outcome"] == "skipped" for r in records):
            verdict = "failed"  # nothing was tested
        return Result(stage, verdict, took, detail, records)

    def command(self, command: Sequence[str], tests: Path, seconds: float) -> int:
        """Its exit status. Nothing that it has started runs on.

        Raises:
            subprocess.TimeoutExpired: it took longer.
        """
        words = self.words(command)
        self.say(f"$ {shlex.join(words)}")
        try:
            process = subprocess.Popen(
                words, cwd=ROOT, env=environment(tests), stdin=subprocess.DEVNULL,
                stdout=self.log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self.say(str(error))
            return 127
        try:
            status = process.wait(max(seconds, 0.0))
        except BaseException:
            process.send_signal(signal.SIGINT)  # it may still say what it has found
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
            raise
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            # A process that waits for a broken GPU inside of the kernel does not end.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        self.say(f"exit status {status}")
        return status

    def words(self, command: Sequence[str]) -> list[str]:
        """The command with the words of stages.py replaced."""
        many = {real.ARGS: self.args.args, real.BENCH_ARGS: self.args.bench_args}
        one = {
            real.PYTHON: self.args.python or sys.executable,
            real.OUT: str(self.args.out),
            real.SCRATCH: str(self.scratch),
            real.FIGURES: str(self.figures),
        }
        words: list[str] = []
        for word in command:
            for name, value in one.items():
                word = word.replace(name, value)
            words += shlex.split(many[word]) if word in many else [word]
        return words

    def say(self, text: str) -> None:
        """Into the log, which the commands write into as well."""
        self.log.write(text + "\n")
        self.log.flush()

    def last_line(self, where: int) -> str:
        """The last line that the stage's commands have printed."""
        printed = Path(self.log.name).read_bytes()[where:].decode(errors="replace").splitlines()
        said = [x for x in printed if x.strip() and not x.startswith(("$ ", "exit status "))]
        return said[-1].strip()[:160] if said else ""


def environment(tests: Path) -> dict[str, str]:
    """Of the commands: this checkout comes first, and nothing that they print is held back."""
    path = [str(ROOT), str(ROOT / "tools" / "gpu"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in path if p),
        "PYTHONUNBUFFERED": "1",
        "TORCHAO8_GPU_RESULTS": str(tests),
    }


def parse(
    argv: Sequence[str] | None, stages: Sequence[Stage]
) -> tuple[argparse.Namespace, list[Stage]]:
    """The command line, and the stages that it chooses."""
    listed = [f"  {s.number:>2} {s.name:<12}{s.proves} ({s.expected:.0f} s)" for s in stages]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="\n".join(["stages, with the seconds that each is expected to take:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, help="a folder without results (runs/gpu-<date>-<time>)")
    add("--stages", default="", help="numbers of stages (all)")
    add("--limit", type=float, default=math.inf, help="seconds of the whole run (no limit)")
    add("--python", help="the interpreter that has torch (this one)")
    add("--args", default="", help="more arguments for pytest")
    add("--bench-args", default="", help="more arguments for benchmarks.step")
    args = parser.parse_args(argv)
    known = [str(s.number) for s in stages]
    asked = args.stages.replace(",", " ").split() or known
    if unknown := [n for n in asked if n not in known]:
        expected = f"expected numbers from {known[0]} to {known[-1]}"
        parser.error(f"--stages: {expected}, got {' '.join(unknown)}")
    args.out = (args.out or ROOT / "runs" / time.strftime("gpu-%Y%m%d-%H%M%S")).resolve()
    if (args.out / "summary.json").exists():
        parser.error(f"--out: expected a folder without results, {args.out} has some; name another")
    return args, [s for s in stages if str(s.number) in asked]


def variables_of(args: argparse.Namespace) -> list[str]:
    """What `make gpu` was given, but for stages and folder: words for a shell."""
    limit = "" if args.limit == math.inf else f"{args.limit:g}"
    given = {
        "PYTHON": args.python, "LIMIT": limit, "ARGS": args.args, "BENCH_ARGS": args.bench_args,
    }  # fmt: skip
    return [f"{name}={shlex.quote(value)}" for name, value in given.items() if value]


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = real.STAGES) -> int:
    """Exits with 0 where no stage failed, was cut or was left out for want of time."""
    args, chosen = parse(argv, stages)
    args.out.mkdir(parents=True, exist_ok=True)
    # Whoever ends it by a signal gets a summary, as with Ctrl-C. A shell that starts it in the
    # background has it ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    minutes = sum(s.expected for s in chosen) / 60
    print(f"{len(chosen)} stages, about {minutes:.1f} minutes. All output: {args.out}/log.txt")
    with tempfile.TemporaryDirectory() as scratch, open(args.out / "log.txt", "a") as log:
        run = Run(args, Path(scratch), log)
        run.all(chosen)
        summary = report.summary(stages, run.results, variables_of(args))
        run.say(summary)
    print(f"{summary}\n{'results':<12}{args.out}")
    return 0 if all(result.is_good for result in run.results) else 1


if __name__ == "__main__":
    sys.exit(main())
