"""``benchmarks.compare``: ratios, bits, and a comparison of this library with a changed copy."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchao8
from benchmarks import compare
from benchmarks.step import contenders, job
from benchmarks.step.rounds import Row
from benchmarks.step.tensor_lists import TensorList


def row(rounds: dict[int, float], **values: Any) -> Row:
    return Row(contenders.Contender("some", "some"), rounds=rounds, **values)


def test_ratios_are_of_speed_in_the_same_round() -> None:
    new = row({0: 1.0, 1: 2.0, 2: 4.0})
    old = row({0: 2.0, 1: 2.0, 2: 2.0, 3: 99.0})
    assert compare.speed(new, old) == {"median": 1.0, "low": 0.75, "high": 1.5}
    assert compare.speed(new, row({5: 1.0})) is None
    assert compare.speed(new, row(old.rounds, batch=1)) is None  # other rounds by the same numbers


def test_bits_are_equal_on_every_rank_or_named() -> None:
    def bits(*ranks: dict[str, str]) -> Row:
        return row({}, info={"bits": list(ranks)})

    one, other = {"parameters": "a", "exp_avg": "b"}, {"parameters": "a", "exp_avg": "c"}
    assert compare.same_bits(bits(one, one), bits(one, one)) == "yes"
    assert compare.same_bits(bits(one, one), bits(one, other)) == "no: exp_avg"
    assert compare.same_bits(bits(one), bits({"parameters": "a"})) == "no: exp_avg"
    assert compare.same_bits(bits(one), row({})) == ""


def test_digest_tells_bits_dtypes_and_shapes() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 3.0])
    same = job.digest([x])
    assert job.digest([x.clone()]) == same
    others = [-x, x.view(2, 2), x.to(torch.bfloat16), x.view(torch.int32), torch.nextafter(x, -x)]
    assert len({same, *(job.digest([other]) for other in others)}) == 6


def test_bits_of_a_job_follow_from_the_seed_and_tell_a_changed_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def bits(name: str) -> dict[str, str]:
        tensors = TensorList("two", [(64, 64), (10,)])
        chosen = contenders.CONTENDERS[name]
        return job.OptimizerJob(chosen, tensors, torch.float32, torch.device("cpu")).bits()

    first = bits("8bit")
    assert {"parameters", "step", "exp_avg", "exp_avg_codes", "exp_avg_sq_scale"} <= first.keys()
    assert bits("8bit") == first
    original = torchao8.AdamW8bit.__init__

    def changed(self: Any, params: Any, **options: Any) -> None:
        original(self, params, **{**options, "eps": 1e-5})

    monkeypatch.setattr(torchao8.AdamW8bit, "__init__", changed)
    second = bits("8bit")
    differ = {name for name in first if first[name] != second[name]}
    assert differ == {"parameters"}


def test_table_has_what_was_left_out() -> None:
    old, new, theirs = compare.contenders("8bit", dict.fromkeys(("old", "new"), Path()), ("whole",))
    info = {"bits": [{"parameters": "a"}]}
    rows = [
        Row(old, skipped="ValueError: too old"),
        Row(new, rounds={0: 1e-3, 1: 2e-3}, info=info),
        Row(theirs, rounds={0: 3e-3, 1: 3e-3}),
    ]
    found = compare.compared("AdamW8bit", rows)
    case = {"label": "a list", "dtype": "float32", "tensors": 2, "step": "eager", "rows": found}
    *lines, note = compare.table([case]).splitlines()
    header, _, first, _ = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    cells = dict(zip(header, first, strict=True))
    assert (cells["side"], cells["ms"], cells["over old"], cells["bits"]) == ("new", "1.5", "", "")
    assert cells["over torch"] == "2.25 (1.88 - 2.62)"
    assert note == "left out, a list, float32, eager, AdamW8bit, whole, old: ValueError: too old"


def test_what_cannot_be_compared_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["HEAD", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["HEAD", "--list", "llama"], "--list: one of gpt2, block, "),
        (["HEAD", "--sharded", "--compiled"], "--compiled: expected without --sharded"),
    ):
        with pytest.raises(SystemExit):
            compare.main(arguments)
        assert message in capsys.readouterr().err
    if shutil.which("git") and (compare.ROOT / ".git").exists():
        with pytest.raises(SystemExit, match="no-such-commit"):
            compare.source_of("no-such-commit")


@pytest.mark.thorough  # starts a process for each optimizer, twice
@pytest.mark.parametrize("sharded", [False, True])
def test_a_changed_copy_is_told_from_this_library(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old: a copy whose AdamW has another default of `amsgrad`, which is a state more."""
    copy = tmp_path / "copy"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(torchao8.__file__).parent, copy / "torchao8", ignore=ignore)
    adam = copy / "torchao8" / "optim" / "adam.py"
    assert "amsgrad: bool = False" in adam.read_text()
    adam.write_text(adam.read_text().replace("amsgrad: bool = False", "amsgrad: bool = True"))
    trees = {"old": ("changed", copy), None: ("this", Path(torchao8.__file__).parents[1])}
    monkeypatch.setattr(compare, "source_of", lambda revision: trees[revision])
    monkeypatch.setattr(compare, "_git", lambda *arguments: "0" * 40)
    arguments = ["old", "--list", "tiny-148x64", "--dtype", "float32", "--rounds", "3"]
    arguments += ["--turn", "0.001", "--threads", "1", "--out", str(tmp_path), "--name", "found"]
    compare.main(arguments + ["--sharded"] * sharded)
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    (case,) = record["cases"]
    kinds = ["DTensor", "shard"] if sharded else ["whole"]
    rows = {(row["optimizer"], row["tensors"], row["side"]): row for row in case["rows"]}
    assert list(rows) == [*itertools.product(compare.OPTIMIZERS, kinds, ("old", "new", "torch"))]
    for (optimizer, kind, side), row in rows.items():
        assert len(row["ms_of_rounds"]) == 3
        assert (row["over torch"]["median"] > 0) if side != "torch" else "over torch" not in row
        assert ("saved_bytes" in row) == ("time over shards" in row) == (kind == "DTensor")
        if side == "new":
            assert row["bits"].startswith("no: ")
            assert "max_exp_avg_sq" in row["bits"]
            assert row["over old"]["median"] > 0
            if kind == "DTensor":
                assert rows[optimizer, kind, "old"]["saved_bytes"] > row["saved_bytes"]


def test_the_script_runs_by_its_path() -> None:
    command = [sys.executable, compare.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=True)
    assert "working tree" in done.stdout
