"""The CUDA sources, compiled without a GPU: no stack, and few instructions."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from compilers import (
    ARCHITECTURES,
    CSRC,
    CUDA,
    LINKED,
    ROOT,
    SOURCES,
    compiled,
    disassembler,
    log_of,
    needs_nvcc,
    nvcc,
    setup_py,
)
from test_cuda_build import build_wheel, write_program
from test_packaging import check_abi

from torchao8 import ops

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


def test_the_cpu_and_the_kernels_include_nothing_of_each_other() -> None:
    """So compilers.py takes what it has compiled of one, when the other has changed."""
    for folder, other in (("cuda", "cpu"), ("cpu", "cuda")):
        for path in (CSRC / folder).rglob("*.*"):
            assert f'#include "{other}/' not in path.read_text(), path
        for shared in ("codec", "formats", "op", "rules"):
            for path in (CSRC / shared).rglob("*.*"):
                assert f'#include "{folder}/' not in path.read_text(), path


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
        ("rules/4bit/adam_plain.cu", (60.1, 62.2, 70.3)),
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
