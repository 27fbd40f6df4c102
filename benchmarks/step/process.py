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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


class WorkerError(RuntimeError):
    """A process failed, ended or did not answer in time; the message says which."""


class Worker:
    """A process that holds `make(*arguments)`.

    Args:
        make: a class or function that the new process can import; its errors are those of the first
            answer.
        threads: OMP_NUM_THREADS of the process.
        environment: more variables; None removes one.
        source: a directory in which the process looks for torchao8 first.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        *arguments: Any,
        threads: int,
        environment: dict[str, str | None] | None = None,
        source: Path | None = None,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, None if source is None else str(source), make, arguments)
        )
        # Where a library compiles code at run time, ninja stands beside the interpreter.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        with _variables({"OMP_NUM_THREADS": str(threads), "PATH": path, **(environment or {})}):
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

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def stop(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def _variables(values: dict[str, str | None]) -> Iterator[None]:
    """Sets variables of the environment for a while."""
    before = {name: os.environ.get(name) for name in values}

    def put(some: dict[str, str | None]) -> None:
        for name, value in some.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


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
                if held is None:
                    held = make(*arguments)
                answer = None, getattr(held, method)(*given)
            except Exception as error:  # whatever a library raises is a result, shown to people
                traceback.print_exc()
                lines = (str(error).strip() or "no message").splitlines()
                answer = f"{type(error).__name__}: {lines[0]}", None
            pipe.send(answer)
