"""What came of the stages: lines for a person, and the files of the results' folder."""

from __future__ import annotations

import contextlib
import json
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages import Stage

Record = dict[str, Any]


class Result(NamedTuple):
    """`tests` are the records of gpu_tests.py, the last one of each test that has begun."""

    stage: Stage
    verdict: str  # passed, failed, cut, interrupted, skipped, not begun
    seconds: float = 0.0
    detail: str = ""
    tests: Sequence[Record] = ()

    @property
    def is_good(self) -> bool:
        return self.verdict in ("passed", "skipped")

    @property
    def title(self) -> str:
        return f"{self.stage.number} {self.stage.name}"

    def line(self) -> str:
        took = f"{self.seconds:4.0f} s" if self.seconds else " " * 6
        return (
            f"{self.stage.number:>2} {self.stage.name:<12}{self.verdict:<13}{took}  {self.detail}"
        )


# -- tests ---------------------------------------------------------------------------------------


def read_tests(path: Path) -> list[Record]:
    """The last record of each test. A process that ends after a failure is told of once more."""
    records: dict[str, Record] = {}
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text(encoding="utf-8").splitlines():
            record = read_json(line)  # None: the last line of a process that was killed
            if record and records.get(record["test"], {}).get("outcome") != "failed":
                records[record["test"]] = record
    return list(records.values())


def count_tests(records: Sequence[Record]) -> str:
    """In words: "2 failed (test/test_a.py::test_b, ...), 20 passed"."""
    parts = []
    for outcome in ("failed", "running", "passed", "skipped"):
        names = [record["test"] for record in records if record["outcome"] == outcome]
        first = f" ({names[0]}{', ...' * (len(names) > 1)})" if names else ""
        if names:
            parts.append(f"{len(names)} {outcome}{first * (outcome in ('failed', 'running'))}")
    return ", ".join(parts)


def read_json(text: str) -> Any:
    """None where the process that wrote it was killed on the way."""
    try:
        return json.loads(text)
    except ValueError:
        return None


# -- files ---------------------------------------------------------------------------------------


def write(out: Path, results: Sequence[Result], figures: Path) -> None:
    """summary.json, figures.json and junit.xml."""
    told = [
        {
            **{name: getattr(r.stage, name) for name in ("number", "name", "proves", "limit")},
            "verdict": r.verdict, "seconds": round(r.seconds, 1), "detail": r.detail,
        }
        for r in results
    ]  # fmt: skip
    write_json(out / "summary.json", {"date": time.strftime("%Y-%m-%d %H:%M"), "stages": told})
    measured = {p.stem: read_json(p.read_text()) for p in sorted(figures.glob("*.json"))}
    write_json(out / "figures.json", measured)
    suites = xml.Element("testsuites")
    of_stages = [
        {"test": r.title, "seconds": r.seconds, "text": r.detail, "outcome": r.verdict}
        for r in results
    ]
    add_suite(suites, "stages", of_stages)
    for result in results:
        if result.tests:
            add_suite(suites, result.stage.name, result.tests)
    xml.ElementTree(suites).write(out / "junit.xml", encoding="utf-8", xml_declaration=True)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def add_suite(suites: xml.Element, name: str, records: Sequence[Record]) -> None:
    """A suite of junit's format. A test that was running when its stage was cut is a failure."""
    kinds = {"passed": "", "skipped": "skipped", "not begun": "skipped"}
    found = [kinds.get(record["outcome"], "failure") for record in records]
    suite = xml.SubElement(suites, "testsuite", {
        "name": name, "tests": str(len(records)), "errors": "0",
        "failures": str(found.count("failure")), "skipped": str(found.count("skipped")),
        "time": f"{sum(record.get('seconds', 0.0) for record in records):.3f}",
    })  # fmt: skip
    for record, kind in zip(records, found, strict=True):
        place, _, test = record["test"].rpartition("::")
        took = f"{record.get('seconds', 0.0):.3f}"
        case = xml.SubElement(suite, "testcase", classname=place, name=test, time=took)
        if kind:
            text = printable(record.get("text", ""))
            last = text.strip().rpartition("\n")[2]
            xml.SubElement(case, kind, message=f"{record['outcome']}: {last}").text = text


def printable(text: str) -> str:
    """Without what XML cannot hold, as the control characters of colours."""
    return "".join(c if c in "\t\n" or c.isprintable() else "?" for c in text)


# -- the end -------------------------------------------------------------------------------------


def summary(stages: Sequence[Stage], results: Sequence[Result], variables: Sequence[str]) -> str:
    """Which stages passed, which did not, what would come next, and the command that goes on, which
    gets the variables of this one."""
    lines = []
    for verdict in ("passed", "failed", "cut", "interrupted", "skipped"):
        if titles := [r.title for r in results if r.verdict == verdict]:
            lines.append(f"{verdict:<12}{', '.join(titles)}")
    begun = {r.stage.number for r in results if r.verdict != "not begun"}
    for s in stages:
        if s.number not in begun:
            lines.append(f"{'next':<12}{s.number} {s.name}: {s.proves}, about {s.expected:.0f} s")
    good = {r.stage.number for r in results if r.is_good}
    if again := [str(s.number) for s in stages if s.number not in good]:
        words = " ".join(["", *variables])
        lines.append(f'{"go on with":<12}make gpu STAGES="{" ".join(again)}"{words}')
    return "\n".join(lines)
