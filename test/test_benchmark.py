"""``benchmarks/step.py`` on a GPU, with a CPU in the GPU's place: processes, results, bars."""

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _bars  # noqa: E402
import _contenders  # noqa: E402
import _devices  # noqa: E402
import _lists  # noqa: E402
import _measure  # noqa: E402
import _tables  # noqa: E402
import _workers  # noqa: E402
import step  # noqa: E402

Step = Callable[[], object]


class FakeGpu(_devices.Cpu):
    """Is treated as a GPU, and computes on the CPU."""

    kind = "cuda"
    keeps_workers = True
    settle_s = 0.0
    trial_steps = 1

    def __init__(self, name: str) -> None:
        self.device = torch.device("cpu")

    @property
    def lists(self) -> tuple[str, ...]:
        return ("mixed", "deadly")

    def describe(self, threads: int) -> dict[str, Any]:
        return {"cpu": "some CPU", "gpu": {"name": "Fake GPU 8"}}

    def result_name(self) -> str:
        return "fake-gpu-8"

    def buffer_bytes(self) -> int:
        return 1 << 20

    def free_bytes(self) -> int:
        return 1 << 40

    def timed_steps(self, step: Step, count: int, warm_up: bool) -> list[float]:
        times = [time.perf_counter()]
        for _ in range(count):
            step()
            times.append(time.perf_counter())
        return [end - start for start, end in itertools.pairwise(times)]

    def launches(self, step: Step) -> int | None:
        step()
        return 3

    def free(self) -> None:
        pass


class Fragile(torch.optim.SGD):
    """Cannot be made for float32 parameters, and ends its process on a list of three."""

    def __init__(self, params: list[Tensor]) -> None:
        if len(params) == 3:
            self.step = functools.partial(os._exit, 7)  # type: ignore[method-assign]
        elif params[0].dtype == torch.float32:
            raise ValueError("float32 is\nbeyond me")
        super().__init__(params, lr=0.1)


def install(set_item: Callable[[Any, str, Any], None] = dict.__setitem__) -> None:
    """Makes the names above known to the benchmark, in this process."""
    set_item(_devices.DEVICES, "fake", FakeGpu)
    set_item(_lists._FIXED, "mixed", _lists.TensorList("mixed", [(64, 256), (300,)]))
    set_item(_lists._FIXED, "deadly", _lists.TensorList("deadly", [(32, 256)] * 3))
    fragile = _contenders.Contender("fragile", "Fragile", "torch", Fragile)
    set_item(_contenders.CONTENDERS, "fragile", fragile)


WORKER = """\
import sys
sys.path.insert(0, {folder!r})
import test_benchmark
import _worker
test_benchmark.install()
_worker.main()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A worker that knows the fake GPU and its lists, as this process does from now on."""
    install(monkeypatch.setitem)
    path = tmp_path / "program.py"
    path.write_text(WORKER.format(folder=str(Path(__file__).parent)))
    return path


ARGS = ["--device", "fake", "--no-plot", "--repeats", "3", "--turn", "0.002", "--threads", "1"]


def test_workers_outlive_lists_and_failures(
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started = []

    class CountedWorker(_workers.Worker):
        def __init__(self, spec: dict[str, Any], program: Path) -> None:
            started.append(spec["contender"])
            super().__init__(spec, program)

    monkeypatch.setattr(_workers, "Worker", CountedWorker)
    monkeypatch.setattr(step, "measure", functools.partial(step.measure, program=program))
    step.main([*ARGS, "--contenders", "8bit", "fragile", "--out", str(tmp_path)])

    # Four cases; one process for each but the one that died, and that is given up at its second.
    assert sorted(started) == ["8bit", "copy", "fragile", "fragile", "scale", "torch"]
    record = json.loads((tmp_path / "fake-gpu-8.json").read_text())
    assert [(case["list"], case["dtype"]) for case in record["cases"]] == [
        ("mixed", "float32"),
        ("mixed", "bfloat16"),
        ("deadly", "float32"),
        ("deadly", "bfloat16"),
    ]
    rows = [{row["name"]: row for row in case["rows"]} for case in record["cases"]]
    assert rows[0]["fragile"]["skipped"] == "ValueError: float32 is"
    assert rows[1]["fragile"]["rounds"] == 3
    assert rows[2]["fragile"]["skipped"] == "the process ended (exit status 7)"
    assert rows[3]["fragile"]["skipped"] == "the process ended (exit status 7)"
    for case in rows:
        ours = case["8bit"]
        assert case["torch"]["speedup"] == 1
        assert ours["rounds"] == len(ours["ms_of_rounds"]) == 3
        assert ours["speedup"] > 0
        assert ours["launches"] == 3
        assert case["copy"]["gb_per_s"] * ours["share_of_copy_rate"] == pytest.approx(
            ours["gb_per_s"]
        )
        assert case["copy"]["launches"] is None
    assert [case["8bit"]["buckets"] for case in rows] == [2, 2, 1, 1]
    assert record["left_out"] == []
    assert record["device"]["gpu"]["name"] == "Fake GPU 8"
    assert [(bar["asked"], bar["met"]) for bar in record["bars"]] == [(3, True)] * 2 + [
        (2, False)
    ] * 2
    output = capsys.readouterr().out
    assert "skipped: Fragile: the process ended (exit status 7)" in output
    assert output.count("bar: ") == 4


def test_what_the_time_limit_leaves_out_is_named(program: Path) -> None:
    args, device = step._parse([*ARGS, "--time-limit", "1e-9"])
    cases, left_out = step.measure(args, device, program=program)
    assert cases == []
    assert [(one["list"], one["dtype"]) for one in left_out] == [
        ("mixed", "float32"),
        ("mixed", "bfloat16"),
        ("deadly", "float32"),
        ("deadly", "bfloat16"),
    ]


def test_who_dies_twice_gets_no_further_process() -> None:
    workers = _workers.Workers("cpu", 1, Path("/nothing/is/started"))
    workers.bury("8bit", "first reason")
    workers.bury("8bit", "second reason")
    assert workers.ensure(["8bit"], 1) == {
        "8bit": "given up after 2 processes, the last with: second reason"
    }


def test_who_cannot_start_is_not_tried_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("raise SystemExit(5)")
    workers = _workers.Workers("cpu", 1, program)
    for _ in range(2):
        assert workers.ensure(["8bit"], 20) == {
            "8bit": "did not start: the process ended (exit status 5)"
        }
    assert workers.started == 1


@pytest.mark.parametrize(
    ("gigabytes", "batches"),
    [
        (200, [["8bit", "32bit", "bitsandbytes", "flashoptim"]]),
        (64, [["8bit", "32bit", "bitsandbytes"], ["flashoptim"]]),
        (40, [["8bit"], ["32bit"], ["bitsandbytes"]]),
        (20, [[]]),
    ],
)
def test_batches_fit_into_memory(
    gigabytes: int, batches: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One tensor of 1e9 float32: 8 GB, and 8 of 32-bit state, 2.2 of 8-bit state or, for FlashOptim
    # at its start, 10.2. torch's 16 GB are in every batch.
    device = FakeGpu("fake")
    monkeypatch.setattr(device, "free_bytes", lambda: gigabytes * 10**9)
    bench = _measure.Bench(device, _workers.Workers("fake", 1), _measure.Plan(3, 1, 1, 1))
    names = ["8bit", "32bit", "bitsandbytes", "flashoptim"]
    contenders = [_contenders.CONTENDERS[name] for name in names]
    found, too_large = bench._batches(contenders, _lists.tensor_list("one"), 4)
    assert [[one.name for one in batch] for batch in found] == batches
    assert {row.name for row in too_large} == set(names) - {n for batch in batches for n in batch}
    assert all(" GB of memory, of " in str(row.skipped) for row in too_large)


# -- the real device, as far as it goes without one ------------------------------------------------


class FakeEvent:
    """Notes when it is recorded; ten seconds lie between any two."""

    log: list[str]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("event")

    def elapsed_time(self, end: "FakeEvent") -> float:
        return 10e3


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a step, an event and a wait wrote, in order."""
    FakeEvent.log = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: FakeEvent.log.append("wait"))
    return FakeEvent.log


def test_steps_on_a_gpu_are_enqueued_without_waiting(log: list[str]) -> None:
    seconds = _devices.Cuda("cuda").timed_steps(lambda: log.append("step"), 2, warm_up=True)
    assert seconds == [10, 10]
    assert log == ["wait", "step", "event", "step", "event", "step", "event", "wait"]


def test_only_kernels_are_counted() -> None:
    def event(name: str, device: DeviceType = DeviceType.CUDA, annotation: bool = False) -> Any:
        return SimpleNamespace(name=name, device_type=device, is_user_annotation=annotation)

    events = [
        event("void step_blocks<AdamRule>()"),
        event("triton_poi_fused_0"),
        event("Memcpy HtoD (Pageable -> Device)"),
        event("Memset (Device)"),
        event("Context Sync"),
        event("Optimizer.step#AdamW.step", annotation=True),
        event("cudaLaunchKernel", DeviceType.CPU),
    ]
    assert _devices.count_kernels(events) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [("cuda", "built without CUDA"), ("cuda:x", "expected cpu, cuda"), ("cpu:1", "expected cpu")],
)
def test_a_device_that_is_not_there_is_refused(
    name: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit):
        step._parse(["--device", name, "--no-plot"])
    assert message in capsys.readouterr().err


# -- lists, bars, tables ---------------------------------------------------------------------------


def test_lists_are_the_models_they_are_named_after() -> None:
    resnet = _lists.tensor_list("resnet101")
    assert (resnet.numel, len(resnet.shapes)) == (44_549_160, 314)
    assert _lists.tensor_list("gpt2").numel == 124_439_808
    llama = _lists.tensor_list("llama")
    assert (llama.numel, len(llama.shapes)) == (6_738_415_616, 291)
    (one,) = _lists.tensor_list("one").shapes
    assert one[0] * one[1] >= 1e9
    assert one[1] % 256 == 0


def test_llama_is_as_deep_as_memory_allows() -> None:
    for gigabytes in (40, 60, 120):
        layers = _lists.llama_layers(gigabytes * 10**9)
        numel = [_lists.tensor_list("llama", n).numel for n in (layers, layers + 1)]
        assert 48 * numel[0] <= gigabytes * 10**9 < 48 * numel[1]
    assert _lists.llama_layers(10**9) == 1
    assert _lists.llama_layers(10**12) == 32


def row(name: str, **values: Any) -> dict[str, Any]:
    """A row as on a GPU; values of no interest are made up."""
    made_up = {
        "label": name,
        "batch": 0,
        "ms": 1.25,
        "ms_quartiles": [1.0, 1.5],
        "speedup": 1.0,
        "gb_per_s": 2000.0,
        "share_of_copy_rate": 0.5,
        "moved_bytes_per_parameter": 16.03,
        "state_bytes_per_parameter": 2.03,
        "launches": 2,
        "buckets": 1,
        "peak_extra_bytes": 3 << 20,
        "rounds": 9,
    }
    return {"name": name, **made_up, **values}


def case(list_name: str, dtype: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"list": list_name, "label": list_name, "dtype": dtype, "rows": list(rows)}


def test_bars() -> None:
    found = _bars.bars(
        [
            case(
                "one",
                "float32",
                row("torch", speedup=1.0),
                row("8bit", speedup=1.6, share_of_copy_rate=0.91),
                row("bitsandbytes", speedup=0.8),
                {"name": "torchao", "label": "torchao", "batch": 0, "skipped": "not installed"},
                row("flashoptim", speedup=1.5, batch=1),
                row("torch", speedup=0.1, batch=1),
            ),
            case(
                "gpt2",
                "bfloat16",
                row("torch"),
                row("8bit", speedup=3.0, launches=5, buckets=2),
                row("bitsandbytes", speedup=0.25),
                row("torchao", speedup=1.5),
            ),
        ]
    )
    assert [bar["text"] for bar in found] == [
        "bar: 8bit, of the copy rate, one, float32: asked at least 90%, measured 91%, met",
        "bar: 8bit over torch, one, float32: asked at least 1.55x, measured 1.60x, met",
        "bar: 8bit over bitsandbytes, one, float32: asked at least 2.00x, measured 2.00x, met",
        "bar: 8bit over flashoptim, one, float32: asked at least 1.30x, measured 1.07x, short",
        "bar: launches of a step, buckets: 1, one, float32: asked at most 2, measured 2, met",
        "bar: 8bit over bitsandbytes, gpt2, bfloat16: asked at least 10.00x, measured 12.00x, met",
        "bar: 8bit over torchao, gpt2, bfloat16: asked at least 3.00x, measured 2.00x, short",
        "bar: launches of a step, buckets: 2, gpt2, bfloat16: asked at most 3, measured 5, short",
    ]
    assert _bars.bars([case("one", "float32", row("torch"))]) == []


def test_table_of_a_gpu() -> None:
    skipped = {"name": "torchao", "label": "torchao", "batch": 0, "skipped": "out of memory"}
    copy = row("copy", speedup=None, launches=None, moved_bytes_per_parameter=None)
    lines = _tables.table(case("one", "float32", row("8bit"), copy, skipped)).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert dict(zip(cells[0], cells[2], strict=True)) == {
        "AdamW": "8bit",
        "ms": "1.25",
        "quartiles": "1 - 1.5",
        "speed-up": "1.00",
        "GB/s": "2000.0",
        "of copy": "50%",
        "moved B/param": "16.03",
        "state B/param": "2.030",
        "launches": "2",
        "peak extra MiB": "3.0",
        "rounds": "9",
    }
    assert cells[3][0] == "copy"
    assert lines[-1] == "skipped: torchao: out of memory"


def test_committed_results_of_a_cpu_still_make_a_table() -> None:
    for path in sorted((BENCHMARKS / "results").glob("step-cpu-*.json")):
        for one in json.loads(path.read_text())["cases"]:
            header = _tables.table(one).splitlines()[0]
            assert " path " in header
            assert "launches" not in header
