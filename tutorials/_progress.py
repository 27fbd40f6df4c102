"""Shows that a tutorial is running: prints a line at once, and then one every few seconds.

It prints plain lines, for a terminal or a file. This module imports nothing slow, so that a script
can start it before it imports PyTorch.
"""

import threading
import time
from collections.abc import Callable

EVERY = 6.0  # seconds without a line after which one is due


def _print(line: str) -> None:
    print(line, flush=True)


def minutes(seconds: float) -> str:
    """Return a duration as text: "1 min 20 s"."""
    whole = max(0, round(seconds))
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60} s"


class Pulse:
    """Prints lines; after a while without a line, prints what the script is doing.

    Args:
        every: seconds without a line after which one is due.
        clock, write: give the time and print a line; tests pass their own.
    """

    def __init__(
        self,
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
        write: Callable[[str], None] = _print,
    ) -> None:
        self.every = every
        self.clock = clock
        self.write = write
        self._lock = threading.Lock()  # the script and the thread both print
        self._last = self._since = clock()
        self._doing = "working"
        self._silent = True

    def start(self, line: str) -> None:
        """Print a first line; from now on print every few seconds what the script is doing."""
        self._silent = False
        self.say(line)
        threading.Thread(target=self._beat_for_ever, daemon=True).start()

    def say(self, line: str) -> None:
        with self._lock:
            self._last = self.clock()
            self.write(line)

    def doing(self, what: str) -> None:
        """Set what the script is doing from now on."""
        with self._lock:
            self._doing = what
            self._since = self.clock()

    def due(self) -> bool:
        """Whether no line was printed for `every` seconds."""
        return self.clock() - self._last >= self.every

    def beat(self) -> None:
        """Print what the script is doing, if a line is due."""
        if not self._silent and self.due():
            self.say(f"... {self._doing}, for {minutes(self.clock() - self._since)}")

    def _beat_for_ever(self) -> None:
        while True:
            time.sleep(0.5)
            self.beat()


class Remaining:
    """Estimates how long the remaining steps take, from the steps that were made.

    Args:
        steps: the steps of all runs.
        after: seconds that the work after the last step takes.
        clock: gives the time.
    """

    def __init__(
        self, steps: int, after: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.left = steps
        self.after = after
        self.clock = clock
        self._first: float | None = None
        self._made = 0

    def skip(self, steps: int) -> None:
        """Count steps that an earlier run has made."""
        self.left -= steps

    def step(self) -> None:
        """Count a step. The first one is not timed: it allocates, and may compile."""
        self.left -= 1
        if self._first is None:
            self._first = self.clock()
        else:
            self._made += 1

    def __str__(self) -> str:
        if self._first is None or self._made == 0:
            return "the time left is not known yet"
        a_step = (self.clock() - self._first) / self._made
        return f"about {minutes(self.left * a_step + self.after)} left"


PULSE = Pulse()


def start(name: str, line: str) -> None:
    """Start the pulse of a script: ``start(__name__, "Loading PyTorch")``, before its imports.

    Nothing is printed when the script is imported.
    """
    if name == "__main__":
        PULSE.start(line)
