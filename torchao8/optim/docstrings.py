"""Docstrings that are complete: all arguments with their defaults, the state, the errors.

There are four classes of each rule, or six, with 20 arguments and more each. In the source, the
class with 32-bit state has the formula and the arguments of its rule, and the others say what they
are: that is what editors show that read the source only. :func:`complete` makes the rest from what
the class declares, so that ``help()`` and the reference of the documentation need no other page.

It runs when the package is imported, so what many classes have in common is made once.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

from torchao8.optim.contract import OptimizerContract, bare_name, states_under
from torchao8.optim.options import CommonOptions, Group

_SECTION = re.compile(r"^(Args|Attributes|Raises):\n", re.MULTILINE)
_OPTIONS = """\
Every argument but ``params`` is an option of the parameter groups and may differ from group to
group. A number whose type allows it, such as ``lr``, may also be a tensor of one element. It
may change from step to step, and ``torch.compile`` does not compile the step again."""


class Parts(NamedTuple):
    """A docstring: its first line, the paragraphs behind it, the texts of its arguments by name,
    and its errors."""

    summary: str
    body: str
    arguments: dict[str, str]
    errors: str


def complete(cls: type[OptimizerContract], classes: Mapping[str, Any]) -> str | None:
    """The docstring of a class with everything that its user needs.

    Args:
        classes: all of them, by name, with the docstrings that they have in the source.

    Returns:
        None where Python was told to drop docstrings (``-OO``).
    """
    rule = classes[bare_name(cls.__name__)]
    if not cls.__doc__ or not rule.__doc__ or not CommonOptions.__doc__:
        return None
    own, of_rule = parts_of(cls.__doc__), parts_of(rule.__doc__)
    common = parts_of(CommonOptions.__doc__)
    text = [own.summary, own.body]
    if cls is not rule:
        text.append(of_rule.body)
    text += [
        _state_of(cls),
        _OPTIONS,
        "Args:\n" + _arguments(cls, {**common.arguments, **of_rule.arguments}),
        "Raises:\n" + of_rule.errors,
    ]
    return "\n\n".join(part for part in text if part)


@cache
def parts_of(doc: str) -> Parts:
    head, *sections = _SECTION.split(inspect.cleandoc(doc))
    summary, _, body = head.strip().partition("\n\n")
    by_title = dict(zip(sections[::2], sections[1::2], strict=True))
    arguments = by_title.get("Args", by_title.get("Attributes", ""))
    return Parts(summary, body, _entries(arguments), by_title.get("Raises", "").rstrip())


def _entries(section: str) -> dict[str, str]:
    """The texts of a section by name; ``a, b: text`` gives both of them the same one."""
    entries = {}
    for entry in re.split(r"^ {4}(?=\S)", section, flags=re.MULTILINE)[1:]:
        names, text = entry.split(": ", 1)
        for name in names.split(", "):
            entries[name] = " ".join(text.split())
    return entries


def _arguments(cls: type[OptimizerContract], texts: Mapping[str, str]) -> str:
    lines = []
    for name, argument in inspect.signature(cls).parameters.items():
        if name not in texts:
            raise KeyError(
                f"docstring of {bare_name(cls.__name__)}: expected a text of the argument {name!r} "
                f"in its section Args, got those of {sorted(texts)}. Are its lines indented alike?"
            )
        text = f"{name}: {texts[name]}"
        if argument.default is not argument.empty:
            default = cls._paged if name == "is_paged" else argument.default
            text += f" Default: {default!r}."
        lines.append(_wrapped(text, " " * 4, " " * 8))
    return "\n".join(lines)


@cache
def _wrapped(text: str, first: str = "", others: str = "") -> str:
    """The text in lines that begin with these indents."""
    return textwrap.fill(
        text,
        96,
        initial_indent=first,
        subsequent_indent=others,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _state_of(cls: type[OptimizerContract]) -> str:
    """Which tensors ``optimizer.state[p]`` holds."""
    text = [_state_of_kind(cls, kind) for kind in cls._kinds]
    for option, name in cls._resting.items():
        text.append(f"Without {option} there is no ``{name}``.")
    for option, name in cls._added.items():
        text.append(f"With {option} there is also ``{name}``.")
    return _wrapped(" ".join([*text, cls._bad_gradients]))


def _state_of_kind(cls: type[OptimizerContract], kind: Group) -> str:
    """That of a parameter in a group which says this."""
    states = states_under(cls, {**dict.fromkeys(cls._resting, 0.9), **kind})
    values = [f"``{state.name}``" for state in states if not state.is_scalar]
    numbers = ["``step``", *(f"``{state.name}``" for state in states if state.is_scalar)]
    form = "float32, of the shape of the parameter, whatever its dtype"
    if cls._bits == 4:
        form = (
            "as uint8 ``_4bit``, two elements to a byte in each row, and float32 ``_4bit_scale``, "
            "one for each block"
        )
    if cls._bits == 8:
        form = (
            "as uint8 ``_codes`` of the shape of the parameter and float32 ``_scale``, one for "
            "each block"
        )
    each = "each " if len(values) > 1 else ""
    where = "".join(f" with {option}={value}" for option, value in kind.items())
    return (
        f"State of a parameter{where}: {_listed(numbers)}, {'each ' if len(numbers) > 1 else ''}"
        f"one float32 number; {_listed(values)}, {each}{form}."
    )


def _listed(names: list[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
