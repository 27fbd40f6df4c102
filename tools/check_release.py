"""Check what the files of a release hold: `check_release.py FOLDER`, the one that holds both files.

There must be one sdist, with every file of the repository but those in NOT_RELEASED, and one
cp310-abi3 wheel for manylinux_2_28 of the same version, with every module of the package, the
license and complete metadata. Needs git, to list the files of the repository.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
# Of use in a clone only.
NOT_RELEASED = (".github/", ".gitignore")
# What setuptools adds.
GENERATED = ("PKG-INFO", "setup.cfg", "torchao8.egg-info/")
TAG = "cp310-abi3-manylinux_2_28_"
URLS = {"Homepage", "Documentation", "Repository", "Issues", "Changelog"}


def tracked() -> set[str]:
    """The files of the repository, by git."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()}


def compare(what: str, held: set[str], expected: set[str]) -> list[str]:
    """A message for each file too few or too many."""
    return [
        *(f"{what} lacks {name}" for name in sorted(expected - held)),
        *(f"{what} has {name}, which is not in the repository" for name in sorted(held - expected)),
    ]


def check_sdist(path: Path, repository: set[str]) -> list[str]:
    """What is wrong with the files of an sdist."""
    with tarfile.open(path) as sdist:
        names = [PurePosixPath(member.name) for member in sdist if member.isfile()]
    held = {str(PurePosixPath(*name.parts[1:])) for name in names}
    return compare(
        "the sdist",
        {name for name in held if not name.startswith(GENERATED)},
        {name for name in repository if not name.startswith(NOT_RELEASED)},
    )


def check_metadata(metadata: Message) -> list[str]:
    """What the metadata of a wheel lacks."""
    urls = {line.split(",")[0] for line in metadata.get_all("Project-URL", [])}
    found = [f"the metadata has no URL named {name}" for name in sorted(URLS - urls)]
    for name in ("Summary", "Author", "License-Expression", "Keywords", "Requires-Python"):
        if not metadata.get(name):
            found.append(f"the metadata has no {name}")
    if not str(metadata.get_payload()).strip():
        found.append("the metadata has no description, which is README.md")
    return found


def check_wheel(path: Path, repository: set[str]) -> list[str]:
    """What is wrong with the files, the tag and the metadata of a wheel."""
    found = []
    if TAG not in path.name:
        found.append(f"{path.name} must have the tag {TAG}<machine>")
    with zipfile.ZipFile(path) as wheel:
        names = {name for name in wheel.namelist() if not name.endswith("/")}
        info = next((name[: -len("METADATA")] for name in names if name.endswith("/METADATA")), "")
        if not info:
            return [*found, f"{path.name} has no METADATA"]
        found += check_metadata(message_from_string(wheel.read(info + "METADATA").decode("utf-8")))
    if info + "licenses/LICENSE" not in names:
        found.append("the wheel lacks the license")
    held = {name for name in names if not name.startswith(info) and not name.endswith(".so")}
    return found + compare(
        "the wheel", held, {name for name in repository if name.startswith("torchao8/")}
    )


def version_of(path: Path) -> str:
    """The version in a file's name, without a label such as +cu130."""
    return path.name.removesuffix(".tar.gz").split("-")[1].split("+")[0]


def main(arguments: list[str]) -> int:
    """Check the one sdist and the one wheel of a folder; return the exit status."""
    if len(arguments) != 1:
        print("usage: check_release.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    sdists, wheels = sorted(folder.glob("*.tar.gz")), sorted(folder.glob("*.whl"))
    if len(sdists) != 1 or len(wheels) != 1:
        names = sorted(path.name for path in folder.glob("*"))
        found = [f"{folder} must hold one sdist and one wheel, it holds {names}"]
    else:
        repository = tracked()
        found = check_sdist(sdists[0], repository) + check_wheel(wheels[0], repository)
        if version_of(sdists[0]) != version_of(wheels[0]):
            found.append(f"{sdists[0].name} and {wheels[0].name} are of different versions")
    for message in found:
        print(f"check_release: error: {message}", file=sys.stderr)
    if not found:
        print(f"{sdists[0].name}, {wheels[0].name}: ok")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
