"""Install what was built into fresh environments and train: `check_install.py FILE...`.

Each FILE is a wheel or an sdist. For each, each --python and each --torch, this makes a virtual
environment, installs torch and the file with pip, and runs `python -m torchao8` and
tools/train_a_step.py away from the checkout. Exits with 1 if one fails, if torchao8 comes from
elsewhere, or if the digests differ: all must train to the same bits. An environment is gigabytes
where pip chooses a torch with CUDA.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRAINING = ROOT / "tools" / "train_a_step.py"


class Failed(Exception):
    """A command failed, or did something unexpected; its text is for the person who reads it."""


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        text = " ".join(map(str, command))
        raise Failed(f"exit status {done.returncode} of: {text}\n{done.stdout}{done.stderr}")
    return done.stdout


def read_digest(printed: str) -> str:
    """The digest that train_a_step.py printed."""
    found = re.search(r"^digest ([\da-f]{64})$", printed, re.MULTILINE)
    if found is None:
        raise Failed(f"tools/train_a_step.py printed no digest:\n{printed}")
    return found[1]


def try_install(file: Path, python: str, torch: str) -> str:
    """Install the file and train; return the digest."""
    with tempfile.TemporaryDirectory(prefix="torchao8-install-") as folder:
        scratch = Path(folder).resolve()
        run(python, "-m", "venv", scratch / "env", cwd=scratch)
        inside = scratch / "env" / "bin" / "python"
        pip = (inside, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        run(*pip, torch, cwd=scratch)
        run(*pip, torch, file.resolve(), cwd=scratch)  # torch again, so that it stays
        run(inside, "-I", "-m", "torchao8", cwd=scratch)
        printed = run(inside, "-I", TRAINING, cwd=scratch)
        if f" in {scratch}" not in printed.splitlines()[0]:
            raise Failed(f"torchao8 was imported from another environment: {printed}")
        print(printed.replace(str(scratch), "(fresh environment)"), end="", flush=True)
        return read_digest(printed)


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--python", action="append", help="a Python (default: this one)")
    parser.add_argument("--torch", action="append", help="a requirement (default: torch)")
    parser.add_argument("--digest", help="a digest that all must have, such as another machine's")
    options = parser.parse_args(arguments)
    for file in options.files:
        if not file.is_file():
            parser.error(f"{file} is not a file; `make release` builds dist/*")
    return options


def main(arguments: list[str]) -> int:
    """Try every combination; return the exit status."""
    options = parse(arguments)
    expected = options.digest
    for file in options.files:
        for python in options.python or [sys.executable]:
            for torch in options.torch or ["torch"]:
                print(f"==> {file.name} with {torch} and {python}", flush=True)
                try:
                    digest = try_install(file, python, torch)
                    expected = expected or digest
                    if digest != expected:
                        raise Failed(f"the digest must be {expected}: other bits were trained")
                except Failed as error:
                    print(f"check_install: error: {error}", file=sys.stderr)
                    return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
