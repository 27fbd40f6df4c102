"""How tables of memory are written: sizes, columns, and which parameters keep 32 bits."""

from __future__ import annotations

from collections.abc import Sequence


def size(nbytes: int) -> str:
    """Bytes as a person reads them.

    >>> size(1000), size(2**20 - 1), size(2**20)
    ('1000 B', '1.00 MiB', '1.00 MiB')
    """
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if round(nbytes / 2**power, 2) >= 1:
            return f"{nbytes / 2**power:,.2f} {unit}"
    return f"{nbytes} B"


def count(n: int, word: str) -> str:
    """``1 tensor``, ``2,000 tensors``."""
    return f"{n:,} {word}" + ("s" if n != 1 else "")


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns, the first one to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]


def kept(reason: str, names: Sequence[str], tensors: int) -> str:
    """Of so many tensors, those that keep 32 bits for a reason."""
    example = f"{names[0]}, ..." if len(names) > 1 else names[0]
    return f"{len(names):,} of {tensors:,} ({reason}: {example})"
