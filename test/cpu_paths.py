"""The paths of the CPU, and a process on each of them: the fixture ``workers`` of conftest.py."""

import platform
from pathlib import Path
from typing import Any

import pytest
from path_worker import Worker

PATHS = ("scalar", "avx2", "avx512")
FLAGS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512vbmi", "avx512_vnni"},
}


def processor_flags() -> set[str] | None:
    """As the system tells them; None where it does not."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    return {flag for line in text.split("\n") if line.startswith("flags") for flag in line.split()}


class Workers:
    """One process for each path, started when first asked for."""

    def __init__(self) -> None:
        self.started: dict[Any, Worker] = {}

    def get(self, path: str | None, flush_denormal: bool = False) -> Worker:
        """Skips the test where the processor does not have the path."""
        key = path, flush_denormal
        if key not in self.started:
            self.started[key] = Worker(path, flush_denormal)
        greeting = self.started[key].greeting
        if greeting["error"] is not None:
            flags = processor_flags()
            on_x86 = platform.machine().lower() in ("x86_64", "amd64")
            if path is not None and not (on_x86 and flags is not None and flags >= FLAGS[path]):
                missing = ", ".join(sorted(FLAGS[path] - (flags or set())))
                pytest.skip(f"the {path} path needs a processor that has {missing}")
            pytest.fail(greeting["error"])
        return self.started[key]

    def close(self) -> None:
        for worker in self.started.values():
            worker.stdin.close()  # all end at once
        for worker in self.started.values():
            worker.close()


every_path = pytest.mark.parametrize("path", PATHS)
every_vector_path = pytest.mark.parametrize("path", PATHS[1:])
