"""Write the tables of the documentation that follow from the classes: `write_doc_tables.py`.

A table lies between two comments, which no reader sees. The first says what is in it::

    <!-- table: options Adam AdamW -->      the arguments of these classes' rule
    <!-- table: signature AdamW8bit -->     the call, with all defaults
    <!-- table: memory Adam | amsgrad -->   bytes a parameter, also with options
    <!-- end of table -->

A test compares the tables of all pages with what this would write.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torchao8  # noqa: E402
from torchao8.optim.docstrings import parts_of  # noqa: E402
from torchao8.optim.options import COMMON  # noqa: E402

_TABLE = re.compile(r"(<!-- table: (.*?) -->\n).*?(<!-- end of table -->)", re.DOTALL)
# Large enough for the step count of a tensor not to count, and a multiple of the block.
_SHAPE = (4096, 4096)


def with_tables(text: str) -> str:
    """The text of a page, its tables written anew."""
    return _TABLE.sub(lambda match: f"{match[1]}\n{_table(match[2])}\n\n{match[3]}", text)


def _table(what: str) -> str:
    kind, _, rest = what.partition(" ")
    if kind == "options":
        return _options(rest.split())
    if kind == "signature":
        return _signature(rest)
    if kind == "memory":
        return _memory(*(part.split() for part in f"{rest}|".split("|")[:2]))
    raise ValueError(f"table: expected options, signature or memory, got {what!r}")


def _options(names: list[str]) -> str:
    """A column of defaults for each class, where they differ."""
    signatures = [inspect.signature(getattr(torchao8, name)).parameters for name in names]
    texts = {}
    for name in names:
        for argument, text in parts_of(getattr(torchao8, name).__doc__).arguments.items():
            texts.setdefault(argument, re.sub(r" Default: \S.*\.$", "", text))
    heads = [f"default of `{name}`" for name in names] if len(names) > 1 else ["default"]
    rows = [["option", *heads, "what it does"]]
    for argument in (a for a in texts if a not in COMMON and a != "params"):
        defaults = [_default(s[argument].default) if argument in s else "" for s in signatures]
        rows.append([f"`{argument}`", *defaults, texts[argument]])
    return _rows(rows)


def _signature(name: str) -> str:
    """The call with all defaults, as its author would write it."""
    arguments = inspect.signature(getattr(torchao8, name)).parameters.values()
    lines, keyword_only = [], False
    for argument in arguments:
        if argument.kind is argument.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            lines.append("    *,")
        has_default = argument.default is not argument.empty
        lines.append(f"    {argument.name}{f'={argument.default!r}' if has_default else ''},")
    return "\n".join(["```text", f"torchao8.{name}(", *lines, ")", "```"])


def _memory(names: list[str], options: list[str]) -> str:
    """The bytes of state for each element of a large matrix."""
    has_4bit = [torchao8.estimate([], optimizer=name).state_4bit is not None for name in names]
    rows = [["", "32 bits", "8 bits", *["4 bits"] * any(has_4bit)]]
    for name in names:
        for with_options in ["", *options]:
            given = {o: 0.9 if o == "momentum" else True for o in with_options.split("+") if o}
            e = torchao8.estimate([_SHAPE], optimizer=name, **given)
            added = " and ".join(f"`{o}={v}`" for o, v in given.items())
            label = f"`{name}`" + (f", {added}" if added else "")
            sizes = (e.state_32bit, e.state_8bit, e.state_4bit)[: len(rows[0]) - 1]
            rows.append([label, *("" if b is None else f"{b / e.elements:.2f}" for b in sizes)])
    return _rows(rows)


def _default(value: Any) -> str:
    return f"`{value!r}`"


def _rows(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Of a docstring: roles of Sphinx, links and double backticks as Markdown has them."""
    text = re.sub(r"`([^`<]+?) <([^>]+)>`_", r"[\1](\2)", text)
    text = re.sub(r":\w+:`~?(?:torchao8\.)?(.*?)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", r"\|")


def main() -> None:
    """Write the tables of every page."""
    for page in [*(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]:
        old = page.read_text(encoding="utf-8")
        new = with_tables(old)
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    main()
