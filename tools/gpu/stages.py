"""What `make gpu` runs, worth most first: a first contact with a GPU may last minutes only.

`expected` is an estimate for one H200 and 16 cores, where the extension need not be built. A test
run has 10 s in which its processes start, and its share of what its tests take on one core of a
CPU: 127 s for test_cuda.py with a pretended GPU, 0.19 s for each of the 5,300 tests that run on
every device, by a sample of 330. All stages: 7.2 minutes; a build takes about one more. Stages 0 to
3: 1.3 minutes. `limit` is when a stage is cut: 0 to 7 take 325 s at most and 8 to 13 265 s, the
build not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Words that run.py replaces.
PYTHON = "{python}"  # the interpreter
OUT = "{out}"  # the folder of the results
SCRATCH = "{scratch}"  # a folder that is gone after the run
FIGURES = "{figures}"  # a folder: each JSON file in it becomes a part of figures.json

ARGS = "{args}"  # more arguments for pytest: any number of words
BENCH_ARGS = "{bench_args}"  # and for benchmarks.step
NO_GPU = 3  # the exit status of stage 0 where torch finds no GPU
BUILD = 240  # seconds for it at most, where no carried extension loads

Command = tuple[str, ...]


class Stage(NamedTuple):
    """Commands that run one after the other; the stage fails if one of them does."""

    number: int
    name: str
    proves: str
    expected: float  # seconds
    limit: float  # seconds, of all commands together
    commands: tuple[Command, ...]
    program: str = ""  # that the stage is skipped without
    needs_kernels: bool = True  # not begun where stage 0 has failed


def pytest(processes: int, *arguments: str, variables: Sequence[str] = ()) -> Command:
    """pytest: what fails is written at once, and a test that hangs says where after 30 s.

    With 0 processes, without pytest-xdist.
    """
    parallel = ("-n", str(processes)) if processes else ()
    return (
        "env", "OMP_NUM_THREADS=2", *variables, PYTHON, "-m", "pytest", "-q", "-p", "gpu_tests",
        "--no-summary", "--maxfail=50", "-o", "faulthandler_timeout=30",
        *parallel, *arguments, ARGS,
    )  # fmt: skip


def benchmark(name: str, *arguments: str) -> Command:
    where = ("--device", "cuda", "--out", FIGURES, "--name", name)
    return (PYTHON, "-m", "benchmarks.step", *where, *arguments, BENCH_ARGS)


def profile(dtype: str) -> tuple[Command, Command]:
    """ncu of one launch of the step's kernel, not of the first; then its report as text."""
    report = f"{OUT}/ncu-{dtype}.ncu-rep"
    measure = (
        "ncu", "--clock-control", "none", "-k", "regex:step_blocks", "--launch-skip", "3",
        "--launch-count", "1", "--set", "full", "-f", "-o", report,
        PYTHON, "tools/gpu/profile_step.py", "--dtype", dtype,
    )  # fmt: skip
    return measure, ("ncu", "--import", report, "--page", "details")


def sanitize(tool: str) -> Command:
    return (
        "env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1",
        "compute-sanitizer", "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "1",
        PYTHON, "tools/gpu/short_steps.py", "--seconds", "15",
    )  # fmt: skip


ON_GPU = "[cuda or -cuda"  # ids of tests that run on every device, and here on the GPU
RULES = tuple(
    f"test/test_{name}.py"
    for name in (
        "optim", "adam_op", "bad_gradients", "codec", "tensor_scale", "param_rounding",
        "exact_sums", "moments", "rounding", "signed_rounding", "clipping", "trust_ratio",
        "corrupt_state", "paths", "op_errors", "op_shards", "count_op",
    )
)  # fmt: skip
COMPILED = "test/test_compile.py"
# Files with tests of managed memory, which are skipped where there are several processes.
PAGED = ("test/test_paging_cuda.py", "test/test_saved_before.py")
# Files that other stages run, and those of the compilers, which need no GPU.
ELSEWHERE = (
    *RULES, COMPILED, "test/test_cuda.py", "test/test_portable_cuda.py", "test/test_paging_cuda.py",
    "test/test_cuda_source.py", "test/test_cuda_emulated.py",
)  # fmt: skip

STAGES = (
    Stage(
        0, "load", "the extension loads, a carried one or one built here", 10, BUILD + 15,
        ((PYTHON, "tools/gpu/load.py", "--figures", FIGURES),),
        needs_kernels=False,
    ),
    Stage(
        1, "self-check", "a step on the GPU has the bits of the CPU", 8, 15,
        ((PYTHON, "-m", "torchao8"),),
    ),
    Stage(
        2, "exactness", "every root and reciprocal is the correctly rounded one", 8, 20,
        (
            ("nvcc", "-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-arch=native",
             "-Icsrc", "-o", f"{SCRATCH}/check_roots", "tools/check_roots.cu"),
            (f"{SCRATCH}/check_roots",),
        ),
        program="nvcc", needs_kernels=False,
    ),
    Stage(
        3, "speed", "the first figures: steps beside torch's, and the rate of a copy", 50, 60,
        (benchmark("speed", "--quick"),),
    ),
    Stage(
        4, "kernels", "all kernels have the bits of the CPU", 30, 85,
        (pytest(8, "test/test_cuda.py", "-k", "not captured and not compiled"),),
    ),
    Stage(
        5, "graphs", "captured and compiled steps have the bits of eager ones", 20, 25,
        (pytest(4, "test/test_cuda.py", "-k", "captured or compiled"),),
    ),
    Stage(
        6, "profile", "what bounds the step's kernel", 35, 50,
        (*profile("float32"), *profile("bfloat16")),
        program="ncu",
    ),
    Stage(
        7, "sanitizer", "no kernel reads or writes out of bounds, and none races", 45, 55,
        (sanitize("memcheck"), sanitize("racecheck")),
        program="compute-sanitizer",
    ),
    Stage(
        8, "rules", "every rule and format on the GPU against its oracle", 40, 45,
        (pytest(12, *RULES, "-k", f"{ON_GPU} or on_a_gpu"),),
    ),
    Stage(
        9, "portable", "PyTorch's own operators on the GPU against the kernels", 35, 45,
        (
            pytest(8, "test/test_portable_cuda.py"),
            pytest(12, "test/test_optim.py", "-k", f"({ON_GPU}) and (oracle or bad_gradient)",
                  variables=("TORCHAO8_CUDA=portable", "TORCHAO8_COMPILE=0")),
        ),
    ),
    Stage(
        10, "rivals", "the speed of the other libraries' steps", 40, 45,
        (benchmark("rivals", "--list", "gpt2", "--rounds", "5", "--time-limit", "25"),),
    ),
    Stage(
        11, "contract", "options, state, checkpoints and errors on the GPU", 40, 45,
        # Tests of managed memory are skipped among several processes: stage 13 runs them.
        (
            pytest(12, "test", "-m", "not paged_cuda and not thorough and not slow", "-k", ON_GPU,
                   *(f"--ignore={path}" for path in ELSEWHERE)),
        ),
    ),
    Stage(
        12, "compiled", "one graph, without copies, and the bits of eager steps", 40, 45,
        (pytest(12, COMPILED, "-k", ON_GPU),),
    ),
    # Last, and alone: they read how much of the card's memory is free.
    Stage(
        13, "paged", "state in managed memory has the bits of the CPU", 30, 40,
        (pytest(0, *PAGED, "-m", "paged_cuda and not thorough and not slow", "-k", "cuda"),),
    ),
)  # fmt: skip
