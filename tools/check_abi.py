"""Check what a built extension needs at run time: `check_abi.py FILE...`, each a wheel or an .so.

The extension must run with every torch from 2.10 and every CPython from 3.10 on. So it may use only
torch's stable C interface and the functions of CPython's limited API in PYTHON_SYMBOLS. The headers
of the torch installed here declare the functions of the stable C interface, each within a
preprocessor condition (a gate) that names the first release with the function.

Prints the oldest sufficient torch, glibc and libstdc++; exits with 1 if a file breaks the rules.
Needs `readelf` (binutils), so it checks Linux builds only.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

Version = tuple[int, ...]

OLDEST_TORCH: Version = (2, 10)
OLDEST_PYTHON_TAG = "cp310"

# Functions declared without a gate: they are as old as the first release with gates, or older.
UNGATED: Version = (2, 9)

# The headers that torch/csrc/stable includes. Inductor's own shims (c_shim_cpu.h and others) are
# not among them: torch does not promise to keep those.
SHIM_HEADERS = (
    "stable/c/shim.h",
    "inductor/aoti_torch/c/shim.h",
    "inductor/aoti_torch/c/shim_deprecated.h",
    "inductor/aoti_torch/generated/c_shim_aten.h",
)

SHIM_PREFIXES = ("torch_", "aoti_torch_")
PYTHON_SYMBOLS = {
    "PyModuleDef_Init",
    # torchao8._C.FAMILIES
    *(
        "PyBytes_FromStringAndSize",
        "PyList_Append",
        "PyList_AsTuple",
        "PyList_New",
        "PyModule_AddObjectRef",
        "Py_BuildValue",
    ),
    *("PyBool_FromLong", "Py_DecRef"),
    # Python's lock, to let go of arguments under it (csrc/op/interpreter.h)
    *("PyGILState_Ensure", "PyGILState_Release", "Py_IsInitialized"),
}
LIBRARIES = re.compile(
    r"(libtorch_cpu|libstdc\+\+|libgcc_s|libm|libc|libpthread|ld-linux.*)\.so(\..*)?"
)
CUDA_LIBRARIES = re.compile(r"(libtorch_cuda|libcudart)\.so(\..*)?")  # of torchao8._C_cuda, too

# Itanium-mangled names that mention one of torch's namespaces: at, c10, torch, caffe2.
TORCH_CPP = re.compile(r"^_Z.*?(?<!\d)(2at|3c10|5torch|6caffe2)[A-Z\d]")
# Those in our own namespace, torchao8, and data members and tables of its classes.
OURS = re.compile(r"^_Z(T[VIS])?N?K?8torchao8")


@dataclass
class Needs:
    """What one shared library needs from the machine that loads it."""

    libraries: list[str]
    undefined: list[str]
    exported: list[str]
    versions: dict[str, Version] = field(default_factory=dict)  # newest GLIBC, GLIBCXX, CXXABI


def parse_version(text: str) -> Version:
    """'2.34' -> (2, 34)."""
    return tuple(int(part) for part in text.split("."))


def show(version: Version) -> str:
    """(2, 34) -> '2.34'."""
    return ".".join(map(str, version))


def declared_since(header: str) -> dict[str, Version]:
    """Map each C function that a header declares to the first torch release that has it.

    Reads `#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_10_0` gates, also nested ones. Any other
    condition is taken as true.
    """
    header = re.sub(r"/\*.*?\*/", " ", header, flags=re.DOTALL)
    since: dict[str, Version] = {}
    gates: list[Version] = []
    for line in re.sub(r"//[^\n]*", "", header).splitlines():
        directive = re.match(r"\s*#\s*(if|el|endif|\w*)", line)
        if directive is None:
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", line):
                release = max(gates, default=UNGATED)
                since[name] = min(since.get(name, release), release)
        elif directive[1] == "if":
            gate = re.search(r"TORCH_FEATURE_VERSION\s*>=\s*TORCH_VERSION_(\d+)_(\d+)", line)
            gates.append((int(gate[1]), int(gate[2])) if gate else UNGATED)
        elif directive[1] == "el":
            gates[-1] = UNGATED
        elif directive[1] == "endif":
            gates.pop()
    return since


def stable_symbols() -> dict[str, Version]:
    """Map every function of the stable C interface to its first release, from installed headers."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise SystemExit("check_abi: torch is not installed, and its headers are needed")
    include = Path(spec.origin).parent / "include" / "torch" / "csrc"
    since: dict[str, Version] = {}
    for name in SHIM_HEADERS:
        for symbol, release in declared_since((include / name).read_text(encoding="utf-8")).items():
            since[symbol] = min(since.get(symbol, release), release)
    return since


def read_needs(path: Path) -> Needs:
    """Read the dynamic section, symbols and symbol versions of a shared library."""
    command = ["readelf", "--wide", "--dynamic", "--dyn-syms", "--version-info", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "Dynamic section" not in done.stdout:
        raise ValueError(f"not an ELF shared library: {done.stderr.strip() or path}")
    needs = Needs(re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout), [], [])
    for line in done.stdout.splitlines():
        # Num: Value Size Type Bind Vis Ndx Name[@version]
        symbol = re.match(r"\s*\d+: [\da-f]+\s+\S+ \S+\s+(\S+)\s+\S+\s+(\S+) ([^\s@]+)", line)
        if symbol and symbol[2] == "UND":
            needs.undefined.append(symbol[3])
        elif symbol:
            needs.exported.append(symbol[3])
        version = re.search(r"Name: (GLIBC|GLIBCXX|CXXABI)_([\d.]+)", line)
        if version:
            newest = max(needs.versions.get(version[1], ()), parse_version(version[2]))
            needs.versions[version[1]] = newest
    return needs


def torch_needed(needs: Needs, since: dict[str, Version]) -> tuple[Version, list[str]]:
    """The oldest torch that has every symbol used, and the symbols that set it."""
    used = [name for name in needs.undefined if name in since]
    oldest = max((since[name] for name in used), default=UNGATED)
    return oldest, [name for name in used if since[name] == oldest]


def violations(needs: Needs, since: dict[str, Version]) -> list[str]:
    """One message for each thing that the library uses and must not use."""
    found = []
    for library in needs.libraries:
        of_cuda = "PyInit__C_cuda" in needs.exported and CUDA_LIBRARIES.fullmatch(library)
        if not LIBRARIES.fullmatch(library) and not of_cuda:
            found.append(f"is linked to {library}")
    for name in needs.undefined:
        if OURS.match(name):
            found.append(f"uses {name}, which none of its source files define")
        elif TORCH_CPP.match(name):
            found.append(f"uses {name}, torch's C++ interface, which changes between releases")
        elif name.startswith(("THP", "THC")):
            found.append(f"uses {name} of libtorch_python")
        elif name.startswith(("Py", "_Py")) and name not in PYTHON_SYMBOLS:
            found.append(f"uses {name} of Python; only {', '.join(PYTHON_SYMBOLS)} is expected")
        elif name.startswith(SHIM_PREFIXES) and name not in since:
            found.append(f"uses {name}, which torch's stable headers do not declare")
    oldest, because = torch_needed(needs, since)
    if oldest > OLDEST_TORCH:
        found.append(
            f"needs torch >= {show(oldest)} because of {', '.join(because)}; "
            f"{show(OLDEST_TORCH)} must do"
        )
    for name in needs.exported:
        if TORCH_CPP.match(name):
            found.append(f"exports {name}, which may clash with another library's copy")
    if not {"PyInit__C", "PyInit__C_cuda"} & set(needs.exported):
        found.append("exports neither PyInit__C nor PyInit__C_cuda")
    return found


def check_library(path: Path, label: str, since: dict[str, Version]) -> list[str]:
    """Print what a shared library needs; return its violations."""
    names = ("_C.abi3.so", "_C_cuda.abi3.so")
    found = [] if label.endswith(names) else [f"is not named {' or '.join(names)}"]
    try:
        needs = read_needs(path)
    except ValueError as error:
        return [*found, str(error)]
    oldest, because = torch_needed(needs, since)
    runtime = ", ".join(f"{name} {show(needs.versions[name])}" for name in sorted(needs.versions))
    print(f"{label}: needs torch >= {show(oldest)} ({', '.join(because)}), {runtime or 'no libc'}")
    return found + violations(needs, since)


def check_wheel(path: Path, since: dict[str, Version]) -> list[str]:
    """Check the tags of a wheel and its extensions: one, and at most one more for CUDA."""
    found = []
    tags = path.stem.split("-")[-3:]
    if tags[:2] != [OLDEST_PYTHON_TAG, "abi3"]:
        found.append(f"is tagged {'-'.join(tags)}, not {OLDEST_PYTHON_TAG}-abi3-*")
    with zipfile.ZipFile(path) as wheel, tempfile.TemporaryDirectory() as scratch:
        libraries = [name for name in wheel.namelist() if name.endswith(".so")]
        if set(libraries) - {"torchao8/_C_cuda.abi3.so"} != {"torchao8/_C.abi3.so"}:
            found.append(
                "must hold torchao8/_C.abi3.so, with CUDA torchao8/_C_cuda.abi3.so too, and no "
                f"other library, has {libraries}"
            )
        for name in libraries:
            found += check_library(Path(wheel.extract(name, scratch)), name, since)
    return found


def main(arguments: Iterable[str]) -> int:
    """Check every file; return the exit status."""
    paths = [Path(argument) for argument in arguments]
    if not paths:
        print("usage: check_abi.py FILE...  (wheels or shared libraries)", file=sys.stderr)
        return 2
    since = stable_symbols()
    failed = False
    for path in paths:
        if path.suffix == ".whl":
            found = check_wheel(path, since)
        else:
            found = check_library(path, str(path), since)
        for violation in found:
            print(f"{path.name}: error: {violation}", file=sys.stderr)
        failed |= bool(found)
        if not found:
            print(f"{path.name}: ok")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
