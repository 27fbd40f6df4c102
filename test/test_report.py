"""``python -m torchao8``, and ``import torchao8`` with and without its extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import torchao8
from torchao8 import _implementation, _selfcheck, ops
from torchao8.__main__ import main

PACKAGE = Path(torchao8.__file__).parent


def run_python(*arguments: str, path: Path) -> subprocess.CompletedProcess[str]:
    """A new interpreter that finds the package in ``path`` alone."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=path,
        env={**os.environ, "PYTHONPATH": str(path)},
    )


@pytest.fixture
def without_extension(tmp_path: Path) -> Path:
    """A folder with the package as a clone has it before the build."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "torchao8", ignore=ignore)
    return tmp_path


def test_report(capsys: pytest.CaptureFixture[str]) -> None:
    """All that a bug report needs, and success."""
    assert main() == 0
    out = capsys.readouterr().out
    for text in (torchao8.__version__, torch.__version__, sys.executable, ops.EXTENSION_FILE,
                 ops.cpu_capability(), f"{torch.get_num_threads()} of "):  # fmt: skip
        assert text in out
    assert out.count("ok: ") == 4 + 3 * len(_selfcheck._accelerators())


def test_report_as_a_module() -> None:
    result = run_python("-m", "torchao8", path=PACKAGE.parent)
    assert result.returncode == 0, result.stderr
    assert "self-check    ok: 8-bit AdamW against float64" in result.stdout


def break_nothing(*arguments: Any, **options: Any) -> None:
    """An op that does not do its work."""


def break_decay(*arguments: Any, **options: Any) -> None:
    """An op that forgets the weight decay."""
    ops_step(*arguments, **{**options, "weight_decay": 0.0})


def break_codes(*arguments: Any, **options: Any) -> None:
    """An op that stores a first moment two codes off, in one place."""
    ops_step(*arguments, **options)
    if arguments[2][0].dtype == torch.uint8:
        arguments[2][0].flatten()[17] ^= 2


def break_nan(*arguments: Any, **options: Any) -> None:
    """An op that yields NaN in one place."""
    ops_step(*arguments, **options)
    arguments[0][0].flatten()[5] = float("nan")


ops_step = ops._STEP_OPS["adam_step_"]


@pytest.mark.parametrize(
    ("broken", "failures"),
    [(break_nothing, 4), (break_decay, 4), (break_codes, 3), (break_nan, 4)],
)
def test_self_check_can_fail(
    broken: Any,
    failures: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the CPU. What compares a GPU with it has tests below."""
    monkeypatch.setattr(_selfcheck, "_accelerators", list)
    monkeypatch.setitem(ops._STEP_OPS, "adam_step_", broken)
    assert main() == 1
    out = capsys.readouterr().out
    assert (out.count("FAILED: "), out.count("ok: ")) == (failures, 4 - failures)


@pytest.mark.parametrize("stored", _selfcheck.STORED, ids=lambda stored: stored.state_format)
@pytest.mark.parametrize("state", [2, 3])
def test_self_check_tells_the_format(
    stored: _selfcheck.Stored, state: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One code of either moment that is some codes off, in one format."""

    def broken(*arguments: Any, **options: Any) -> None:
        ops_step(*arguments, **options)
        codes = arguments[state][0]
        if options["state_format"] == ops.FORMAT_NUMBERS[stored.state_format]:
            if codes.dtype == torch.uint8:
                codes.flatten()[17] ^= 0x44  # of a half byte, too

    monkeypatch.setattr(_selfcheck, "_accelerators", list)
    monkeypatch.setitem(ops._STEP_OPS, "adam_step_", broken)
    failed = [result.name for result in _selfcheck.run() if not result.passed]
    assert failed == [f"{stored.name} against float64"]


def test_self_check_reports_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no kernel")

    monkeypatch.setitem(ops._STEP_OPS, "adam_step_", raising)
    assert {(r.passed, r.detail) for r in _selfcheck.run()} == {(False, "RuntimeError: no kernel")}


def test_import_without_the_extension_says_how_to_build_it(without_extension: Path) -> None:
    result = run_python("-c", "import torchao8", path=without_extension)
    assert result.returncode == 1
    assert "ImportError: torchao8: the compiled extension torchao8/_C could not be" in result.stderr
    assert "pip install --no-build-isolation -e ." in result.stderr


def test_report_without_the_extension(without_extension: Path) -> None:
    """It still tells the versions, and how to build, and that something is wrong."""
    result = run_python("-m", "torchao8", path=without_extension)
    assert result.returncode == 1
    assert "extension     NOT LOADED" in result.stdout
    assert "pip install --no-build-isolation -e ." in result.stdout
    assert torch.__version__ in result.stdout
    assert result.stderr == ""


def test_import_brings_nothing_new() -> None:
    """Nothing that torch had not imported, but the package itself: the import is cheap."""
    code = (
        "import sys, torch; before = set(sys.modules); import torchao8\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert run_python("-c", code, path=PACKAGE.parent).stdout.split() == ["torchao8"]


@pytest.mark.parametrize("stored", _selfcheck.STORED, ids=lambda stored: stored.state_format)
def test_the_self_check_compares_a_gpu(
    stored: _selfcheck.Stored, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the CPU in the GPU's place: equal bits pass, and a GPU that is a code off does not."""
    assert _selfcheck._check_cuda(stored, "cpu") == (True, "0 of 16 tensors differ")
    calls = []

    def broken_for_the_second(*arguments: Any, **options: Any) -> None:
        calls.append(arguments)
        (break_codes if len(calls) % 4 == 3 else ops_step)(*arguments, **options)

    monkeypatch.setitem(ops._STEP_OPS, "adam_step_", broken_for_the_second)
    passed, detail = _selfcheck._check_cuda(stored, "cpu")
    assert not passed
    assert detail.endswith("of 16 tensors differ")


@pytest.mark.parametrize(
    ("gpu", "portable", "other"),
    [
        pytest.param("cuda", set(), "the CPU", id="kernels on both"),
        pytest.param("cuda", {"cpu"}, "float64", id="kernels on the GPU alone"),
        pytest.param("cuda", {"cuda"}, "float64", id="kernels on the CPU alone"),
        pytest.param("mps", set(), "float64", id="a GPU that has none"),
    ],
)
def test_what_the_self_check_compares_a_gpu_with(
    gpu: str, portable: set[str], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its bits with the CPU's where both have kernels, else its numbers with float64."""
    monkeypatch.setattr(_selfcheck, "_accelerators", lambda: [torch.device(gpu, 0)])
    monkeypatch.setattr(_implementation, "_kernels", {"cpu", "cuda"})
    monkeypatch.setattr(_implementation, "_chosen", dict.fromkeys(portable))
    monkeypatch.setattr(_selfcheck, "_run_one", lambda name, check: name)
    names = ("8-bit AdamW", "8-bit AdamW (mulaw)", "4-bit AdamW")
    assert _selfcheck.run()[4:] == [f"{name} on {gpu}:0 against {other}" for name in names]


def test_a_path_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHAO8_CPU", "sse")
    result = run_python("-m", "torchao8", path=PACKAGE.parent)
    assert result.returncode == 1
    assert "extension     NOT LOADED" in result.stdout
    assert "TORCHAO8_CPU must be avx512, avx2, scalar or portable, got sse" in result.stdout
    assert result.stderr == ""
