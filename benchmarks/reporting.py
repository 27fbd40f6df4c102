"""What all benchmarks share: options, a description of the machine, tables, and result files."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

OUT = Path("runs/benchmarks")  # git ignores runs/: results/ holds the results that are reported

_BUSY_SHARE = 0.03  # of the CPU time; with more gone elsewhere, timings are doubtful


def say(text: str) -> None:
    """Tells the person who waits."""
    print(text, file=sys.stderr, flush=True)


# --- options ------------------------------------------------------------------------------------


def at_least(kind: type, least: float) -> Any:
    """A `type` for argparse: a number of this kind that is no smaller."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"expected at least {least:g}, got {text}")
        return value

    return parse


def parser(doc: str | None, name: str | None = None, **more: Any) -> argparse.ArgumentParser:
    """A parser with what every benchmark knows: the name and the folder of its result files."""
    form = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=doc, formatter_class=form, **more)
    told = name or "tells what is timed"
    made.add_argument("--name", default=name, help=f"name of the result files ({told})")
    made.add_argument("--out", type=Path, default=OUT, help="their folder (%(default)s)")
    return made


def add_timing(made: argparse.ArgumentParser, rounds: str, turn: str, lists: str) -> None:
    """Adds what the benchmarks of the step know; texts tell the defaults, which are None."""
    add = made.add_argument
    add("--list", nargs="+", metavar="LIST", help=f"lists of tensors ({lists})")
    both = ["float32", "bfloat16"]
    add("--dtype", nargs="+", choices=both, default=both, help="of parameters and gradients (both)")
    add("--rounds", type=at_least(int, 3), help=f"turns of each contender ({rounds})")
    add("--turn", type=at_least(float, 0), help=f"seconds of steps in a turn ({turn})")
    add("--threads", type=at_least(int, 1), default=usable_cores(), help="threads (all cores)")


# --- the machine --------------------------------------------------------------------------------


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python, torch and `packages`; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # A source tree on the path has no metadata, but may state its version.
            try:
                module = importlib.import_module(package) if installed(package) else None
            except Exception:  # of whatever kind: who takes part tells why it fails
                module = None
            found[package] = getattr(module, "__version__", None)
    return found


def command_line() -> str:
    """The command that started this program, free of the machine's own paths."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.stem
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def field_of(path: str, field: str, colon: str = ":") -> str:
    """What stands behind "field:" in a file; "" if there is no such file or field."""
    try:
        match = re.search(rf"^{field}\s*{colon}\s*(.+)$", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return ""
    return match.group(1).strip() if match else ""


def kibibytes(path: str, field: str) -> int | None:
    """Bytes of a field in kB, as "MemAvailable" of /proc/meminfo; None if it is not there."""
    text = field_of(path, field)
    return int(text.split()[0]) * 1024 if text else None


def usable_cores() -> int:
    """Number of logical cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(threads: int) -> dict[str, Any]:
    """CPU, memory and settings that a timing depends on."""
    return {
        "cpu": field_of("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": usable_cores(),
        "threads": threads,
        "memory_bytes": kibibytes("/proc/meminfo", "MemTotal"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


class CpuWatch:
    """Tells what share of all CPU time, since it was made, went to somebody else.

    `stolen` is what a hypervisor took, `others` what processes took that are not this one or its
    ended children. A few percent of either means that the timings are not of a quiet machine.
    """

    def __init__(self) -> None:
        self._start = self._seconds()

    def _seconds(self) -> list[float]:
        """Seconds of all cores since the system started: all, stolen, busy, our own."""
        ticks = [int(field) for field in field_of("/proc/stat", "cpu", "").split()[:8]]
        if not ticks:  # there is no such file on this system
            return []
        total, steal, idle = (t / os.sysconf("SC_CLK_TCK")
                              for t in (sum(ticks), ticks[7], ticks[3] + ticks[4]))  # fmt: skip
        return [total, steal, total - steal - idle, sum(os.times()[:4])]

    def shares(self) -> dict[str, float] | None:
        """{"stolen", "others"} as fractions; says them if they are large. None: no /proc/stat."""
        if not self._start:
            return None
        total, steal, busy, own = (b - a for a, b in zip(self._start, self._seconds(), strict=True))
        shares = steal / max(total, 1e-9), max(busy - own, 0.0) / max(total, 1e-9)
        if sum(shares) > _BUSY_SHARE:
            say("the machine was not quiet: a hypervisor took {:.0%} of the CPU time, other "
                "processes {:.0%}".format(*shares))  # fmt: skip
        return dict(zip(("stolen", "others"), shares, strict=True))


# --- what comes out -----------------------------------------------------------------------------


def write_results(args: argparse.Namespace, record: dict[str, Any]) -> Path:
    """Writes `record`, with date and command line, to `args.out`/`args.name`.json; its path."""
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / f"{args.name}.json"
    stamped = {"command": command_line(), "date": time.strftime("%Y-%m-%d"), **record}
    part = path.with_suffix(".part")  # whoever is cut off leaves the last whole file
    part.write_text(json.dumps(stamped, indent=1) + "\n")
    return part.replace(path)


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that also reads well in a terminal; `left` columns are left-aligned."""
    widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
    rules = [("-" * w if i < left else "-" * (w - 1) + ":") for i, w in enumerate(widths)]
    sides = "<" * left + ">" * (len(widths) - left)
    form = " | ".join(f"{{:{side}{w}}}" for side, w in zip(sides, widths, strict=True))
    return "\n".join(f"| {form.format(*row)} |" for row in (headers, rules, *rows))
