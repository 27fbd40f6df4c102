"""The CUDA kernels on emulated warps give the CPU's bits.

Mutants of them must not pass, or the comparison would prove nothing.
"""

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from compilers import CSRC, EMULATION, cpp_command, oracle, outcome, program
from cuda_mutants import MUTANTS

CHECKS = {  # of the others: check_step.cpp
    "lamb.cuh": "check_lamb.cpp",
    "one_scale.cuh": "check_one_scale.cpp",
    "sums.cuh": "check_sums.cpp",
    "warp_sum.cuh": "check_sums.cpp",
}


# Mutants in the common run, which are quick to compile: that a check can fail.
COMMON_MUTANTS = (
    "bits shifted out of the low word",
    "extremes of the first tensor",
    "the scale of the first block, in the trust ratio",
)
# A check tries less then (see there). With optimization it also compiles faster: of the many small
# functions few are left.
QUICK = ("-O1", "-DQUICK", "-fsanitize=alignment", "-fno-sanitize-recover")
BRIEF = ("-O1", "-DQUICK", "-DBRIEF")  # of check_step.cpp: one kernel, in a third of the time
FULL = ("-O1",)
# More launches, each of fewer tensors; see csrc/cuda/table.cuh.
SMALL = (*QUICK, "-DTORCHAO8_ARGUMENT_BYTES=4096")

MULAW = "-DFORMAT=MulawFormat"  # in place of the dynamic format; see emulation/format.h
FOUR_BIT = "-DFORMAT=FourBitFormat"
MUON = "-DONLY_MUON"  # in place of Adam
FORMAT_FLAGS = {"mulaw": MULAW, "4 bits": FOUR_BIT}  # by a part of a mutant's file or name


@pytest.mark.parametrize(
    ("check", "format_flags"),
    [
        *((f"check_{name}.cpp", ()) for name in ("lamb", "one_scale", "step", "sums")),
        *((f"check_{name}.cpp", (MULAW,)) for name in ("lamb", "one_scale", "step")),
        ("check_step.cpp", (FOUR_BIT,)),
        ("check_step.cpp", (MUON,)),
        pytest.param("check_step.cpp", (MUON, MULAW), marks=pytest.mark.thorough),
    ],
)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(BRIEF, id="brief", marks=pytest.mark.thorough),
        pytest.param(FULL, id="full", marks=pytest.mark.thorough),
        pytest.param(SMALL, id="small arguments", marks=pytest.mark.thorough),
    ],
)
def test_the_kernels_give_the_bits_of_the_cpu(
    check: str, format_flags: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    """Quick: one rule, and each way through each kernel. Brief: one kernel. Mutants are checked in
    these two. Full: every rule, dtype and block size. Small arguments: as quick, with 4,096 bytes
    of them a launch."""
    assert outcome(program(check, (*flags, *format_flags))) == "0: 0 configurations differ\n"


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in COMMON_MUTANTS else pytest.mark.thorough)
        for name in MUTANTS
    ],
)
def test_the_check_fails_for_a_mutant(name: str, tmp_path: Path) -> None:
    """It passes for the kernels as they are: the test above, quick."""
    file, old, new = MUTANTS[name]
    csrc = tmp_path / "csrc"
    shutil.copytree(CSRC, csrc)
    text = (csrc / "cuda" / file).read_text()
    assert old in text, f"{name}: the source has changed"
    (csrc / "cuda" / file).write_text(text.replace(old, new))
    check = CHECKS.get(file, "check_step.cpp")
    of_format = [flag for part, flag in FORMAT_FLAGS.items() if part in file + name]
    assert any(
        not _outcome_of_mutant(csrc, check, (*flags, *of_format)).startswith("0: ")
        for flags in ([BRIEF, QUICK] if check == "check_step.cpp" else [QUICK])
    )


def _outcome_of_mutant(csrc: Path, check: str, flags: Sequence[str]) -> str:
    program = csrc / "mutant"
    command = [*cpp_command(csrc, *flags, EMULATION / check, *oracle()), program]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return outcome(program)
