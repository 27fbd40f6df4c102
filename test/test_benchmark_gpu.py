"""``benchmarks.step --device cuda`` without a GPU: who decides, graphs, the quick form, folders."""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from test_benchmark import FakeGpu, Step

import benchmarks.step.__main__ as command
from benchmarks import reporting
from benchmarks.step import contenders, devices, rounds, tables, tensor_lists

LAUNCH_S = 5e-6  # of the host's time


class PretendedGpu(devices.Cuda):
    """A GPU on a clock that only it turns: work is queued, and done in order."""

    capacity = 1000  # kernels that the queue holds; more make the host wait

    def __init__(self) -> None:
        self.host, self.queue = 0.0, [0.0]  # the time; when each kernel will be done
        self.held_s: list[float] = []

    def launch(self, seconds: float) -> None:
        self.host += LAUNCH_S
        if len(self.queue) >= self.capacity:
            self.host = max(self.host, self.queue[-self.capacity])
        self.queue.append(max(self.host, self.queue[-1]) + seconds)

    def now(self) -> float:
        return self.host

    def wait(self) -> None:
        self.host = max(self.host, self.queue[-1])

    def occupy(self, seconds: float) -> None:
        self.held_s.append(seconds)
        self.launch(seconds)

    def mark(self) -> Any:
        done = self.queue[-1]
        return SimpleNamespace(
            done=done,
            query=lambda: done <= self.host,
            elapsed_time=lambda end: 1e3 * (end.done - done),
        )

    def step(self, kernels: int, kernel_s: float, python_s: float, waits: bool = False) -> Step:
        def step() -> None:
            self.host += python_s
            for _ in range(kernels):
                self.launch(kernel_s)
            if waits:
                self.wait()

        return step


# -- host and device -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernels", "kernel_s", "python_s"),
    [
        (1, 1e-3, 50e-6),  # a large tensor: the device
        (1, 30e-6, 1.8e-3),  # many small ones: the host
        (148, 2e-6, 1e-3),  # a kernel for each tensor
        (1, 100e-6, 90e-6),  # about the same
        (800, 2e-6, 0.0),  # 20 such steps would not fit into the queue
        (100, 1e-4, 0.0),  # more steps than these fill the queue, and the host waits
        (1, 1e-3, 0.5),
    ],
)
def test_host_and_device_are_told_apart(kernels: int, kernel_s: float, python_s: float) -> None:
    gpu = PretendedGpu()
    found = gpu.times_alone(gpu.step(kernels, kernel_s, python_s))
    assert found["host_s"] == pytest.approx(python_s + kernels * LAUNCH_S, rel=1e-6)
    assert found["device_s"] == pytest.approx(kernels * kernel_s, rel=1e-6)
    assert gpu.held_s == sorted(gpu.held_s)
    assert gpu.host < 10 * (found["host_s"] + found["device_s"]) + 0.15  # soon over


@pytest.mark.parametrize(("kernels", "waits"), [(1, True), (3000, False)])
def test_a_step_that_makes_the_host_wait_has_no_time_of_the_device(
    kernels: int, waits: bool
) -> None:
    gpu = PretendedGpu()
    found = gpu.times_alone(gpu.step(kernels, 1e-4, 1e-5, waits))
    assert found["device_s"] is None
    assert found["host_s"] > 1e-4


def test_what_is_queued_grows_with_what_the_host_needs() -> None:
    """A host that slows down by half between its own time and the queueing is given more time."""
    gpu = PretendedGpu()
    host = gpu.step(1, 1e-5, 1e-3)
    calls: list[int] = []

    def step() -> None:
        calls.append(1)
        host()
        gpu.host += 2e-3 * (len(calls) > 20)

    found = gpu.times_alone(step)
    assert len(gpu.held_s) > 1
    assert found["device_s"] == pytest.approx(1e-5)


def rows_of(host_s: float, device_s: float | None) -> dict[str, dict[str, Any]]:
    """Records of a step and of a copy at 4,000 GB/s."""
    times = {number: max(host_s, device_s or 0.0) for number in range(3)}
    info = {"moved_bytes": 4e9, "state_bytes": 2, "first_step_s": 1.0, "peak_extra_bytes": 0,
            "launches": 1}  # fmt: skip
    alone = {"host_s": host_s, "device_s": device_s}
    ours = rounds.Row(contenders.CONTENDERS["8bit"], info={**info, **alone}, rounds=times)
    copied = dict.fromkeys(range(3), 0.001)
    copy = rounds.Row(contenders.MEMORY[0], info={**info, **alone}, rounds=copied)
    shapes = tensor_lists.TensorList("one", [(1,)])
    case = tables.Case("one", shapes, "float32", [contenders.CONTENDERS["torch"]], None, [])
    case.rows = [ours, copy]
    record = case.record()
    assert json.loads(json.dumps(record)) == record
    lines = [line.strip("|").split("|") for line in tables.table(record).splitlines()]
    cells = dict(zip(*([c.strip() for c in line] for line in (lines[0], lines[2])), strict=True))
    return {"cells": cells, **{row["name"]: row for row in record["rows"]}}


def test_the_longer_time_decides() -> None:
    found = rows_of(host_s=1e-3, device_s=2e-3)
    assert found["8bit"]["decided_by"] == "device"
    assert found["8bit"]["device_share_of_copy_rate"] == pytest.approx(0.5)
    assert found["8bit"]["share_of_copy_rate"] == pytest.approx(0.5)
    assert "decided_by" not in found["copy"]
    found = rows_of(host_s=4e-3, device_s=2e-3)
    assert found["8bit"]["decided_by"] == "host"
    assert found["8bit"]["share_of_copy_rate"] == pytest.approx(0.25)
    shown = {"host ms": "4", "device ms": "2", "decides": "host", "of copy": "25%",
             "device of copy": "50%"}  # fmt: skip
    assert found["cells"].items() >= shown.items()
    found = rows_of(host_s=4e-3, device_s=None)
    assert found["8bit"]["decided_by"] == "not known"
    assert "device ms" not in found["cells"]


# -- the quick form --------------------------------------------------------------------------------


class Replaying(FakeGpu):
    """Has graphs and times of its own, and the quick form's lists."""

    lists = ("huge", "gpt2")
    quick: ClassVar[dict[str, Any]] = {**devices.Cuda.quick, "list": ["huge", "gpt2"]}

    def captured(self, step: Step) -> Step:
        return lambda: step()

    def times_alone(self, step: Step) -> dict[str, float | None]:
        # The step of a graph is known by not being a method of an optimizer.
        return {"host_s": 1e-6 if step.__name__ == "<lambda>" else 1.0, "device_s": 1e-3}

    def clocks(self) -> dict[str, str]:
        return {"clocks.sm": "1980"}


@pytest.mark.usefixtures("forked")
def test_the_quick_form_writes_one_file_of_first_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(devices.DEVICES, "fake", Replaying)
    few = {"huge": ("8bit", "8bit-graph"), "gpt2": ("8bit",)}
    monkeypatch.setattr(command, "QUICK", few)  # each contender starts a process
    for name in few:
        shapes = tensor_lists.TensorList(name, [(64, 256), (300,)])
        monkeypatch.setitem(tensor_lists.tensor_lists(), name, shapes)
    seen: list[int] = []
    write = reporting.write_results

    def watch(args: Any, record: dict[str, Any]) -> Path:
        seen.append(len(record["cases"]))
        return write(args, record)

    monkeypatch.setattr(reporting, "write_results", watch)
    arguments = ["--device", "fake", "--quick", "--threads", "1", "--dtype", "float32"]
    command.main([*arguments, "--turn", "0.002", "--time-limit", "600", "--out", str(tmp_path)])
    (path,) = tmp_path.iterdir()
    assert path.name == "fake-gpu-8-quick.json"
    assert seen == [1, 2, 2]  # whoever cuts it off has the figures until then
    record = json.loads(path.read_text())
    assert record["settings"]["rounds"] == 5
    assert record["device"]["gpu_after"] == {"clocks.sm": "1980"}
    assert {case["list"]: {row["name"] for row in case["rows"]} for case in record["cases"]} == {
        name: {"copy", "scale", "torch", *some} for name, some in few.items()
    }
    for case in record["cases"]:
        rows = {row["name"]: row for row in case["rows"]}
        assert {name: row.get("skipped") for name, row in rows.items()} == dict.fromkeys(rows)
        assert rows["8bit"]["decided_by"] == "host"
    rows = {row["name"]: row for row in record["cases"][0]["rows"]}
    assert rows["8bit-graph"]["decided_by"] == "device"
    assert " decides " in capsys.readouterr().out


def test_the_quick_form_is_a_short_part_of_the_whole() -> None:
    quick, whole = devices.Cuda.quick, devices.Cuda.defaults
    assert {"huge", "gpt2", "small"} < {*quick["list"]} <= {*devices.Cuda.lists}
    assert quick.keys() == whole.keys()
    for name in ("rounds", "turn", "budget", "time_limit"):
        assert quick[name] < whole[name]

    def names(device: str, list_name: str, quick: bool) -> set[str]:
        args = SimpleNamespace(contenders=None, quick=quick)
        return {one.name for one in command._chosen(args, device, list_name)}

    for name, some in contenders.QUICK.items():
        assert {*some} == names("cuda", name, quick=True) < names("cuda", name, quick=False)
    assert names("cuda", "llama", quick=True) == {*contenders.QUICK["gpt2"]}
    assert names("cpu", "block", quick=True) == {"8bit", "32bit", "8bit-compiled"}
    assert not any("compiled" in name for name in names("cpu", "block", quick=False))
    assert command.parse(["--quick"])[0].name == "step-cpu-gpt2-quick"
    graphs = [one.name for one in contenders.CONTENDERS.values() if one.mode == "graph"]
    assert graphs
    assert all(contenders.CONTENDERS[name].devices == ("cuda",) for name in graphs)


def test_a_run_that_is_cut_off_leaves_a_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = SimpleNamespace(out=tmp_path, name="figures")
    path = reporting.write_results(args, {"cases": [1]})
    monkeypatch.setattr(json, "dumps", lambda *_, **__: "{" + "x" * 100)

    def cut(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", cut)
    with pytest.raises(KeyboardInterrupt):
        reporting.write_results(args, {"cases": [1, 2]})
    monkeypatch.undo()
    assert json.loads(path.read_text())["cases"] == [1]


# -- the real calls, as far as there is no GPU -----------------------------------------------------


def test_a_step_is_captured_after_it_was_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Graph:
        def replay(self) -> None:
            calls.append("replay")

        def __enter__(self) -> None:
            calls.append("begin")

        def __exit__(self, *_: object) -> None:
            calls.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    gpu = object.__new__(devices.Cuda)
    gpu.captured(lambda: calls.append("step"))()
    assert calls == ["begin", "step", "end", "replay"]
    with pytest.raises(NotImplementedError, match="cpu has no graphs"):
        devices.Cpu("cpu").captured(lambda: None)


def test_the_gpu_is_occupied_and_marked_by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)  # it must be there
    event = SimpleNamespace(record=lambda: slept.append(-1))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    gpu = object.__new__(devices.Cuda)
    gpu.occupy(1e-3)
    assert gpu.mark() is event
    assert slept == [3_000_000, -1]
    assert gpu.now() < gpu.now()


@pytest.mark.parametrize("status", [0, 9])
def test_clocks_are_those_that_nvidia_smi_tells(
    status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n'
        f'echo "1980, 3201, 1980, 3201, 80.5, 700.0, 31"\nexit {status}\n'
    )
    smi.chmod(0o755)
    properties = SimpleNamespace(uuid="12-34")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    gpu = object.__new__(devices.Cuda)
    gpu.device = torch.device("cuda", 0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = gpu.clocks()
    assert "--id=GPU-12-34" in (tmp_path / "asked").read_text()
    if status:
        assert found is None
    else:
        assert found is not None
        assert (found["clocks.sm"], found["temperature.gpu"]) == ("1980", "31")
    monkeypatch.setenv("PATH", "")
    assert gpu.clocks() is None


# -- contenders as folders of files ----------------------------------------------------------------

CODE = """
import torch
from pathlib import Path

assert (Path(__file__).parent / "libflashoptim.so").exists()


class FlashAdamW(torch.optim.AdamW):
    def __init__(self, params, master_weight_bits, **options):
        super().__init__(params, **options)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that holds a package like FlashOptim's; `sys.path` is put back."""
    package = tmp_path / "field" / "flashoptim"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(CODE)
    (package / "libflashoptim.so").touch()
    metadata = package.parent / "flashoptim-7.8.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: flashoptim\nVersion: 7.8\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setitem(devices.DEVICES, "fake", FakeGpu)
    shapes = tensor_lists.TensorList("mixed", [(64, 256)])
    monkeypatch.setitem(tensor_lists.tensor_lists(), "mixed", shapes)
    return package.parent


def test_a_contender_is_found_in_a_folder(folder: Path, tmp_path: Path) -> None:
    arguments = ["--device", "fake", "--list", "mixed", "--dtype", "float32", "--rounds", "3",
                 "--turn", "0.002", "--threads", "1", "--contenders", "flashoptim"]  # fmt: skip
    command.main([*arguments, "--contenders-path", str(folder), "--out", str(tmp_path)])
    record = json.loads((tmp_path / "fake-gpu-8-mixed.json").read_text())
    rows = {row["name"]: row for row in record["cases"][0]["rows"]}
    assert rows["flashoptim"]["rounds"] == 3
    assert record["versions"]["flashoptim"] == "7.8"


def test_a_package_that_cannot_be_imported_has_no_version(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "stated.py").write_text("__version__ = '7.9'")
    (folder / "broken.py").write_text("raise OSError('no library')")
    monkeypatch.syspath_prepend(folder)
    found = reporting.versions(["broken", "stated", "flashoptim"])
    assert [found[name] for name in ("broken", "stated", "flashoptim")] == [None, "7.9", "7.8"]


def test_a_folder_that_cannot_be_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [*sys.path]
    arguments = ["--device", "fake", "--contenders-path"]
    with pytest.raises(SystemExit):
        command.parse([*arguments, str(folder / "flashoptim")])
    message = capsys.readouterr().err
    assert "--contenders-path: expected a folder that holds one of ['bitsandbytes'," in message
    (folder / "torch").mkdir()
    with pytest.raises(SystemExit):
        command.parse([*arguments, str(folder)])
    assert "expected a folder without a torch of its own" in capsys.readouterr().err
    assert sys.path == before
