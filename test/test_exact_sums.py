"""The ops sum_squares and norms: sums without rounding, whose bits no order can change.

The oracle is Python's integers, in units of 2^-298, the smallest square of a float32.
"""

import math
import random
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from cpu_paths import Workers, every_path
from helpers import bits, needs_kernels
from torch import Tensor

from torchao8 import ops

LIMBS = ops.SUM_LIMBS
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def exact_sum(t: Tensor) -> int:
    numbers = t.detach().cpu().double().flatten().tolist()
    # Up to 2^277: a whole number, and exact.
    return sum(int(math.ldexp(x, 149)) ** 2 for x in numbers if math.isfinite(x))


def limbs_of(total: int) -> list[int]:
    """The canonical row of a sum."""
    lower = [total >> 32 * k & 0xFFFFFFFF for k in range(LIMBS - 1)]
    return [*lower, total >> 32 * (LIMBS - 1)]


def value_of(row: Tensor) -> int:
    return sum(limb << 32 * k for k, limb in enumerate(row.tolist()))


def rows_of(tensors: list[Tensor]) -> list[list[int]]:
    return [limbs_of(exact_sum(t)) for t in tensors]


# -- numbers -----------------------------------------------------------------------------------


def numbers(count: int, low: int, high: int, seed: int = 0) -> Tensor:
    """Random mantissas and signs, with exponents from low to high; below -126 subnormal."""
    generator = torch.Generator().manual_seed(seed)
    mantissa = 1 + torch.randint(0, 1 << 23, (count,), generator=generator).double() * 2.0**-23
    exponent = torch.randint(low, high + 1, (count,), generator=generator)
    sign = 2 * torch.randint(0, 2, (count,), generator=generator) - 1
    return torch.ldexp(sign * mantissa, exponent).float()


def with_some(x: Tensor, values: list[float], seed: int = 0) -> Tensor:
    """Every fifth element or so replaced by one of the values."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.randint(0, 5 * len(values), x.shape, generator=generator)
    for i, value in enumerate(values):
        x = torch.where(which == i, torch.tensor(value), x)
    return x


def full_windows(spread: int, sign: int) -> Tensor:
    """The CPU sums in windows of doubles (csrc/cpu/squares.inl), which numbers of one magnitude
    fill most: the largest ones, and those that each leave nearly half a unit of the first window to
    the next one, up or down. A small one among them sets the unit."""
    top = 30
    small = (2**24 - 1) * Fraction(2) ** (top - spread - 23)
    unit = Fraction(2) ** (2 * (top - spread - 23) + (45 if spread < 30 else 90))
    choices = random.Random(spread)
    mantissas = [2**24 - 1 - choices.randrange(2**23) for _ in range(20000)]

    def rest(mantissa: int) -> float:
        square = (mantissa * Fraction(2) ** (top - 23)) ** 2 / unit
        return sign * float(square - math.floor(square + Fraction(1, 2)))

    worst = max(mantissas, key=rest) if sign else 2**24 - 1
    x = torch.full((4096,), math.ldexp(worst, top - 23))
    x[1000] = x[3000] = float(small)
    return x


SPECIAL = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 2.0**-149, 2.0**-126 - 2.0**-149,
           -3.4028234663852886e38, 2.0**127]  # fmt: skip
COUNTS = [0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 65, 2047, 2048, 2049, 4095, 4096, 4097, 9000]
CASES = {
    **{f"{n} numbers": numbers(n, -8, 2, n) for n in COUNTS},
    **{f"spread of {s}": numbers(5000, 10 - s, 10, s) for s in (0, 12, 19, 20, 21, 22, 42, 43, 44)},
    **{
        f"windows for {s} full of {name}": full_windows(s, sign)
        for s in (19, 20, 21, 22, 42, 43, 44, 45)
        for name, sign in (("large", 0), ("up", 1), ("down", -1))
    },
    "any magnitude": numbers(9000, -149, 127),
    "subnormal": numbers(5000, -149, -127),
    "smallest": torch.full((5000,), 2.0**-149),
    "smallest normal": numbers(5000, -126, -126),
    "small": numbers(5000, -126, -100),
    "largest": torch.full((40000,), 3.4028234663852886e38),
    "large": numbers(5000, 100, 127),
    "zeros": torch.zeros(5000),
    "negative zeros": -torch.zeros(70),
    "NaN": torch.full((70,), math.nan),
    "infinity": torch.full((5000,), -math.inf),
    "zeros among": with_some(numbers(5000, -8, 2), [0.0, -0.0]),
    "one NaN": with_some(numbers(70, -8, 2), [math.nan]),
    "special among": with_some(numbers(9000, -8, 2), SPECIAL),
    "a subnormal one among": torch.cat([numbers(5000, -8, 2), torch.tensor([1e-40])]),
    "0-d": torch.tensor(-3.7),
    "shared by threads": numbers(150_001, -30, 2),
}
for dtype, highest in ((torch.bfloat16, 127), (torch.float16, 15)):
    CASES[f"{dtype}"] = numbers(5000, -24, highest).to(dtype)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    CASES[f"every {dtype}"] = every.view(dtype)
TENSORS = list(CASES.values())
ROWS = rows_of(TENSORS)


def assert_rows(rows: Tensor, expected: list[list[int]]) -> None:
    assert rows.dtype == torch.int64
    assert tuple(rows.shape) == (len(expected), LIMBS)
    wrong = [i for i, row in enumerate(rows.tolist()) if row != expected[i]]
    assert wrong == []


def test_sums_are_exact_and_canonical(device: str) -> None:
    assert_rows(ops.sum_squares([t.to(device) for t in TENSORS]), ROWS)


@pytest.mark.parametrize("name", list(CASES))
def test_a_sum_by_itself(name: str, device: str) -> None:
    x = CASES[name].to(device)
    assert_rows(ops.sum_squares([x]), [ROWS[list(CASES).index(name)]])


# -- paths and threads -------------------------------------------------------------------------


@needs_kernels
@every_path
def test_every_path_and_any_threads(workers: Workers, path: str) -> None:
    expected = torch.tensor(ROWS)
    for options in ({"threads": 1}, {"threads": 2}, {"threads": 3, "flush_denormal": True}):
        sums, norms = workers.get(path)("sums", TENSORS, **options)
        assert_rows(torch.frombuffer(bytearray(sums), dtype=torch.int64).view(-1, LIMBS), ROWS)
        assert norms == bits(ops.norms(expected))


# -- what must not matter ----------------------------------------------------------------------


def test_order_does_not_matter(device: str) -> None:
    for x in (CASES["special among"], CASES["any magnitude"], CASES["spread of 43"]):
        whole = ops.sum_squares([x.to(device)])
        for seed in range(3):
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
            assert bits(ops.sum_squares([x[order].to(device)])) == bits(whole)


@hypothesis.given(st.lists(st.integers(0, 9000), max_size=12), st.sampled_from(["special", "any"]))
@hypothesis.settings(max_examples=30)
def test_pieces_add_up(cuts: list[int], kind: str) -> None:
    x = CASES["special among" if kind == "special" else "any magnitude"]
    places = [0, *sorted(cuts), len(x)]
    pieces = [x[a:b] for a, b in pairwise(places)]
    rows = ops.sum_squares(pieces)
    # As ranks do: each has some of the rows, and the limbs are added as they are.
    ranks = rows[::2].sum(0, keepdim=True) + rows[1::2].sum(0, keepdim=True)
    assert limbs_of(value_of(ranks[0])) == limbs_of(exact_sum(x))
    assert bits(ops.norms(ranks)) == bits(ops.norms(ops.sum_squares([x])))


def views_of(base: Tensor) -> list[Tensor]:
    """Of a tensor of shape (7, 60, 13)."""
    return [
        base.transpose(0, 2),
        base[:, :, 3],
        base[:, ::2, ::2],
        base.flatten()[1:],
        base.transpose(0, 1)[3:50, :, 2:],
        base[0, :, :1].expand(60, 13),
        base[3, 4, 5].expand(3, 5),
        base[3, 4, 5],
        base[:, 2:3, :].transpose(0, 1),
        base[0].diagonal(),
        base.view(7, 6, 10, 13).contiguous(memory_format=torch.channels_last),
        base[:, 3:3],
        base.flatten().as_strided((50, 60), (1, 2)),  # overlaps itself
    ]


def test_views(device: str) -> None:
    base = with_some(numbers(7 * 60 * 13, -20, 5), SPECIAL).view(7, 60, 13).to(device)
    for dtype in FLOATS:
        views = views_of(base.to(dtype))
        assert_rows(ops.sum_squares(views), rows_of(views))


def test_half_precision_is_widened(device: str) -> None:
    for dtype in FLOATS[1:]:
        x = numbers(9001, -30, 15).to(dtype).to(device)
        assert bits(ops.sum_squares([x])) == bits(ops.sum_squares([x.float()]))


def test_many_tensors(device: str) -> None:
    """More than a kernel takes on a GPU, some of them empty."""
    tensors = [numbers(i % 7, -8, 2, i) for i in range(2500)]
    assert_rows(ops.sum_squares([t.to(device) for t in tensors]), rows_of(tensors))


def test_no_tensors_and_empty_ones(device: str) -> None:
    assert tuple(ops.sum_squares([]).shape) == (0, LIMBS)
    assert_rows(ops.sum_squares([torch.empty(0, device=device)]), [[0] * LIMBS])
    assert ops.norms(ops.sum_squares([torch.empty(0, 3, device=device)])).tolist() == [0.0]
    assert tuple(ops.norms(ops.sum_squares([])).shape) == (0,)


def test_inputs_stay_as_they_are(device: str) -> None:
    x = CASES["special among"].to(device).clone()
    before = bits(x)
    rows = ops.sum_squares([x])
    limbs = bits(rows)
    ops.norms(rows)
    assert (bits(x), bits(rows)) == (before, limbs)


# -- norms -------------------------------------------------------------------------------------


def halfway_sums() -> list[int]:
    """Sums halfway between two float64, and those next to them, near and far below."""
    choices = random.Random(0)
    mantissas = [2**52, 2**52 + 1, 2**53 - 1, 2**53 - 2, *(choices.randrange(2**52, 2**53)
                 for _ in range(8))]  # fmt: skip
    totals = []
    for shift in (0, 1, 9, 10, 11, 12, 31, 32, 33, 42, 43, 63, 64, 65, 100, 301, 520):
        for mantissa in mantissas:
            half = (2 * mantissa + 1) << shift
            below = {1, 1 << shift // 2, 1 << max(shift - 1, 0), 1 << max(shift - 33, 0)}
            totals += [half, *(half + b for b in below), *(half - b for b in below)]
    return totals


SUMS = [0, 1, 2, 3, 2**32 - 1, 2**32, 2**52 + 1, 2**53 + 1, 2**54 - 1, 2**575, 2**576, 2**576 - 1,
        2**606 + 1, 2**607 - 1, *(2**k for k in range(606)), *halfway_sums()]  # fmt: skip


def nearest_float(total: int) -> float:
    """Python rounds a quotient of integers correctly."""
    return total / 2**298


def is_nearest_root(root: float, x: float) -> bool:
    if x == 0:
        return root == 0
    half = Fraction(math.ulp(root)) / 2
    return (Fraction(root) - half) ** 2 <= Fraction(x) <= (Fraction(root) + half) ** 2


@needs_kernels
def test_the_norm_of_a_sum_is_rounded_correctly(device: str) -> None:
    rows = torch.tensor([limbs_of(total) for total in SUMS], device=device)
    found = ops.norms(rows).tolist()
    wrong = [t for t, x in zip(SUMS, found, strict=True) if x != math.sqrt(nearest_float(t))]
    assert wrong == []
    assert all(is_nearest_root(x, nearest_float(t)) for t, x in zip(SUMS, found, strict=True))


def test_rounding_is_seen_in_some_norms() -> None:
    """A root halves relative differences, so half of the wrong sums would not show; the sums above
    must have enough that do, either way."""
    halves = halfway_sums()
    changed = [math.sqrt(nearest_float(t)) != math.sqrt(math.nextafter(nearest_float(t), step))
               for t in halves for step in (0, math.inf)]  # fmt: skip
    assert sum(changed) > len(changed) / 3


def test_norms_of_added_rows(device: str) -> None:
    """Limbs that are not canonical: carries either way, more than thousands of ranks make."""
    choices = random.Random(1)
    rows, totals = [], [total for total in SUMS if total < 2**606]
    for total in totals:
        row = limbs_of(total)
        for k in range(LIMBS - 1):
            moved = choices.randrange(-(2**29), 2**29)
            row[k] += moved << 32
            row[k + 1] -= moved
        rows.append(row)
    expected = ops.norms(torch.tensor([limbs_of(total) for total in totals]))
    assert bits(ops.norms(torch.tensor(rows, device=device))) == bits(expected)

    ranks = torch.tensor(ROWS, device=device) * 8000
    expected = ops.norms(torch.tensor([limbs_of(8000 * exact_sum(t)) for t in TENSORS]))
    assert bits(ops.norms(ranks)) == bits(expected)


@needs_kernels
def test_norms_agree_with_torch(device: str) -> None:
    for name in ("9000 numbers", "spread of 43", "large", "0-d"):
        x = CASES[name].to(device)
        expected = torch.linalg.vector_norm(x.double()).item()
        # Torch adds in float64: an error of count * 2^-53, relatively, and less in the root.
        assert ops.norms(ops.sum_squares([x])).item() == pytest.approx(expected, rel=1e-12)


def test_rows_with_strides(device: str) -> None:
    rows = torch.tensor(ROWS, device=device)
    assert bits(ops.norms(rows[::3])) == bits(ops.norms(rows[::3].contiguous()))
    columns = rows.t().contiguous().t()
    assert bits(ops.norms(columns)) == bits(ops.norms(rows))


def test_a_negative_sum_has_no_norm(device: str) -> None:
    rows = torch.zeros(2, LIMBS, dtype=torch.int64, device=device)
    rows[1, 3] = -1
    assert ops.norms(rows)[0].item() == 0
    assert math.isnan(ops.norms(rows)[1].item())


# -- as ops ------------------------------------------------------------------------------------


def test_opcheck(device: str) -> None:
    tensors = [x.to(device) for x in (torch.randn(3, 70), torch.randn(()), torch.randn(0))]
    torch.library.opcheck(torch.ops.torchao8.sum_squares.default, (tensors,))
    torch.library.opcheck(torch.ops.torchao8.norms.default, (ops.sum_squares(tensors),))


def test_in_a_traced_function(device: str, fresh_compiler: None) -> None:
    tensors = [torch.randn(3, 70, device=device), torch.randn((), device=device)]

    def total(values: list[Tensor]) -> Tensor:
        return ops.norms(ops.sum_squares(values).sum(0, keepdim=True))

    traced = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert bits(traced(tensors)) == bits(total(tensors))


REFUSALS: dict[str, tuple[str, Any, str]] = {
    "an integer": (
        "sum_squares",
        torch.tensor([1]),
        "tensors[1] must be float32, bfloat16 or float16, got int64",
    ),
    "float64": (
        "sum_squares",
        torch.zeros(3, dtype=torch.float64),
        "tensors[1] must be float32, bfloat16 or float16, got float64",
    ),
    "sparse": (
        "sum_squares",
        torch.zeros(3).to_sparse(),
        "tensors[1] must be dense, got layout torch.sparse_coo",
    ),
    "on meta": (
        "sum_squares",
        torch.zeros(3, device="meta"),
        "expected all tensors on cpu, as tensors[0], got one on meta",
    ),
    "norms of floats": ("norms", torch.zeros(2, LIMBS), "sums must be int64, got float32"),
    "norms of a row": (
        "norms",
        torch.zeros(LIMBS, dtype=torch.int64),
        "sums must have shape [n, 18], as sum_squares gives it, got [18]",
    ),
    "norms of short rows": (
        "norms",
        torch.zeros(2, 17, dtype=torch.int64),
        "sums must have shape [n, 18], as sum_squares gives it, got [2, 17]",
    ),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_refusals(name: str) -> None:
    op, argument, words = REFUSALS[name]
    call = argument if op == "norms" else [torch.ones(2), argument]
    with pytest.raises(RuntimeError, match=re.escape(words)) as info:
        getattr(ops, op)(call)
    assert str(info.value).startswith(f"{op}: ")
