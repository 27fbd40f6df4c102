"""The ops in plain PyTorch operators: the codec, exact sums, refusals, and who gets them."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import bits, needs_kernels
from portable_steps import Differences, portable, sorted_by_value

import torchao8
from torchao8 import ops

pytestmark = needs_kernels


def test_every_op_is_there_on_any_device() -> None:
    """But for those that only CUDA can have."""
    names = {n.split("::")[1] for n in torch._C._dispatch_get_all_op_names() if "torchao8::" in n}
    assert len(names) > 20
    missing = {
        name
        for name in names
        if not torch._C._dispatch_has_kernel_for_dispatch_key(
            f"torchao8::{name}", "CompositeExplicitAutograd"
        )
    }
    assert missing == {"allocate_managed", "free_managed"}


def test_exact_sums_and_norms() -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = [0.0, -40.0, 37.0]
    tensors = [
        torch.randn(n, generator=generator) * 10.0 ** (e * torch.rand(n, generator=generator))
        for n in (0, 1, 300, 40_000, 300_000)
        for e in exponents
    ]
    tensors += [torch.randn(300, 700).bfloat16().t(), torch.randn(7, 9).half(), torch.zeros(5)]
    tensors[-4][::5] = math.nan
    tensors[-4][1::5] = -math.inf
    tensors.append(torch.tensor([2.0**-149, 2.0**-126, torch.finfo(torch.float32).max]))
    wanted = ops.sum_squares(tensors)
    with portable():
        rows = ops.sum_squares(tensors)
        assert torch.equal(rows, wanted)
        added = rows[:3].sum(0, keepdim=True)
        norms = ops.norms(torch.cat((rows, added, -added)))
    exact_norms = ops.norms(torch.cat((rows, added, -added)))
    torch.testing.assert_close(
        norms.double(), exact_norms, rtol=2.0**-22, atol=1e-45, equal_nan=True
    )


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("block_size", "state_format"),
    [(64, "dynamic"), (256, "dynamic"), (2048, "dynamic"), (256, "mulaw")],
)
def test_the_codec_is_the_same_to_the_bit(
    signed: bool, dtype: torch.dtype, block_size: int, state_format: str
) -> None:
    """Scales of every size, those that are none, and blocks that end early. Signed mu-law codes may
    be the next ones: a kernel rounds a product and a sum once."""
    differences = Differences()
    generator = torch.Generator().manual_seed(1)
    for shape in ((3, 300), (5000,), (2, 3, 70), (40, 8), (0, 4), (4, 2048), ()):
        for scale in (1.0, 1e-30, 1e-38, 1e-41, 3e38):
            x = (torch.randn(shape, generator=generator) * scale).to(dtype)
            x.view(-1)[::1001] = math.nan
            x.view(-1)[7::999] = math.inf
            options: dict[str, Any] = {"block_size": block_size, "signed": signed}
            options["state_format"] = state_format
            wanted = torchao8.quantize_blockwise(x, **options)
            with portable():
                found = torchao8.quantize_blockwise(x, **options)
                back = torchao8.dequantize_blockwise(*wanted, dtype=dtype, **options)
            assert bits(found[1]) == bits(wanted[1])
            if signed and state_format == "mulaw":
                differences.add(*(sorted_by_value(codes) for codes, _ in (found, wanted)))
            else:
                assert bits(found[0]) == bits(wanted[0])
            expected = torchao8.dequantize_blockwise(*wanted, dtype=dtype, **options)
            torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)
    differences.check()


@pytest.mark.parametrize("state_format", ["dynamic", "mulaw", "4bit"])
@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_floats_are_the_same_and_finite(signed: bool, state_format: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([largest, 3.4e38, 0.9 * largest, 2.0**127, 2.0**126]).expand(64, 5).mT
    x = x.contiguous()
    if signed:
        x[:, 1::2] *= -1
    options: dict[str, Any] = {"block_size": 64, "signed": signed, "state_format": state_format}
    wanted = torchao8.quantize_blockwise(x, **options)
    with portable():
        found = torchao8.quantize_blockwise(x, **options)
    assert [bits(t) for t in found] == [bits(t) for t in wanted]
    assert torchao8.dequantize_blockwise(*found, **options).isfinite().all()


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # it is deprecated
def test_arguments_that_do_not_fit() -> None:
    """Both implementations refuse them, and name the argument."""
    codes, scale = torchao8.quantize_blockwise(torch.randn(4, 300))
    refused: list[tuple[str, Callable[[], Any]]] = [
        (
            "quantize_blockwise: block_size",
            lambda: torchao8.quantize_blockwise(codes.float(), block_size=100),
        ),
        ("quantize_blockwise: input", lambda: torchao8.quantize_blockwise(codes.double())),
        (
            "quantize_blockwise: input must be dense, got layout torch._mkldnn",
            lambda: torchao8.quantize_blockwise(scale.to_mkldnn()),
        ),
        (
            "quantize_blockwise: input must be dense, got torch.qint8",
            lambda: torchao8.quantize_blockwise(
                torch._empty_affine_quantized((4, 300), scale=1.0, zero_point=0, dtype=torch.qint8)
            ),
        ),
        (
            "dequantize_blockwise: block_size",
            lambda: torchao8.dequantize_blockwise(codes, scale, block_size=32),
        ),
        ("dequantize_blockwise: codes", lambda: torchao8.dequantize_blockwise(codes.int(), scale)),
        ("dequantize_blockwise: codes", lambda: torchao8.dequantize_blockwise(codes.t(), scale)),
        (
            "dequantize_blockwise: scale",
            lambda: torchao8.dequantize_blockwise(codes, scale.view(-1)),
        ),
        (
            "dequantize_blockwise: scale",
            lambda: torchao8.dequantize_blockwise(codes, scale.double()),
        ),
        (
            "dequantize_blockwise: dtype",
            lambda: torchao8.dequantize_blockwise(codes, scale, dtype=torch.float64),
        ),
        (r"sum_squares: tensors\[1\]", lambda: ops.sum_squares([scale, scale.double()])),
        ("norms: sums", lambda: ops.norms(torch.zeros(3, 17, dtype=torch.int64))),
        ("norms: sums", lambda: ops.norms(torch.zeros(3, 18))),
    ]
    for argument, call in refused:
        for implementation in (nullcontext, portable):
            with implementation(), pytest.raises(RuntimeError, match=argument):
                call()


def import_with(**variables: str) -> subprocess.CompletedProcess[str]:
    """Prints whether the CPU's steps are portable, and which devices they are compiled for."""
    code = (
        "from torchao8 import ops; import torch; from torchao8.portable import compiled\n"
        "print(ops.is_portable(torch.device('cpu')), len(compiled.devices))"
    )
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("cpu", "compiles", "expected"),
    [("portable", "", "True 3"), ("scalar", "0", "False 0"), ("", "1", "False 3")],
)
def test_the_environment_chooses(cpu: str, compiles: str, expected: str) -> None:
    run = import_with(TORCHAO8_CPU=cpu, TORCHAO8_COMPILE=compiles)
    assert run.stdout.strip() == expected, run.stderr


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("TORCHAO8_CPU", "sse", "avx512, avx2, scalar or portable"),
        ("TORCHAO8_CUDA", "kernels", "portable, or not be set"),
        ("TORCHAO8_COMPILE", "no", "0 or 1, or not be set"),
    ],
)
def test_another_value_is_refused_at_import(variable: str, value: str, expected: str) -> None:
    run = import_with(**{variable: value})
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode == 1
    assert last == f"ImportError: {variable} must be {expected}, got {value}"
