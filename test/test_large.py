"""Memory: none beside the arguments that grows with the model; and tensors over 2^31 elements.

Each measurement is made in a process of its own, whose peak memory is what is asked about.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TEST_DIRECTORY = Path(__file__).parent
MEBI = 2**20


def run_script(name: str, *arguments: str, timeout: int = 120) -> dict[str, int]:
    """Runs one of the functions of large_worker.py; its last line is a dictionary of numbers."""
    result = subprocess.run(
        [sys.executable, str(TEST_DIRECTORY / "large_worker.py"), name, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    pairs = (pair.split("=") for pair in result.stdout.strip().split("\n")[-1].split())
    return {key: int(value) for key, value in pairs}


# What a step may need whatever the size: a few KiB for each thread, its stack. What is measured is
# the peak of the whole process, where a page of code that is run for the first time counts too.
ALLOWED = 2 * MEBI
# For each entry of the argument lists: the dispatcher's copies of the lists, and where the engine
# keeps pointers, strides and the constants of the step.
ALLOWED_EACH = 2048


# In `make test` each case once, and each format with a plain and with an unusual one: what stands
# in memory before a step hangs on the case, and codes are decoded and stored in registers anyway.
MEASURED = [("direct", "8"), ("float16", "8"), ("strided", "32"), ("many", "32")]
ALSO_MEASURED = [("direct", "32"), ("float16", "32"), ("strided", "8"), ("many", "8")]


@pytest.mark.parametrize(
    ("case", "state_bits"),
    [*MEASURED, *(pytest.param(*each, marks=pytest.mark.thorough) for each in ALSO_MEASURED)],
)
def test_a_step_needs_no_memory_that_grows(case: str, state_bits: str) -> None:
    """16 million elements: a temporary of a bit for each would be 2 MiB. "many": 4,096 tensors."""
    measured = run_script("peak_of_a_step", case, state_bits)
    assert measured["elements"] == 2**24
    assert measured["held"] > measured["elements"] * 2
    assert measured["growth"] < ALLOWED + ALLOWED_EACH * measured["tensors"]


def test_the_measurement_sees_a_temporary() -> None:
    """Of a byte for each element; Linux counts pages in batches, so a little less is seen."""
    measured = run_script("peak_of_a_step", "temporary", "8")
    assert measured["growth"] >= 0.9 * measured["elements"]


def available_memory(device: str) -> int:
    """Bytes that can be had without swapping; 0 where the system does not tell."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text().split("\n")
    except OSError:
        return 0
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


# Codes and bfloat16 parameters take 4 bytes an element, a dense bfloat16 gradient 2 more.
NEEDED = {"dense": 6.1 * 2**31 + 2**30, "expanded": 4.1 * 2**31 + 2**30}


@pytest.mark.slow
@pytest.mark.parametrize("grad", ["dense", "expanded"])
@pytest.mark.parametrize("shape", ["vector", "matrix"])
def test_over_two_to_the_31_elements(shape: str, grad: str, device: str) -> None:
    """Blocks at both ends and about element 2^31 have the bits of small tensors placed there, and
    all rows, which are alike, have become alike."""
    copied = grad == "expanded" and device == "cuda"  # the kernels read dense gradients
    if shape == "vector" and grad == "expanded":
        grad = "one number"  # a vector's gradient of stride 0
    needed = NEEDED["dense" if grad == "dense" or copied else "expanded"]
    if available_memory(device) < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free memory on the {device}")
    measured = run_script("huge_tensor", shape, grad, device, timeout=1800)
    assert measured["elements"] > 2**31
    assert measured["compared"] >= 3
    assert measured["growth"] < 64 * MEBI + (2 * measured["elements"] if copied else 0)
