"""The checks of a release, in tools/, and that an sdist installs."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_packaging import ROOT, find, load

import torchao8

check_release = load(ROOT / "tools" / "check_release.py")
check_install = load(ROOT / "tools" / "check_install.py")

REPOSITORY = {
    "README.md",
    "pyproject.toml",
    "torchao8/__init__.py",
    "test/test_one.py",
    ".github/workflows/ci.yml",
    ".gitignore",
}
SDIST = REPOSITORY - {".github/workflows/ci.yml", ".gitignore"}
WHEEL = {"torchao8/__init__.py", "torchao8/_C.abi3.so"}
METADATA = {
    "Name": "torchao8",
    "Summary": "Optimizers",
    "Author": "Somebody",
    "License-Expression": "BSD-3-Clause",
    "Keywords": "pytorch",
    "Requires-Python": ">=3.10",
}
PLATFORM = "manylinux_2_28_x86_64"


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/check_release.py, for a repository of six files."""
    monkeypatch.setattr(check_release, "tracked", lambda: set(REPOSITORY))
    return check_release


def write_sdist(folder: Path, names: set[str], version: str = "1.0") -> None:
    """An sdist of empty files."""
    with tarfile.open(folder / f"torchao8-{version}.tar.gz", "w:gz") as sdist:
        for name in sorted(names | {"PKG-INFO", "setup.cfg", "torchao8.egg-info/SOURCES.txt"}):
            sdist.addfile(tarfile.TarInfo(f"torchao8-{version}/{name}"), io.BytesIO())


def write_wheel(
    folder: Path,
    names: set[str] = WHEEL,
    *,
    metadata: dict[str, str] = METADATA,
    urls: set[str] = check_release.URLS,
    platform: str = PLATFORM,
    license_file: str = "licenses/LICENSE",
) -> None:
    """A wheel of empty files, but for its metadata."""
    lines = [f"{key}: {value}" for key, value in metadata.items()]
    lines += [f"Project-URL: {name}, https://example.org" for name in urls]
    info = "torchao8-1.0.dist-info/"
    with zipfile.ZipFile(folder / f"torchao8-1.0-cp310-abi3-{platform}.whl", "w") as wheel:
        for name in names | {info + license_file, info + "RECORD"}:
            wheel.writestr(name, "")
        wheel.writestr(info + "METADATA", "\n".join([*lines, "", "What it is."]))


def test_good_release_passes(checked: ModuleType, tmp_path: Path) -> None:
    write_sdist(tmp_path, SDIST)
    write_wheel(tmp_path)
    assert checked.main([str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("sdist", "wheel", "message"),
    [
        ({"names": SDIST - {"test/test_one.py"}}, {}, "the sdist lacks test/test_one.py"),
        ({"names": REPOSITORY}, {}, "the sdist has .github/workflows/ci.yml, which is not"),
        ({"names": SDIST, "version": "1.1"}, {}, "are of different versions"),
        ({}, {"names": {"torchao8/_C.abi3.so"}}, "the wheel lacks torchao8/__init__.py"),
        ({}, {"names": WHEEL | {"torchao8/old.py"}}, "the wheel has torchao8/old.py, which is not"),
        ({}, {"platform": "linux_x86_64"}, "must have the tag cp310-abi3-manylinux_2_28_"),
        ({}, {"license_file": "x"}, "the wheel lacks the license"),
        ({}, {"urls": check_release.URLS - {"Changelog"}}, "has no URL named Changelog"),
        ({}, {"metadata": {**METADATA, "Keywords": ""}}, "has no Keywords"),
    ],
)
def test_bad_release_fails(
    checked: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sdist: dict,
    wheel: dict,
    message: str,
) -> None:
    write_sdist(tmp_path, **({"names": SDIST} | sdist))
    write_wheel(tmp_path, **wheel)
    assert checked.main([str(tmp_path)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert any(message in error for error in errors), errors


def test_release_is_one_sdist_and_one_wheel(
    checked: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_sdist(tmp_path, SDIST)
    assert checked.main([str(tmp_path)]) == 1
    assert "must hold one sdist and one wheel" in capsys.readouterr().err
    assert checked.main([]) == 2


def test_missing_file_is_not_installed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        check_install.main(["dist/no-such.whl"])
    assert "dist/no-such.whl is not a file" in capsys.readouterr().err


def test_other_bits_fail(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two environments that train to different digests are an error; two equal ones are none."""
    wheel = tmp_path / "a.whl"
    wheel.touch()
    arguments = [str(wheel), "--torch", "torch==1", "--torch", "torch==2"]
    monkeypatch.setattr(check_install, "try_install", lambda file, python, torch: "a")
    assert check_install.main(arguments) == 0
    assert check_install.main([*arguments, "--digest", "b"]) == 1
    monkeypatch.setattr(check_install, "try_install", lambda file, python, torch: torch)
    assert check_install.main(arguments) == 1
    assert capsys.readouterr().err.count("other bits were trained") == 2


def test_training_prints_the_same_digest_on_other_paths() -> None:
    """What a fresh environment runs also runs here, and its digest does not depend on the CPU."""
    digests = set()
    for path in ("scalar", ""):
        # Where the tests themselves are started with a path, the second run keeps it.
        environment = {**os.environ, **({"TORCHAO8_CPU": path} if path else {})}
        environment["PYTHONPATH"] = str(Path(torchao8.__file__).parent.parent)
        done = subprocess.run(
            [sys.executable, str(check_install.TRAINING)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        digests.add(check_install.read_digest(done.stdout))
    assert len(digests) == 1
    with pytest.raises(check_install.Failed, match="printed no digest"):
        check_install.read_digest("digest 12")


def test_citation_names_the_version_and_the_license() -> None:
    assert find(r"^version: (.+)$", "CITATION.cff") == torchao8.__version__
    assert find(r"^license: (.+)$", "CITATION.cff") == find(r'^license = "(.+)"$', "pyproject.toml")
    assert find(r"^repository-code: (.+)$", "CITATION.cff") == find(
        r'^Repository = "(.+)"$', "pyproject.toml"
    )


@pytest.mark.slow
def test_sdist_installs_and_trains(tmp_path: Path) -> None:
    """As a user without a wheel has it: pip builds the sdist in a fresh environment with torch."""
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation"]
    subprocess.run([*build, "--outdir", str(tmp_path), str(ROOT)], check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    version = torch.__version__.split("+")[0]
    assert check_install.main([str(sdist), "--torch", f"torch=={version}"]) == 0
