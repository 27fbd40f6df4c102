"""The kernels' root and reciprocal against those of CUDA's compiler, in its machine code.

``bounded_root`` and ``bounded_reciprocal`` refine a GPU's approximation once. By the error bounds
that are documented for the approximations, a few mantissas might come out wrong. The compiler's own
functions are documented to be correctly rounded. Behind a check of the exponent they take the same
steps. Compared here are the steps, and which exponents pass the check. tools/check_roots.cu tries
all floats on a GPU.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from compilers import ARCHITECTURES, disassembler

ROOT = Path(__file__).resolve().parent.parent
KERNELS = """
#include "cuda/device.cuh"
using namespace torchao8::cuda;
extern "C" __global__ void root_ours(float* x) { *x = bounded_root(*x); }
extern "C" __global__ void root_compilers(float* x) { *x = __fsqrt_rn(*x); }
extern "C" __global__ void reciprocal_ours(float* x) { *x = bounded_reciprocal(*x); }
extern "C" __global__ void reciprocal_compilers(float* x) { *x = __frcp_rn(*x); }
"""
MASK = 0xFFFFFFFF

needs_compiler = pytest.mark.skipif(
    shutil.which("nvcc") is None or disassembler() is None,
    reason="no nvcc on PATH, or no nvdisasm",
)


@dataclass(frozen=True)
class Term:
    """What a register holds: an operation on others, and whether its sign is turned."""

    operation: str
    operands: tuple["Term", ...] = ()
    negative: bool = False

    def __neg__(self) -> "Term":
        return Term(self.operation, self.operands, not self.negative)


def constant(text: str) -> Term:
    return Term(text.lstrip("-"), negative=text.startswith("-"))


def product(a: Term, b: Term) -> Term:
    factors = [Term(t.operation, t.operands) for t in (a, b)]
    return Term("*", tuple(sorted(factors, key=repr)), a.negative != b.negative)


def fma(a: Term, b: Term, c: Term) -> Term:
    """-(a b + c) is -a b - c, rounded to nearest, but for the sign of a zero, which the last step,
    an addition to a number that is not zero, does not show."""
    p = product(a, b)
    if c.negative:
        return -Term("fma", (-p, -c))
    return Term("fma", (p, c))


class Machine:
    """Runs the instructions of one thread, with the float that it loads as a term and as bits."""

    def __init__(self, code: list[str], bits: int) -> None:
        self.code, self.bits = code, bits
        self.terms: dict[str, Term] = {}
        self.numbers: dict[str, int] = {}
        self.predicates: dict[str, bool] = {}

    def term(self, text: str) -> Term:
        negative, name = text.startswith("-"), text.lstrip("-")
        if re.match(r"R\d", name):
            found = self.terms[name]
        elif name == "RZ":
            found = Term("0")
        else:
            found = constant(name)
        return -found if negative else found

    def number(self, text: str) -> int:
        if text == "RZ":
            return 0
        return self.numbers[text] if text.startswith("R") else int(text, 0) & MASK

    def run(self) -> Term | None:
        """The float that is stored; none if it takes the compiler's slow path."""
        at = 0
        while True:
            text = self.code[at]
            at += 1
            if not re.match(r"(@!?P\d )?[A-Z]", text):
                continue  # a label
            guard, code = re.match(r"(?:@(!?P\d) )?(.*)", text).groups()  # type: ignore[union-attr]
            if guard and self.predicates[guard.lstrip("!")] == guard.startswith("!"):
                continue
            name, _, rest = code.partition(" ")
            operands = [o.removesuffix(".reuse") for o in rest.split(", ")]
            operands = [o for o in operands if o != "PT"]
            if name.startswith("CALL"):
                return None
            if name == "BRA":
                at = self.code.index(operands[0].strip("`()") + ":")
            elif name.startswith("STG"):
                return self.terms[operands[-1]]
            elif name.startswith("LDG"):
                self.terms[operands[0]], self.numbers[operands[0]] = Term("x"), self.bits
            else:
                self.compute(name.removesuffix(".FTZ"), operands)

    def compute(self, name: str, operands: list[str]) -> None:
        to, *sources = operands
        match name:
            case "MUFU.RCP" | "MUFU.RSQ":
                self.terms[to] = Term(name, (self.term(sources[0]),))
            case "FMUL":
                self.terms[to] = product(self.term(sources[0]), self.term(sources[1]))
            case "FFMA":
                self.terms[to] = fma(*map(self.term, sources))
            case "FADD" if sources[1] == "-RZ":
                self.terms[to] = self.term(sources[0])
            case "VIADD" | "IADD3":
                self.numbers[to] = sum(map(self.number, sources)) & MASK
            case "LOP3.LUT" if sources[3] == "0xc0":
                self.numbers[to] = self.number(sources[0]) & self.number(sources[1])
            case "ISETP.GT.U32.AND":
                self.predicates[to] = self.number(sources[0]) > self.number(sources[1])
            case "MOV" | "IMAD.MOV.U32" | "LDC" | "LDC.64" | "ULDC.64" | "LDCU.64":
                pass  # addresses
            case _:
                raise AssertionError(f"an instruction that this test does not know: {name}")


def functions(disassembly: str) -> Iterator[tuple[str, list[str]]]:
    for part in re.split(r"^\.text\.", disassembly, flags=re.MULTILINE)[1:]:
        lines = re.findall(r"^(\.L_\w+:)|/\*[0-9a-f]+\*/\s+(.*?)\s*;", part, re.MULTILINE)
        yield part.split(":")[0], [label or code for label, code in lines]


def machine_code(folder: Path, arch: str) -> dict[str, list[str]]:
    source, binary = folder / "roots.cu", folder / "roots.cubin"
    source.write_text(KERNELS)
    subprocess.run(["nvcc", f"-arch={arch}", "-std=c++17", "-O3", "-fmad=false", "-cubin",
                    "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}", source, "-o", binary],
                   check=True)  # fmt: skip
    command = [str(disassembler()), "-c", str(binary)]
    return dict(
        functions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    )


# The first and the last float of each range, and those next to them, for which the compiler's own
# function takes its slow path: 2^-101 and 2^128, 2^-126 and 2^126.
ENDS = {"root": (0x0D000000, 0x7F7FFFFF), "reciprocal": (0x00800000, 0x7E7FFFFF)}
APPROXIMATIONS = {"root": "MUFU.RSQ", "reciprocal": "MUFU.RCP"}


@needs_compiler
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_roots_take_the_steps_of_the_compilers_own(arch: str, tmp_path: Path) -> None:
    code = machine_code(tmp_path, arch)
    for name, (first, last) in ENDS.items():
        ours = Machine(code[f"{name}_ours"], first).run()
        assert ours is not None
        assert APPROXIMATIONS[name] in repr(ours)
        for bits in (first, last):
            assert Machine(code[f"{name}_compilers"], bits).run() == ours
        for bits in (first - 1, last + 1):
            assert Machine(code[f"{name}_compilers"], bits).run() is None


@needs_compiler
def test_the_program_that_tries_all_floats(tmp_path: Path) -> None:
    """It compiles. Without a GPU it says so, after a test of its check on the host."""
    program = tmp_path / "check_roots"
    subprocess.run(["nvcc", "-arch=sm_90", "-std=c++17", "-O3", "-fmad=false",
                    "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}",
                    ROOT / "tools/check_roots.cu", "-o", program], check=True)  # fmt: skip
    result = subprocess.run([program], capture_output=True, text=True)
    right = "check_roots: 0 of 1920991232 roots are wrong, 0 of 2113929216 reciprocals\n"
    expected = r"check_roots: CUDA error: .+\n" if result.returncode else re.escape(right)
    assert re.fullmatch(expected, result.stdout)
