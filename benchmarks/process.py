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


class WorkerError(RuntimeError):
    """A process failed, ended or did not answer in time; the message says which."""


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

    def receive(self, timeout: float) -> Any:
        """What the method returned.

        Raises:
            WorkerError: the method raised, or there is no answer within `timeout` seconds.
        """
        if not self._pipe.poll(max(timeout, 0)):
            self.stop()
            raise WorkerError(f"no answer within {timeout:.0f} s")
        try:
            error, result = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            raise WorkerError(f"the process ended (exit status {status})") from None
        if error is not None:
            raise WorkerError(error)
        return result

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
