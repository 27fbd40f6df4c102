"""What the project asks of its step, held against what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
_OURS = "8bit"
_DTYPES = ("float32", "bfloat16")

_SHARE = {("one", "float32"): 0.9, ("one", "bfloat16"): 0.8}
# (rival, list, dtype) -> times as fast.
_FASTER = {
    ("torch", "one", "float32"): 1.55,
    **{("bitsandbytes", "one", dtype): 2.0 for dtype in _DTYPES},
    **{("bitsandbytes", "gpt2", dtype): 10.0 for dtype in _DTYPES},
    **{(other, "one", dtype): 1.3 for other in ("torchao", "flashoptim") for dtype in _DTYPES},
    **{(other, "gpt2", dtype): 3.0 for other in ("torchao", "flashoptim") for dtype in _DTYPES},
}
_MORE_LAUNCHES = 1  # than buckets
_OVER_ANY_FORM = {"float32": 1.3}  # dtype -> 8-bit state over the fastest form of the same rule


def _times(value: float) -> str:
    return f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _count(value: float) -> str:
    return f"{value:.0f}"


def _bar(
    what: str, case: dict[str, Any], asked: float, measured: float, form: Callable[[float], str]
) -> dict[str, Any]:
    at_most = form is _count
    met = measured <= asked if at_most else measured >= asked
    text = (
        f"bar: {what}, {case['list']}, {case['dtype']}: asked "
        f"{'at most' if at_most else 'at least'} {form(asked)}, "
        f"measured {form(measured)}, {'met' if met else 'short'}"
    )
    return {
        "what": what,
        "list": case["list"],
        "dtype": case["dtype"],
        "asked": asked,
        "measured": measured,
        "met": met,
        "text": text,
    }


def _bars_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    rows: dict[str, Row] = {}
    for row in case["rows"]:  # what every batch repeats counts in the first
        if "ms" in row:
            rows.setdefault(row["name"], row)
    ours = rows.get(_OURS)
    if ours is None:
        return []
    bars = []
    share = _SHARE.get((case["list"], case["dtype"]))
    if share is not None and ours["share_of_copy_rate"] is not None:
        what = f"{ours['label']}, of the copy rate"
        bars.append(_bar(what, case, share, ours["share_of_copy_rate"], _percent))
    for (rival, list_name, dtype), asked in _FASTER.items():
        other = rows.get(rival)
        if (list_name, dtype) != (case["list"], case["dtype"]) or other is None:
            continue
        # Both are ratios to torch's time in the same rounds, so that they compare across batches.
        if ours["speedup"] is not None and other["speedup"] is not None:
            what = f"{ours['label']} over {other['label']}"
            bars.append(_bar(what, case, asked, ours["speedup"] / other["speedup"], _times))
    if ours["launches"] is not None:
        what = f"launches of a step, buckets: {ours['buckets']}"
        asked = ours["buckets"] + _MORE_LAUNCHES
        bars.append(_bar(what, case, asked, ours["launches"], _count))
    return bars


def bars(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars that these cases, of a GPU, can tell; "text" is each one's line for people."""
    return [bar for case in cases for bar in _bars_of(case)]


def rule_bars(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bars that cases of rules of the family can tell, on any device."""
    found = []
    for case in cases:
        asked = _OVER_ANY_FORM.get(case["dtype"])
        rows = {row["name"]: row for row in case["rows"] if "ms" in row}
        fastest = rows.get(case["fastest"])
        ours = next((row for name, row in rows.items() if name.endswith(f"-{_OURS}")), None)
        if asked is not None and ours is not None and fastest is not None:
            what = f"{ours['label']} over {fastest['label']}"
            found.append(_bar(what, case, asked, ours["speedup"], _times))
    return found
