"""The CUDA sources without a GPU: they compile, take no stack, and give the CPU's bits.

The kernels run here on warps emulated by fibers (test/emulation). Mutants of them must not pass,
or the comparison would prove nothing.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EMULATION = ROOT / "test" / "emulation"
COMPILER = os.environ.get("CXX", "c++")

# Each breaks one thing that the kernels must do.
MUTANTS = {
    "a skipped block": ("step.cuh", "if (skip) continue;", "if (skip || unit % 7 == 3) continue;"),
    "no barrier after copying the tables": ("step.cuh", "  __syncthreads();\n", ""),
    "an approximate root": (
        "device.cuh",
        "return std::fma(std::fma(-s, s, v), r * 0.5f, s);",
        "return s;",
    ),
    "no way out for a bad block": (
        "step.cuh",
        "if (!good) return false;",
        "if (!good && false) return false;",
    ),
    "-1.0 not avoided": ("codec.cuh", "254 - (code < 254 ? code : 254)", "254 - code"),
    "a second moment may be zero": (
        "codec.cuh",
        "build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned);",
        "build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned); "
        "t.nearest_unsigned[0] -= 1 << 16;",
    ),
    "the random numbers of the next eight": (
        "step.cuh",
        "const uint32_t j = uint32_t(first) / 8;",
        "const uint32_t j = uint32_t(first) / 8 + 1;",
    ),
    "a scale that is not written": (
        "step.cuh",
        "if (lane == 0) entry.scales",
        "if (lane == 32) entry.scales",
    ),
    "the sign of the extreme lost": (
        "step.cuh",
        "(low & 0x7fffffffu) > high ? low : high",
        "(low & 0x7fffffffu) > high ? low & 0x7fffffffu : high",
    ),
    "the step not counted": ("prepare.cuh", "*table.steps[i] = float(step);", ""),
    "lanes past the end of a short row": (
        "step.cuh",
        "const int first = lane * kPerLane < last ? lane * kPerLane : last;",
        "const int first = lane * kPerLane < last ? lane * kPerLane : last - last % 16;",
    ),
}


def build_check(csrc: Path, program: Path, *flags: str) -> Path:
    command = [COMPILER, "-std=c++20", "-O1", "-ffp-contract=off", "-fno-math-errno", *flags,
               f"-I{EMULATION}", f"-I{csrc}", str(EMULATION / "check_step.cpp"),
               str(csrc / "cpu/isa_scalar.cpp"), str(csrc / "cpu/codec_tables.cpp"),
               "-o", str(program)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return program


def test_the_kernels_give_the_bits_of_the_cpu(tmp_path: Path) -> None:
    program = build_check(ROOT / "csrc", tmp_path / "check")
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert result.stdout == "0 configurations differ\n"


@pytest.fixture(scope="module")
def mutants(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the check says of the kernels as they are, and of each mutant."""
    folder = tmp_path_factory.mktemp("mutants")

    def outcome(number: int, name: str | None) -> str:
        csrc = folder / str(number) / "csrc"
        shutil.copytree(ROOT / "csrc", csrc)
        if name is not None:
            file, old, new = MUTANTS[name]
            text = (csrc / "cuda" / file).read_text()
            assert old in text, f"{name}: the source has changed"
            (csrc / "cuda" / file).write_text(text.replace(old, new))
        program = build_check(csrc, csrc / "check", "-DQUICK", "-O0")
        result = subprocess.run([program], capture_output=True, text=True, timeout=120)
        return f"{result.returncode}: {result.stdout[-200:]}"

    names = [None, *MUTANTS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        outcomes = pool.map(outcome, range(len(names)), names)
    return {name or "": text for name, text in zip(names, outcomes, strict=True)}


@pytest.mark.parametrize("name", list(MUTANTS))
def test_the_check_fails_for_a_mutant(mutants: dict[str, str], name: str) -> None:
    assert mutants[""] == "0: 0 configurations differ\n"
    assert not mutants[name].startswith("0: ")


# -- nvcc --------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc on PATH: install the CUDA toolkit's compiler"
)


def ptxas_report(source: str, flags: list[str], output: Path, what: str = "-c") -> str:
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", "-std=c++20", *flags, "-O3", "-fmad=false", "--expt-relaxed-constexpr",
               "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY",
               f"-I{ROOT / 'csrc'}", f"-I{include}", f"-I{include}/torch/csrc/api/include",
               "-Xptxas=-v", what, str(ROOT / "csrc/cuda" / source), "-o", str(output)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stderr


def resources(report: str) -> Iterator[tuple[str, list[int]]]:
    """Of each function its bytes of stack frame, of spill stores and of spill loads."""
    pattern = (
        r"Function properties for (\S+)\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    for name, *numbers in re.findall(pattern, report):
        yield name, [int(n) for n in numbers]


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_the_kernels_compile_and_take_no_stack(arch: str, tmp_path: Path) -> None:
    """A stack frame or a spill is memory traffic that no count of bytes has."""
    found = []
    for source in ("adam.cu", "quantize.cu"):
        report = ptxas_report(source, [f"-arch={arch}"], tmp_path / f"{source}.o")
        assert "warning" not in report
        found += list(resources(report))
    step_kernels = [name for name, _ in found if "11step_blocks" in name]
    assert len(step_kernels) == 12  # four rules, three dtypes
    assert [(name, numbers) for name, numbers in found if any(numbers)] == []


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit, or the one that the package triton carries."""
    if found := shutil.which("nvdisasm"):
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    tool = Path(spec.origin).parent / "backends/nvidia/bin/nvdisasm"
    return str(tool) if tool.exists() else None


@needs_nvcc
@pytest.mark.skipif(disassembler() is None, reason="no nvdisasm: pip install triton")
def test_instructions_an_element(tmp_path: Path) -> None:
    """An H100 issues 96 instructions an element in the time that memory takes for bfloat16, and 153
    for float32. What is counted today may grow by 2% before somebody has to look."""
    cubin = tmp_path / "adam.cubin"
    ptxas_report("adam.cu", ["-arch=sm_90"], cubin, what="-cubin")
    tool = str(disassembler())
    command = [sys.executable, str(ROOT / "tools/count_instructions.py"), tool, str(cubin)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    plain = {
        dtype: float(count)
        for count, dtype in re.findall(
            r"^([\d.]+) an element: \S*11step_blocksINS_8AdamRuleILb0ELb1EEE(f|NS_8BFloat16E)E",
            lines,
            re.M,
        )
    }
    assert plain["f"] < 93
    assert plain["NS_8BFloat16E"] < 95.5


@needs_nvcc
def test_the_sources_compile_to_ptx_and_as_cpp17(tmp_path: Path) -> None:
    """For GPUs to come; and for a torch whose headers ask for the older standard."""
    flags = ["-gencode=arch=compute_100,code=compute_100", "-std=c++17"]
    ptxas_report("quantize.cu", flags, tmp_path / "quantize.o")
