"""What compilers make of the sources, kept in build/ for all tests that ask for it.

The kernels run without a GPU on warps emulated by fibers (test/emulation), and are compared with
the CPU's plain C++ path. nvcc compiles them as setup.py has it done.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from test_packaging import load

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATION = ROOT / "test" / "emulation"
CACHE = ROOT / "build" / "test"
setup_py = load(ROOT / "setup.py")
COMPILER = os.environ.get("CXX", "c++")


def built(name: str, command: Sequence[str | Path], sources: Sequence[Path]) -> Path:
    """What a compiler makes of sources, in a file whose name the command is given as its last word.

    It is kept in build/, under a name that tells compiler, command and every byte of the sources,
    so that processes which test at the same time, and later runs, compile nothing twice.
    """
    key = hashlib.sha256((_version_of(str(command[0])) + torch.__version__).encode())
    key.update(repr([str(word) for word in command]).encode())
    found = {path for source in sources for path in (source, *source.rglob("*"))}
    for path in sorted(path for path in found if path.is_file()):
        key.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    CACHE.mkdir(parents=True, exist_ok=True)
    output = CACHE / f"{key.hexdigest()[:32]}-{name}"
    with open(f"{output}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not output.exists():
            unfinished = output.with_name(f"{output.name}.unfinished")
            result = subprocess.run([*command, unfinished], capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            output.with_name(f"{output.name}.log").write_text(result.stderr)
            unfinished.rename(output)
    return output


def csrc_without(folder: str) -> list[Path]:
    """csrc, without one of its folders, whose changes so compile nothing again."""
    return [path for path in CSRC.iterdir() if path.name != folder]


def log_of(output: Path) -> str:
    """What the compiler had to say."""
    return output.with_name(f"{output.name}.log").read_text()


@functools.cache
def _version_of(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def cpp_command(csrc: Path, *arguments: str | Path) -> list[str | Path]:
    return [COMPILER, "-std=c++20", "-ffp-contract=off", "-fno-math-errno", f"-I{EMULATION}",
            f"-I{csrc}", *arguments, "-o"]  # fmt: skip


def oracle() -> list[Path]:
    """The CPU's plain C++ path, compiled."""
    return [
        built(
            f"{name}.o",
            cpp_command(CSRC, "-O1", "-c", CSRC / f"cpu/{name}.cpp"),
            csrc_without("cuda"),
        )
        for name in (
            "isa_scalar",
            "isa_scalar_dynamic",
            "isa_scalar_mulaw",
            "isa_scalar_4bit",
            "codec_tables",
        )
    ]


def program(check: str, flags: Sequence[str]) -> Path:
    """A check of the kernels as they are."""
    command = cpp_command(CSRC, *flags, EMULATION / check, *oracle())
    return built(Path(check).stem, command, [CSRC, EMULATION])


def outcome(path: Path) -> str:
    result = subprocess.run([path], capture_output=True, text=True, timeout=300)
    return f"{result.returncode}: {result.stdout[-4000:]}"


# -- nvcc --------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc on PATH: install the CUDA toolkit's compiler"
)
CUDA = CSRC / "cuda"
SOURCES = sorted(path.relative_to(CUDA).as_posix() for path in CUDA.rglob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LINKED = "sm_90"  # what the extension is linked from


def nvcc(source: str, *flags: str) -> Path:
    """The file that nvcc makes of a source, with the flags of setup.py."""
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", *setup_py.nvcc_flags(), "-Xcompiler=-fPIC", *flags, f"-I{CSRC}",
               f"-I{include}", f"-I{include}/torch/csrc/api/include", CUDA / source,
               "-o"]  # fmt: skip
    return built(Path(source).name, command, csrc_without("cpu"))


def compiled(source: str, arch: str) -> Path:
    """The kernels of a source; as an object of the extension for LINKED."""
    # The oldest standard that a torch's headers ask for, once.
    standard = f"-std=c++{17 if arch == 'sm_80' else 20}"
    number = arch.removeprefix("sm_")
    output = ("-c", "-no-compress") if arch == LINKED else ("-cubin",)
    return nvcc(source, f"-gencode=arch=compute_{number},code={arch}", standard, "-Xptxas=-v",
                *output)  # fmt: skip


def disassembler() -> str | None:
    """nvdisasm of the CUDA toolkit, or the one of the package nvidia-cuda-nvdisasm."""
    if found := shutil.which("nvdisasm"):
        return found
    places = [Path(p) / "bin/nvdisasm" for p in _nvidia_packages()]
    return next((str(p) for p in places if p.exists()), None)


def _nvidia_packages() -> list[str]:
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    return [str(path) for root in roots for path in Path(root).glob("cu*")]
