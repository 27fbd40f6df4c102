"""``benchmarks/step.py --family``: the rules, torch's forms of them, what is compared with what."""

import functools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_params, set_grads
from test_benchmark import ARGS, FakeGpu, case, install, row

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import _bars  # noqa: E402
import _contenders  # noqa: E402
import _devices  # noqa: E402
import _family  # noqa: E402
import _tables  # noqa: E402
import step  # noqa: E402

import torchao8  # noqa: E402

WORKER = """\
import sys
sys.path.insert(0, {folder!r})
import test_benchmark
import test_benchmark_family
import _worker
test_benchmark.install()
test_benchmark_family.install_cpu()
_worker.main()
"""


class FakeCpu(FakeGpu):
    """Says that it is a CPU, and keeps its workers as a GPU does: tests are faster."""

    kind = "cpu"

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.device = torch.device("cpu")

    @property
    def lists(self) -> tuple[str, ...]:
        return ("mixed",)

    def result_name(self) -> str:
        return "step-fake"


def install_cpu(set_item: Any = dict.__setitem__) -> None:
    """In place of the fake GPU."""
    set_item(_devices.DEVICES, "fake", FakeCpu)


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    install(monkeypatch.setitem)
    install_cpu(monkeypatch.setitem)
    path = tmp_path / "program.py"
    path.write_text(WORKER.format(folder=str(Path(__file__).parent)))
    return path


def test_every_optimizer_of_the_library_is_a_rule() -> None:
    names = [name for name in torchao8.__all__ if not name.startswith("Paged")]
    classes = {name.removesuffix("8bit") for name in names if name.endswith("8bit")}
    assert _family.RULES.keys() == classes
    for rule in _family.RULES.values():
        assert rule.options["weight_decay"] > 0  # zero lets some skip work
        assert (rule.reference is None) == hasattr(torch.optim, rule.name)


@pytest.mark.parametrize("name", list(_family.RULES))
def test_all_forms_of_a_rule_do_what_ours_does(name: str) -> None:
    """In float32, three steps: a few roundings of numbers below 16 apart, but for 8-bit state."""
    rule = _family.RULES[name]
    cls = getattr(torchao8, name)

    def trained(build: Any) -> list[torch.Tensor]:
        params = make_params()
        optimizer = build(params)
        for number in range(3):
            set_grads(params, number)
            optimizer.step()
        return [p.detach() for p in params]

    expected = trained(lambda params: cls(params, **rule.options))
    start = make_params()
    assert not any(torch.allclose(a, b) for a, b in zip(start, expected, strict=True))
    names = rule.rivals("cpu", "float32")
    assert len(names) == len(rule.forms)
    for contender in names:
        found = trained(_contenders.CONTENDERS[contender].build)
        for ours, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5, msg=contender)
    ours = _contenders.CONTENDERS[rule.ours].build(make_params())
    assert type(ours) is getattr(torchao8, f"{name}8bit")
    options = {key: ours.defaults[key] for key in rule.options}
    assert options == rule.options


def test_a_form_that_is_wrong_is_left_out_where_it_is() -> None:
    """Should torch be repaired, this fails, and the form can come back."""
    assert _family.RULES["SGD"].rivals("cpu", "float32")[-1] == "sgd-fused"
    for rule, form, device, dtype in _family.BROKEN:
        name = f"{rule.lower()}-{form}"
        assert name in _contenders.CONTENDERS
        assert name not in _family.RULES[rule].rivals(device, dtype)
        if torch.__version__.startswith("2.13."):
            p = torch.nn.Parameter(torch.full((256,), 0.02, dtype=getattr(torch, dtype)))
            p.grad = torch.full_like(p, 1e-3)
            before = p.detach().clone()
            _contenders.CONTENDERS[name].build([p]).step()
            assert torch.equal(p, before)


# What a rule is measured with: ours, torch's forms that are right, and the memory's rate.
MEASURED = {
    "Lion": ["lion-8bit", "lion-for-loop", "lion-foreach", "copy", "scale"],
    "SGD": ["sgd-8bit", "sgd-for-loop", "sgd-foreach", "sgd-fused", "copy", "scale"],
}


# A process for each contender is what takes the time: in `make test` those of one rule.
@pytest.mark.parametrize(
    "rules", [["Lion"], pytest.param(["Lion", "SGD"], marks=pytest.mark.thorough)], ids=str
)
def test_rules_are_measured_against_their_fastest_form(
    rules: list[str],
    program: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(step, "measure", functools.partial(step.measure, program=program))
    monkeypatch.setitem(step._DEFAULTS["cpu"], "list", "all")
    step.main([*ARGS, "--out", str(tmp_path), "--family", *rules])
    record = json.loads((tmp_path / "step-fake-family.json").read_text())
    assert [(c["rule"], c["dtype"]) for c in record["cases"]] == [
        (rule, dtype) for dtype in ("float32", "bfloat16") for rule in rules
    ]
    for found in record["cases"]:
        rows = {r["name"]: r for r in found["rows"]}
        wanted = list(MEASURED[found["rule"]])
        if (found["rule"], found["dtype"]) == ("SGD", "bfloat16"):
            wanted.remove("sgd-fused")
        assert list(rows) == wanted
        assert not any("skipped" in r for r in rows.values())
        rivals = {
            n: rows[n]["ms"] for n in rows if n not in ("copy", "scale") and not n.endswith("8bit")
        }
        assert found["fastest"] == min(rivals, key=lambda name: rivals[name])
        assert rows[found["fastest"]]["speedup"] == 1
        (ours,) = (r for name, r in rows.items() if name.endswith("8bit"))
        ratios = [
            rows[found["fastest"]]["ms_of_rounds"][i] / ours["ms_of_rounds"][i] for i in range(3)
        ]
        assert ours["speedup"] == pytest.approx(sorted(ratios)[1])
    assert [(bar["dtype"], bar["asked"]) for bar in record["bars"]] == [("float32", 1.3)] * len(
        rules
    )
    output = capsys.readouterr().out
    assert output.count("bar: ") == len(rules)
    for found in record["cases"]:
        labels = {r["name"]: r["label"] for r in found["rows"]}
        theirs = re.escape(labels[found["fastest"]])
        line = rf"^\| torchao8\.{found['rule']}8bit +\| {theirs} +\| {found['dtype']} "
        assert re.search(line, output, re.MULTILINE)


def test_bars_and_table_of_rules() -> None:
    lion = case(
        "gpt2",
        "float32",
        row("lion-8bit", label="ours", ms=2.0, speedup=1.4),
        row("lion-foreach", label="theirs", ms=2.8),
        row("lion-for-loop", label="slower", ms=5.0, speedup=0.5),
    )
    sgd = case(
        "gpt2",
        "float32",
        row("sgd-8bit", label="our SGD", ms=2.0, speedup=1.2),
        row("sgd-fused", label="their SGD", ms=2.4),
    )
    lion |= {"rule": "Lion", "fastest": "lion-foreach"}
    sgd |= {"rule": "SGD", "fastest": "sgd-fused"}
    half = {**lion, "dtype": "bfloat16"}
    alone = {**sgd, "fastest": "", "rows": sgd["rows"][:1]}
    assert [bar["text"] for bar in _bars.rule_bars([lion, sgd, half, alone])] == [
        "bar: ours over theirs, gpt2, float32: asked at least 1.30x, measured 1.40x, met",
        "bar: our SGD over their SGD, gpt2, float32: asked at least 1.30x, measured 1.20x, short",
    ]
    lines = _tables.rules_table([lion, sgd, half, alone]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells == [
        ["ours", "theirs", "float32", "2", "2.8", "1.40"],
        ["our SGD", "their SGD", "float32", "2", "2.4", "1.20"],
        ["ours", "theirs", "bfloat16", "2", "2.8", "1.40"],
    ]
    assert _tables.title(lion) == "Lion, gpt2, float32"


def test_contenders_and_rules_do_not_mix(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step._parse(["--family", "--contenders", "8bit", "--no-plot"])
    assert "--family: expected no --contenders with it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        step._parse(["--family", "Adamax", "--no-plot"])
    assert "'Adamax'" in capsys.readouterr().err
