"""A file of records that a study makes one after another, and can go on with after a stop."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

Record = dict[str, Any]


class Run(Protocol):
    """What a record is of."""

    def identity(self) -> dict[str, Any]:
        """All that its result depends on, as JSON has it."""


def key(identity: dict[str, Any]) -> str:
    """One text for each run."""
    return json.dumps(identity, sort_keys=True)


class Records(dict[str, Record]):
    """The file of records by run: a line of JSON each, {"run", "result", "machine", "date"}.

    A line that a kill cut off is dropped; a later record of a run takes the place of an earlier
    one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        super().__init__((key(r["run"]), r) for r in map(json.loads, whole.splitlines()))

    def has(self, run: Run) -> bool:
        """Whether a run has a result. One that failed has none: it is tried again."""
        record = self.get(key(run.identity()))
        return record is not None and "error" not in record["result"]

    def add(self, run: Run, result: dict[str, Any], machine: dict[str, Any]) -> None:
        """Appends a record; it is on the disk when this returns."""
        date = time.strftime("%Y-%m-%d")
        record = {"run": run.identity(), "result": result, "machine": machine, "date": date}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self[key(record["run"])] = record
