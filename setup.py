"""Builds the extensions; everything else is in pyproject.toml.

`torchao8._C` registers the ops and has the CPU's kernels. `torchao8._C_cuda` has those of CUDA. It
is built where torch has CUDA and there is an nvcc. Where TORCHAO8_BUILD_CUDA asks for it, it is
built with any torch, and without a GPU.

Both use the LibTorch Stable ABI and CPython's limited API: one built file serves every torch from
`OLDEST_TORCH` on and every Python from `OLDEST_PYTHON` on. tools/check_abi.py checks it.

In the environment,
    TORCHAO8_BUILD_CUDA=1     builds both extensions; =only builds `torchao8._C_cuda` alone
    TORCH_CUDA_ARCH_LIST=9.0  the GPUs to build for
    CUDA_HOME=/opt/cuda       the CUDA toolkit; without it, that of the nvcc in PATH
    TORCHAO8_LABEL=1          the version of a build with CUDA kernels names CUDA's: 0.1.0+cu130
    DEBUG=1                   debug information and little optimization
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

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


class Toolkit(NamedTuple):
    """A CUDA toolkit."""

    root: Path
    version: str  # 13.0
    runtime: Path | None  # the file to link with


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME, of the nvcc in PATH, or in /usr/local/cuda, if there is one.

    An nvcc in PATH may be a wrapper in any folder. So it is asked where its toolkit is.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc")
    folders = [named or "/usr/local/cuda"]
    if not named and found is not None:
        said = subprocess.run([found, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        top = re.search(r"^#\$ _?TOP=(.+)$", said.stderr, re.MULTILINE)
        # Some toolkits have their libraries in TOP, and nvcc elsewhere.
        folders = [*([top[1].strip()] if top else []), str(Path(found).parent.parent)]
    compiler = Path("bin", "nvcc.exe" if sys.platform == "win32" else "nvcc")
    roots = [Path(os.path.normpath(folder)) for folder in folders]
    root = next((root for root in roots if (root / compiler).exists()), None)
    if root is None:
        return None
    nvcc = root / compiler
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)\.(\d+)", said.stdout)
    if release is None:
        raise SystemExit(
            f"torchao8: {nvcc} --version names no release:\n{said.stdout}{said.stderr}"
        )
    return Toolkit(root, f"{release[1]}.{release[2]}", find_runtime(root, release[1]))


def find_runtime(root: Path, major: str) -> Path | None:
    """The file of the CUDA runtime to link with.

    A toolkit has a link libcudart.so for this. NVIDIA's Python packages have none, and hold the
    library under its full name only, libcudart.so.13.
    """
    nvidia = importlib.util.find_spec("nvidia")
    packages = [Path(p) for p in nvidia.submodule_search_locations or ()] if nvidia else []
    folders = [root / "lib64", root / "lib", root / f"targets/{platform.machine()}-linux/lib"]
    for package in packages:
        folders += [package / f"cu{major}/lib", package / "cuda_runtime/lib"]
    names = ("libcudart.so", f"libcudart.so.{major}", f"libcudart.so.{major}.*")
    return next((p for name in names for folder in folders for p in folder.glob(name)), None)


def choice_of_cuda() -> str:
    """What TORCHAO8_BUILD_CUDA says."""
    choice = os.environ.get("TORCHAO8_BUILD_CUDA", "")
    if choice not in ("", "1", "only"):
        raise SystemExit(f"torchao8: TORCHAO8_BUILD_CUDA must be 1 or only, got {choice}")
    return choice


def toolkit_to_build_with() -> Toolkit | None:
    """The toolkit, if the CUDA kernels are to be built: not with a torch without CUDA, unasked."""
    import torch

    asked = choice_of_cuda() != ""
    toolkit = find_toolkit() if asked or torch.version.cuda is not None else None
    if toolkit is None:
        if asked:
            raise SystemExit(
                "torchao8: TORCHAO8_BUILD_CUDA asks for CUDA kernels, and there is no nvcc. Put "
                "nvcc into PATH, or name the folder of a CUDA toolkit: CUDA_HOME=/usr/local/cuda"
            )
        if "TORCH_CUDA_ARCH_LIST" in os.environ:
            missing = "no nvcc" if torch.version.cuda else "this torch is built without CUDA"
            print(f"torchao8: TORCH_CUDA_ARCH_LIST has no effect: {missing}", file=sys.stderr)
        return None
    if toolkit.runtime is None and sys.platform != "win32":
        major = toolkit.version.split(".")[0]
        raise SystemExit(
            f"torchao8: neither libcudart.so nor libcudart.so.{major} in {toolkit.root} or in "
            "NVIDIA's Python packages. Install one: pip install nvidia-cuda-runtime"
        )
    return toolkit


def make_cuda_extension(toolkit: Toolkit) -> Extension:
    """Describe `torchao8._C_cuda`."""
    from torch.utils import cpp_extension

    blackwell = tuple(int(n) for n in toolkit.version.split(".")) >= (12, 8)
    os.environ.setdefault(
        "TORCH_CUDA_ARCH_LIST", "8.0;9.0;10.0+PTX" if blackwell else "8.0;9.0+PTX"
    )
    cpp_extension.CUDA_HOME = str(toolkit.root)  # torch's own guess knows no wrappers
    runtime = [] if toolkit.runtime is None else [str(toolkit.runtime)]
    extension = cpp_extension.CUDAExtension(
        "torchao8._C_cuda",
        relative("csrc/cuda/**/*.cu", "csrc/cuda/*.cpp", "csrc/op/*.cpp", "csrc/old_runtime.cpp"),
        depends=relative("csrc/**/*.h", "csrc/**/*.cuh"),
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args={"cxx": compile_flags(), "nvcc": nvcc_flags()},
        extra_link_args=[*runtime, *link_flags()],
        py_limited_api=True,
    )
    extension.libraries = ["torch_cpu", "torch_cuda", *([] if runtime else ["cudart"])]
    return extension


def labelled_version(toolkit: Toolkit) -> type[egg_info]:
    """With TORCHAO8_LABEL=1, the version ends in the CUDA that torch must have for the kernels."""
    import torch

    choice = os.environ.get("TORCHAO8_LABEL", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(f"torchao8: TORCHAO8_LABEL must be 0 or 1, got {choice}")
    labels = choice == "1"

    class LabelledVersion(egg_info):
        def finalize_options(self) -> None:
            if labels:
                version = torch.version.cuda or toolkit.version
                self.tag_build = "+cu" + version.replace(".", "")
            super().finalize_options()

    return LabelledVersion


STUB_OF_TORCH_CUDA = """\
int aoti_torch_get_current_cuda_stream(int device, void **stream) { return 1; }
"""


def build_command(with_torch: bool) -> type[build_ext]:
    """The command that compiles."""
    if not with_torch:
        return BuildWithoutTorch
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """A torch without CUDA has no libtorch_cuda to link with. So a stub takes its place, in the
        build folder. It has what the kernels call, and the name by which the real one is found."""

        def build_extensions(self) -> None:
            lacks_cuda = not list((torch_directory() / "lib").glob("*torch_cuda.*"))
            for extension in self.extensions:
                if "torch_cuda" in extension.libraries and lacks_cuda:
                    extension.library_dirs.append(str(self.make_stub()))
            super().build_extensions()

        def make_stub(self) -> Path:
            folder = Path(self.build_temp, "stub").resolve()
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "torch_cuda.c").write_text(STUB_OF_TORCH_CUDA)
            objects = self.compiler.compile([str(folder / "torch_cuda.c")], output_dir="/")
            self.compiler.link_shared_lib(
                objects, "torch_cuda", str(folder), extra_postargs=["-Wl,-soname,libtorch_cuda.so"]
            )
            return folder

    return Build


def main() -> None:
    """Run setuptools."""
    if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
        raise SystemExit(
            f"torchao8: setuptools >= {OLDEST_SETUPTOOLS} is needed to build, and this is "
            f"{setuptools.__version__}; run: pip install --upgrade setuptools"
        )
    with_torch = import_torch()
    toolkit = toolkit_to_build_with() if with_torch else None
    extensions = [] if choice_of_cuda() == "only" else [make_extension(with_torch)]
    commands: dict[str, type] = {"build_ext": build_command(with_torch)}
    if toolkit is not None:
        extensions.append(make_cuda_extension(toolkit))
        commands["egg_info"] = labelled_version(toolkit)
    setup(
        ext_modules=extensions,
        cmdclass=commands,
        options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*OLDEST_PYTHON)}},
    )


if __name__ == "__main__":
    main()
