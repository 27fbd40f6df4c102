"""``benchmarks.step``: contenders, rules, lists; what is timed and how; contenders that fail."""

import functools
import itertools
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_params, set_grads
from torch import Tensor
from torch.autograd import DeviceType

import benchmarks.step.__main__ as command
import torchao8
from benchmarks import reporting
from benchmarks.step import contenders, devices, rounds, tables, tensor_lists

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
Step = Callable[[], object]


class FakeGpu(devices.Cpu):
    """Is treated as a GPU, and computes on the CPU."""

    kind = "cuda"
    settle_s = 0.0
    lists = ("mixed", "deadly")
    buffer_bytes = 1 << 20
    defaults = devices.Cuda.defaults

    def __init__(self, name: str) -> None:
        super().__init__("cpu")
        self.result_name = "fake-gpu-8"

    def describe(self, threads: int) -> dict[str, Any]:
        return {"cpu": "some CPU", "gpu": {"name": "Fake GPU 8"}}

    def free_bytes(self) -> int:
        return 1 << 40

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


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the names above known to the benchmark."""
    monkeypatch.setitem(devices.DEVICES, "fake", FakeGpu)
    for name, shapes in (("mixed", [(64, 256), (300,)]), ("deadly", [(32, 256)] * 3)):
        monkeypatch.setitem(
            tensor_lists.tensor_lists(), name, tensor_lists.TensorList(name, shapes)
        )
    fragile = contenders.Contender("fragile", "Fragile", "test_benchmark.Fragile")
    monkeypatch.setitem(contenders.CONTENDERS, "fragile", fragile)


ARGS = ["--device", "fake", "--rounds", "3", "--turn", "0.002", "--threads", "1"]


# -- from end to end -------------------------------------------------------------------------------


@pytest.mark.usefixtures("known", "forked")
def test_rows_are_right_and_failures_stay_with_their_contender(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ARGS, "--contenders", "8bit", "fragile", "--out", str(tmp_path)]
    command.main(arguments)
    record = json.loads((tmp_path / "fake-gpu-8.json").read_text())
    assert [(case["list"], case["dtype"]) for case in record["cases"]] == [
        (name, dtype) for name in ("mixed", "deadly") for dtype in ("float32", "bfloat16")
    ]
    rows = [{row["name"]: row for row in case["rows"]} for case in record["cases"]]
    assert rows[0]["fragile"]["skipped"] == "ValueError: float32 is"
    assert rows[1]["fragile"]["rounds"] == 3  # in a new process
    assert rows[2]["fragile"]["skipped"] == "the process ended (exit status 7)"
    assert rows[3]["fragile"]["skipped"] == "the process ended (exit status 7)"
    for case, numel, itemsize in zip(rows, (16684, 16684, 24576, 24576), (4, 2, 4, 2), strict=True):
        ours, theirs = case["8bit"], case["torch"]
        assert theirs["speedup"] == 1
        pairs = zip(theirs["ms_of_rounds"], ours["ms_of_rounds"], strict=True)
        assert ours["speedup"] == pytest.approx(sorted(a / b for a, b in pairs)[1])
        assert ours["ms"] == sorted(ours["ms_of_rounds"])[1]
        assert ours["rounds"] == len(ours["ms_of_rounds"]) == 3
        assert ours["launches"] == 3
        # torch's state has the dtype of the parameter, and a step count of float32 for each.
        tensors = 2 if numel == 16684 else 3
        state = 2 * itemsize * numel + 4 * tensors
        assert theirs["state_bytes_per_parameter"] == pytest.approx(state / numel)
        moved = 3 * itemsize * numel + 2 * state
        assert theirs["moved_bytes_per_parameter"] == pytest.approx(moved / numel)
        assert theirs["gb_per_s"] == pytest.approx(moved / theirs["ms"] / 1e6)
        rate = case["copy"]["gb_per_s"] * ours["share_of_copy_rate"]
        assert rate == pytest.approx(ours["gb_per_s"])
        assert "launches" not in case["copy"]
    assert [case["8bit"]["buckets"] for case in rows] == [2, 2, 1, 1]
    assert record["left_out"] == []
    assert record["device"]["gpu"]["name"] == "Fake GPU 8"
    assert record["versions"]["torch"] == torch.__version__
    output = capsys.readouterr().out
    assert "skipped: Fragile: the process ended (exit status 7)" in output


@pytest.mark.usefixtures("known", "forked")
def test_a_rule_is_measured_against_its_fastest_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*ARGS, "--list", "mixed", "--dtype", "float32", "--family", "SGD"]
    command.main([*arguments, "--out", str(tmp_path)])
    (found,) = json.loads((tmp_path / "fake-gpu-8-mixed-family.json").read_text())["cases"]
    rows = {row["name"]: row for row in found["rows"]}
    rivals = ["sgd-for-loop", "sgd-foreach", "sgd-fused"]
    assert list(rows) == [*rivals, "sgd-8bit", "copy", "scale"]
    assert found["rule"] == "SGD"
    assert found["fastest"] == min(rivals, key=lambda name: rows[name]["ms"])
    fastest, ours = rows[found["fastest"]], rows["sgd-8bit"]
    assert fastest["speedup"] == 1
    pairs = zip(fastest["ms_of_rounds"], ours["ms_of_rounds"], strict=True)
    assert ours["speedup"] == pytest.approx(sorted(a / b for a, b in pairs)[1])
    line = capsys.readouterr().out.split("| fastest")[1].splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["torchao8.SGD8bit", fastest["label"], "float32"]
    assert cells[5] == f"{ours['speedup']:.2f}"


def test_what_the_time_limit_leaves_out_is_named(known: None) -> None:
    args, device = command.parse([*ARGS, "--list", "all", "--time-limit", "1e-9"])
    with rounds.Bench(device, 1, rounds.Plan(3, 0.1, 1, deadline=0)) as bench:
        cases, left_out = command.measure(args, device, bench)
    assert cases == []
    assert [(one["list"], one["dtype"]) for one in left_out] == [
        (name, dtype) for name in ("mixed", "deadly") for dtype in ("float32", "bfloat16")
    ]


# -- how it is measured ----------------------------------------------------------------------------


def test_slow_contenders_sit_out_rounds_evenly() -> None:
    plan = rounds.Plan(rounds=10, turn=0.1, budget=5)
    for step_s, count in ((0.01, 10), (1.0, 5), (1.6, 3)):
        turns = plan.turns(step_s)
        assert len(turns) == count
        gaps = [b - a for a, b in itertools.pairwise(turns)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("gigabytes", "batches"),
    [
        (200, [["8bit", "32bit", "bitsandbytes", "flashoptim"]]),
        (64, [["8bit", "32bit"], ["bitsandbytes"], ["flashoptim"]]),
        (20, [[]]),
    ],
)
def test_batches_fit_into_memory(
    gigabytes: int, batches: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # One tensor of 1e9 float32: 8 GB, and 8 of 32-bit state or 3 of 8-bit state; 28 and 8 more
    # while bitsandbytes and FlashOptim make it. torch's 16 GB are in every batch.
    device = FakeGpu("fake")
    monkeypatch.setattr(device, "free_bytes", lambda: gigabytes * 10**9)
    bench = rounds.Bench(device, 1, rounds.Plan(3, 1, 1))
    names = ["8bit", "32bit", "bitsandbytes", "flashoptim"]
    chosen = [contenders.CONTENDERS[name] for name in names]
    always = [*contenders.MEMORY, contenders.CONTENDERS["torch"]]
    tensors = tensor_lists.tensor_lists()["one"]
    found = bench.batches(chosen, always, tensors, 4)
    assert [[one.name for one in batch] for batch in found] == batches


def test_steps_on_a_cpu_are_timed_one_by_one() -> None:
    took: list[float] = []

    def step() -> None:
        start = time.perf_counter()
        time.sleep(0.5 if len(took) % 5 == 4 else 0.004)
        took.append(time.perf_counter() - start)

    assert 0.004 <= devices.Cpu("cpu").seconds_of_step(step, 1.0) < 0.5  # the median
    assert sum(took) > 1.0


def test_steps_on_a_gpu_are_enqueued_for_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def timeit(self: Any, number: int) -> SimpleNamespace:
        counts.append(number)
        return SimpleNamespace(mean=10.0)

    monkeypatch.setattr(devices.Timer, "timeit", timeit)
    gpu = object.__new__(devices.Cuda)  # there may be none
    assert gpu.seconds_of_step(lambda: None, 25.0) == 10
    assert gpu.seconds_of_step(lambda: None, 5.0) == 10
    assert counts == [3, 2, 3, 1]


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
    assert devices.count_kernels(events) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "built without CUDA"),
        (["--device", "cuda:x"], "expected cpu, cuda"),
        (["--device", "cpu:1"], "expected cpu"),
        (["--family", "--contenders", "8bit"], "--family: expected no --contenders with it"),
        (["--family", "Adamax"], "'Adamax'"),
        (["--contenders", "Adamax"], "'Adamax'"),
        (["--contenders", "flashoptim"], "flashoptim does not run on cpu"),
        (["--list", "llama"], "--list: on cpu one of"),
        (["--rounds", "2"], "expected at least 3, got 2"),
    ],
)
def test_arguments_that_cannot_be_are_refused(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(SystemExit):
        command.parse(arguments)
    assert message in capsys.readouterr().err


# -- lists, contenders, rules ----------------------------------------------------------------------


def test_lists_are_the_models_they_are_named_after() -> None:
    lists = tensor_lists.tensor_lists()
    sizes = {name: (len(one.shapes), one.numel) for name, one in lists.items()}
    assert sizes["resnet101"] == (314, 44_549_160)
    assert sizes["gpt2"] == (148, 124_439_808)
    assert sizes["block"] == (12, 7_087_872)
    assert sizes["gpt2-hidden"] == (48, 84_934_656)
    assert sizes["llama"] == (45, 1_090_560_000)
    (one,) = tensor_lists.tensor_lists()["one"].shapes
    assert one[0] * one[1] >= 1e9
    assert one[1] % 256 == 0
    tiny = [tensor_lists.tensor_lists()[name] for name in tensor_lists.TINY]
    counts = [(len(one.shapes), one.numel // len(one.shapes)) for one in tiny]
    assert counts == [(148, 64), (1000, 64), (148, 4096), (1000, 4096)]
    args, _ = command.parse(["--list", "tiny"])
    assert tuple(args.lists) == tensor_lists.TINY
    assert args.name == "step-cpu-tiny"


def test_our_contenders_are_what_they_are_called() -> None:
    for one in contenders.CONTENDERS.values():
        assert one.options["weight_decay"] > 0  # zero lets some skip work
        if one.package in ("torchao8", "torch"):
            matrices_only = one.lists == tuple(contenders.MUON_BASELINES)
            optimizer = one.build([p for p in make_params() if p.ndim == 2 or not matrices_only])
            assert type(optimizer).__name__ == one.where.rpartition(".")[2]
            assert one.options.items() <= optimizer.defaults.items()


@pytest.mark.parametrize("name", contenders.rule_names())
def test_all_forms_of_a_rule_do_what_ours_does(name: str) -> None:
    """In float32, three steps: a few roundings of numbers below 16 apart, but for 8-bit state."""
    chosen, forms = contenders.rule(name)
    assert chosen.options["weight_decay"] > 0
    assert chosen.options["lr"] > 0
    expected_forms = {"for-loop", "foreach"} <= set(forms) <= set(contenders.FORMS)
    assert expected_forms

    def trained(build: Any) -> list[Tensor]:
        params = make_params()
        optimizer = build(params)
        for number in range(3):
            set_grads(params, number)
            optimizer.step()
        return [p.detach() for p in params]

    expected = trained(lambda params: getattr(torchao8, name)(params, **chosen.options))
    start = make_params()
    assert not any(torch.allclose(a, b) for a, b in zip(start, expected, strict=True))
    for form in contenders.rivals(name, "cpu", "float32"):
        for ours, theirs in zip(expected, trained(form.build), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5, msg=form.name)
    ours = chosen.build(make_params())
    assert type(ours) is getattr(torchao8, f"{name}8bit")
    assert chosen.options.items() <= ours.defaults.items()


def test_a_rule_in_another_format_and_on_a_path_that_is_told() -> None:
    plain, forms = contenders.rule("SGD")
    ours, same = contenders.rule("SGD", "mulaw", "avx2")
    assert same == forms
    assert (ours.name, ours.cpu_path) == ("sgd-8bit-mulaw-avx2", "avx2")
    assert ours.label == 'torchao8.SGD8bit(state_format="mulaw"), avx2'
    assert ours.options == {**plain.options, "state_format": "mulaw"}
    assert ours.build(make_params()).defaults["state_format"] == "mulaw"
    rows = [{"name": name, "ms": 1.0} for name in ("copy", ours.name, "sgd-fused")]
    found = tables.of_rule({"rule": "SGD", "fastest": "sgd-fused", "rows": rows})
    assert found == (rows[1], rows[2])


def test_muon_is_timed_on_matrices_against_torch_s() -> None:
    args, device = command.parse([])
    muon = ["muon", "muon8bit", "muon8bit-mulaw"]
    for quick in (False, True):
        args.quick = quick
        found = [one.name for one in command._chosen(args, device.kind, "gpt2-hidden")]
        assert found == muon
        assert not {*muon, "torch-muon"} & {
            one.name for one in command._chosen(args, device.kind, "gpt2")
        }
    case = {"list": "gpt2-hidden", "rows": []}
    assert tables.table(case).startswith("| Muon")
    assert tables.table({**case, "list": "gpt2"}).startswith("| AdamW")


def test_family_options_go_with_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    args, _ = command.parse(["--family", "SGD", "--state-format", "mulaw", "--cpu-path", "avx2"])
    assert args.name == "step-cpu-gpt2-family-mulaw-avx2"
    for option, value in (("--state-format", "mulaw"), ("--cpu-path", "avx2")):
        with pytest.raises(SystemExit):
            command.parse([option, value])
        assert f"{option}: expected --family with it" in capsys.readouterr().err


def test_a_form_that_is_wrong_is_left_out_where_it_is() -> None:
    """Should torch be repaired, this fails, and the form can come back."""
    assert contenders.rivals("SGD", "cpu", "float32")[-1].name == "sgd-fused"
    for name, form, device, dtype in contenders.BROKEN:
        broken = contenders.rule(name)[1][form]
        assert broken not in contenders.rivals(name, device, dtype)
        if torch.__version__.startswith("2.13."):
            p = torch.nn.Parameter(torch.full((256,), 0.02, dtype=getattr(torch, dtype)))
            p.grad = torch.full_like(p, 1e-3)
            before = p.detach().clone()
            broken.build([p]).step()
            assert torch.equal(p, before)


# -- tables ----------------------------------------------------------------------------------------


def test_table_of_a_gpu() -> None:
    row = {
        "name": "8bit", "label": "8bit", "batch": 0, "ms": 1.25, "ms_quartiles": [1.0, 1.5],
        "speedup": 1.0, "gb_per_s": 2000.0, "share_of_copy_rate": 0.5,
        "moved_bytes_per_parameter": 16.06, "state_bytes_per_parameter": 2.03, "launches": 2,
        "buckets": 1, "peak_extra_bytes": 3 << 20, "rounds": 9,
    }  # fmt: skip
    copy = {**row, "label": "copy", "speedup": None, "launches": None, "buckets": None}
    skipped = {"name": "torchao", "label": "torchao", "batch": 0, "skipped": "out of memory"}
    case = {"list": "one", "label": "one", "dtype": "float32", "rows": [row, copy, skipped]}
    lines = tables.table(case).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert dict(zip(cells[0], cells[2], strict=True)) == {
        "AdamW": "8bit", "ms": "1.25", "quartiles": "1 - 1.5", "speed-up": "1.00",
        "GB/s": "2000.0", "of copy": "50%", "moved B/param": "16.06", "state B/param": "2.030",
        "launches": "2", "buckets": "1", "peak extra MiB": "3.0", "rounds": "9",
    }  # fmt: skip
    assert cells[3][0] == "copy"
    assert lines[-1] == "skipped: torchao: out of memory"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("step-cpu-*.json")), ids=lambda p: p.stem)
def test_committed_results_still_make_a_table_and_a_picture(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib, which pictures are drawn with")
    from benchmarks import pictures

    for case in json.loads(path.read_text())["cases"]:
        header = tables.table(case).splitlines()[0]
        assert " path " in header
        assert "launches" not in header
    pictures.main([str(path), "--out", str(tmp_path)])
    assert (tmp_path / f"{path.stem.replace('-cpu', '')}.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_is_told_without_the_machine_s_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/home/me/benchmarks/step/__main__.py", "--list", "gpt2"])
    assert reporting.command_line() == "python -m benchmarks.step --list gpt2"
    monkeypatch.setattr("sys.argv", ["/home/me/benchmarks/compare.py"])
    assert reporting.command_line() == "python -m benchmarks.compare"


def test_each_reported_result_has_its_command_and_is_not_overwritten_unasked() -> None:
    text = (RESULTS.parent / "README.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `") and "python -m" in line]
    named = {name for row in rows for name in re.findall(r"`([\w-]+\.\w+)`", row.split("|")[1])}
    assert named == {path.name for path in RESULTS.iterdir()}
    folder = command.parse([])[0].out
    assert not (RESULTS.parents[1] / folder).is_relative_to(RESULTS)


def test_picture_of_memory_shows_the_estimate(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="no matplotlib, which pictures are drawn with")
    from benchmarks import memory

    rows = {name: memory.gibibytes(*what) for name, what in memory.ROWS.items()}
    elements = 8_030_261_248
    exact = rows["AdamW, float32 weights"]
    assert exact["weights"] == exact["gradients"] == pytest.approx(4 * elements / 2**30)
    assert exact["optimizer state"] == pytest.approx(8 * elements / 2**30, rel=1e-6)
    smallest = rows["Lion8bit, bfloat16 weights"]
    assert smallest["weights"] == exact["weights"] / 2
    assert sum(smallest.values()) == min(sum(row.values()) for row in rows.values())
    memory.main(["--out", str(tmp_path)])
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
