"""The tutorial of sharded training: saved by 2 ranks, resumed by 3, against one run of one."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import TIMEOUT, _loopback
from torch.distributed.checkpoint import FileSystemReader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tutorials"))

import train_fsdp2

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "tutorials"
# Large enough that every matrix has 8-bit state; a batch that neither 2 nor 3 ranks divide.
TINY = (
    "--device cpu --batch 5 --layers 1 --width 64 --heads 2 --context 32 --held-out-batches 2 "
    "--save-every 4"
).split()
LOSS = re.compile(r"^step (\d+): held-out loss ([\d.]+)$", re.MULTILINE)
BYTES = re.compile(r"^rank \d+: ([\d,]+) bytes of optimizer state; AdamW takes ([\d,]+)$", re.M)


def python(*arguments: str, status: int = 0) -> str:
    """Run Python; return what it printed, errors included, once it ended with this status."""
    process = subprocess.run(
        [sys.executable, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": _loopback(),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    assert process.returncode == status, process.stdout
    return process.stdout


def tutorial(out: Path, *arguments: str, ranks: int | None = None, status: int = 0) -> str:
    """Run the tutorial under torchrun, or by itself if no number of ranks is given."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    script = str(TUTORIALS / "train_fsdp2.py")
    return python(
        *(launcher if ranks else []), script, *TINY, "--out", str(out), *arguments, status=status
    )


def losses(printed: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in LOSS.findall(printed)}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp2")


@pytest.fixture(scope="module")
def saved(out: Path) -> str:
    """What 2 ranks print that train 4 steps; behind them a run was killed while it saved."""
    printed = tutorial(out, "--steps", "4", ranks=2)
    whole = out / "step-00000004"
    shutil.copytree(whole, out / "step-00000008.unfinished")  # all written, not yet renamed
    partial = shutil.ignore_patterns(".metadata", "__1_*")
    shutil.copytree(whole, out / "step-00000008", ignore=partial)  # such as a copy that broke off
    return printed


@pytest.fixture(scope="module")
def resumed(out: Path, saved: str) -> str:
    """What 3 ranks print that go on to step 8."""
    return tutorial(out, "--steps", "8", ranks=3)


def test_losses_continue_at_another_world_size(
    tmp_path: Path, out: Path, saved: str, resumed: str
) -> None:
    """As in a run of one process that nothing interrupts.

    Tolerance: the gradients differ by the order of their sums, some 1e-7 of each. Rounding to codes
    makes of that a rare change by a whole code, up to a tenth of a moment, but as rare as it is
    large: on the average a moment and its update differ by 1e-7, too. One such change moves one
    element by up to a tenth of lr, 1e-4, and the loss by that times the element's gradient, less
    than 1e-2 as all are clipped to 1 together: 1e-6. A hundred are allowed for. A batch that comes
    again, a state that is not loaded, gradients that are weighted wrongly make 1e-3 or more.
    """
    whole = losses(tutorial(tmp_path, "--steps", "8"))
    parts = losses(saved) | losses(resumed)
    assert list(parts) == list(whole) == [4, 8]
    assert list(parts.values()) == pytest.approx(list(whole.values()), rel=0, abs=1e-4)
    assert parts[8] < parts[4] < 5.5  # below that of a uniform guess, log 256


def test_loads_the_newest_whole_checkpoint(out: Path, saved: str, resumed: str) -> None:
    before, after = re.findall(r"held-out loss ([\d.]+)$", resumed, re.MULTILINE)[:2]
    assert f"{out / 'step-00000004'}, saved by 2 ranks: held-out loss {before}" in resumed
    assert f"loaded by 3: held-out loss {after}" in resumed
    assert float(before) == losses(saved)[4]
    assert float(after) == pytest.approx(float(before), rel=train_fsdp2.LOSS_TOLERANCE)


def test_remains_of_a_killed_run_are_replaced(out: Path, resumed: str) -> None:
    names = sorted(path.name for path in out.iterdir())
    assert names == ["step-00000004", "step-00000008"]
    files = {path.name for path in (out / "step-00000008").iterdir()}
    assert files == {".metadata", "__0_0.distcp", "__1_0.distcp", "__2_0.distcp"}


def test_bytes_of_optimizer_state(saved: str, resumed: str) -> None:
    matrices = [(256, 64), (192, 64), (64, 64), (256, 64), (64, 256), (256, 64)]
    norms = [64, 32, 32, 64, 64]
    elements = sum(rows * row for rows, row in matrices)
    # Two moments: a code for each element, a scale for each row, which is at most a block.
    in_8bit = 2 * (elements + 4 * sum(rows for rows, _ in matrices))
    in_32bit = 8 * sum(norms)
    counts = 4 * (len(matrices) + len(norms))  # of steps, on every rank
    for ranks, printed in [(2, saved), (3, resumed)]:
        found = [[int(n.replace(",", "")) for n in pair] for pair in BYTES.findall(printed)]
        assert len(found) == ranks
        ours, theirs = map(sum, zip(*found, strict=True))
        assert ours == in_8bit + in_32bit + ranks * counts
        assert theirs == 8 * (elements + sum(norms))


def test_a_checkpoint_is_plain_tensors_and_numbers(out: Path, saved: str) -> None:
    metadata = FileSystemReader(out / "step-00000004").read_metadata()
    dtypes = {
        name: value.properties.dtype
        for name, value in metadata.state_dict_metadata.items()
        if name.startswith("optimizer.state.head.weight.")
    }
    prefix = "optimizer.state.head.weight."
    assert {name.removeprefix(prefix): dtype for name, dtype in dtypes.items()} == {
        "step": torch.float32,
        "exp_avg_codes": torch.uint8,
        "exp_avg_scale": torch.float32,
        "exp_avg_sq_codes": torch.uint8,
        "exp_avg_sq_scale": torch.float32,
    }


def test_a_checkpoint_of_another_run_is_refused(out: Path, resumed: str) -> None:
    printed = tutorial(out, "--steps", "8", "--width", "128", status=1)
    assert f"{out / 'step-00000008'} was made with width 64: use another --out" in printed


OTHER_MODEL = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import train_fsdp2
loss = train_fsdp2.cross_entropy
train_fsdp2.cross_entropy = lambda *batch: 1.0001 * loss(*batch)
train_fsdp2.main()
"""


def test_a_model_that_is_not_what_was_saved_is_noticed(out: Path, resumed: str) -> None:
    arguments = [str(TUTORIALS), *TINY, "--out", str(out)]
    printed = python("-c", OTHER_MODEL, *arguments, status=1)
    assert "the losses differ: this is not the model that was saved" in printed


@pytest.fixture(params=[1, 2, 3, 4, 5])
def world_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    monkeypatch.setattr(dist, "get_world_size", lambda: request.param)
    return request.param


def test_shares_make_up_the_batch(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(5.0) ** 2
    seen, mean = [], 0.0
    for rank in range(world_size):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        (inputs, targets), share = train_fsdp2.my_share((values, -values))
        assert torch.equal(targets, -inputs)
        seen += inputs.tolist()
        mean += inputs.mean().item() * share
    assert sorted(seen) == values.tolist()
    assert mean == pytest.approx(values.mean().item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--batch 2", "--batch must have a sequence for each rank"),
        ("--width 66", "--width must be a multiple of twice --heads"),
        ("--save-every 0", "--save-every and --held-out-batches must be at least 1"),
    ],
)
def test_arguments_are_refused(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(sys, "argv", ["train_fsdp2.py", *arguments.split()])
    with pytest.raises(SystemExit):
        train_fsdp2.parse_arguments()
    assert message in capsys.readouterr().err
