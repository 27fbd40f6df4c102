"""The op count_step_: what it counts, and what it refuses."""

import re
from typing import Any

import pytest
import torch
from helpers import bits
from torch import Tensor

from torchao8 import ops


def steps_at(values: list[float], device: str) -> list[Tensor]:
    return [torch.tensor(value, device=device) for value in values]


def test_each_step_is_counted(device: str) -> None:
    # More than a kernel takes on a GPU.
    values = [float(7 * i % 1000) for i in range(4500)]
    steps = steps_at(values, device)
    for times in (1, 2):
        ops.count_step_(steps, None)
        assert [step.item() for step in steps] == [value + times for value in values]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_found_inf(dtype: torch.dtype, device: str) -> None:
    for place in {"cpu", device}:  # where found_inf is
        steps = steps_at([3.0, 0.0], device)
        ops.count_step_(steps, torch.tensor(1, dtype=dtype, device=place))
        assert [step.item() for step in steps] == [3, 0]
        ops.count_step_(steps, torch.tensor(0, dtype=dtype, device=place))
        assert [step.item() for step in steps] == [4, 1]


def test_a_list_without_steps() -> None:
    ops.count_step_([], None)


REFUSALS: dict[str, tuple[list[Any], Any, str]] = {
    "an integer": ([torch.tensor(1)], None, "steps[1] must be float32, got int64"),
    "two elements": ([torch.zeros(2)], None, "steps[1] must have one element, got shape [2]"),
    "found_inf of two": (
        [torch.zeros(())],
        torch.zeros(2),
        "found_inf must have one element, got shape [2]",
    ),
    "found_inf an integer": (
        [torch.zeros(())],
        torch.tensor(0),
        "found_inf must be float32 or float64, got int64",
    ),
    "on meta": (
        [torch.zeros((), device="meta")],
        None,
        "expected all tensors on cpu, as steps[0], got one on meta",
    ),
    "negative": ([torch.tensor(-1.0)], None, "steps[1] must be a whole number from 0 to 2^24 - 1"),
    "a fraction": ([torch.tensor(0.5)], None, "steps[1] must be a whole number from 0 to 2^24 - 1"),
    "uncountable": ([torch.tensor(2.0**24)], None, "up to which float32 counts, got 1.67772e+07"),
}


@pytest.mark.parametrize("name", list(REFUSALS))
def test_refusals(name: str) -> None:
    more, found_inf, words = REFUSALS[name]
    steps = [torch.tensor(5.0), *more]
    with pytest.raises(RuntimeError, match=re.escape(words)) as info:
        ops.count_step_(steps, found_inf)
    assert str(info.value).startswith("count_step_: ")
    assert bits(steps[0]) == bits(torch.tensor(5.0))


def test_a_step_twice(device: str) -> None:
    step = torch.tensor(1.0, device=device)
    with pytest.raises(RuntimeError, match=r"steps\[0\] and steps\[1\] must be different tensors"):
        ops.count_step_([step, step], None)
    assert step.item() == 1


def test_opcheck(device: str) -> None:
    op = torch.ops.torchao8.count_step_.default
    found_inf = torch.zeros((), device=device)
    torch.library.opcheck(op, (steps_at([1.0, 2.0], device), None))
    torch.library.opcheck(op, (steps_at([1.0, 2.0], device), found_inf))
