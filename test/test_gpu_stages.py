"""`make gpu`, run to its end without a GPU: with stages that are stubs, and with stub programs."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as xml
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / "tools" / "gpu"
sys.path.append(str(TOOLS))
import stages as real  # noqa: E402

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs a system that has process groups and /proc"
)

DRIVER = """
import sys
sys.path.insert(0, {tools!r})
import run, stages
from stages import Stage
run.GRACE, run.LEAST = 0.5, 0.1
{before}
sys.exit(run.main(sys.argv[1:], {stages}))
"""
# A process that ignores Ctrl-C, with a child that has no other parent when it is killed.
HANGS = "sleep 300 & echo $! > {folder}/child; trap '' INT; echo begun; sleep 300 & wait; wait"
RESULTS = [
    {"test": "test/test_one.py::test_a[1]", "outcome": "running"},
    {"test": "test/test_one.py::test_b", "outcome": "running"},
    {"test": "test/test_one.py::test_c", "outcome": "running"},
    {"test": "test/test_one.py::test_a[1]", "outcome": "passed", "seconds": 1.5, "text": ""},
    {"test": "test/test_one.py::test_b", "outcome": "failed", "seconds": 0.5, "text": "\x1b[1mno"},
]


def start(
    folder: Path, stages: str, *arguments: str, before: str = "", **options: Any
) -> subprocess.Popen[str]:
    """The driver with the stages of a Python expression; results go into `folder`/out. It runs the
    line `before` first."""
    script = folder / "driver.py"
    script.write_text(DRIVER.format(tools=str(TOOLS), stages=stages, before=before))
    return subprocess.Popen(
        [sys.executable, str(script), "--out", str(folder / "out"), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    text, _ = process.communicate(timeout=60)
    return process.returncode, text


def stub(number: int, *commands: str, limit: float = 20, more: str = "") -> str:
    """Source of a stage of shell commands."""
    name = f"stage{number}"
    listed = ", ".join(repr(("sh", "-c", command)) for command in commands)
    return f"Stage({number}, {name!r}, 'proves {name}', 1, {limit}, ({listed},), {more})"


def verdicts(folder: Path) -> dict[int, str]:
    summary = json.loads((folder / "out" / "summary.json").read_text())
    return {stage["number"]: stage["verdict"] for stage in summary["stages"]}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(path: Path) -> str:
    for _ in range(600):
        if path.exists() and path.read_text().strip():
            return path.read_text()
        time.sleep(0.05)
    raise TimeoutError(f"{path} was not written")


def suites(folder: Path) -> dict[str, xml.Element]:
    tree = xml.parse(folder / "out" / "junit.xml")
    return {suite.attrib["name"]: suite for suite in tree.getroot()}


# -- the driver ----------------------------------------------------------------------------------


def test_a_run_with_a_stage_that_fails_and_one_that_hangs(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(record) + "\n" for record in RESULTS) + '{"test": "te')
    skipped = tmp_path / "skipped.jsonl"
    skipped.write_text('{"test": "test/test_one.py::test_d", "outcome": "skipped"}\n')
    stages = [
        stub(0, "echo loaded"),
        stub(1, "sleep 0.3; echo took what it should"),
        stub(2, "echo broken >&2; exit 3", "echo and the second command"),
        stub(3, HANGS.format(folder=tmp_path), limit=0.5),
        stub(4, "echo '{\"ms\": 1.5}' > {figures}/speed.json", "echo '{' > {figures}/half.json"),
        stub(5, f"cat {results} > $TORCHAO8_GPU_RESULTS; exit 1"),
        stub(6, "echo never", more="program='no-such-program'"),
        stub(7, "echo last"),
        stub(8, f"cat {skipped} > $TORCHAO8_GPU_RESULTS"),
    ]
    begin = time.monotonic()
    status, printed = finish(start(tmp_path, f"[{', '.join(stages)}]"))
    assert status == 1
    assert time.monotonic() - begin < 30
    assert verdicts(tmp_path) == {
        0: "passed", 1: "passed", 2: "failed", 3: "cut", 4: "passed", 5: "failed", 6: "skipped",
        7: "passed", 8: "failed",
    }  # fmt: skip
    assert not is_running(int((tmp_path / "child").read_text()))
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[1:10] == [
        "0 stage0 passed 0 s loaded",
        "1 stage1 passed 0 s took what it should",
        "2 stage2 failed 0 s and the second command",
        "3 stage3 cut 1 s begun",
        "4 stage4 passed 0 s",
        "5 stage5 failed 0 s 1 failed (test/test_one.py::test_b), "
        "1 running (test/test_one.py::test_c), 1 passed",
        "6 stage6 skipped there is no no-such-program in PATH",
        "7 stage7 passed 0 s last",
        "8 stage8 failed 0 s 1 skipped",
    ]
    assert lines[10:] == [
        "passed 0 stage0, 1 stage1, 4 stage4, 7 stage7",
        "failed 2 stage2, 5 stage5, 8 stage8",
        "cut 3 stage3",
        "skipped 6 stage6",
        'go on with make gpu STAGES="2 3 5 8"',
        f"results {tmp_path / 'out'}",
    ]
    log = (tmp_path / "out" / "log.txt").read_text()
    for said in ("broken\n", "exit status 3\n", "and the second command\n", "begun\n"):
        assert said in log
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert figures == {"half": None, "speed": {"ms": 1.5}}
    found = suites(tmp_path)
    assert set(found) == {"stages", "stage5", "stage8"}
    assert found["stages"].attrib["failures"] == "4"
    assert found["stages"].attrib["skipped"] == "1"
    tests = {case.attrib["name"]: case for case in found["stage5"]}
    assert found["stage5"].attrib["tests"] == "3"
    assert tests["test_a[1]"].attrib["classname"] == "test/test_one.py"
    assert tests["test_a[1]"].find("failure") is None
    assert tests["test_b"].find("failure").text == "?[1mno"  # type: ignore[union-attr]
    running = tests["test_c"].find("failure")
    assert running is not None
    assert running.attrib["message"].startswith("running")


def test_a_process_that_no_signal_ends(tmp_path: Path) -> None:
    """As one that waits for a broken GPU inside of the kernel. The run goes on without it."""
    hangs = f"echo $$ > {tmp_path}/parent; {HANGS.format(folder=tmp_path)}"
    stages = [stub(0, hangs, limit=0.5), stub(1, "echo more", more="needs_kernels=False")]
    no_kill = "run.os.killpg = lambda *_: None"
    process = start(tmp_path, f"[{', '.join(stages)}]", before=no_kill)
    try:
        status, _ = finish(process)
    finally:
        process.kill()
        os.killpg(int(wait_for(tmp_path / "parent")), signal.SIGKILL)
    assert status == 1
    assert verdicts(tmp_path) == {0: "cut", 1: "passed"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_an_interrupted_run_writes_its_summary(tmp_path: Path, number: int) -> None:
    stages = [stub(0, "echo loaded"), stub(1, HANGS.format(folder=tmp_path)), stub(2, "echo more")]
    process = start(tmp_path, f"[{', '.join(stages)}]")
    child = int(wait_for(tmp_path / "child"))
    process.send_signal(number)
    status, printed = finish(process)
    assert status == 1
    assert verdicts(tmp_path) == {0: "passed", 1: "interrupted", 2: "not begun"}
    assert not is_running(child)
    assert "next        2 stage2: proves stage2, about 1 s" in printed
    assert 'go on with  make gpu STAGES="1 2"' in printed


def test_a_run_with_too_little_time(tmp_path: Path) -> None:
    """The stage that is running is cut; what would have come next is said."""
    stages = [stub(i, "sleep 300" if i == 1 else "echo done") for i in range(4)]
    status, printed = finish(start(tmp_path, f"[{', '.join(stages)}]", "--limit", "2"))
    assert status == 1
    assert verdicts(tmp_path) == {0: "passed", 1: "cut", 2: "not begun", 3: "not begun"}
    assert "next        2 stage2: proves stage2" in printed


def test_what_needs_the_extension_is_not_begun_without_it(tmp_path: Path) -> None:
    stages = [
        stub(0, "exit 1"),
        stub(1, "echo no"),
        stub(2, "echo yes", more="needs_kernels=False"),
    ]
    finish(start(tmp_path, f"[{', '.join(stages)}]"))
    assert verdicts(tmp_path) == {0: "failed", 1: "not begun", 2: "passed"}


def test_without_a_gpu_nothing_else_is_begun(tmp_path: Path) -> None:
    stages = [stub(0, f"exit {real.NO_GPU}"), stub(1, "echo no", more="needs_kernels=False")]
    status, printed = finish(start(tmp_path, f"[{', '.join(stages)}]"))
    assert status == 1
    assert verdicts(tmp_path) == {0: "failed", 1: "not begun"}
    assert "1 stage1 not begun there is no GPU" in " ".join(printed.split())


def test_some_stages_and_arguments(tmp_path: Path) -> None:
    shows = "Stage(2, 'args', 'shows them', 1, 9, (('printf', '[%s]', '{args}', '{bench_args}'),))"
    stages = f"[{stub(0, 'exit 1')}, {stub(1, 'exit 1')}, {shows}]"
    status, printed = finish(
        start(tmp_path, stages, "--stages", "2", "--args=-k 'a or b'", "--bench-args=--rounds 5")
    )
    assert status == 0
    assert verdicts(tmp_path) == {2: "passed"}
    assert "[-k][a or b][--rounds][5]" in printed


def test_the_command_that_goes_on(tmp_path: Path) -> None:
    """It has what `make gpu` was given."""
    given = ("--python", sys.executable, "--limit", "90.0", "--args=-k 'a or b'")
    _, printed = finish(start(tmp_path, f"[{stub(0, 'exit 1')}]", *given))
    (line,) = [line for line in printed.splitlines() if line.startswith("go on with")]
    words = shlex.split(line.removeprefix("go on with"))
    assert words == [
        "make", "gpu", "STAGES=0", f"PYTHON={sys.executable}", "LIMIT=90", "ARGS=-k 'a or b'",
    ]  # fmt: skip


def test_results_are_not_written_over(tmp_path: Path) -> None:
    stages = f"[{stub(0, 'echo loaded')}]"
    finish(start(tmp_path, stages))
    before = (tmp_path / "out" / "summary.json").read_bytes()
    status, printed = finish(start(tmp_path, stages))
    assert status == 2
    assert "--out: expected a folder without results" in printed
    assert (tmp_path / "out" / "summary.json").read_bytes() == before
    status, printed = finish(start(tmp_path, stages, "--stages", "0 8"))
    assert status == 2
    assert "--stages: expected numbers from 0 to 0, got 8" in printed


# -- the real stages -----------------------------------------------------------------------------

# Stands for the programs that the stages start. It takes a hundredth of the time that the stage is
# expected to take, and leaves what the program would leave.
PROGRAM = """#!{python}
import json, os, pathlib, subprocess, sys, time
name, words = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
with open({calls!r}, "a") as calls:
    calls.write(json.dumps([name, *words]) + "\\n")
if name == "ncu" and "--import" not in words:
    child = subprocess.Popen(["sleep", "300"])
    pathlib.Path({folder!r}, "child").write_text(str(child.pid))
    child.wait()
time.sleep(0.05)
if name == "nvcc":
    made = pathlib.Path(words[words.index("-o") + 1])
    made.write_text("#!/bin/sh\\necho 16777216 roots, 8388608 reciprocals: 0 differ\\n")
    made.chmod(0o755)
if "pytest" in words:
    record = {{"test": "test/test_a.py::test_b", "outcome": "passed", "seconds": 1.0, "text": ""}}
    pathlib.Path(os.environ["TORCHAO8_GPU_RESULTS"]).write_text(json.dumps(record))
if "benchmarks.step" in words:
    out, result = (words[words.index(option) + 1] for option in ("--out", "--name"))
    pathlib.Path(out, result + ".json").write_text('{{"cases": []}}')
print(name, "has ended")
sys.exit(name == "compute-sanitizer")
"""


def test_all_stages_with_pretended_programs(tmp_path: Path) -> None:
    """Every stage starts its commands, the one of ncu hangs, that of compute-sanitizer fails."""
    programs = tmp_path / "programs"
    programs.mkdir()
    calls = tmp_path / "calls"
    source = PROGRAM.format(python=sys.executable, calls=str(calls), folder=str(tmp_path))
    for name in ("python3", "nvcc", "ncu", "compute-sanitizer"):
        (programs / name).write_text(source)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    stages = "[s._replace(limit=s.limit / 20 if s.program == 'ncu' else 20) for s in stages.STAGES]"
    process = start(tmp_path, stages, "--python", "python3", env={**os.environ, "PATH": path})
    status, printed = finish(process)
    assert status == 1
    expected = {s.number: "passed" for s in real.STAGES}
    by_program = {s.program: s.number for s in real.STAGES if s.program}
    expected[by_program["ncu"]] = "cut"
    expected[by_program["compute-sanitizer"]] = "failed"
    assert verdicts(tmp_path) == expected, printed
    assert not is_running(int((tmp_path / "child").read_text()))
    assert "0 differ" in printed
    started = [json.loads(line) for line in calls.read_text().splitlines()]
    assert not [words for words in started if any("{" in word for word in words)]
    assert len([words for words in started if words[0] == "compute-sanitizer"]) == 2
    figures = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert set(figures) == {"speed", "rivals"}
    of_tests = {s.name for s in real.STAGES if any("pytest" in c for c in s.commands)}
    assert set(suites(tmp_path)) == {"stages"} | of_tests


def test_the_numbers_of_the_real_stages() -> None:
    """What their texts say, and what a first and a second command on a borrowed GPU need."""
    numbers = [s.number for s in real.STAGES]
    assert numbers == list(range(len(numbers)))
    assert all(0 < s.expected < s.limit for s in real.STAGES)
    assert sum(s.expected for s in real.STAGES) < 8 * 60
    assert sum(s.expected for s in real.STAGES[:4]) < 2 * 60
    assert sum(s.limit for s in real.STAGES[:8]) - real.BUILD <= 325
    assert sum(s.limit for s in real.STAGES[8:]) <= 265
    assert real.STAGES[-1].name == "paged"


def commands_of(program: str) -> list[list[str]]:
    """What follows a word in the commands of the real stages, without what run.py replaces."""
    found = []
    for command in (c for s in real.STAGES for c in s.commands if program in c):
        words = command[command.index(program) + 1 :]
        found.append([word for word in words if word not in (real.ARGS, real.BENCH_ARGS)])
    assert found
    return found


def run_script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_files_of_the_real_stages_exist() -> None:
    words = {word for s in real.STAGES for command in s.commands for word in command}
    files = {word.removeprefix("--ignore=").partition("::")[0] for word in words}
    files = {f for f in files if f.endswith((".py", ".cu"))}
    assert [f for f in files if not (ROOT / f).exists()] == []
    assert len(files) > 20


def test_the_benchmark_takes_its_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is only named. Its lists end within the limit of the stage."""
    from benchmarks.step import __main__ as step
    from benchmarks.step.devices import Cuda

    class Named(Cuda):
        def __init__(self, name: str) -> None:
            self.result_name = name

    monkeypatch.setattr(step, "open_device", Named)
    limits = {s.name: s.limit for s in real.STAGES}
    for words in commands_of("benchmarks.step"):
        args, device = step.parse(words)
        assert device.result_name == "cuda"
        assert args.time_limit < limits[args.name]


@pytest.mark.parametrize("script", ["profile_step", "short_steps"])
def test_scripts_of_the_real_stages_run(script: str) -> None:
    (words, *_) = commands_of(f"tools/gpu/{script}.py")
    small = ["--elements", "4096"] if script == "profile_step" else []
    done = run_script(f"tools/gpu/{script}.py", *words, *small, "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr


LOAD = """
import sys, types
from importlib.machinery import ModuleSpec
torch = sys.modules["torch"] = types.ModuleType("torch")
torch.__spec__, torch.__version__ = ModuleSpec("torch", None), "2.10"
torch.cuda = types.SimpleNamespace(is_available=lambda: {has_gpu})
sys.path.append({tools!r})
import load
load.versions = lambda: {{"torch": "some"}}
answers = {answers}
load.output_of = lambda *command, seconds=10: answers.pop(0)
load.build = lambda: print("build") or {built}
sys.argv[1:] = ["--figures", {folder!r}]
sys.exit(load.main())
"""
LOADED = (0, "torchao8/_C_cuda.abi3.so")
BROKEN = (1, "_C_cuda could not be loaded")
SLOW = (124, "no answer within 45 s")


@pytest.mark.parametrize(
    ("has_gpu", "answers", "built", "status", "last"),
    [
        pytest.param(True, [SLOW], 0, 1, SLOW[1], id="no answer"),
        pytest.param(False, [], 0, real.NO_GPU, "finds no GPU", id="no GPU"),
        pytest.param(True, [LOADED], 0, 0, "loaded torchao8/_C_cuda.abi3.so", id="carried"),
        pytest.param(True, [BROKEN, LOADED], 0, 0, "loaded torchao8/_C", id="built"),
        pytest.param(True, [BROKEN, BROKEN], 0, 1, BROKEN[1], id="built in vain"),
        pytest.param(True, [BROKEN], 1, 1, "the build failed", id="not built"),
    ],
)
def test_loading(
    tmp_path: Path, has_gpu: bool, answers: list[Any], built: int, status: int, last: str
) -> None:
    code = LOAD.format(
        tools=str(TOOLS), has_gpu=has_gpu, answers=answers, built=built, folder=str(tmp_path)
    )
    done = run_script("-c", code)
    assert done.returncode == status, done.stdout + done.stderr
    assert last in done.stdout.splitlines()[-1]
    assert ("\nbuild\n" in done.stdout) == (BROKEN in answers)
    assert (tmp_path / "versions.json").exists() == has_gpu


COLLECT = """
import contextlib, io, json, sys
import pytest
sys.path.insert(0, "test")
import helpers
helpers.DEVICES[:] = ["cpu", "cuda"]
class Collected:
    def pytest_collection_finish(self, session):
        self.ids = [item.nodeid for item in session.items]
found = []
for words in json.loads(sys.argv[1]):
    plugin = Collected()
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", *words], plugins=[plugin])
    found.append(plugin.ids)
print(json.dumps(found))
"""


def without_option(words: Sequence[str], *options: str) -> list[str]:
    """Words without options that have a value."""
    left = list(words)
    for option in options:
        while option in left:
            del left[(i := left.index(option)) : i + 2]
    return left


@pytest.mark.thorough
def test_every_test_for_a_gpu_is_in_one_stage() -> None:
    """Collected as where there is a GPU: those that run on each device, and whole files."""
    commands = [without_option(words, "-n", "-p") for words in commands_of("pytest")]
    everything = ["test", "-k", real.ON_GPU]
    done = run_script("-c", COLLECT, json.dumps([everything, *commands]))
    assert done.returncode == 0, done.stderr
    every, *each = json.loads(done.stdout.splitlines()[-1])
    assert all(each)
    chosen = [name for names in each for name in names]
    assert set(every) - set(chosen) == set()
    assert any("on_a_gpu" in name for name in chosen)
    portable = {c for c in chosen if chosen.count(c) > 1}  # with the kernels, and without
    assert all(name.startswith("test/test_optim.py") for name in portable)


# -- the plugin of pytest ------------------------------------------------------------------------

PRETENDED = """
import torch
def fail(*args):
    raise RuntimeError("an illegal memory access was encountered")
torch.cuda.is_available = lambda: True
torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = lambda *args: None
"""
TESTS = """
import pytest, torch, pretended
def test_1_good(): torch.cuda.synchronize()
def test_2_breaks_the_gpu():
    torch.cuda.synchronize = pretended.fail
    torch.cuda.synchronize()
def test_3_good_in_another_process(): torch.cuda.synchronize()
def test_4_fails(): assert 1 == 2
def test_5_skipped(): pytest.skip("no reason")
"""


@pytest.mark.parametrize("pretended", [True, False])
def test_the_plugin_records_and_leaves_a_broken_gpu(tmp_path: Path, pretended: bool) -> None:
    pytest.importorskip("xdist", reason="no pytest-xdist: pip install pytest-xdist")
    (tmp_path / "pretended.py").write_text(PRETENDED)
    (tmp_path / "no_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: False\n")
    (tmp_path / "test_it.py").write_text(TESTS)
    results = tmp_path / "results.jsonl"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tmp_path}{os.pathsep}{TOOLS}",
        "TORCHAO8_GPU_RESULTS": str(results),
    }
    plugin = "pretended" if pretended else "no_gpu"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "gpu_tests", "-n", "1",
         "--rootdir", str(tmp_path), "-c", os.devnull, "test_it.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if not pretended:
        assert done.returncode == 3, done.stdout
        assert "torch finds no GPU" in done.stdout + done.stderr
        return
    import results as report

    found = {r["test"].partition("::")[2]: r for r in report.read_tests(results)}
    assert {name: record["outcome"] for name, record in found.items()} == {
        "test_1_good": "passed",
        "test_2_breaks_the_gpu": "failed",
        "test_3_good_in_another_process": "passed",
        "test_4_fails": "failed",
        "test_5_skipped": "skipped",
    }, done.stdout
    assert "illegal memory access" in found["test_2_breaks_the_gpu"]["text"]
    assert "assert 1 == 2" in done.stdout
