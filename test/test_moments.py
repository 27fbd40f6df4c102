"""``moments``: what a parameter's state stands for, as float32 tensors that nobody else has."""

import re
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, set_grads, train
from optim_table import OPTIMIZERS, OptimizerCase
from ranks import run_ranks
from sharded import fsdp_weights, groups_of, step_with, whole
from test_to_torch import moment
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import torchao8
from torchao8.checkpoint import to_torch
from torchao8.optim._state import paging

OPTIONS: dict[str, Any] = {"lr": 0.01, "min_8bit_size": SMALL}


@pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda case: case.cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_class(case: OptimizerCase, dtype: torch.dtype, device: str) -> None:
    """All states that it can have, element by element through the map; and nothing changes."""
    params = make_params(dtype, device=device)
    optimizer = case.make(params, min_8bit_size=SMALL, percentile_clipping=50, **case.full)
    train(optimizer, params, range(2))
    before = all_bits(optimizer)
    group = optimizer.param_groups[0]
    names = [state.name for state in optimizer._states(group) if not state.is_scalar]
    for p in params:
        found = optimizer.moments(p)
        assert list(found) == names
        for name, value in found.items():
            assert (value.dtype, value.shape, value.device) == (torch.float32, p.shape, p.device)
            if p.ndim > 1:
                want = moment(optimizer.state[p], name, case.is_signed(name))
                assert bits(value) == bits(want)
            value.fill_(7.0)
    assert all_bits(optimizer) == before


@pytest.mark.parametrize("cls", [torchao8.AdamW, torchao8.AdamW8bit])
@pytest.mark.parametrize("options", [{}, {"block_wise": False}, {"is_paged": True}], ids=str)
def test_options(cls: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.optim would go on from, of one scale a tensor and of paged state too."""
    monkeypatch.setattr(paging, "LEAST", 1000)
    params = make_params()
    optimizer = cls(params, **OPTIONS, **options)
    train(optimizer, params, range(3))
    theirs = to_torch(optimizer)["state"]
    for i, p in enumerate(params):
        found = optimizer.moments(p)
        for name in ("exp_avg", "exp_avg_sq"):
            assert bits(found[name]) == bits(theirs[i][name])
            assert paging.found_in(found[name]) is None
            assert found[name].any()


def test_numbers_of_bad_variances_are_as_they_are_kept() -> None:
    """to_torch raises the variance of RMSprop, which torch has no floor under; this tells it."""
    params = make_params(shapes=[(40, 70)])
    optimizer = torchao8.RMSprop8bit(params, centered=True, alpha=0.9, **OPTIONS)
    for _ in range(60):  # of the same gradients: the variances go to 0, and rounding does the rest
        set_grads(params, 0)
        optimizer.step()
    found, theirs = optimizer.moments(params[0]), to_torch(optimizer)["state"][0]
    assert bits(found["grad_avg"]) == bits(theirs["grad_avg"])
    assert bool((found["square_avg"] < theirs["square_avg"]).any())


def test_momentum_that_is_off() -> None:
    params = make_params(shapes=[(40, 70)])
    optimizer = torchao8.SGD8bit(params, **OPTIONS)
    train(optimizer, params, range(1))
    assert optimizer.moments(params[0]) == {}
    optimizer.param_groups[0]["momentum"] = 0.9  # its buffer comes with the next step
    assert optimizer.moments(params[0]) == {}
    train(optimizer, params, range(1))
    assert list(optimizer.moments(params[0])) == ["momentum_buffer"]
    optimizer.param_groups[0]["momentum"] = 0.0
    assert list(optimizer.moments(params[0])) == ["momentum_buffer"]


def test_others_keys_and_inference_mode() -> None:
    params = make_params(shapes=[(40, 70), (3,)])
    optimizer = torchao8.AdamW8bit(params, **OPTIONS)
    train(optimizer, params, range(1))
    for p in params:
        optimizer.state[p]["slow"] = torch.ones(3)
        with torch.inference_mode():
            found = optimizer.moments(p)
        assert list(found) == ["exp_avg", "exp_avg_sq"]
        assert not any(value.is_inference() or value.requires_grad for value in found.values())


@pytest.mark.parametrize("cls", [torchao8.AdamW, torchao8.AdamW8bit])
def test_refused(cls: Any) -> None:
    p, frozen = nn.Parameter(torch.ones(40, 70)), nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = cls([("w", p), ("b", frozen)], **OPTIONS)
    message = "expected a parameter with state, got parameter 0 (w): it gets its state at the first"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        optimizer.moments(p)
    assert not optimizer.state
    with pytest.raises(RuntimeError, match=r"parameter 1 \(b\): it does not require a gradient"):
        optimizer.moments(frozen)
    with pytest.raises(ValueError, match=r"got a tensor of shape \[40, 70\] that is in none of"):
        optimizer.moments(p.detach())
    with pytest.raises(TypeError, match="expected a parameter, got str"):
        optimizer.moments("w")


def _sharded(rank: int, world_size: int, wanted: list[dict[str, bytes]]) -> None:
    model = fsdp_weights(init_device_mesh("cpu", (world_size,)))
    optimizer = torchao8.AdamW8bit(groups_of(model.parameters(), True), **OPTIONS)
    step_with(optimizer, range(3))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p, want in zip(params, wanted, strict=True):
        found = optimizer.moments(p)
        for value in found.values():
            assert isinstance(value, DTensor)
            assert (value.placements, value.device_mesh) == (p.placements, p.device_mesh)
        assert {name: bits(whole(value)) for name, value in found.items()} == want


def test_sharded() -> None:
    """DTensors placed as the parameters are, with the bits of unsharded training."""
    optimizer = torchao8.AdamW8bit(groups_of(fsdp_weights(None).parameters(), False), **OPTIONS)
    step_with(optimizer, range(3))
    params = [p for group in optimizer.param_groups for p in group["params"]]
    wanted = [{k: bits(v) for k, v in optimizer.moments(p).items()} for p in params]
    run_ranks(3, _sharded, wanted)
