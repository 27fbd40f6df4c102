"""Builds `torchao8._C`, the extension that registers the ops; everything else is in pyproject.toml.

The extension uses the LibTorch Stable ABI and CPython's limited API: one built file serves every
torch from `OLDEST_TORCH` on and every Python from `OLDEST_PYTHON` on. tools/check_abi.py checks it.

DEBUG=1 in the environment builds with debug information and little optimization. TORCHAO8_LABEL=1
adds torch's CUDA release to the version of a build with CUDA kernels: 0.1.0+cu130.
"""

from __future__ import annotations

import os
import platform
import site
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
OLDEST_PYTHON = (3, 10)

OLDEST_SETUPTOOLS = 77  # the first that reads the license of pyproject.toml

TORCH_MISSING = """\
torchao8: no torch >= {}.{} found to build with. Install torch first, then run
    pip install --no-build-isolation .
or, for a wheel,
    python -m build --wheel --no-isolation"""


def import_torch() -> bool:
    """Import torch >= OLDEST_TORCH and tell whether there is one.

    In an isolated build pip hides the environment that it installs into. The torch there is as good
    as any for the stable ABI, so its directories are searched last.
    """
    hidden = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE is not False:
        hidden.append(site.getusersitepackages())
    sys.path.extend(p for p in dict.fromkeys(hidden) if p not in sys.path)
    try:
        import torch
    except ModuleNotFoundError:
        return False
    return tuple(int(n) for n in torch.__version__.split(".")[:2]) >= OLDEST_TORCH


class BuildWithoutTorch(build_ext):
    """Metadata and source distributions need no torch; compiling does."""

    def run(self) -> None:
        raise SystemExit(TORCH_MISSING.format(*OLDEST_TORCH))


def torch_directory() -> Path:
    import torch

    return Path(torch.__file__).parent


def macros() -> list[str]:
    """The oldest torch and Python whose interfaces may be used, and that no other may."""
    return [
        f"TORCH_TARGET_VERSION=0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000",
        "TORCH_STABLE_ONLY",
        f"Py_LIMITED_API=0x{OLDEST_PYTHON[0]:02X}{OLDEST_PYTHON[1]:02X}0000",
    ]


def compile_flags() -> list[str]:
    """Flags for the C++ compiler.

    The results must have the same bits on every machine, so the compiler may neither fuse a
    multiply with an add that the source keeps apart nor use the instructions of the machine it runs
    on: the files for AVX2 and AVX-512 ask for theirs with `#pragma GCC target`. No C++ standard is
    named: torch adds the one that its own headers are written for.
    """
    debug = os.environ.get("DEBUG") == "1"
    if sys.platform == "win32":
        optimize = ["/Od", "/Z7"] if debug else ["/O2"]
        return [*optimize, "/fp:precise", "/W3", *(f"/D{macro}" for macro in macros())]
    return [
        *(["-O1", "-g"] if debug else ["-O3", "-g0"]),
        "-fvisibility=hidden",
        # Torch's own checks name the source file: not by its place on the machine that built it.
        f"-ffile-prefix-map={ROOT}/=",
        f"-ffile-prefix-map={torch_directory()}/=torch/",
        # Without these two, square roots and selects keep the loops over a block scalar. Neither
        # changes a result: nothing here reads errno or the floating-point exception flags.
        "-fno-math-errno",
        "-fno-trapping-math",
        "-ffp-contract=off",
        # For speed: an order of instructions (not a choice of them), and where loops start.
        *(
            ["-mtune=icelake-server"]
            if platform.machine() == "x86_64" and sys.platform == "linux"
            else []
        ),
        "-falign-loops=64",
        "-fno-wrapv",  # Python's flags have -fwrapv
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",  # torch's headers have some
        *(f"-D{macro}" for macro in macros()),
    ]


def link_flags() -> list[str]:
    """Flags for the linker: csrc/old_runtime.cpp has what takes the place of dlsym."""
    wrapped = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return ["-Wl,--wrap=dlsym"] if wrapped and platform.libc_ver()[0] == "glibc" else []


def nvcc_flags() -> list[str]:
    """Flags for nvcc: as for the CPU, no fast-math and no contraction that the source does not
    spell. test/test_cuda_source.py compiles with the same."""
    return [
        "-O3",
        "-fmad=false",
        "--expt-relaxed-constexpr",
        "-Xcompiler=-fvisibility=hidden",
        "-DUSE_CUDA",
        *(f"-D{macro}" for macro in macros()),
    ]


def relative(*patterns: str) -> list[str]:
    """The files that match, relative to the repository as setuptools wants them, sorted."""
    return sorted(
        p.relative_to(ROOT).as_posix() for pattern in patterns for p in ROOT.glob(pattern)
    )


def make_extension(with_torch: bool) -> Extension:
    """Describe `torchao8._C`."""
    sources = relative("csrc/*.cpp", "csrc/cpu/*.cpp", "csrc/op/*.cpp")
    options = {
        "depends": relative("csrc/**/*.h", "csrc/**/*.inl"),
        "include_dirs": [str(ROOT / "csrc")],
        "extra_compile_args": compile_flags(),
        "extra_link_args": link_flags(),
        "py_limited_api": True,
    }
    if not with_torch:
        return Extension("torchao8._C", sources, **options)
    from torch.utils.cpp_extension import CppExtension

    extension = CppExtension("torchao8._C", sources, **options)
    # The whole C interface of the stable ABI is in this one. CppExtension would also have the file
    # depend on libtorch and libc10, which it uses nothing of.
    extension.libraries = ["torch_cpu"]
    return extension


def make_cuda_extension() -> Extension | None:
    """Describe `torchao8._C_cuda`; None where torch has no CUDA or there is no nvcc.

    TORCH_CUDA_ARCH_LIST chooses other GPUs than the default ones.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CUDAExtension

    if torch.version.cuda is None or CUDA_HOME is None:
        if "TORCH_CUDA_ARCH_LIST" in os.environ:
            missing = "no nvcc" if torch.version.cuda else "this torch is built without CUDA"
            print(f"torchao8: TORCH_CUDA_ARCH_LIST has no effect: {missing}", file=sys.stderr)
        return None
    blackwell = tuple(int(n) for n in torch.version.cuda.split(".")) >= (12, 8)
    os.environ.setdefault(
        "TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if blackwell else "8.0;9.0+PTX"
    )
    extension = CUDAExtension(
        "torchao8._C_cuda",
        relative("csrc/cuda/*.cu", "csrc/cuda/*.cpp", "csrc/op/*.cpp", "csrc/old_runtime.cpp"),
        depends=relative("csrc/**/*.h", "csrc/**/*.cuh"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": compile_flags(), "nvcc": nvcc_flags()},
        extra_link_args=link_flags(),
        py_limited_api=True,
    )
    extension.libraries = ["cudart", "torch_cpu", "torch_cuda"]
    return extension


class LabelledVersion(egg_info):
    """With TORCHAO8_LABEL=1, the version ends in the CUDA that torch must have for the kernels."""

    def finalize_options(self) -> None:
        import torch

        if os.environ.get("TORCHAO8_LABEL") == "1" and torch.version.cuda is not None:
            self.tag_build = "+cu" + torch.version.cuda.replace(".", "")
        super().finalize_options()


def build_command(with_torch: bool) -> type[build_ext]:
    """The command that compiles."""
    if not with_torch:
        return BuildWithoutTorch
    from torch.utils.cpp_extension import BuildExtension

    return BuildExtension


def main() -> None:
    """Run setuptools."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"torchao8: setuptools >= {OLDEST_SETUPTOOLS} is needed to build, and this is "
            f"{setuptools.__version__}; run: pip install --upgrade setuptools"
        )
    with_torch = import_torch()
    cuda = make_cuda_extension() if with_torch else None
    commands = {"build_ext": build_command(with_torch)}
    setup(
        ext_modules=[e for e in (make_extension(with_torch), cuda) if e is not None],
        cmdclass=commands if cuda is None else {**commands, "egg_info": LabelledVersion},
        options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}},
    )


main()
