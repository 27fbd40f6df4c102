"""How setup.py finds a CUDA toolkit and links with it: no GPU, no nvcc, no torch with CUDA needed.

The toolkit here has a script for nvcc, which compiles an empty program in place of every source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_packaging import ROOT, check_abi, load, needs_elf

NVCC = """\
#!/bin/sh
case "$*" in
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88'; exit;;
  *--dryrun*) echo '#$ TOP={root}/bin/..' >&2; exit;;
esac
echo "$@" >> {root}/commands
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then out=$2; fi
  shift
done
exec cc -fPIC -c {root}/kernels.c -o "$out"
"""
# What the linker must find in the two libraries.
KERNELS = """\
int aoti_torch_get_current_cuda_stream(int device, void **stream);
int cudaGetLastError(void);
__attribute__((used)) static int launch(void) {
  return aoti_torch_get_current_cuda_stream(0, 0) + cudaGetLastError();
}
"""

needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def setup() -> ModuleType:
    """setup.py, without running it."""
    return load(ROOT / "setup.py")


@pytest.fixture
def toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit that only a wrapper in PATH leads to, and that has no link libcudart.so."""
    root = tmp_path / "cuda-13.0"
    write_program(root / "bin/nvcc", NVCC.format(root=root))
    write_program(tmp_path / "wrappers/nvcc", f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n')
    (root / "kernels.c").write_text(KERNELS)
    (root / "lib64").mkdir()
    for name in ("CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "TORCHAO8_BUILD_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'wrappers'}{os.pathsep}{os.environ['PATH']}")
    return root


def add_runtime(root: Path) -> Path:
    runtime = root / "lib64/libcudart.so.13"
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(runtime)]
    command.append("-Wl,-soname,libcudart.so.13")
    subprocess.run(command, input="int cudaGetLastError(void) { return 0; }", text=True, check=True)
    return runtime


@needs_cc
def test_a_wrapper_leads_to_its_toolkit(setup: ModuleType, toolkit: Path) -> None:
    runtime = add_runtime(toolkit)
    assert setup.find_toolkit() == (toolkit, "13.0", runtime)
    link = toolkit / "lib64/libcudart.so"
    link.symlink_to(runtime.name)
    assert setup.find_toolkit() == (toolkit, "13.0", link)


@needs_cc
def test_a_toolkit_whose_top_has_no_nvcc(
    setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = toolkit / "bin/nvcc"
    nvcc.write_text(nvcc.read_text().replace(f"{toolkit}/bin/..", f"{toolkit}/targets/some"))
    monkeypatch.setenv("PATH", f"{nvcc.parent}{os.pathsep}{os.environ['PATH']}")
    runtime = add_runtime(toolkit)
    assert setup.find_toolkit() == (toolkit, "13.0", runtime)


@needs_cc
def test_a_named_toolkit_comes_first(
    setup: ModuleType, toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_runtime(toolkit)
    named = tmp_path / "named"
    shutil.copytree(toolkit, named)
    monkeypatch.setenv("CUDA_HOME", str(named))
    assert setup.find_toolkit().root == named
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert setup.find_toolkit() is None


def test_what_is_missing_is_said(
    setup: ModuleType, toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert setup.toolkit_to_build_with() is None
    monkeypatch.setenv("TORCHAO8_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="TORCHAO8_BUILD_CUDA must be 1 or only, got yes"):
        setup.toolkit_to_build_with()
    monkeypatch.setenv("TORCHAO8_BUILD_CUDA", "only")
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=f"neither libcudart.so nor libcudart.so.13 in {toolkit}"):
        setup.toolkit_to_build_with()
    monkeypatch.setenv("CUDA_HOME", "/nothing")
    with pytest.raises(SystemExit, match="asks for CUDA kernels, and there is no nvcc"):
        setup.toolkit_to_build_with()


def test_a_label_is_asked_for_or_not(setup: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHAO8_LABEL", "yes")
    with pytest.raises(SystemExit, match="TORCHAO8_LABEL must be 0 or 1, got yes"):
        setup.labelled_version(None)


def build_wheel(folder: Path) -> Path:
    """Builds a wheel of the CUDA kernels alone, for one GPU; the library that is in it."""
    chosen = {"TORCHAO8_BUILD_CUDA": "only", "TORCHAO8_LABEL": "1", "TORCH_CUDA_ARCH_LIST": "9.0"}
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    command += ["build", "--build-base", str(folder / "build")]
    command += ["bdist_wheel", "--dist-dir", str(folder), "--bdist-dir", str(folder / "wheel")]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | chosen, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = folder.glob("*.whl")
    assert re.fullmatch(r"torchao8-[\d.]+\+cu\d+-cp310-abi3-.*\.whl", wheel.name)
    name = "torchao8/_C_cuda.abi3.so"
    with zipfile.ZipFile(wheel) as file:
        assert [n for n in file.namelist() if n.endswith(".so")] == [name]
        return Path(file.extract(name, folder / "unpacked"))


@needs_elf
def test_the_kernels_are_built_without_a_gpu(toolkit: Path, tmp_path: Path) -> None:
    """Whatever torch there is; a wheel holds them, and its name tells their CUDA."""
    add_runtime(toolkit)
    library = build_wheel(tmp_path)
    assert list(tmp_path.glob("torchao8-*+cu130-*.whl"))
    assert check_abi.main([str(library)]) == 0
    libraries = check_abi.read_needs(library).libraries
    assert {"libtorch_cuda.so", "libcudart.so.13"} <= set(libraries)
    commands = (toolkit / "commands").read_text().splitlines()
    assert all("arch=compute_90,code=sm_90" in command for command in commands)
    words = {word for command in commands for word in command.split()}
    sources = {str(path) for path in (ROOT / "csrc/cuda").rglob("*.cu")}
    assert {word for word in words if word.endswith(".cu")} == sources


LOAD = """\
import importlib.util, sys, torch
torch.version.cuda = {torch_cuda!r}
class Finder:  # finds a module without content in a file
    def find_spec(name, path, target=None):
        if name == "torchao8._C_cuda":
            return importlib.util.spec_from_file_location(name, {file!r}, loader=Finder)
    def create_module(spec):
        return None
    def exec_module(module):
        print("loaded")
sys.meta_path.insert(0, Finder)
from torchao8 import ops
print(ops.CUDA_EXTENSION_FILE, "|", ops.CUDA_MISSING, "|", ops.is_portable(torch.device("cuda")))
"""


@pytest.mark.parametrize(
    ("torch_cuda", "linked_with", "loaded"),
    [
        ("13.1", "libcudart.so.13", True),
        ("12.8", "cudart64_12.dll", True),
        ("12.8", "libcudart.so.13", False),
        ("13.0", "libcudart.so.12", False),
    ],
)
def test_kernels_of_another_cuda_are_not_loaded(
    tmp_path: Path, torch_cuda: str, linked_with: str, loaded: bool
) -> None:
    """They would take the place of the implementation that needs no kernels."""
    library = tmp_path / "_C_cuda.abi3.so"
    library.write_bytes(b"\0libtorch_cuda.so\0" + linked_with.encode() + b"\0")
    program = LOAD.format(torch_cuda=torch_cuda, file=str(library))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if loaded:
        assert result.stdout == f"loaded\n{library} |  | False\n"
    else:
        major = re.search(r"1\d", linked_with)
        assert major
        assert result.stdout == (
            f"None | {library} is built for CUDA {major[0]}, and torch for CUDA {torch_cuda}; "
            "install a build for the CUDA of torch | True\n"
        )
