"""Print the requirements of extras in pyproject.toml, one a line: `requirements.py EXTRA...`.

The Makefile installs tools from this list: installing `.[extra]` would also build the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip contains the same parser
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main(extras: list[str]) -> int:
    """Print the requirements and return the exit status."""
    known = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    unknown = [extra for extra in extras if extra not in known]
    if unknown or not extras:
        print(f"usage: requirements.py EXTRA... (one of {', '.join(known)})", file=sys.stderr)
        return 2
    for extra in extras:
        print(*known[extra], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
