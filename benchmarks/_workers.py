"""The processes of `step.py`: one for each contender, started, asked and stopped from here."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from _contenders import CONTENDERS

PROGRAM = Path(__file__).with_name("_worker.py")
_MOST_DEATHS = 2  # of a contender; after them it gets no further process


class WorkerError(RuntimeError):
    """A worker failed or did not answer in time; the message says which.

    If it is `fatal`, the process has ended or can do no more.
    """

    def __init__(self, message: str, fatal: bool) -> None:
        super().__init__(message)
        self.fatal = fatal


class Worker:
    """A process that runs one contender's steps on request; `_worker.py` is its program."""

    def __init__(self, spec: dict[str, Any], program: Path = PROGRAM) -> None:
        env = dict(os.environ, OMP_NUM_THREADS=str(spec["threads"]))
        env.pop("TORCHAO8_CPU", None)
        if spec["cpu_path"] is not None:
            env["TORCHAO8_CPU"] = spec["cpu_path"]
        if "source" in spec:  # the directory to import torchao8 from
            env["PYTHONPATH"] = spec["source"]
        # Where a library compiles code at run time, ninja stands beside the interpreter.
        env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
        self._log = tempfile.TemporaryFile()  # stop() closes it
        self._process = subprocess.Popen(
            [sys.executable, str(program)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=env,
            bufsize=0,
            start_new_session=True,  # so that what it starts can be stopped with it
        )
        self.send(spec)

    def send(self, request: dict[str, Any]) -> None:
        """Sends a request; WorkerError if the process has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write((json.dumps(request) + "\n").encode())
        except BrokenPipeError:
            raise self._ended() from None

    def receive(self, timeout: float, since: float | None = None) -> dict[str, Any]:
        """The next reply; WorkerError if there is none within `timeout` seconds.

        They count from `since`, of time.monotonic(), or from now.
        """
        pipe = self._process.stdout
        assert pipe is not None
        waited = 0.0 if since is None else time.monotonic() - since
        if not select.select([pipe], [], [], max(timeout - waited, 0.0))[0]:
            raise WorkerError(f"no answer within {timeout:.0f} s", fatal=True)
        line = pipe.readline()
        if not line:
            raise self._ended()
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"], reply["fatal"])
        return reply

    def _ended(self) -> WorkerError:
        status = self._process.wait()
        return WorkerError(f"the process ended (exit status {status})", fatal=True)

    def log_tail(self, lines: int = 12) -> str:
        """The end of what the process wrote to standard error, the traceback of an error last."""
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Ends the process and whatever it started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            if pipe is not None:
                pipe.close()


class Workers:
    """The processes that run at present, by the name of their contender or memory job."""

    def __init__(self, device: str, threads: int, program: Path = PROGRAM) -> None:
        self._device = device
        self._threads = threads
        self._program = program
        self._running: dict[str, Worker] = {}
        self._deaths: dict[str, int] = {}
        self._dropped: dict[str, str] = {}
        self.started = 0

    def __getitem__(self, name: str) -> Worker:
        return self._running[name]

    def ensure(self, names: Iterable[str], timeout: float) -> dict[str, str]:
        """Starts the processes that do not run yet, all at a time, and waits for them.

        Returns why there is none, for the names that have none. One that could not start will not
        be tried again, nor one that died twice.
        """
        names = list(names)
        missing = [n for n in names if n not in self._running and n not in self._dropped]
        start = time.monotonic()
        for name in missing:
            contender = CONTENDERS.get(name)
            spec = {
                "contender": name,
                "device": self._device,
                "threads": self._threads,
                "cpu_path": contender.cpu_path if contender is not None else None,
            }
            self.started += 1
            self._running[name] = Worker(spec, self._program)
        for name in missing:
            try:
                self._running[name].receive(timeout, start)
            except WorkerError as error:
                print(self._running[name].log_tail(), file=sys.stderr)
                self.stop(name)
                self._dropped[name] = f"did not start: {error}"
        return {name: self._dropped[name] for name in names if name in self._dropped}

    def bury(self, name: str, reason: str) -> None:
        """Stops a process that failed for good; the next `ensure` may start another."""
        self.stop(name)
        self._deaths[name] = self._deaths.get(name, 0) + 1
        if self._deaths[name] == _MOST_DEATHS:
            self._dropped[name] = (
                f"given up after {_MOST_DEATHS} processes, the last with: {reason}"
            )

    def stop(self, name: str) -> None:
        """Stops a process, if it runs."""
        worker = self._running.pop(name, None)
        if worker is not None:
            worker.stop()

    def stop_all(self) -> None:
        """Stops all processes."""
        for name in list(self._running):
            self.stop(name)
