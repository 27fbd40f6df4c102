"""Stochastic rounding to the signed map: unbiased, and the same codes on every path.

The program is C++ as the library is, compiled for each path: no rule needs all of its cases.
"""

import subprocess
from pathlib import Path

import pytest
from compilers import EMULATION, ROOT, cpp_command
from helpers import needs_kernels

from torchao8 import ops

# Of the CPU path in use, those that this machine has.
PATHS = {
    "scalar": (),
    "avx2": ("-DPATH_AVX2", "-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-DPATH_AVX512", "-march=icelake-server"),
}
# Each breaks one thing that the encoder must do.
MUTANTS = {
    "the sign mirrored": (
        "cpu/formats/dynamic/scalar.h",
        "((magnitude ^ minus) - minus)",
        "magnitude",
    ),
    "-1.0 not avoided": ("cpu/formats/dynamic/scalar.h", "most = 128 + minus", "most = 128"),
    "never rounded to zero": (
        "cpu/formats/dynamic/scalar.h",
        "int32_t kk = int32_t(",
        "int32_t kk = 1 | int32_t(",
    ),
    "no line from zero": ("codec/dynamic_map.h", "Point{0.0, -1.0}", "Point{0.0, 0.0}"),
    "the gap of class 0": ("codec/dynamic_map.h", "is_signed ? 1.0f : 0.0f", "0.0f"),
    "the extreme's line": (
        "codec/dynamic_map.h",
        "is_signed ? 0.5 : 1.1",
        "is_signed ? 4.0 : 1.1",
    ),
}

COMMON = ("never rounded to zero", "the gap of class 0")  # of each file, one that make test has


def run(csrc: Path, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    source = EMULATION / "check_signed_rounding.cpp"
    tables = csrc / "cpu/codec_tables.cpp"
    program = folder / "check"
    command = [*cpp_command(csrc, "-O2", *flags, source, tables), program]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return subprocess.run([program], capture_output=True, text=True, timeout=120)


@needs_kernels
@pytest.mark.parametrize("path", list(PATHS))
def test_codes(path: str, tmp_path: Path) -> None:
    names = list(PATHS)
    if names.index(path) > names.index(ops.cpu_capability()):
        pytest.skip(f"this CPU has no {path}")
    result = run(ROOT / "csrc", tmp_path, *PATHS[path])
    assert (result.returncode, result.stdout) == (0, "0 failures\n")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in COMMON else pytest.mark.thorough) for n in MUTANTS],
)
def test_the_check_fails_for_a_mutant(name: str, tmp_path: Path) -> None:
    import shutil

    file, old, new = MUTANTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert old in text, f"{name}: the source has changed"
    (csrc / file).write_text(text.replace(old, new))
    assert run(csrc, tmp_path).returncode == 1
