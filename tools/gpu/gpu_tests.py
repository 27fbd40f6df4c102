"""A plugin of pytest for a GPU that may be lost any moment: results are written as they come.

Each start and each result of a test is a line of JSON in the file that TORCHAO8_GPU_RESULTS names,
so that a run that is killed says what it has found, and which tests were running. What fails is
printed at once. A process whose GPU context is broken ends, and pytest-xdist starts another one:
an illegal access would fail all later tests of the process.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

_failed = False  # the test that runs, in one of its phases


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return
    config.pluginmanager.register(Recorder(config, os.environ["TORCHAO8_GPU_RESULTS"]))
    if not torch.cuda.is_available():
        # All tests would be skipped, which must not look like success.
        pytest.exit("torch finds no GPU", returncode=3)


class Recorder:
    """Of the process that gathers all results."""

    def __init__(self, config: pytest.Config, path: str) -> None:
        self._config = config
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def _write(self, **fields: Any) -> None:
        self._file.write(json.dumps(fields) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write(test=nodeid, outcome="running")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.passed and report.when != "call":
            return
        text = "" if report.passed else report.longreprtext
        if report.failed:
            terminal = self._config.pluginmanager.getplugin("terminalreporter")
            terminal.write_line(f"\nFAILED {report.nodeid}\n{text}")
        self._write(test=report.nodeid, outcome=report.outcome, seconds=report.duration, text=text)


def pytest_runtest_logstart() -> None:
    global _failed
    _failed = False


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    global _failed
    _failed |= report.failed


@pytest.hookimpl(trylast=True)  # when xdist has sent the result
def pytest_runtest_logfinish() -> None:
    if "PYTEST_XDIST_WORKER" in os.environ and _failed and context_is_lost():
        os._exit(1)


def context_is_lost() -> bool:
    """Whether every call to the GPU fails from now on."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
