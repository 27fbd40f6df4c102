"""``benchmarks.quality``: its runs, its records, its report; and a quick run of it all."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="no matplotlib, which the benchmark draws with")

import benchmarks.quality.__main__ as quality
import torchao8
from benchmarks import pictures
from benchmarks.quality import moments
from benchmarks.quality import report as shown
from benchmarks.quality import runs as study
from benchmarks.records import Records, key

QUICK = study.QUICK
MACHINE = {"cpu": "some CPU", "threads": 1, "versions": {"torch": "2.13.0", "bitsandbytes": None}}


@pytest.fixture(autouse=True)
def _same_threads() -> Any:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


# -- what is run -----------------------------------------------------------------------------------


def test_every_optimizer_of_the_library_is_in_the_study() -> None:
    names = [name for name in torchao8.__all__ if not name.startswith("Paged")]
    classes = {name.removesuffix("8bit") for name in names if name.endswith("8bit")}
    classes.remove("Muon")  # MuonAdamW steps with it
    assert {*study.RULES} == classes
    assert {run.row for run in study.plan(QUICK) if run.study == "family"} == classes


def test_runs_are_distinct_and_in_order() -> None:
    runs = study.plan(study.FULL)
    keys = [key(run.identity()) for run in runs]
    assert len(set(keys)) == len(keys)
    assert list(dict.fromkeys(run.study for run in runs)) == ["family", "ablation", "rounding"]
    for name in study.STUDIES:
        seeds = [run.seed for run in runs if run.study == name]
        assert seeds == sorted(seeds)
        assert set(seeds) == set(range(5))
    assert min(run.steps for run in runs if run.study == "rounding") >= 5000


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    rates = [study.learning_rate(step, 100, 0.5) for step in range(101)]
    assert rates[:10] == pytest.approx([0.05 * (step + 1) for step in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[100] == pytest.approx(0.05)


def test_a_seed_gives_all_optimizers_the_same_start_and_batches() -> None:
    task = QUICK.sizes["gpt"]
    losses = [task.loss(task.model(seed), step, seed).item()
              for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))]  # fmt: skip
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_a_run_that_diverges_is_told() -> None:
    runs = study.plan(QUICK)
    (run,) = (r for r in runs if r.label == "family/gpt/SGD/8-bit/seed 0")
    task = run.size
    good = study.train(run)
    assert not good["diverged"]
    assert good["steps_done"] == run.steps
    assert good["held_out"] < task.guess
    assert 1 < good["state_bytes_per_parameter"] < 1.2
    wild = study.train(dataclasses.replace(run, lr=1e30))
    assert wild["diverged"]
    assert wild["steps_done"] < run.steps


# -- emulated codecs, the error of an update -------------------------------------------------------


@pytest.mark.parametrize("map_name", ["linear", "dynamic"])
@pytest.mark.parametrize("scope", ["tensor", "blocks"])
def test_emulated_moments_are_the_nearest_of_the_map(map_name: str, scope: str) -> None:
    params = [torch.nn.Parameter(torch.zeros(32, 256)) for _ in range(2)]
    small = torch.nn.Parameter(torch.zeros(15, 256))
    groups = [{"params": [params[0], small]}, {"params": [params[1]], "optim_bits": 32}]
    exact = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params], lr=0.1)
    emulated = moments.EmulatedAdamW8bit(groups, map_name, scope, lr=0.1)
    params[0].grad = torch.randn(32, 256) * torch.logspace(0, -4, 32)[:, None]
    params[0].grad[5] = 0
    params[1].grad, small.grad = params[0].grad.clone(), torch.ones_like(small)
    for ours, theirs in zip(params, exact.param_groups[0]["params"], strict=True):
        theirs.grad = ours.grad.clone()
    emulated.step()
    exact.step()
    assert torch.equal(params[0], params[1])  # the first step is from exact moments
    for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
        moment, (want, other) = emulated.state[params[0]][name], (
            exact.state[p][name] for p in exact.param_groups[0]["params"]
        )  # fmt: skip
        assert torch.equal(emulated.state[params[1]][name], other)
        assert not torch.equal(moment, want)
        blocks = want.reshape((1, -1) if scope == "tensor" else (-1, 256))
        absmax = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
        book = moments.MAPS[map_name](signed)
        distances = ((blocks / absmax)[..., None] - book).abs()
        nearest = book[distances.argmin(dim=2)] * absmax
        torch.testing.assert_close(moment, nearest.reshape(moment.shape), rtol=1e-6, atol=0)
        assert (moment[5] == 0).all()
    assert (emulated.state[small]["exp_avg"] == 0.1).all()


def test_error_of_an_update_is_nothing_for_exact_moments_and_found_in_others() -> None:
    def errors(optimizer: Any) -> list[float]:
        watch = moments.UpdateError(optimizer, every=2)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            p.grad = torch.randn(p.shape, generator=generator)
            watch.before_step()
            optimizer.step()
            watch.after_step()
        assert [step for step, _ in watch.errors] == [2, 4]
        if optimizer.defaults["optim_bits"] == 8:
            low, median, high = watch.stored_over_exact()
            assert 0.5 < low < 0.99 < median < 1.01 < high < 2
        return [error for _, error in watch.errors]

    options = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1}
    p = torch.nn.Parameter(torch.randn(64, 256))
    assert max(errors(torchao8.AdamW([p], **options))) < 1e-4
    # After a step of 8-bit state: half a code of 64 in the highest decade, more below it.
    assert 0.003 < min(errors(torchao8.AdamW8bit([p], **options))) < 0.1
    watch = moments.UpdateError(torchao8.AdamW([p], **options), every=1)
    watch._adam.param_groups[0]["eps"] = 1.0  # not that of the optimizer
    p.grad = torch.randn(64, 256)
    watch.before_step()
    watch._optimizer.step()
    watch.after_step()
    assert watch.errors[0][1] > 0.5


# -- records ---------------------------------------------------------------------------------------


def test_records_outlive_a_kill(tmp_path: Path) -> None:
    first, second, third = study.plan(QUICK)[:3]
    path = tmp_path / "runs" / "records.jsonl"
    records = Records(path)
    records.add(first, {"held_out": 1.0, "diverged": False}, MACHINE)
    records.add(second, {"error": "RuntimeError: no kernel"}, MACHINE)
    with path.open("a") as file:
        file.write('{"run": {"study": "fam')  # killed while it wrote
    again = Records(path)
    assert [again.has(run) for run in (first, second, third)] == [True, False, False]
    again.add(second, {"held_out": 2.0, "diverged": False}, MACHINE)
    again.add(third, {"held_out": 3.0, "diverged": False}, MACHINE)
    found = [record["result"]["held_out"] for record in Records(path).values()]
    assert found == [1.0, 2.0, 3.0]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_run_with_other_settings_is_another_run(tmp_path: Path) -> None:
    records = Records(tmp_path / "records.jsonl")
    run = study.plan(QUICK)[0]
    records.add(run, {"held_out": 1.0, "diverged": False}, MACHINE)
    for change in ({"lr": 0.5}, {"steps": 5}, {"seed": 1}, {"options": {"betas": (0.9, 0.9)}},
                   {"size": study.FULL.sizes["gpt"]}):  # fmt: skip
        assert not records.has(dataclasses.replace(run, **change))
    assert not any(Records(records.path).has(r) for r in study.plan(study.FULL))


# -- the report, of made-up records ----------------------------------------------------------------


def record(run: study.Run, held_out: float, **result: Any) -> dict[str, Any]:
    diverged = not math.isfinite(held_out)
    values = {"held_out": None if diverged else held_out, "diverged": diverged, "seconds": 36.0}
    made = json.loads(json.dumps({"run": run.identity()}))  # as it comes from the file
    return {**made, "result": {**values, **result}, "machine": MACHINE, "date": "2026-01-01"}


def made_up() -> tuple[list[study.Run], list[dict[str, Any]]]:
    """Three seeds. 8-bit Adam is 0.01 worse, Lion 0.5, SGD diverges once, AdamW has no 8-bit."""
    runs = study.plan(dataclasses.replace(QUICK, seeds=3))
    records = []
    for run in runs:
        loss = 2.0 + 0.1 * run.seed
        eight = run.column == "8-bit"
        if run.study == "family" and run.task == "gpt":
            if run.row == "Adam":
                loss += {"8-bit": 0.01, "8-bit mulaw": 0.02}.get(run.column, 0.0)
            elif run.row == "Lion":
                loss += 0.5 * eight
            elif run.row == "SGD":
                loss = math.inf if eight and run.seed == 1 else loss
            elif run.row == "AdamW":
                if eight:
                    continue
            if run.column == "bitsandbytes" and run.row == "RMSprop":
                records.append(record(run, loss, error="RuntimeError: no kernel"))
                continue
        elif run.study == "ablation":
            if run.row == "emulated: linear, tensor":
                loss = math.inf if run.seed else loss
            elif run.row == "emulated: dynamic, tensor":
                loss += 0.25
        elif run.study == "rounding" and run.column != "32-bit":
            error = 0.2 if run.column == "nearest" else 0.07
            errors = [[2, error / 2 + run.seed / 100], [4, error + run.seed / 100]]
            records.append(
                record(run, loss, update_error=errors, stored_over_exact=[0.5, 1.0, 2.0])
            )
            continue
        records.append(record(run, loss))
    return runs, records


def cells_of(table: str) -> list[dict[str, Any]]:
    """Markdown tables as a dict for each line; cells under equal headers are in a tuple."""
    found: list[dict[str, Any]] = []
    for block in table.split("\n\n"):
        lines = [line for line in block.splitlines() if line.startswith("|")]
        headers, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
        for row in rows[1:]:
            pairs = list(zip(headers, row, strict=True))
            many = {h: tuple(v for k, v in pairs if k == h) for h in headers}
            found.append({h: v if len(v) > 1 else v[0] for h, v in many.items()})
    return found


def test_family_table() -> None:
    runs, records = made_up()
    summary = shown.summarize(runs, records)
    assert summary["runs_planned"] == len(runs)
    assert summary["runs_recorded"] == len(records) == len(runs) - 3
    assert summary["hours"] == pytest.approx(len(records) / 100)
    table = shown.family_table(summary["cells"])
    rows: dict[str, dict[str, Any]] = {}  # the lines of both tables
    for line in cells_of(table):
        if line["task"] == "gpt":
            rows.setdefault(line["rule"], {}).update(line)
    assert rows["Adam"]["32-bit"] == "2.1000 ± 0.1000"
    assert rows["Adam"]["8-bit"] == "2.1100 ± 0.1000"
    assert rows["Adam"]["8-bit - 32-bit"] == "+0.0100 ± 0.0000"
    assert rows["Adam"]["8-bit mulaw - 32-bit"] == "+0.0200 ± 0.0000"
    verdicts = {name: row["within"] for name, row in rows.items()}
    others = dict.fromkeys(study.RULES, ("yes", "yes"))
    mine = {"AdamW": ("", "yes"), "Lion": ("no", "yes"), "SGD": ("no", "yes")}
    assert {name: both[:2] for name, both in verdicts.items()} == {**others, **mine}
    assert rows["AdamW"]["8-bit"] == rows["AdamW"]["8-bit - 32-bit"] == ""
    assert rows["Lion"]["torch.optim"] == ""
    assert rows["SGD"]["8-bit"] == "2.1000 ± 0.1414 (1 of 3 diverged)"
    if rows["Adam"].get("bitsandbytes"):  # those runs are planned where it is installed
        assert rows["RMSprop"]["bitsandbytes"] == "fails"
        assert "bitsandbytes fails on gpt, RMSprop: RuntimeError: no kernel" in table
    else:  # nor is there an empty column
        assert "bitsandbytes" not in table


def test_ablation_table() -> None:
    summary = shown.summarize(*made_up())
    rows = cells_of(shown.ablation_table(summary["cells"]))
    found = {(row["state"], row["embeddings"]): row for row in rows}
    assert len(found) == 1 + 2 + 8
    loss = "loss over 32-bit, lr 0.001"
    exact = found["torchao8.AdamW", ""]
    assert (exact["diverged"], exact[loss]) == ("0% of 3", "2.1000 ± 0.1000")
    broken = found["emulated: linear, tensor", "embeddings in 32 bits"]
    assert (broken["diverged"], broken[loss]) == ("67% of 3", "+0.0000")
    worse = found["emulated: dynamic, tensor", "embeddings in 8 bits"]
    assert (worse["diverged"], worse[loss]) == ("0% of 3", "+0.2500 ± 0.0000")


def test_rounding_table() -> None:
    summary = shown.summarize(*made_up())
    rows = cells_of(shown.rounding_table(summary["cells"]))
    ways = ("32-bit", "nearest", "stochastic")
    places = [(f"beta2 {beta2}", way) for beta2 in (0.999, 0.95) for way in ways]
    assert [(row[""], row["second moments"]) for row in rows] == places
    _, nearest, stochastic = rows[:3]
    assert nearest["error at 2"] == "0.1100 ± 0.0100"
    assert nearest["error at 4"] == "0.2100 ± 0.0100"
    assert stochastic["error at 4"] == "0.0800 ± 0.0100"
    assert stochastic["stored/exact v, percentile 1/50/99"] == "0.50 / 1.00 / 2.00"
    assert rows[0]["error at 4"] == rows[0]["over 32-bit"] == ""


def test_page_and_picture_of_any_part_of_the_records(tmp_path: Path) -> None:
    runs, records = made_up()
    for name, part in (
        ("whole", records),
        ("one", records[:1]),
        ("half", records[: len(records) // 2]),
    ):
        summary = shown.summarize(runs, part)
        json.dumps(summary)
        page = shown.page(summary)
        assert f"{len(part)} of {len(runs)} runs" in page
        assert ("## Second moments" in page) == (name == "whole")
        pictures.quality(json.loads(json.dumps(summary)), tmp_path / name)
    drawn = {
        name: {path.stem.removeprefix("quality-") for path in (tmp_path / name).glob("*.png")}
        for name in ("whole", "one", "half")
    }
    # One run is compared with none.
    assert drawn == {"whole": {"family", "codec", "rounding"}, "one": set(), "half": {"family"}}
    other = shown.summarize(study.plan(study.FULL), records)
    assert other["runs_recorded"] == 0
    assert not other["cells"]


# -- from end to end -------------------------------------------------------------------------------


def test_quick_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One seed of everything, in two goes; then the report."""
    patterns = ["*/seed 0"]
    try:
        import sklearn  # noqa: F401
    except ImportError:
        patterns = [f"{name}/gpt/*/seed 0" for name in study.STUDIES]
    path = tmp_path / "records.jsonl"
    common = ["--quick", "--records", str(path), "--out", str(tmp_path), "--only"]
    quality.main([*common, "family/gpt/*/8-bit/seed 0"])
    first = path.read_text()
    assert len(first.splitlines()) == len(study.RULES)
    capsys.readouterr()
    quality.main([*common, *patterns])
    assert f", {len(study.RULES)} of them recorded" in capsys.readouterr().out
    assert path.read_text().startswith(first)
    for line in path.read_text().splitlines():
        found = json.loads(line)
        if found["run"]["column"] != "bitsandbytes":
            assert found["result"]["held_out"] is None or found["result"]["held_out"] > 0

    quality.main(["--report", *common, *patterns])
    assert "8-bit mulaw - 32-bit" in capsys.readouterr().out
    summary = json.loads((tmp_path / "quality.json").read_text())
    assert summary["runs_recorded"] == summary["runs_planned"]
    rows = shown.groups(summary["cells"], "family", ("task", "row"), "column")
    assert len(rows) == len(study.RULES) * len({task for task, _ in rows})
    for (task, rule), sources in rows.items():
        if task != "gpt":
            continue
        exact, eight = (sources[name]["mean"] for name in ("32-bit", "8-bit"))
        # Four steps: the two are within rounding of each other, and torch's rule is ours.
        assert eight == pytest.approx(exact, rel=5e-3), rule
        if "torch.optim" in sources:
            # Muon rounds products of matrices to bfloat16, and not always as torch's does.
            near = 1e-3 if rule == "MuonAdamW" else 1e-4
            assert sources["torch.optim"]["mean"] == pytest.approx(exact, rel=near), rule
    assert "## The codec" in (tmp_path / "quality.md").read_text()


def test_patterns_that_match_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        quality.main(["--only", "family/gpt/Adamax/*"])
    assert "family/gpt/Adamax/* matches no run" in capsys.readouterr().err
