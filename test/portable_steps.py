"""Steps in plain PyTorch operators beside those of the kernels: run, compared, counted.

The two are not the same to the bit: without a fused multiply-add, products are rounded once more.
So parameters lie within the oracle's bounds, and codes may be the next one where a value lies at a
border.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import reference
import torch
from optim_table import OptimizerCase
from test_optim import on_cpu
from torch import Tensor

from torchao8._implementation import choose_portable
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.portable import compiled

# Codes that differ: values within rounding, 2^-23 or so, of a border between codes that are at
# least 0.7% of the scale apart. At most 2^-23 / 0.007 = 1.7e-5 of them.
MOST_DIFFERENT = 1e-4


@contextmanager
def portable(device: str = "cpu", compiles: bool = False) -> Iterator[None]:
    before = set(compiled.devices)
    choose_portable(device)
    if not compiles:
        compiled.devices.clear()
    try:
        yield
    finally:
        choose_portable(device, False)
        compiled.devices.update(before)


def step_portably(optimizer: torch.optim.Optimizer, device: str = "cpu") -> None:
    with portable(device):
        optimizer.step()


def copy_state(source: LowPrecisionOptimizer, target: LowPrecisionOptimizer) -> None:
    """Parameters and states, in place."""
    for a, b in zip(source.param_groups, target.param_groups, strict=True):
        for p, q in zip(a["params"], b["params"], strict=True):
            q.data.copy_(p.data)
            for key, value in source.state[p].items():
                target.state[q][key].copy_(value)


class Differences:
    """Of codes and scales, counted."""

    def __init__(self) -> None:
        self.codes = self.different = self.furthest = 0
        self.scales = self.other_scales = 0

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.dtype == torch.uint8 and a.numel():
            distance = (a.int() - b.int()).abs()
            self.codes += distance.numel()
            self.different += int((distance > 0).sum())
            self.furthest = max(self.furthest, int(distance.max()))

    def add_mulaw(self, codes: Sequence[Tensor], scales: Sequence[Tensor], signed: bool) -> None:
        """Scales are on a grid, and a bound at a border may get the next one: then the codes of its
        block are others."""
        other = scales[0] != scales[1]
        self.scales += other.numel()
        self.other_scales += int(other.sum())
        assert ((scales[0] - scales[1]).abs() <= scales[0] * (2**-7 if signed else 1)).all()
        if not other.any():
            self.add(*(sorted_by_value(c) if signed else c for c in codes))

    def check(self) -> None:
        assert self.furthest <= 1
        assert self.different <= max(1, MOST_DIFFERENT * self.codes)
        assert self.other_scales <= max(1, 1e-3 * self.scales)


def sorted_by_value(codes: Tensor) -> Tensor:
    """Signed mu-law codes in the order of their values, and 0.0 in the place of -0.0."""
    return torch.where(codes > 127, 255 - codes, codes + 127).to(torch.uint8)


def assert_alike(
    case: OptimizerCase,
    theirs: LowPrecisionOptimizer,
    ours: LowPrecisionOptimizer,
    wanted: list[Any],
    unit: float,
    differences: Differences,
) -> None:
    """After a step from the same state.

    Args:
        wanted: what the oracle made of each parameter; none where it knows no bounds.
        unit: of the dtype of the parameters, where that is narrower than float32.
    """
    block_wise = bool(wanted)
    of_kernels, of_operators = (o.param_groups[0]["params"] for o in (theirs, ours))
    for i, (p, q) in enumerate(zip(of_kernels, of_operators, strict=True)):
        p, q = p.detach().cpu(), q.detach().cpu()
        # Each of both is within the oracle's bound, and is rounded once to its dtype, up or
        # down by a unit in the last place if that is stochastic.
        if block_wise:
            limit = 2 * wanted[i].param_error + 2 * unit * p.double().abs() + 1e-37
            assert ((p.double() - q.double()).abs() <= limit).all()
        else:
            torch.testing.assert_close(p, q, rtol=1e-4 + unit, atol=1e-5)
        for key, value in on_cpu(theirs.state[of_kernels[i]]).items():
            other = ours.state[of_operators[i]][key].cpu()
            if "_mulaw" in key:
                continue
            differences.add(value, other)
            if block_wise and key in wanted[i].errors:
                error = 2 * wanted[i].errors[key] + 1e-37
                assert ((value.double() - other.double()).abs() <= error).all()
            elif key.endswith("_scale"):
                torch.testing.assert_close(value, other, rtol=1e-4, atol=0)
            elif block_wise and key.endswith("_codes"):
                name = key.removesuffix("_codes")
                if case.is_signed(name):
                    continue
                live = wanted[i].states[name] > wanted[i].errors[name]
                scale = ours.state[of_operators[i]][f"{name}_scale"].cpu()
                live &= reference.expand_scale(scale, tuple(live.shape), 256) > 0
                assert (other[live] > 0).all()  # a second moment is never rounded to zero
        pair = [on_cpu(o.state[x]) for o, x in ((theirs, of_kernels[i]), (ours, of_operators[i]))]
        add_mulaw_states(case, pair, differences)


def add_mulaw_states(
    case: OptimizerCase, pair: Sequence[dict[str, Tensor]], differences: Differences
) -> None:
    for key in pair[0]:
        if key.endswith("_mulaw"):
            codes, scales = ([state[k] for state in pair] for k in (key, f"{key}_scale"))
            name = key.removesuffix("_mulaw")
            differences.add_mulaw(codes, scales, case.is_signed(name) and name != "exp_avg_slow")
