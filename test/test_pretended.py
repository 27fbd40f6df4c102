"""The tests for a GPU, run to their ends on GPUs that are not there: see pretended_gpu.py.

A wrong argument, a missing name, or a tensor on the wrong device is a mistake of the test or of the
library's Python, and shows before there is a GPU.
"""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

TEST = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX", "c++")
pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="a torch that has CUDA itself"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler: {COMPILER}"),
]

# Of test_cuda.py, what takes seconds for numbers that are large or many.
LARGE = "many_numbers or refills or several_units or many_tensors or more_tensors or every_option"
# Those with tests for every device. test_portable.py runs operator by operator: for minutes.
LEFT_OUT = {"test_portable.py", "test_benchmark_gpu.py", "test_new_device.py"}
MINUTES = {"test_optim.py", "test_optim_contract.py"}  # what these take
FILES = sorted(
    path.name
    for path in TEST.glob("test_*.py")
    if re.search(r"\bdevice: str\b", path.read_text()) and path.name not in LEFT_OUT
)


def run_pretended(*arguments: str | Path, plugins: str = "") -> str:
    """What pytest says at the end.

    Args:
        plugins: a folder with more of them.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TEST.parent), str(TEST), plugins]),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "200",
    }
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pretended_gpu", "-p",
               "no:cacheprovider", "--tb=short", *arguments]  # fmt: skip
    result = subprocess.run(
        command, env=environment, cwd=TEST.parent, capture_output=True, text=True
    )
    return result.stdout + result.stderr


def assert_passed(out: str, some: bool = True) -> None:
    """Not some: of a file, all may be skipped or expected to fail on a pretended GPU."""
    last = out.strip().splitlines()[-1]
    assert not some or re.search(r"[1-9]\d* passed", last), out[-4000:]
    assert re.search(r"[1-9]\d* (passed|skipped|deselected|xfailed)", last), out[-4000:]
    assert not re.search(r"\bfailed|\berror", last), out[-4000:]


@pytest.mark.parametrize(
    "file",
    [pytest.param("test_cuda.py", marks=pytest.mark.thorough), "test_paging_cuda.py"],
)
def test_tests_for_a_gpu(file: str) -> None:
    assert_passed(run_pretended(TEST / file, "-k", f"not ({LARGE})"))


@pytest.mark.thorough
def test_large_tests_for_a_gpu() -> None:
    assert_passed(run_pretended(TEST / "test_cuda.py", "-k", LARGE))


@pytest.mark.thorough
def test_portable_steps_on_a_gpu() -> None:
    """But for compiled ones: a pretended tensor is never compiled."""
    assert_passed(run_pretended(TEST / "test_portable_cuda.py", "-k", "not compiled"))


@pytest.mark.thorough
@pytest.mark.parametrize(
    "file", [pytest.param(f, marks=pytest.mark.slow) if f in MINUTES else f for f in FILES]
)
def test_tests_for_all_devices(file: str) -> None:
    assert_passed(run_pretended(TEST / file, "-k", "[cuda or -cuda", "-m", "not slow"), some=False)


# -- that they can fail ------------------------------------------------------------------------

MISTAKES = {
    "an unknown name": ("torch.zeros(3, device='cuda') + undefined", "NameError"),
    "an argument that there is not": (
        "torchao8.AdamW8bit([torch.zeros(3, device='cuda')], amsgrads=True)",
        "TypeError",
    ),
    "tensors on two devices": (
        "torch.zeros(3, device='cuda') + torch.zeros(3)",
        "Expected all tensors to be on the same device",
    ),
    "tensors on two GPUs": (
        "torch.zeros(3, device='cuda') + torch.zeros(3, device='cuda:1')",
        "Expected all tensors to be on the same device",
    ),
    "an op with a tensor on the CPU": (
        "c, s = torchao8.quantize_blockwise(torch.zeros(300, device='cuda'));"
        " torchao8.dequantize_blockwise(c, s.cpu())",
        "dequantize_blockwise: scale must be on cuda:0",
    ),
    "numpy": ("torch.zeros(3, device='cuda').numpy()", "TypeError|RuntimeError"),
    "a number that is read where the host must not wait": (
        "torch.cuda.set_sync_debug_mode('error'); float(torch.zeros((), device='cuda'))",
        "called a synchronizing CUDA operation",
    ),
    "a number that is brought where the host must not wait": (
        "torch.cuda.set_sync_debug_mode('error'); torch.tensor(1.0).to('cuda')",
        "called a synchronizing CUDA operation",
    ),
    "a capture without its mark": (
        "torch.cuda.graph(torch.cuda.CUDAGraph()).__enter__()",
        "must be marked captured",
    ),
    "managed memory without its mark": (
        "torchao8.ops.allocate_managed(torch.device('cuda'), 4096)",
        "must be marked paged_cuda",
    ),
}


def test_mistakes_are_found(tmp_path: Path) -> None:
    tests = [f"def test_{i}():\n    {line}\n" for i, (line, _) in enumerate(MISTAKES.values())]
    file = tmp_path / "test_mistakes.py"
    file.write_text("import torch\nimport torchao8\n\n\n" + "\n\n".join(tests))
    out = run_pretended(file, f"--rootdir={tmp_path}")
    for i, (name, (_, message)) in enumerate(MISTAKES.items()):
        assert re.search(rf"FAILED .*test_{i} - .*({message})", out), (name, out[-6000:])


def test_a_graph_holds_what_was_captured(tmp_path: Path) -> None:
    """The operators run at a replay and not before; what is on the CPU is read at the capture."""
    file = tmp_path / "test_graph.py"
    file.write_text(
        textwrap.dedent("""
        import pytest, torch

        @pytest.mark.captured
        def test_it():
            x, number = torch.ones(3, device="cuda"), torch.tensor(2.0)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                x.mul_(number)
                y = x + 1
                with pytest.raises(RuntimeError, match="when stream is capturing"):
                    x.sum().item()
            assert x.tolist() == [1.0] * 3
            number.fill_(7.0)
            for value in (2.0, 4.0):
                graph.replay()
                assert x.tolist() == [value] * 3
                assert y.tolist() == [value + 1] * 3
        """)
    )
    assert_passed(run_pretended(file, "-c", TEST.parent / "pyproject.toml"))


# -- the order of tests ------------------------------------------------------------------------


MARKS = """
def pytest_collection_finish(session):
    for item in session.items:
        print("collected", *{mark.name for mark in item.iter_markers()})
"""


def test_captures_and_managed_memory_come_last(tmp_path: Path) -> None:
    (tmp_path / "marks_of_tests.py").write_text(MARKS)
    files = (TEST / "test_paging_cuda.py", TEST / "test_cuda.py")
    collecting = ("-p", "marks_of_tests", "--collect-only", "-m", "not slow")
    out = run_pretended(*files, *collecting, plugins=str(tmp_path))
    marks = [set(line.split()) for line in out.splitlines() if line.startswith("collected ")]
    kinds = [
        "paged_cuda" if "paged_cuda" in m else "captured" if "captured" in m else "" for m in marks
    ]
    assert kinds == sorted(kinds, key=["", "captured", "paged_cuda"].index)
    assert min(kinds.count(kind) for kind in ("", "captured", "paged_cuda")) > 20


def test_managed_memory_is_not_taken_beside_other_processes() -> None:
    pytest.importorskip("xdist", reason="no pytest-xdist")
    out = run_pretended(TEST / "test_paging_cuda.py", "-n", "1", "-k", "that_is_none")
    assert "pytest -m paged_cuda" in out
    assert out.strip().splitlines()[-1].startswith("1 skipped")
