"""``benchmarks.formats``: its shadows, what it compares, its report; and a quick run."""

import json
import shutil
from pathlib import Path
from typing import Any

import format_reference as reference
import pytest
import torch
from torch import Tensor

pytest.importorskip("benchmarks.formats", reason="no benchmarks beside the tests")

import benchmarks.formats.__main__ as study
from benchmarks.formats import report, shadows, tasks

if shutil.which("c++") is None:
    pytest.skip("no C++ compiler, which the shadows need", allow_module_level=True)

SHAPES = (16, 256), (9, 300), (5, 1024)  # blocks of 256, and shorter ones at the end of a row


def gradients(step: int) -> list[Tensor]:
    """Of sizes that differ inside a block by up to 100."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for shape in SHAPES:
        sizes = 10 ** (-2 * torch.rand(shape, generator=generator))
        found.append(sizes * torch.randn(shape, generator=generator))
    return found


def errors(shadow: shadows.Shadow, beta2: float, steps: int) -> list[float]:
    exact = shadows.Exact(gradients(0), beta2)
    for step in range(steps):
        grads, last = gradients(step), step == steps - 1
        updates, right = shadow.step(grads, last), exact.step(grads, last)
    return study.compare(updates, right)


def test_a_format_that_the_library_has_gives_its_bits() -> None:
    """So the constants that it does not have are compared with the arithmetic it would use."""
    shadow = shadows.Mulaw(4, 4, gradients(0), 0.999)
    options = {"state_format": "mulaw", "min_8bit_size": 0}
    library = shadows.OfLibrary("torchao8", "AdamW8bit", gradients(0), 0.999, **options)
    for step in range(30):
        ours, theirs = (one.step(gradients(step), True) for one in (shadow, library))
        assert all(map(torch.equal, ours, theirs))


def test_exact_moments_are_those_of_torch() -> None:
    exact = shadows.Exact(gradients(0), 0.95)
    torchs = shadows.OfLibrary("torch.optim", "AdamW", gradients(0), 0.95)
    for step in range(5):
        ours, theirs = (one.step(gradients(step), True) for one in (exact, torchs))
        for u, t in zip(ours, theirs, strict=True):
            torch.testing.assert_close(u, t, rtol=1e-5, atol=1e-7)
    half = [u / 2 for u in ours]
    largest = max(u.abs().max().item() for u in ours)
    assert study.compare(half, ours) == pytest.approx([0.5, 0.5, largest / 2])


@pytest.mark.parametrize("fits", [True, False])
def test_codes_of_4_bits_stand_for_the_values_of_their_oracle(fits: bool) -> None:
    """After one step from nothing: each second moment is one of the 16 values, a neighbour of the
    exact one; each first moment the nearest level of m over its root."""
    shadow = shadows.FourBit(shadows.EIGHTHS, gradients(0), 0.999, fits=fits)
    shadow.step(gradients(1), False)
    for g, (m, v) in zip(gradients(1), shadow._states, strict=True):
        for row in range(g.shape[0]):
            for block in range(0, g.shape[1], 64):
                part = (slice(row, row + 1), slice(block, block + 64))
                g_, m_, v_ = (t[part].double()[0] for t in (g, m, v))
                exact = g_.square() * 0.001
                scale = reference.scale_of_squares(exact.max().item())
                values = reference.squares_of_4bit() * scale
                code = (v_[:, None] - values).abs().argmin(1)
                assert torch.equal(v_.float(), values[code].float())
                gap = (values[code] - exact).abs() / values[(code + 1).clamp_max(15)]
                assert (gap[code > 0] < 0.51).all()
                y = 0.1 * g_ / v_.sqrt()
                unit = y[y.abs().argmax()].item()
                if fits:
                    unit = reference.scale_of_levels(y.max().item(), y.min().item())
                steps = y / unit * 8
                away = (steps - (m_ / v_.sqrt() / unit * 8).round()).abs()
                # A level of -8 there is not.
                assert (away[steps > -7.5] < 0.5001).all()
                assert not fits or steps.min() > -7.001


@pytest.mark.parametrize("beta2", [0.999, 0.95])
def test_errors_tell_formats_apart(beta2: float) -> None:
    makers = {name: make for name, make in shadows.available().items() if "torchao" not in name}
    found = {name: errors(make(gradients(0), beta2), beta2, 12)[0] for name, make in makers.items()}
    assert errors(shadows.Exact(gradients(0), beta2), beta2, 3)[0] == 0
    eight = [error for name, error in found.items() if "4" not in name.split("/")[0] or "L" in name]
    assert all(0.01 < error < 0.4 for error in eight)
    assert min(e for name, e in found.items() if name.startswith("4 bits")) > max(
        found[shadows.DYNAMIC], found["mulaw L34/L44"]
    )


def test_a_format_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3, 4\) mantissa bits"):
        shadows.Mulaw(3, 4, gradients(0), 0.999).step(gradients(0), False)


def test_gradients_are_those_of_parameters_with_8_bit_state() -> None:
    task = tasks.TASKS["gpt"]
    assert isinstance(task, tasks.Training)
    rows, loss = next(task.gradients(5000, 0))
    assert sum(g.numel() for g in rows) * task.every == 2_490_368
    assert 4 < loss < 7
    assert {g.shape[1] for g in rows} == {256, 1024}


def test_quick_run_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In two goes: what is recorded is not made again, and the training is, for the others."""
    path = tmp_path / "records.jsonl"
    common = ["--quick", "--records", str(path), "--out", str(tmp_path)]
    only = ["--only", "gpt/*/dynamic/*", "unequal*/mulaw*"]
    study.main([*common, "--only", "gpt/*0.95/dynamic/*"])
    first = path.read_text()
    study.main([*common, *only])
    assert "10 runs, 1 of them recorded" in capsys.readouterr().out
    assert path.read_text().startswith(first)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2 * 10  # at each of the two steps that are compared
    # A record that ends early, as a stop leaves it, is made again.
    path.write_text(path.read_text() + json.dumps(lines[-2 - 8]) + "\n")
    study.main([*common, *only])
    assert "10 runs, 9 of them recorded" in capsys.readouterr().out
    study.main([*common, "--report", *only])
    summary = json.loads((tmp_path / "formats.json").read_text())
    assert {cell["task"] for cell in summary["cells"]} == {"gpt", "unequal 100"}
    for cell in summary["cells"]:
        assert [row[0] for row in cell["update"]] == [2, 4]
        assert all(0 < row[1] < 1 for row in cell["update"])
    assert "error at 4" in (tmp_path / "formats.md").read_text()


def test_the_report_has_the_means_over_seeds() -> None:
    def record(seed: int, error: float, **run: Any) -> dict[str, Any]:
        about = {"task": "gpt", "of": {"lr": 1}, "beta2": 0.95, "shadow": "dynamic", "seed": seed}
        result = {"update": [[200, error, 1.0, 2.0]], "loss": 1.5, "elements": 9, "seconds": 36.0}
        machine = {"cpu": "some CPU", "versions": {"torch": "2.13.0"}}
        return {"run": {**about, **run}, "result": result, "machine": machine}

    records = [record(0, 0.1), record(1, 0.2), record(0, 0.5, shadow="mulaw L34/L44")]
    summary = report.summarize(records)
    assert [cell["seeds"] for cell in summary["cells"]] == [2, 1]
    first, second = (line.split("|") for line in report.table(summary["cells"]).splitlines()[2:])
    assert [cell.strip() for cell in first[1:-1]] == ["0.95", "dynamic", "0.1500", "1.000", "2.00"]
    assert [cell.strip() for cell in second[2:4]] == ["mulaw L34/L44", "0.5000"]
    assert "9 elements; lr 1; loss 1.5000." in report.page(summary)
