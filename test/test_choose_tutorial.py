"""The tutorial on choosing: what it measures, and that its advice follows from the numbers."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tutorials"))

import choose_an_optimizer as tutorial
from _progress import Remaining
from choose_an_optimizer import EIGHT_BITS, EMBEDDINGS, YARDSTICK, Result

UNLEARNED = 3.0  # the loss of a model that has learned nothing

TINY = (
    "--steps 4 --seeds 2 --batch 2 --layers 1 --width 64 --heads 2 --context 32 "
    "--held-out-batches 2"
).split()


def result(name: str, mean: float, size: int, spread: float = 0.01) -> Result:
    """Two seeds with this mean and about this standard deviation; 1,000 parameters."""
    return Result(name, size, 1000, [mean - spread, mean, mean + spread])


def results(eight: float, embeddings: float, **others: tuple[float, int]) -> list[Result]:
    return [
        result(YARDSTICK.name, 2.0, 8000),
        result(EIGHT_BITS.name, eight, 2000),
        result(EMBEDDINGS.name, embeddings, 3200),
        *(result(name, loss, size) for name, (loss, size) in others.items()),
    ]


def test_state_bytes_are_those_of_the_tensors() -> None:
    model = torch.nn.Linear(256, 64, bias=False)
    size = {"AdamW8bit": 2, "AdEMAMix8bit": 3, "RMSprop8bit": 1, "Lion8bit": 1, "MuonAdamW8bit": 1}
    for choice in tutorial.CHOICES:
        optimizer = choice.make(model)
        model(torch.ones(1, 256)).sum().backward()
        optimizer.step()
        codes = size.get(choice.name, 1 if choice.name.startswith("SGD") else 2)
        counts_only = 4  # the number of steps
        expected = codes * (64 * 256 + 4 * 64) + counts_only
        if choice is YARDSTICK:
            expected = 2 * 4 * 64 * 256 + counts_only
        assert tutorial.state_bytes(optimizer) == expected, choice.name


def test_the_same_seed_gives_the_same_run() -> None:
    settings = tutorial.parse_arguments(TINY)
    text = tutorial.Text.from_stdlib("cpu")
    left = Remaining(100)
    runs = [tutorial.train(EIGHT_BITS, seed, text, settings, left) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0][0] != runs[2][0]


@pytest.mark.parametrize(
    ("eight", "embeddings", "expected"),
    [
        (
            2.005,
            2.0,
            "Its loss is +0.0050 from there, and no different by the measure of the seeds",
        ),
        (1.9, 2.0, "Its loss is -0.1000 from there, and lower by the measure of the seeds"),
        (2.1, 2.004, "With embeddings in 32 bits it is +0.0040, at 2.5 times less state"),
        (2.1, 2.05, "do not help enough (+0.0500): keep 32 bits"),
    ],
)
def test_advice_on_bits(eight: float, embeddings: float, expected: str) -> None:
    text = tutorial.advice(results(eight, embeddings), UNLEARNED)
    assert "AdamW8bit keeps 4.0 times less state than AdamW, 32 bits" in text
    assert expected in text
    assert ("8 bits cost nothing" in text) == (eight < 2.01)
    assert ("but its loss is +0.1000" in text) == (eight > 2.01)


@pytest.mark.parametrize(
    ("others", "least", "lowest"),
    [
        ({"Lion8bit": (2.3, 1000)}, "AdamW8bit, 2.00 bytes", "No choice has a lower loss"),
        ({"Lion8bit": (2.005, 1000)}, "Lion8bit, 1.00 bytes", "No choice has a lower loss"),
        ({"Lion8bit": (1.995, 1000)}, "Lion8bit, 1.00 bytes", "Lion8bit's, is -0.0050"),
        ({"Big": (1.8, 3000), "Lion8bit": (2.3, 1)}, "AdamW8bit, 2.00 bytes", "Big, -0.2000"),
    ],
)
def test_advice_on_the_rule(others: dict[str, tuple[float, int]], least: str, lowest: str) -> None:
    text = tutorial.advice(results(2.005, 2.005, **others), UNLEARNED).split("Rule: ")[1]
    assert f"The least state that loses nothing: {least}" in text
    assert lowest in text
    assert ("too little to choose by" in text) == ("'s, is" in lowest)


def test_nothing_as_good_is_said() -> None:
    text = tutorial.advice(results(2.1, 2.1), UNLEARNED)
    assert "Nothing with less state is as good as AdamW, 32 bits: keep it." in text


def test_no_advice_before_a_model_has_learned() -> None:
    """The yardstick is what two frequencies of bytes would predict: then nothing is said."""
    text = tutorial.Text(torch.tensor([7, 7, 7, 9], dtype=torch.uint8), torch.zeros(1))
    least = tutorial.loss_of_frequencies(text)
    assert least == pytest.approx(0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    measured = results(2.1, 2.1)
    assert tutorial.advice(measured, 2.0).startswith(
        "No advice: the loss of AdamW, 32 bits, 2.0000"
    )
    assert tutorial.advice(measured, 2.01).startswith("Bits: ")
    wide = [result(YARDSTICK.name, 2.0, 8000, spread=0.041), *measured[1:]]
    assert "differ by 0.0410, more than 0.0400" in tutorial.advice(wide, UNLEARNED)


def test_table() -> None:
    rows = [line.split("|")[1:-1] for line in tutorial.table(results(2.1, 2.0)).splitlines()]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[2] == ["AdamW, 32 bits", "8,000", "8.00", "2.0000 ± 0.0100", "", ""]
    assert cells[3] == ["AdamW8bit", "2,000", "2.00", "2.1000 ± 0.0100", "+0.1000", "no"]
    assert cells[4][-2:] == ["+0.0000", "yes"]


def test_run_from_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    assert tutorial.main(TINY) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][2:]
    shares = {row[0].strip(): float(row[2]) for row in rows}
    assert list(shares) == [choice.name for choice in tutorial.CHOICES]
    expected = {"AdamW, 32 bits": 8, "AdamW8bit": 2.1, "AdEMAMix8bit": 3.15, "Lion8bit": 1.05}
    assert {name: shares[name] for name in expected} == pytest.approx(expected, rel=0.02)
    assert shares["AdamW8bit"] < shares[EMBEDDINGS.name] < 5
    losses = [float(row[3].split("±")[0]) for row in rows]
    assert all(2 < loss < 6.5 for loss in losses)
    # Four steps bear no advice.
    assert "No advice: the loss of AdamW, 32 bits" in printed
    assert "Rule: " not in printed


def test_one_seed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tutorial.parse_arguments(["--seeds", "1"])
    assert "--seeds must be 2 or more" in capsys.readouterr().err
