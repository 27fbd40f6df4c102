"""Quantization error of 8-bit codecs: dynamic against linear map, blockwise against tensor-wise.

    python -m benchmarks.codec_error

The table has the form of the one in "8-bit Optimizers via Block-wise Quantization" (Dettmers et
al., 2022): mean absolute and relative error of a tensor quantized and dequantized once. The data
are normal (signed maps), normal with a few outliers (what blocks are for) and the second moment of
Adam after 50 steps (unsigned maps). The last table is of Adam's update m / sqrt(v) when both
moments are quantized.

The rows "dynamic" with blocks run `torchao8.quantize_blockwise` and
`torchao8.dequantize_blockwise`; every other row is plain PyTorch in this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import torchao8
from benchmarks import reporting

Codec = Callable[[Tensor, bool], Tensor]  # (x, signed) -> x quantized and dequantized

BLOCK_SIZES = (64, 256, 2048)
SEED = 0


def linear_map(signed: bool) -> Tensor:
    """256 (255 if signed) equally spaced values from -1 (or 0) to 1, zero among them; float32."""
    if signed:
        return torch.arange(-127, 128, dtype=torch.float32) / 127
    return torch.arange(256, dtype=torch.float32) / 255


def absmax_codec(make_map: Callable[[bool], Tensor], block_size: int | None) -> Codec:
    """Rounds x / absmax to the nearest value of a map; absmax of blocks, or of the whole tensor."""

    def codec(x: Tensor, signed: bool) -> Tensor:
        blocks = x.reshape(-1, block_size or x.numel())
        absmax = blocks.abs().amax(dim=1, keepdim=True)
        absmax = absmax.clamp_min(torch.finfo(torch.float32).tiny)  # zeros stay zeros
        values = make_map(signed)
        midpoints = (values[1:].double() + values[:-1].double()) / 2
        nearest = values[torch.searchsorted(midpoints.float(), blocks / absmax)]
        return (nearest * absmax).reshape(x.shape)

    return codec


def codecs() -> dict[tuple[str, str], Codec]:
    """The codecs to compare by map and by what shares one scale, the crudest first."""

    def library(size: int, x: Tensor, signed: bool) -> Tensor:
        codes, scale = torchao8.quantize_blockwise(x, block_size=size, signed=signed)
        return torchao8.dequantize_blockwise(codes, scale, block_size=size, signed=signed)

    dynamic = torchao8.dynamic_map
    found = {("linear", "tensor"): absmax_codec(linear_map, None),
             ("dynamic", "tensor"): absmax_codec(dynamic, None)}  # fmt: skip
    for size in BLOCK_SIZES:
        scope = f"blocks of {size}"
        found["linear", scope] = absmax_codec(linear_map, size)
        found["dynamic, positive scale", scope] = absmax_codec(dynamic, size)
        found["dynamic", scope] = functools.partial(library, size)
    return found


def errors(stored: Tensor, exact: Tensor) -> dict[str, float]:
    """Absolute and relative errors; the share rounded to zero of what is not zero."""
    error, live = (stored.double() - exact).abs(), exact != 0
    relative = error[live] / exact[live].double().abs()
    return {
        "mean_absolute_error": error.mean().item(),
        "median_absolute_error": error.median().item(),
        "largest_absolute_error": error.max().item(),
        "mean_relative_error": relative.mean().item(),
        "median_relative_error": relative.median().item(),
        "share_rounded_to_zero": (stored[live] == 0).double().mean().item(),
    }


def update(m: Tensor, v: Tensor) -> Tensor:
    """Adam's m / (sqrt(v) + eps)."""
    return m.double() / (v.double().sqrt() + 1e-8)


def adam_moments(elements: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Adam's (m, v), bias-corrected, after `steps` steps of made-up gradients (beta2 = 0.99).

    Gradients are normal. Their standard deviation is a factor of the row (of 2048 elements) times
    a factor of the column, both log-normal, since in a network's weights both differ by decades.
    """
    rows = torch.exp(2 * torch.randn(elements // 2048, 1, generator=generator))
    columns = torch.exp(torch.randn(2048, generator=generator))
    m, v = torch.zeros(elements // 2048, 2048), torch.zeros(elements // 2048, 2048)
    for _ in range(steps):
        gradient = torch.randn(m.shape, generator=generator) * rows * columns
        m.lerp_(gradient, 1 - 0.9)
        v.lerp_(gradient.square(), 1 - 0.99)
    return (m / (1 - 0.9**steps)).flatten(), (v / (1 - 0.99**steps)).flatten()


def measure(elements: int) -> dict[str, list[dict[str, Any]]]:
    """The tables: for each kind of data the errors of every codec."""
    generator = torch.Generator().manual_seed(SEED)
    normal = torch.randn(elements, generator=generator)
    m, v = adam_moments(elements, 50, generator)
    far = torch.rand(normal.shape, generator=generator) < 1e-4
    outliers = torch.where(far, normal * 100, normal)
    kinds: dict[str, tuple[Tensor, Callable[[Codec], Tensor]]] = {
        "normal": (normal, lambda codec: codec(normal, True)),
        "normal, 1 in 10,000 is 100 times as large": (outliers, lambda c: c(outliers, True)),
        "second moment v": (v, lambda codec: codec(v, False)),
        "update m / sqrt(v)": (update(m, v), lambda c: update(c(m, True), c(v, False))),
    }
    return {
        data: [{"map": m, "scope": s, **errors(stored(codec), exact)}
               for (m, s), codec in codecs().items()]
        for data, (exact, stored) in kinds.items()
    }  # fmt: skip


def main(argv: Iterable[str] | None = None) -> None:
    parser = reporting.parser(__doc__, "codec-error")
    parser.add_argument("--elements", type=int, default=1 << 22, help="of each tensor (2^22)")
    args = parser.parse_args(argv)
    if args.elements < 2048 or args.elements % 2048:
        parser.error(f"--elements: must be a multiple of 2048, got {args.elements}")
    tables = measure(args.elements)
    for data, rows in tables.items():
        headers = ["map", "scale of", *(name.replace("_", " ") for name in list(rows[0])[2:])]
        lines = [[map_name, scope, *(f"{value:.3g}" for value in values)]
                 for map_name, scope, *values in (row.values() for row in rows)]  # fmt: skip
        print(f"\n{data}, {args.elements:,} elements")
        print(reporting.format_table(headers, lines, left=2))
    record = {
        "device": reporting.describe_machine(torch.get_num_threads()),
        "versions": reporting.versions(["torchao8"]),
        "elements": args.elements,
        "seed": SEED,
        "tables": [{"data": data, "errors": rows} for data, rows in tables.items()],
    }
    print(f"\nwrote {reporting.write_results(args, record)}")


if __name__ == "__main__":
    main()
