"""The CUDA sources without a GPU: they compile, take no stack, and give the CPU's bits.

The kernels run here on warps emulated by fibers (test/emulation). Mutants of them must not pass,
or the comparison would prove nothing.
"""

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from test_cuda_build import build_wheel, write_program
from test_packaging import check_abi, load

from torchao8 import ops

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
EMULATION = ROOT / "test" / "emulation"
CACHE = ROOT / "build" / "test"
setup_py = load(ROOT / "setup.py")
COMPILER = os.environ.get("CXX", "c++")

# Each breaks one thing that the kernels must do.
MUTANTS = {
    "a skipped block": (
        "fast_block.cuh",
        "for (; unit < end; unit += kWarps) {",
        "for (; unit < end; unit += kWarps) {\n    if (unit % 7 == 3) continue;",
    ),
    "no barrier after copying the tables": (
        "table.cuh",
        "    __syncthreads();\n    uint32_t i = first",
        "    uint32_t i = first",
    ),
    "the rules of the last window": (
        "table.cuh",
        "window[threadIdx.x].set(table.numbers, table.entries[first + threadIdx.x])",
        "window[threadIdx.x].set(table.numbers, table.entries[threadIdx.x])",
    ),
    "factors not read": (
        "table.cuh",
        "if (entry.factors) options.multiply(entry.factors);",
        "",
    ),
    "numbers on the device not read": (
        "table.cuh",
        "if (numbers.rest) set_numbers(options, numbers.rest);",
        "",
    ),
    "found_inf not read": ("step.cuh", "if (table.numbers.found_inf.get() != 0) return;", ""),
    "an approximate root": (
        "device.cuh",
        "return std::fma(std::fma(-s, s, v), r * 0.5f, s);",
        "return s;",
    ),
    "an approximate reciprocal": (
        "device.cuh",
        "return std::fma(std::fma(-x, r, 1.0f), r, r);",
        "return r;",
    ),
    "reciprocals out of their range": (
        "step.cuh",
        "prepared.is_bounded ? entry.fast_units : 0",
        "entry.fast_units",
    ),
    "no way out for a bad block": (
        "fast_block.cuh",
        "if (!scales.finish(rule, look, lanes)) return false;",
        "scales.finish(rule, look, lanes);",
    ),
    "-1.0 not avoided": (
        "formats/dynamic.cuh",
        "codes -= (codes & negative & 0x80808080u) >> 7;",
        "",
    ),
    "a second moment may be zero": (
        "formats/dynamic.cuh",
        "build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned);",
        "build_nearest_words(t.nearest_unsigned, false, false, kLowestUnsigned); "
        "t.nearest_unsigned[0] -= 1 << 16;",
    ),
    "the random numbers of the next eight": (
        "fast_block.cuh",
        "random.c0 + random.c2 * eight",
        "random.c0 + random.c2 * (eight + 1)",
    ),
    "the random numbers of the next block": (
        "fast_block.cuh",
        "first_element_of(unit + uint32_t(lane) * kWarps)",
        "first_element_of(unit + uint32_t(lane + 1) * kWarps)",
    ),
    "the parameter rounded by the random numbers of the next eight": (
        "fast_block.cuh",
        "random.from(eight)",
        "random.from(eight + 1)",
    ),
    "the parameter rounded by the random numbers of a state": (
        "table.cuh",
        "uint64_t(step), kParamStream",
        "uint64_t(step), 1",
    ),
    "the parameter of a long block rounded as if it had one span": (
        "fast_block.cuh",
        "of_param, uint32_t(start) / kPerLane);",
        "of_param, uint32_t(lane));",
    ),
    "elements of a shard taken for those of a whole tensor": (
        "table.cuh",
        "return shard_offset + uint64_t(row) * uint64_t(row_stride)",
        "return shard_offset + uint64_t(row) * uint64_t(row_length)",
    ),
    "a row's end inside of four elements": (
        "table.cuh",
        "(row_length == this->count || row_length % kPerThread == 0)",
        "true",
    ),
    "a bad block's parameters rounded to nearest": (
        "slow_block.cuh",
        "at, updated, of_param(i));",
        "at, updated);",
    ),
    "a scale that is not written": (
        "fast_block.cuh",
        "if (lane % lanes == 0) scales.store",
        "if (lane == 32) scales.store",
    ),
    "the sign of the extreme lost": (
        "block.cuh",
        "(low & 0x7fffffffu) > high ? low : high",
        "(low & 0x7fffffffu) > high ? low & 0x7fffffffu : high",
    ),
    "the step not counted": ("count.cuh", "= float(int64_t(*table.steps[i]) + 1);", "+= 0;"),
    "step counts of the first launch in all others": (
        "count.cuh",
        "address_of(first + i)",
        "address_of(i)",
    ),
    "lanes past the end of a short row": (
        "fast_block.cuh",
        "if (eight_of_block > last_eight) eight_of_block = last_eight;",
        "",
    ),
    "lanes past the last block of a row": (
        "fast_block.cuh",
        "if (number > last) number = last;",
        "",
    ),
    "the last span of a long block": (
        "fast_block.cuh",
        "return start < last ? start : last;",
        "return start;",
    ),
    "words at odd addresses": (
        "table.cuh",
        "return reinterpret_cast<uintptr_t>(p) % bytes == 0;",
        "return p != nullptr || bytes;",
    ),
    "the end of a vector": (
        "table.cuh",
        "uint32_t(row_length / unit)",
        "uint32_t(row_length / unit + 1)",
    ),
    "32-bit elements that are not usable": (
        "step.cuh",
        "    if (!good) {\n",
        "    if (!good && false) {\n",
    ),
    "a window that moves and takes its numbers along": (
        "warp_sum.cuh",
        "    flush();\n    const int lowest",
        "    const int lowest",
    ),
    "bits shifted out of the low word": ("warp_sum.cuh", "(square >> 1 >> (63 - shift))", "0"),
    "a carry lost": ("warp_sum.cuh", "+ (low < low_)", ""),
    "a mantissa for zeros": ("warp_sum.cuh", "mantissa = magnitude ?", "mantissa = true ?"),
    "infinite squares": ("warp_sum.cuh", "magnitude != 0 && exponent != 255", "magnitude != 0"),
    "sums read before all warps are done": (
        "sums.cuh",
        "    sum.flush();\n    __syncthreads();",
        "    sum.flush();",
    ),
    "a thread block's last sum in its next": (
        "sums.cuh",
        "      block.limbs[threadIdx.x] = 0;\n    }",
        "    }",
    ),
    "numbers below the window taken for some in it": (
        "warp_sum.cuh",
        " &&\n           smallest_less_1 >= (uint32_t(lowest_) << 23) - 1",
        "",
    ),
    "extremes of the last tensor taken for this one": (
        "one_scale.cuh",
        "    found = Extremes<Rule>();\n",
        "",
    ),
    "the extremes of a warp's last tensor lost": (
        "one_scale.cuh",
        "for_each_unit(table, shared.window, finder);\n  finder.finish();",
        "for_each_unit(table, shared.window, finder);",
    ),
    "extremes of elements that are not usable": (
        "one_scale.cuh",
        "if (all_of_warp(good)) {",
        "if (all_of_warp(good) || true) {",
    ),
    "extremes of the first tensor": (
        "one_scale.cuh",
        "return extreme_of_key<kSigned>(extremes[s]);",
        "return extreme_of_key<kSigned>(extremes[0]);",
    ),
    "reciprocals out of their range, with one scale": (
        "one_scale.cuh",
        "block_size == kSpan && prepared.is_bounded ?",
        "block_size == kSpan ?",
    ),
    "a bad block's parameters rounded to nearest, with one scale": (
        "one_scale.cuh",
        "slow_unit<Format, Rule, kRounds>(entry",
        "slow_unit<Format, Rule, false>(entry",
    ),
    "random numbers of the last tensor taken for this one": (
        "fast_block.cuh",
        "&ahead.of_unit[0][kLanes - 1]",
        "&ahead.of_unit[0][0]",
    ),
    "an extreme element that is too large": (
        "formats/dynamic.cuh",
        "good = good & usable<Rule::kSigned[s]>(extreme[s]) &",
        "good = good &",
    ),
    "a scale that counts as zero": (
        "formats/dynamic.cuh",
        "has_scale = std::fabs(new_scale[s]) >= kMinScale;",
        "has_scale = true;",
    ),
    "the line of a cell for what lies below its start": (
        "formats/dynamic.cuh",
        "cell.template skip_if_below<kBelowStart>(y.x, cell[0].first);",
        "",
    ),
    "scales written though found_inf": (
        "one_scale.cuh",
        "if (i >= table.count || table.numbers.found_inf.get() != 0) return;",
        "if (i >= table.count) return;",
    ),
    "one scale without its unit": ("one_scale.cuh", "prepared.rule.unit[s]);", "1.0f);"),
    "mu-law: a second moment may be zero": (
        "formats/mulaw.cuh",
        "constexpr uint32_t kLeast = !kSigned;",
        "constexpr uint32_t kLeast = 0;",
    ),
    "mu-law: numbers above the last code": (
        "formats/mulaw.cuh",
        "kCodes * kStep<kSigned> - 1;",
        "0x7fff;",
    ),
    "mu-law: signs lost": (
        "formats/mulaw.cuh",
        "and_or(signs_of(x), 0x80808080u,",
        "and_or(signs_of(x), 0,",
    ),
    "mu-law: signs not read": (
        "formats/mulaw.cuh",
        "and_or(word, 0x80008000u, mulaw::",
        "and_or(word, 0, mulaw::",
    ),
    "mu-law: gradients that are NaN": (
        "formats/mulaw.cuh",
        "largest = larger_magnitude(largest, get(i));",
        "largest = larger(largest, std::fabs(get(i)));",
    ),
    "mu-law: the bound of one lane": (
        "formats/mulaw.cuh",
        "mulaw_bounds(rule, param, of_block(l.grad), states, bounds);",
        "mulaw_bounds(rule, param, bits_float(l.grad), states, bounds);",
    ),
    "mu-law: a negative scale": (
        "formats/mulaw.cuh",
        "raise(most, float_bits(scale[s]));",
        "",
    ),
    "mu-law: an approximate quotient": (
        "formats/mulaw.cuh",
        "return 2.0f * fma(fma(Real(-q.x), Real(b), Real(a)), r, q).x;",
        "return 2.0f * q.x;",
    ),
    "mu-law: bounds of gradients that are not usable": (
        "formats/mulaw.cuh",
        "    if (e.good) {\n      param",
        "    {\n      param",
    ),
    "mu-law: no code for a state that is kept": (
        "formats/mulaw.cuh",
        "        if (bad) {",
        "        if (bad && false) {",
    ),
    "4 bits: codes that wrap": (
        "formats/four_bit.cuh",
        "both_halves(16 * kStep - 1));",
        "both_halves(0x7fff));",
    ),
    "4 bits: a level of -8": (
        "formats/four_bit.cuh",
        "add_and_clamp_halves(levels, added, both_halves(15))",
        "(add_and_clamp_halves(levels, added + both_halves(1), both_halves(16)) - both_halves(1))",
    ),
    "4 bits: the roots of the old scale": (
        "formats/four_bit.cuh",
        "roots(tables, scales.new_scale[kRoot]);",
        "roots(tables, scales.scale[kRoot]);",
    ),
    "4 bits: the roots of the new scale": (
        "formats/four_bit.cuh",
        "roots(tables, scale[kRoot]);",
        "roots(tables, 2.0f * scale[kRoot]);",
    ),
    "4 bits: roots of one parity": (
        "formats/four_bit.cuh",
        "first = ahead & 3;",
        "first = 0;",
    ),
    "4 bits: quotients of another element's root": (
        "formats/four_bit.cuh",
        "roots.reciprocal(codes[kRoot], i)",
        "roots.reciprocal(codes[kRoot], i ^ 1)",
    ),
    "4 bits: the extreme quotient of one lane": (
        "formats/four_bit.cuh",
        "scales.finish_levels(extremes, lanes);",
        "scales.finish_levels(extremes, 1);",
    ),
    "4 bits: the extreme quotient of one span": (
        "fast_block.cuh",
        "elements.add_to(quotients);",
        "if (span == 0) elements.add_to(quotients);",
    ),
    "4 bits: a negative scale": (
        "formats/four_bit.cuh",
        "good = good & usable<Rule::kSigned[s]>(scale[s]);",
        "",
    ),
    "4 bits: momentum that is not usable": (
        "formats/four_bit.cuh",
        "bool good = l.magnitude < kMostOfLevels;",
        "bool good = true;",
    ),
    "4 bits: a scale that counts as zero": (
        "formats/four_bit.cuh",
        "new_scale[s] = has_scale ? rounded : 0.0f;",
        "new_scale[s] = rounded;",
    ),
    "4 bits: an approximate root": (
        "formats/four_bit.cuh",
        "to.roots[i] = float_bits(FourBitRoots(1.0f).root(i));",
        "to.roots[i] = float_bits(FourBitRoots(1.0f).root(i)) + (i == 9);",
    ),
    "4 bits: the last code of an odd row": (
        "formats/four_bit.cuh",
        "code[s] = FourBitFormat::zero_byte<Rule::kSigned[s]>() & 15;",
        "code[s] = 1;",
    ),
    "4 bits: rows of half bytes": (
        "formats/four_bit.cuh",
        "row * ((entry.row_length + 1) / 2) + column / 2;",
        "(row * entry.row_length + column) / 2;",
    ),
    "4 bits: the slow path's codes not random": (
        "formats/four_bit.cuh",
        "if (stochastic) added = Squares::draw",
        "if (stochastic && false) added = Squares::draw",
    ),
    "4 bits: the slow path's levels not random": (
        "formats/four_bit.cuh",
        "if (stochastic) return Levels::encode",
        "if (stochastic && false) return Levels::encode",
    ),
    "4 bits: levels to nearest": (
        "formats/four_bit.cuh",
        "encode_levels(this->values[s], scales.inverse[s], hash);",
        "encode_levels(this->values[s], scales.inverse[s], nullptr);",
    ),
    "4 bits: random numbers of levels not prepared": (
        "fast_block.cuh",
        "if constexpr (Format::template draws<Rule>(s)) set",
        "if constexpr (Rule::kStochastic[s]) set",
    ),
    "4 bits: codes of a block without a scale that is a number": (
        "formats/four_bit.cuh",
        "if (std::isnan(new_scale[s])) return 0;",
        "",
    ),
    "limbs that are not canonical": ("warp_sum.cuh", "make_canonical(sums + row * kLimbs)", ""),
    "the update of an element that is not usable, in the trust ratio": (
        "lamb.cuh",
        "return good ? rule",
        "return good || true ? rule",
    ),
    "the scale of the first block, in the trust ratio": (
        "lamb.cuh",
        "entry.one_scale ? 0 : block",
        "0",
    ),
    "one scale taken for one of many, in the trust ratio": (
        "lamb.cuh",
        "entry.one_scale ? 0 : block",
        "block",
    ),
    "a tensor's update added to the next one's, in the trust ratio": (
        "lamb.cuh",
        "    finish();\n    row_ = row;",
        "    row_ = row;",
    ),
}
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
# Without optimization they compile in a second or two; each check then tries less (see there).
QUICK = ("-O0", "-DQUICK", "-fsanitize=alignment", "-fno-sanitize-recover")
FULL = ("-O1",)
# More launches, each of fewer tensors; see csrc/cuda/table.cuh.
SMALL = (*QUICK, "-DTORCHAO8_ARGUMENT_BYTES=4096")


def built(name: str, command: Sequence[str | Path], sources: Sequence[Path]) -> Path:
    """What a compiler makes of sources, in a file whose name the command is given as its last word.

    It is kept in build/, under a name that tells compiler, command and every byte of the sources,
    so that processes which test at the same time, and later runs, compile nothing twice.
    """
    key = hashlib.sha256((_version_of(str(command[0])) + torch.__version__).encode())
    key.update(repr([str(word) for word in command]).encode())
    for path in sorted(path for folder in sources for path in folder.rglob("*") if path.is_file()):
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
        built(f"{name}.o", cpp_command(CSRC, "-O1", "-c", CSRC / f"cpu/{name}.cpp"), [CSRC])
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


MULAW = "-DFORMAT=MulawFormat"  # in place of the dynamic format; see emulation/format.h
FOUR_BIT = "-DFORMAT=FourBitFormat"
FORMAT_FLAGS = {"mulaw": MULAW, "4 bits": FOUR_BIT}  # by a part of a mutant's file or name


@pytest.mark.parametrize(
    ("check", "format_flags"),
    [
        *((f"check_{name}.cpp", ()) for name in ("lamb", "one_scale", "step", "sums")),
        *((f"check_{name}.cpp", (MULAW,)) for name in ("lamb", "one_scale", "step")),
        ("check_step.cpp", (FOUR_BIT,)),
    ],
)
@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(FULL, id="full", marks=pytest.mark.thorough),
        pytest.param(SMALL, id="small arguments", marks=pytest.mark.thorough),
    ],
)
def test_the_kernels_give_the_bits_of_the_cpu(
    check: str, format_flags: tuple[str, ...], flags: tuple[str, ...]
) -> None:
    """Quick: one rule, and each way through each kernel, as the mutants are checked. Full: every
    rule, dtype and block size. Small arguments: as quick, with 4,096 bytes of them a launch."""
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
    check = EMULATION / CHECKS.get(file, "check_step.cpp")
    flags = (*QUICK, *(flag for part, flag in FORMAT_FLAGS.items() if part in file + name))
    command = [*cpp_command(csrc, *flags, check, *oracle()), tmp_path / "mutant"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert not outcome(tmp_path / "mutant").startswith("0: ")


# -- nvcc --------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no nvcc on PATH: install the CUDA toolkit's compiler"
)
CUDA = CSRC / "cuda"
SOURCES = sorted(path.relative_to(CUDA).as_posix() for path in CUDA.rglob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
LINKED = "sm_90"  # what the extension is linked from
# In the common run: a rule, which has every kind of kernel, and what is quick.
COMMON_SOURCES = (
    "count.cu",
    "quantize.cu",
    "rules/lion.cu",
    "rules/mulaw/lion.cu",
    "rules/4bit/lion.cu",
)


WITHOUT_KERNELS = ("device_codec.cu", "pages.cu", "steps.cu")


def states_of_rules() -> dict[str, int]:
    """How many states each rule has, by the lists of the families."""
    states = {}
    for family in ops.FAMILIES:
        header = (CSRC / "rules" / f"{family.name}.h").read_text()
        listed = re.search(r"using Rules = Types<(.*?)>;", header, re.DOTALL)
        assert listed
        rules = re.findall(r"\w+Rule\b(?:<[^<>]*>)?", listed[1])
        states.update(zip(rules, family.rules, strict=True))
    return states


def rule_of(source: str) -> str | None:
    """The rule whose kernels a source has."""
    instances = re.findall(
        r"^template struct torchao8::cuda::\w+<\s*torchao8::(\w+(?:<[^<>]*>)?)\s*[,>]",
        text_of(source),
        re.M,
    )
    assert len(set(instances)) <= 1
    return instances[0] if instances else None


def text_of(source: str) -> str:
    return (CUDA / source).read_text()


FORMATS = {"": "DynamicFormat", "mulaw": "MulawFormat", "4bit": "FourBitFormat"}  # by folder


def format_of(source: str) -> str:
    """The format of whose state a rule's source has the kernels. That of the dynamic format has
    those of 32-bit state too."""
    return FORMATS[source.split("/")[1] if source.count("/") == 2 else ""]


def test_each_rule_has_a_source_for_each_format() -> None:
    found = [(rule, format_of(source)) for source in SOURCES if (rule := rule_of(source))]
    states = states_of_rules()
    of_four_bits = re.compile("Adam|Lion|Sgd")  # each names its roots, kRootOf
    expected = [(rule, "DynamicFormat") for rule in states]
    for rule, count in states.items():
        if count > 0:
            expected.append((rule, "MulawFormat"))
        if count > 0 and of_four_bits.match(rule):
            expected.append((rule, "FourBitFormat"))
    assert sorted(found) == sorted(expected)
    for source in SOURCES:
        if rule := rule_of(source):
            others = set(FORMATS.values()) - {format_of(source)}
            # A rule without states names no format.
            assert (format_of(source) in text_of(source)) == (states[rule] > 0)
            assert not any(other in text_of(source) for other in others)


def nvcc(source: str, *flags: str) -> Path:
    """The file that nvcc makes of a source, with the flags of setup.py."""
    include = Path(torch.__file__).parent / "include"
    command = ["nvcc", *setup_py.nvcc_flags(), "-Xcompiler=-fPIC", *flags, f"-I{CSRC}",
               f"-I{include}", f"-I{include}/torch/csrc/api/include", CUDA / source,
               "-o"]  # fmt: skip
    return built(Path(source).name, command, [CSRC])


def compiled(source: str, arch: str) -> Path:
    """The kernels of a source; as an object of the extension for LINKED."""
    # The oldest standard that a torch's headers ask for, once.
    standard = f"-std=c++{17 if arch == 'sm_80' else 20}"
    number = arch.removeprefix("sm_")
    output = ("-c", "-no-compress") if arch == LINKED else ("-cubin",)
    return nvcc(source, f"-gencode=arch=compute_{number},code={arch}", standard, "-Xptxas=-v",
                *output)  # fmt: skip


def cubin_of(file: Path, folder: Path) -> Path:
    """The cubin in an object: an ELF file in one of its sections."""
    content = file.read_bytes()
    starts = [m.start() for m in re.finditer(rb"\x7fELF\x02\x01", content)]
    (start,) = (i for i in starts if content[i + 18 : i + 20] == b"\xbe\x00")  # of machine EM_CUDA
    cubin = folder / f"{file.stem}.cubin"
    cubin.write_bytes(content[start:])
    return cubin


def resources(report: str) -> Iterator[tuple[str, list[int]]]:
    """Of each function its bytes of stack frame, of spill stores and of spill loads."""
    pattern = (
        r"Function properties for (\S+)\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    )
    for name, *numbers in re.findall(pattern, report):
        yield name, [int(n) for n in numbers]


@needs_nvcc
@pytest.mark.parametrize(
    ("source", "arch"),
    [
        pytest.param(
            source,
            arch,
            marks=() if arch == "sm_90" and source in COMMON_SOURCES else pytest.mark.thorough,
        )
        for source in SOURCES
        for arch in ARCHITECTURES
        if arch == LINKED or source not in WITHOUT_KERNELS
    ],
)
def test_the_kernels_compile_and_take_no_stack(source: str, arch: str) -> None:
    """A stack frame or a spill is memory traffic that no count of bytes has."""
    report = log_of(compiled(source, arch))  # of ptxas: registers, stack, spills
    assert "warning" not in report
    found = list(resources(report))
    assert found or source in WITHOUT_KERNELS
    rule = rule_of(source)
    with_elements = int(rule is not None and format_of(source) == "DynamicFormat")
    with_state = int(rule is not None and states_of_rules()[rule] > 0)
    with_one_scale = with_state * int(format_of(source) != "FourBitFormat")
    count = {
        kernel: sum(kernel in name for name, _ in found)
        for kernel in ("11step_blocks", "13step_elements", "14step_one_scale")
    }
    # Three dtypes and bfloat16 rounded stochastically, and three ways for blocks to lie.
    assert list(count.values()) == [with_state * 4 * 3, with_elements * 4, with_one_scale * 4]
    assert [(name, numbers) for name, numbers in found if any(numbers)] == []


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


@needs_nvcc
@pytest.mark.skipif(
    disassembler() is None, reason="no nvdisasm: pip install --no-deps nvidia-cuda-nvdisasm"
)
@pytest.mark.thorough
@pytest.mark.parametrize(
    ("source", "most"),
    [
        # What is counted today may grow by 2% before somebody has to look.
        ("rules/adam_plain.cu", (58.2, 60.4, 68.5)),
        ("rules/mulaw/adam_plain.cu", (45.8, 48.1, 55.9)),
        ("rules/4bit/adam_plain.cu", (59.1, 61.1, 69.0)),
    ],
)
def test_instructions_an_element(
    source: str, most: tuple[float, float, float], tmp_path: Path
) -> None:
    """An H100 issues 96 instructions an element in the time that memory takes for bfloat16, and 153
    for float32. The last number is of parameters that are rounded stochastically."""
    adam = cubin_of(compiled(source, "sm_90"), tmp_path)
    script = ROOT / "tools/count_instructions.py"
    command = [sys.executable, str(script), str(disassembler()), str(adam)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts = {
        (dtype, rounds): float(count)
        for count, dtype, rounds in re.findall(
            r"^([\d.]+) an element: \S*11step_blocksINS_8AdamRuleILb0ELb1EEE(f|NS_8BFloat16E)"
            r"LNS0_6BlocksE1ELb([01])E",
            lines,
            re.M,
        )
    }
    instances = (("f", "0"), ("NS_8BFloat16E", "0"), ("NS_8BFloat16E", "1"))
    for instance, bound in zip(instances, most, strict=True):
        assert 40 < counts[instance] < bound


# An nvcc that has compiled all sources before.
COMPILED = """\
#!/bin/sh
case "$*" in *--version*) exec {nvcc} --version;; esac
while [ $# -gt 0 ]; do
  case "$1" in *.cu) source=$1;; esac
  if [ "$1" = -o ]; then out=$2; fi
  shift
done
exec cp {root}/$(echo "${{source##*csrc/cuda/}}" | tr / +).o "$out"
"""


@needs_nvcc
@pytest.mark.thorough
def test_the_extension_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As setup.py does it, from the objects that the tests above look at: without a GPU, with any
    torch."""
    toolkit = setup_py.find_toolkit()
    root = tmp_path / "toolkit"
    write_program(root / "bin/nvcc", COMPILED.format(nvcc=toolkit.root / "bin/nvcc", root=root))
    (root / "include").symlink_to(toolkit.root / "include")
    (root / "lib64").mkdir()
    (root / "lib64" / toolkit.runtime.name).symlink_to(toolkit.runtime)
    for source in SOURCES:
        (root / f"{source.replace('/', '+')}.o").symlink_to(compiled(source, LINKED))
    monkeypatch.setenv("CUDA_HOME", str(root))
    library = build_wheel(tmp_path)
    assert check_abi.main([str(library)]) == 0
    has = set(check_abi.read_needs(toolkit.runtime).exported)
    needs = check_abi.read_needs(library).undefined
    assert [name for name in needs if re.match("_*cuda", name) and name not in has] == []
    assert "cudaGetLastError" in needs


@needs_nvcc
@pytest.mark.thorough
def test_the_sources_compile_to_ptx() -> None:
    """For GPUs to come."""
    for source in ("quantize.cu", "count.cu", "rules/sgd.cu"):
        nvcc(source, "-gencode=arch=compute_100,code=compute_100", "-std=c++20", "-c")
