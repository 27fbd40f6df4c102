"""The build: the ABI check of tools/check_abi.py, and that versions said twice agree."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import torchao8
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.contract import bare_name

ROOT = Path(__file__).resolve().parent.parent
EXTENSION = Path(torchao8.__file__).parent / "_C.abi3.so"
MODULE = "void PyModuleDef_Init(); void* PyInit__C() { PyModuleDef_Init(); return 0; }\n"

needs_elf = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not shutil.which("cc") or not shutil.which("readelf"),
    reason="the ABI check reads Linux libraries, with binutils, and its inputs need a C compiler",
)


def load(path: Path) -> ModuleType:
    """Import a script that is no part of the package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


check_abi = load(ROOT / "tools" / "check_abi.py")
requirements = load(ROOT / "tools" / "requirements.py")


def link(folder: Path, source: str, *, name: str = "_C.abi3.so", libraries: str = "") -> Path:
    """A shared library made from C; what it uses need not exist."""
    code = folder / "source.c"
    code.write_text(source)
    # GCC's own default may drop a library that nothing is used of.
    options = ["-shared", "-fPIC", "-w", "-Wl,--no-as-needed", f"-L{folder}", *libraries.split()]
    subprocess.run(["cc", str(code), *options, "-o", str(folder / name)], check=True)
    return folder / name


def using(*symbols: str) -> str:
    """C source of a module that uses the symbols."""
    calls = "".join(
        f"void {symbol}(); void call_{symbol}() {{ {symbol}(); }}\n" for symbol in symbols
    )
    return MODULE + calls


def test_every_class_is_exported() -> None:
    """Each of the forms of a rule, from both packages, by the list of its own file."""

    def subclasses(cls: type) -> set[type]:
        return {cls}.union(*map(subclasses, cls.__subclasses__()))

    ours = [c for c in subclasses(LowPrecisionOptimizer) if c.__module__.startswith("torchao8.")]
    names = {c.__name__ for c in ours if not c.__name__.startswith("_")} - {"LowPrecisionOptimizer"}
    bare = {bare_name(name): getattr(torchao8, bare_name(name)) for name in names}
    assert names == {
        f"{paged}{name}{bits}"
        for name, cls in bare.items()
        for paged in ("", "Paged")
        for bits in ("", "8bit", *["4bit"] * cls._has_4bit)
    }
    assert set(torchao8.optim.__all__) == names | {"CommonOptions"}
    assert names < set(torchao8.__all__)
    for package in (torchao8, torchao8.optim):
        assert package.__all__ == sorted(package.__all__)
        assert all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "LAMB4bit",
            "Of this rule there are LAMB and LAMB8bit. "
            "Adam, AdamW, Lion and SGD have state of 4 bits",
        ),
        ("PagedAdam32bit", "Of this rule there are PagedAdam, PagedAdam8bit and PagedAdam4bit"),
        ("lion8bit", "Of this rule there are Lion, Lion8bit and Lion4bit"),
        ("Rprop8bit", "The rules here are Adagrad, Adam, AdamW, AdEMAMix, "),
        ("Rprop", None),
        ("__wrapped__", None),
    ],
)
@pytest.mark.parametrize("package", [torchao8, torchao8.optim])
def test_a_class_that_is_not_there(package: ModuleType, name: str, said: str | None) -> None:
    with pytest.raises(AttributeError) as error:
        getattr(package, name)
    plain = f"module {package.__name__!r} has no attribute {name!r}"
    assert str(error.value).startswith(plain if said is None else f"{plain}. {said}")
    assert said is not None or str(error.value) == plain
    assert not hasattr(package, name)


@needs_elf
def test_built_extension_keeps_to_the_stable_abi(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_abi.main([str(EXTENSION)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"_C\.abi3\.so: needs torch >= 2\.\d+ \(.*torch_library_impl.*\)", out)
    assert re.search(r"CXXABI [\d.]+, GLIBC [\d.]+, GLIBCXX [\d.]+", out)


@needs_elf
def test_smallest_good_library_passes(tmp_path: Path) -> None:
    source = using("torch_library_impl", "aoti_torch_get_numel", "_ZNSt6vectorIiE3addEv")
    assert check_abi.main([str(link(tmp_path, source))]) == 0


@needs_elf
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (using("_ZN3c105ErrorC1ERKSs"), "uses _ZN3c105ErrorC1ERKSs, torch's C++ interface"),
        (using("_ZNK2at6Tensor4addEv"), "uses _ZNK2at6Tensor4addEv, torch's C++ interface"),
        (using("_ZNSt6vectorIN2at6TensorEE3addEv"), "torch's C++ interface"),
        (using("THPVariable_Wrap"), "uses THPVariable_Wrap of libtorch_python"),
        (using("PyList_GetItem"), "uses PyList_GetItem of Python"),
        (using("_PyObject_New"), "uses _PyObject_New of Python"),
        (using("torch_no_such_function"), "uses torch_no_such_function, which torch's stable"),
        (
            using("aoti_torch_cpu_add_Tensor"),
            "uses aoti_torch_cpu_add_Tensor, which torch's stable",
        ),
        (
            using("_ZN8torchao84cuda7KernelsINS_8LionRuleEE3allE"),
            "uses _ZN8torchao84cuda7KernelsINS_8LionRuleEE3allE, which none of its source files",
        ),
        (MODULE + "void _ZN5torch6stable6TensorC1Ev() {}", "exports _ZN5torch6stable6TensorC1Ev"),
        ("int nothing;", "exports neither PyInit__C nor PyInit__C_cuda"),
    ],
)
def test_forbidden_symbol_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, message: str
) -> None:
    assert check_abi.main([str(link(tmp_path, source))]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1
    assert message in errors[0]


@needs_elf
def test_libtorch_python_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    link(tmp_path, "int torch_python;", name="libtorch_python.so")
    library = link(tmp_path, MODULE, libraries="-ltorch_python")
    assert check_abi.main([str(library)]) == 1
    assert "is linked to libtorch_python.so" in capsys.readouterr().err


@needs_elf
def test_symbol_of_a_later_torch_fails(tmp_path: Path) -> None:
    needs = check_abi.read_needs(link(tmp_path, using("torch_old", "torch_new")))
    since = {"torch_old": (2, 10), "torch_new": (2, 11)}
    assert check_abi.violations(needs, since) == [
        "needs torch >= 2.11 because of torch_new; 2.10 must do"
    ]
    since["torch_new"] = (2, 10)
    assert check_abi.violations(needs, since) == []


@needs_elf
def test_not_a_library_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "_C.abi3.so"
    text.write_text("text")
    assert check_abi.main([str(text), str(tmp_path / "missing" / "_C.abi3.so")]) == 1
    assert capsys.readouterr().err.count("not an ELF shared library") == 2


def test_release_of_a_function_is_read_from_its_gates() -> None:
    header = """
    #ifndef GUARD_H
    #define torch_macro(x) x
    int torch_always(void);  // like torch_in_comment(int)
    /* #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_12_0
       torch_in_block_comment(int) */
    #if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0
    AOTI_TORCH_EXPORT AOTITorchError
    torch_ten(int a,
              int b);
    #  ifdef USE_CUDA
    int aoti_torch_ten_cuda();
    #  endif
    # if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
    int torch_thirteen (void);
    # endif
    int torch_ten_again(void);
    #else
    int torch_before(void);
    #endif
    int torch_after(void);
    #endif
    """
    assert check_abi.declared_since(header) == {
        "torch_always": (2, 9),
        "torch_ten": (2, 10),
        "aoti_torch_ten_cuda": (2, 10),
        "torch_thirteen": (2, 13),
        "torch_ten_again": (2, 10),
        "torch_before": (2, 9),
        "torch_after": (2, 9),
    }


def make_wheel(path: Path, names: list[str]) -> Path:
    """A wheel that holds the built extension under each name."""
    with zipfile.ZipFile(path, "w") as wheel:
        for name in names:
            wheel.write(EXTENSION, name)
    return path


@needs_elf
def test_wheel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "torchao8-0.1.0-{}-linux_x86_64.whl"
    one = ["torchao8/_C.abi3.so"]
    good = make_wheel(tmp_path / name.format("cp310-abi3"), one)
    assert check_abi.main([str(good)]) == 0

    for tag, names, message in (
        ("cp311-cp311", one, "is tagged cp311-cp311-linux_x86_64, not cp310-abi3"),
        ("cp310-abi3", [*one, "torchao8/_C.cpython-311.so"], "and no other library"),
        ("cp310-abi3", [], "must hold torchao8/_C.abi3.so"),
    ):
        capsys.readouterr()
        assert check_abi.main([str(make_wheel(tmp_path / name.format(tag), names))]) == 1
        assert message in capsys.readouterr().err


def text_of(name: str) -> str:
    """A file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def find(pattern: str, name: str) -> str:
    """The first group of a pattern that a file must match."""
    match = re.search(pattern, text_of(name), re.MULTILINE)
    assert match, f"{name} has no match for {pattern}"
    return match[1]


def test_package_version() -> None:
    version = find(r'^__version__ = "(.+)"$', "torchao8/_version.py")
    assert torchao8.__version__ == version
    assert (
        find(r'^version = \{ attr = "(.+)" \}$', "pyproject.toml")
        == "torchao8._version.__version__"
    )
    assert find(r"^## \[?(\d+\.\d+\.\d+)", "CHANGELOG.md") == version


def test_oldest_torch() -> None:
    oldest = find(r'^dependencies = \["torch>=([\d.]+)"\]$', "pyproject.toml")
    assert check_abi.show(check_abi.OLDEST_TORCH) == oldest
    assert find(r"^OLDEST_TORCH = \((\d+, \d+)\)$", "setup.py").replace(", ", ".") == oldest
    pinned = find(r"^PINNED_TORCH := torch==([\d.]+)$", "Makefile")
    assert check_abi.parse_version(pinned) >= check_abi.OLDEST_TORCH


def test_oldest_python() -> None:
    oldest = find(r'^requires-python = ">=3\.(\d+)"$', "pyproject.toml")
    assert find(r"^OLDEST_PYTHON = \(3, (\d+)\)$", "setup.py") == oldest
    assert f"cp3{oldest}" == check_abi.OLDEST_PYTHON_TAG
    assert find(r'^target-version = "py3(\d+)"$', "pyproject.toml") == oldest
    assert int(
        find(r"^#define Py_LIMITED_API 0x03([0-9A-F]{2})0000$", "csrc/module.cpp"), 16
    ) == int(oldest)


def test_makefile_lists_what_can_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    for extra in ("build", "release", "test", "demo", "lint", "bench"):
        assert requirements.main([extra]) == 0
        assert capsys.readouterr().out.strip()
        assert re.search(rf"tools[,-][a-z ]*\b{extra}\b", text_of("Makefile"))
    assert requirements.main(["test", "unknown"]) == 2
    assert requirements.main([]) == 2
    assert "unknown" not in capsys.readouterr().out


def test_compiler_may_not_change_results() -> None:
    """P1 rests on these: no machine-dependent instructions, no contraction, no fast-math."""
    flags = text_of("setup.py")
    assert '"-ffp-contract=off"' in flags
    assert '"-fmad=false"' in flags
    assert not re.search(r'"[^" ]*(-march|-mavx|-mfma|-Ofast|fast-math|fast_math)', flags)
