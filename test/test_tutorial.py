"""The tutorial: its data, its schedule, its report, and a small run from end to end."""

import itertools
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="no matplotlib, which the tutorial plots with: install it")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tutorials"))

import _gpt
import _progress
import _report
import train_gpt

# Large enough that every matrix has 8-bit state.
TINY = (
    "--no-compile --device cpu --steps 6 --batch 2 --layers 1 --width 64 --heads 2 --context 32 "
    "--evaluations 3 --held-out-batches 2"
).split()


@pytest.fixture
def _torch_settings() -> Iterator[None]:
    """Undo what the tutorial sets for the whole process."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.compiler.set_stance("default")


@pytest.fixture
def text() -> _gpt.Text:
    return _gpt.Text(torch.arange(200, dtype=torch.uint8), torch.arange(100, dtype=torch.uint8))


def settings(*arguments: str) -> train_gpt.Settings:
    return train_gpt.parse_arguments([*TINY, *arguments])[1]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    training = train_gpt.Training(train_gpt.RESTARTED, settings())
    training.load(path)
    return training.bits()


def test_text_is_the_library_itself() -> None:
    files = _gpt.stdlib_files()
    names = {path.name for path in files}
    assert {"argparse.py", "decoder.py"} <= names  # a module, and one of a package
    assert not any({"site-packages", "test", "tests"} & set(path.parts) for path in files)
    assert files == sorted(files)


def test_split_is_by_file_and_always_the_same() -> None:
    files = [Path(f"{number}.py") for number in range(100)]
    train, held_out = _gpt.split_files(files)
    assert len(held_out) == 5
    assert sorted(train + held_out) == sorted(files)
    assert held_out != sorted(held_out), "not shuffled"
    assert _gpt.split_files(files[::-1]) == (train, held_out)


def test_batches_follow_from_seed_and_step(text: _gpt.Text) -> None:
    inputs, targets = text.batch(step=3, seed=0, size=4, context=8)
    assert inputs.shape == targets.shape == (4, 8)
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(targets, inputs + 1)  # the text counts up
    assert torch.equal(inputs, text.batch(step=3, seed=0, size=4, context=8)[0])
    assert not torch.equal(inputs, text.batch(step=4, seed=0, size=4, context=8)[0])
    assert not torch.equal(inputs, text.batch(step=3, seed=1, size=4, context=8)[0])


def test_held_out_windows_reach_from_end_to_end(text: _gpt.Text) -> None:
    batches = text.held_out_batches(count=3, size=2, context=9)
    assert [inputs.shape for inputs, _ in batches] == [(2, 9)] * 3
    assert batches[0][0][0, 0] == 0
    assert batches[-1][1][-1, -1] == 99


def test_model_looks_at_the_past_only() -> None:
    model = settings().model()
    inputs = torch.randint(256, (1, 32))
    changed = inputs.clone()
    changed[0, 20] += 1
    same = (model(inputs) == model(changed)).all(dim=2)[0]
    assert same[:20].all()
    assert not same[20:].any()


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    run = settings("--steps", "100", "--lr", "0.5")
    rates = [train_gpt.learning_rate(step, run) for step in range(101)]
    assert rates[0] == pytest.approx(0.05)
    assert rates[:10] == sorted(rates[:10])
    assert rates[9] == rates[10] == max(rates) == 0.5
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.25)
    assert rates[100] == pytest.approx(0)


@pytest.fixture
def memory_unmeasured(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Start no process to measure memory: each takes seconds."""
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "peak_memory", lambda *_: 123_000_000)
        yield patch


@pytest.mark.usefixtures("_torch_settings")
def test_run_from_end_to_end(
    tmp_path: Path,
    memory_unmeasured: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [*TINY, "--full", "--out", str(tmp_path)]
    assert train_gpt.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "torchao8.AdamW8bit.restarted has the same bits in all" in printed
    assert "Written by the GPT that torchao8.AdamW8bit trained:\nclass Reader" in printed
    assert printed.index("\nAdamW, state of ") < printed.index("\nAdamW8bit, state of ")
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    rows = [line.split("|") for line in table.splitlines() if "AdamW" in line and "|" in line]
    assert [row[1].strip() for row in rows] == list(train_gpt.OPTIMIZERS)
    # Six steps near the start: the three runs are within rounding of each other.
    losses = [float(row[2]) for row in rows]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)
    assert losses[0] < 5.5  # below that of a uniform guess, log 256
    assert [float(row[4]) for row in rows] == pytest.approx([8, 8, 2.1], abs=0.1)
    assert [float(row[5]) for row in rows] == [123] * 3
    assert all(float(row[6]) > 0 for row in rows)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")

    memory_unmeasured.undo()
    assert train_gpt.main([*arguments, "--optimizers", "torchao8.AdamW"]) == 0
    printed = capsys.readouterr().out
    assert " 123.0 " not in printed
    assert "torchao8.AdamW is finished in" in printed
    assert "step 1/6" not in printed


@pytest.mark.usefixtures("_torch_settings", "memory_unmeasured")
def test_interrupted_run_continues_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = train_gpt.RESTARTED
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = [*TINY, "--optimizers", name, "--out"]
    assert train_gpt.main([*arguments, str(whole)]) == 0
    capsys.readouterr()

    train_step = train_gpt.Training.train_step
    handler = signal.getsignal(signal.SIGINT)  # a job in the background ignores the signal

    def interrupted_step(training: train_gpt.Training, text: _gpt.Text) -> None:
        if training.step == 1:
            signal.raise_signal(signal.SIGINT)
        train_step(training, text)

    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.Training, "train_step", interrupted_step)
        assert train_gpt.main([*arguments, str(broken)]) == 130
    assert "continues from the checkpoints" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is handler
    assert torch.load(broken / f"{name}.pt", weights_only=True)["step"] == 2

    assert train_gpt.main([*arguments, str(broken)]) == 0
    continued = capsys.readouterr().out
    assert f"{name} continues at step 2 from" in continued
    assert f"{name}.restarted: step 6/6" in continued
    assert (
        continued.split(f"{name}.restarted: step 6/6")[1].split("\n")[0].endswith("about 0 s left")
    )
    expected = tensors(whole / f"{name}.pt")
    actual = tensors(broken / f"{name}.pt")
    assert expected.keys() == actual.keys()
    assert all(torch.equal(expected[key], actual[key]) for key in expected)


@pytest.mark.usefixtures("_torch_settings", "memory_unmeasured")
def test_restart_that_changes_a_bit_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = train_gpt.RESTARTED
    arguments = [*TINY, "--optimizers", name, "--out", str(tmp_path)]
    assert train_gpt.main(arguments) == 0
    (tmp_path / f"{name}.restarted.pt").unlink()
    halfway = tmp_path / f"{name}.halfway.pt"
    content = torch.load(halfway, weights_only=True)
    for state in content["optimizer"]["state"].values():
        if "exp_avg_codes" in state:
            state["exp_avg_codes"] ^= 1
    torch.save(content, halfway)
    assert train_gpt.main(arguments) == 1
    assert f"{name}.restarted differs in" in capsys.readouterr().out


def test_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    train_gpt.Training("torchao8.AdamW", settings()).save(path)
    other = train_gpt.Training("torchao8.AdamW", settings("--seed", "7"))
    with pytest.raises(SystemExit, match=r"run\.pt was made with seed 0 \(now 7\): use --fresh"):
        other.load(path)


@pytest.mark.usefixtures("_torch_settings")
def test_a_short_run_shows_no_times_that_say_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_gpt.main([*TINY, "--out", str(tmp_path), "--optimizers", "torchao8.AdamW"]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "bytes per parameter" in table
    assert not {"peak memory", "step", "ms"} & {cell.strip() for cell in table.split("|")}
    printed = capsys.readouterr().out
    assert "step 1/6" in printed
    assert "Measuring" not in printed


def test_sizes_and_what_is_compiled() -> None:
    """The short run compiles nothing, which takes longer than its training."""
    short, full = (
        train_gpt.parse_arguments(["--device", "cpu", *more])[1] for more in ([], ["--full"])
    )
    assert (short.compile, full.compile) == (False, True)
    assert short.steps * short.width < full.steps * full.width
    assert (
        train_gpt.parse_arguments(["--device", "cpu", "--full", "--no-compile"])[1].compile is False
    )


class Clock:
    """A time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_no_silence_is_longer_than_it_may_be() -> None:
    """Work of 100 seconds that prints a line at its 3rd and its 50th: beats fill the gaps."""
    clock, said = Clock(), []

    def write(line: str) -> None:
        said.append((clock.now, line))

    pulse = _progress.Pulse(every=6, clock=clock, write=write)
    pulse._silent = False
    pulse.doing("compiling")
    for half_seconds in range(200):
        clock.now = half_seconds / 2
        if clock.now in (3, 50):
            pulse.say("a line")
        if clock.now == 50:
            pulse.doing("measuring")
        pulse.beat()
    times = [0.0, *(when for when, _ in said), 100.0]
    assert max(b - a for a, b in itertools.pairwise(times)) <= 6.5
    assert min(b - a for a, b in itertools.pairwise(times[:-1])) >= 2
    assert (9.0, "... compiling, for 9 s") in said
    assert (56.0, "... measuring, for 6 s") in said


def test_a_script_that_is_imported_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    _progress.start("train_gpt", "Loading")
    _progress.PULSE.beat()
    assert capsys.readouterr().out == ""


def test_the_time_that_is_left() -> None:
    clock = Clock()
    remaining = _progress.Remaining(11, after=30, clock=clock)
    assert "not known" in str(remaining)
    remaining.step()  # which compiles
    assert "not known" in str(remaining)
    for _ in range(2):
        clock.now += 10
        remaining.step()
    assert str(remaining) == "about 1 min 50 s left"  # 8 steps of 10 s, and 30
    remaining.skip(3)
    assert str(remaining) == "about 1 min 20 s left"


@pytest.mark.skipif(not _report.STATUS.exists(), reason="the system does not tell the peak")
def test_peak_memory_is_that_of_the_work() -> None:
    torch.ones(300, 250_000)  # of this process: must not count
    # 1 MB a row. A function of torch: a new process would import this module for one of it.
    small, large = (_report.peak_memory("cpu", torch.ones, rows, 250_000) for rows in (10, 110))
    assert small is not None
    assert large is not None
    assert (large - small) / 1e6 == pytest.approx(100, abs=5)


def test_median_is_of_interleaved_calls() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    medians = _report.median_ms(calls, "cpu", rounds=3)
    assert order == list("ababab")
    assert 0 < medians["a"] < 1000


def test_table_compares_with_the_first_row() -> None:
    results = [
        _report.Result("one", [3.0], [(1, 2.0)], 8.0, 100_000_000, 1.5),
        _report.Result("two", [3.0], [(1, 1.99)], 2.03, None, 1.0),
    ]
    rows = _report.table(results).splitlines()[:5]
    assert len({len(row) for row in rows}) == 1
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[3] == ["one", "2.0000", "0.00%", "8.00", "100.0", "1.50"]
    assert cells[4] == ["two", "1.9900", "-0.50%", "2.03", "not known", "1.00"]
