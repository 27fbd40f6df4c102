"""What is said of an optimizer class that does not exist, such as ``torchao8.LAMB4bit``."""

from __future__ import annotations

import re
from collections.abc import Collection

_NAME = re.compile(r"(paged)?(\w+?)(\d+)bit", re.IGNORECASE)
_BITS = ("", "8bit", "4bit")  # at the end of the names of classes with state of 32, 8 and 4 bits


def missing(module: str, name: str, there: Collection[str]) -> AttributeError:
    """The error for a name that a module lacks.

    Of a name that looks like that of a class, as ``LAMB4bit``, it says which classes there are.

    Args:
        there: the names that the module has.
    """
    advice: list[str] = []
    parts = _NAME.fullmatch(name)
    rules = sorted(
        (n for n in there if f"{n}8bit" in there and f"Paged{n}" in there), key=str.lower
    )
    if parts is not None and rules:
        paged = "Paged" if parts[1] else ""
        rule = next((n for n in rules if n.lower() == parts[2].lower()), None)
        if rule is None:
            advice = [f"The rules here are {_listed(rules)}"]
        else:
            have = [n for n in (f"{paged}{rule}{bits}" for bits in _BITS) if n in there]
            advice = [f"Of this rule there are {_listed(have)}"]
            if parts[3] == "4":
                of_4_bits = [n for n in rules if f"{n}4bit" in there]
                advice.append(f"{_listed(of_4_bits)} have state of 4 bits")
    return AttributeError(". ".join([f"module {module!r} has no attribute {name!r}", *advice]))


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]])
