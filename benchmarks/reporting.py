"""What all benchmarks share: a description of the machine, tables, and result files."""

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

RESULTS = Path(__file__).resolve().parent / "results"

# The vector extensions that decide which code path a CPU library takes.
_CPU_FLAGS = "avx avx2 fma f16c avx512f avx512bw avx512dq avx512vl avx512vbmi avx512_vnni".split()
_BUSY_SHARE = 0.03  # of the CPU time; with more gone elsewhere, timings are doubtful


def at_least(kind: type, least: float) -> Any:
    """A `type` for argparse: a number of this kind that is no smaller."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"expected at least {least:g}, got {text}")
        return value

    return parse


def parser(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with what every benchmark knows: the name and the folder of its result files."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--name", default=name, help=f"name of the result files ({name})")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    return made


def installed(package: str) -> bool:
    """Whether `package` can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Versions of Python, torch and `packages`; None for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            # A source tree on the path has no metadata, but may state its version.
            module = importlib.import_module(package) if installed(package) else None
            found[package] = getattr(module, "__version__", None)
    return found


def command_line() -> str:
    """The command that started this program, free of the machine's own paths."""
    script = Path(sys.argv[0])
    name = script.parent.name if script.name == "__main__.py" else script.stem
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else ""


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if _read(f"{index}/type").strip() in ("Data", "Unified"):
            found[f"L{_read(f'{index}/level').strip()}"] = _read(f"{index}/size").strip()
    return found


def meminfo(field: str) -> int | None:
    """Bytes of a field of /proc/meminfo, such as "MemAvailable"; None if there is no such file."""
    match = re.search(rf"^{field}:\s*(\d+) kB", _read("/proc/meminfo"), re.MULTILINE)
    return int(match.group(1)) * 1024 if match else None


def usable_cores() -> int:
    """Number of logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_machine(threads: int) -> dict[str, Any]:
    """CPU, memory and settings that a timing depends on."""
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "threads": threads,
        "cpu_flags": [flag for flag in _CPU_FLAGS if flag in _cpuinfo("flags").split()],
        "caches_of_one_core": _caches(),
        "memory_bytes": meminfo("MemTotal"),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "transparent_hugepages": _read("/sys/kernel/mm/transparent_hugepage/enabled").strip()
        or None,
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


class CpuWatch:
    """Tells what share of all CPU time, since it was made, went to somebody else.

    `stolen` is what a hypervisor took, `others` what processes took that are not this one or its
    ended children. A few percent of either means that the timings are not of a quiet machine.
    """

    def __init__(self) -> None:
        self._start = self._seconds()

    @staticmethod
    def _seconds() -> tuple[float, float, float, float] | None:
        fields = _read("/proc/stat").split("\n", 1)[0].split()[1:]
        if len(fields) < 8:
            return None
        user, nice, system, idle, iowait, irq, softirq, steal = (
            int(field) / os.sysconf("SC_CLK_TCK") for field in fields[:8]
        )
        busy = user + nice + system + irq + softirq
        return busy + idle + iowait + steal, steal, busy, sum(os.times()[:4])

    def shares(self) -> dict[str, float] | None:
        """{"stolen", "others"} as fractions; None where there is no /proc/stat."""
        now = self._seconds()
        if self._start is None or now is None:
            return None
        total, steal, busy, own = (b - a for a, b in zip(self._start, now, strict=True))
        total = max(total, 1e-9)
        return {"stolen": steal / total, "others": max(busy - own, 0.0) / total}

    def warning(self) -> list[str]:
        """A line for people if the machine was not quiet."""
        shares = self.shares()
        if shares is None or sum(shares.values()) <= _BUSY_SHARE:
            return []
        return [f"the machine was not quiet: other processes took {shares['others']:.0%} of the "
                f"CPU time, a hypervisor {shares['stolen']:.0%}"]  # fmt: skip


def write_results(name: str, record: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Writes `record`, with date and command line, to `folder`/`name`.json; returns the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    stamped = {"command": command_line(), "date": time.strftime("%Y-%m-%d"), **record}
    path.write_text(json.dumps(stamped, indent=1) + "\n")
    return path


def format_table(headers: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table that also reads well in a terminal; `left` columns are left-aligned."""
    widths = [max(len(row[i]) for row in [headers, *rows]) for i in range(len(headers))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.ljust(width) for cell, width in zip(cells[:left], widths, strict=False)]
        rest = zip(cells[left:], widths[left:], strict=True)
        padded += [cell.rjust(width) for cell, width in rest]
        return "| " + " | ".join(padded) + " |"

    rules = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([line(headers), line(rules), *(line(row) for row in rows)])
