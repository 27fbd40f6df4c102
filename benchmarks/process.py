"""Processes that do what they are told: each holds an object, whose methods are called from here.

Optimizers are timed in processes of their own, which take turns: some libraries choose their code
path once a process, some bring a thread pool, and peak memory can only be told of a process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock


class Worker:
    """A process that holds `make(*arguments)`.

    Args:
        make: a class or function that the new process can import; its errors are those of the first
            answer.
        environment: variables of the process; None removes one.
        source: a directory in which the process looks for torchao8 first.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *arguments: Any,
        environment: dict[str, str | None],
        source: str | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, source, make, arguments))
        # Where a library compiles code at run time, ninja stands beside the interpreter.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        variables = {**os.environ, "PATH": path, **environment}
        known = {name: value for name, value in variables.items() if value is not None}
        with mock.patch.dict(os.environ, known, clear=True):
            self._process.start()
        theirs.close()

    def send(self, method: str, *arguments: Any) -> None:
        """Calls a method there; `receive` has what it returns."""
        with contextlib.suppress(OSError):  # it has ended, which `receive` tells
            self._pipe.send((method, arguments))

    def receive(self, timeout: float) -> tuple[str | None, Any]:
        """An error, if there is one, and what the method returned; waits for so many seconds."""
        try:
            if self._pipe.poll(max(timeout, 0)):
                error, result = self._pipe.recv()
                return error, result
        except (EOFError, OSError):
            self._process.join()
            return f"the process ended (exit status {self._process.exitcode})", None
        return f"no answer within {timeout:.0f} s", None

    def stop(self) -> None:
        self._process.kill()
        self._process.join()


def error_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _serve(
    pipe: Any, source: str | None, make: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.dup2(2, 1)  # what libraries print is not part of this program's output
    if source is not None:
        sys.path.insert(0, source)
    held = None
    with contextlib.suppress(EOFError):  # the other side has ended
        while True:
            method, given = pipe.recv()
            try:
                held = held or make(*arguments)
                answer = None, getattr(held, method)(*given)
            except Exception as error:  # whatever a library raises is a result, shown to people
                traceback.print_exc()
                answer = error_line(error), None
            pipe.send(answer)
