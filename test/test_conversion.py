"""Checkpoints of another precision, or of other blocks, are converted, and one warning says so."""

import copy
import re
import warnings
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, through_file, train
from optim_table import ADAMS, OPTIMIZERS, OptimizerCase

from torchao8 import AdamW, AdamW8bit, dequantize_blockwise, quantize_blockwise

# Which parameters of SHAPES are quantized, with min_8bit_size=SMALL.
QUANTIZED = (0, 1, 2, 3, 4, 6)
SIGNED = {"exp_avg": True, "exp_avg_sq": False, "max_exp_avg_sq": False}


def saved_by(optimizer_class: Any, device: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    params = make_params(torch.bfloat16, device=device)
    optimizer = optimizer_class(params, min_8bit_size=SMALL, **options)
    train(optimizer, params, range(3))
    return optimizer, through_file(optimizer.state_dict())


def loaded(cls: Any, saved: dict[str, Any], device: str, **options: Any) -> tuple[Any, list[str]]:
    optimizer = cls(make_params(torch.bfloat16, device=device), min_8bit_size=SMALL, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved)
    return optimizer, [str(w.message) for w in caught]


def states(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}], ids=str)
def test_8bit_becomes_32bit_without_loss(options: dict[str, Any], device: str) -> None:
    source, saved = saved_by(AdamW8bit, device, **options)
    target, told = loaded(AdamW, saved, device, **options)
    for i, (old, new) in enumerate(zip(states(source), states(target), strict=True)):
        for name in SIGNED:
            if name in new and i in QUANTIZED:
                codes, scale = old[f"{name}_codes"], old[f"{name}_scale"]
                value = dequantize_blockwise(codes, scale, signed=SIGNED[name])
                assert bits(new[name]) == bits(value)
            elif name in new:
                assert bits(new[name]) == bits(old[name])
        assert bits(old["step"]) == bits(new["step"])
    assert told == [
        "AdamW: the state of parameter 0 (of shape [3, 300]) and 5 more was saved in 8 bits, and "
        "is kept in 32 from here on. The options of this optimizer (optim_bits, min_8bit_size, "
        "block_size, state_format, block_wise) or the sharding of its parameters decide that"
    ]
    train(target, target.param_groups[0]["params"], [3])


@pytest.mark.parametrize("block_size", [64, 256])
def test_32bit_becomes_8bit_by_the_nearest_codes(block_size: int, device: str) -> None:
    source, saved = saved_by(AdamW, device)
    target, told = loaded(AdamW8bit, saved, device, block_size=block_size)
    for i, (old, new) in enumerate(zip(states(source), states(target), strict=True)):
        for name, signed in list(SIGNED.items())[:2]:
            if i in QUANTIZED:
                codes, scale = quantize_blockwise(old[name], block_size=block_size, signed=signed)
                assert bits(new[f"{name}_codes"]) == bits(codes)
                assert bits(new[f"{name}_scale"]) == bits(scale)
            else:
                assert bits(new[name]) == bits(old[name])
    assert len(told) == 1
    assert re.search(
        r"parameter 0 \(of shape \[3, 300\]\) and 5 more was saved in 32 bits, and is rounded to 8",
        told[0],
    )
    train(target, target.param_groups[0]["params"], [3])


@pytest.mark.parametrize(
    "case", [c for c in OPTIMIZERS[len(ADAMS) :] if c.optim_bits == 8], ids=lambda c: c.cls.__name__
)
def test_every_state_of_the_other_classes(case: OptimizerCase) -> None:
    """8 bits into 32, into other blocks, and 32 into 8: all states that the class can have."""
    options = {**case.base, **case.full}
    narrow, saved = saved_by(case.cls, "cpu", **options)
    wide, told = loaded(case.cls, saved, "cpu", optim_bits=32, **options)
    assert len(told) == 1
    other, _ = loaded(case.cls, saved, "cpu", block_size=64, **options)
    again, _ = loaded(case.cls, through_file(wide.state_dict()), "cpu", **options)
    names = [state.name for state in narrow._states(narrow.param_groups[0])]
    for i, p in enumerate(zip(*map(states, (narrow, wide, other, again)), strict=True)):
        old, in_32, in_64, back = p
        for name in names:
            if i not in QUANTIZED or name in case.scalars:
                assert bits(old[name]) == bits(in_32[name]) == bits(back[name])
                continue
            signed = case.is_signed(name)
            value = dequantize_blockwise(old[f"{name}_codes"], old[f"{name}_scale"], signed=signed)
            mended = in_32[name] > value if name == "square_avg" else torch.zeros_like(value).bool()
            assert bits(torch.where(mended, value, in_32[name])) == bits(value)
            for state, source, size in ((in_64, value, 64), (back, in_32[name], 256)):
                codes, scale = quantize_blockwise(source, block_size=size, signed=signed)
                assert bits(state[f"{name}_codes"]) == bits(codes)
                assert bits(state[f"{name}_scale"]) == bits(scale)
        assert old["step"] == in_32["step"] == in_64["step"] == back["step"] == 3
    for optimizer in (wide, other, again):
        train(optimizer, optimizer.param_groups[0]["params"], [3])


def test_other_blocks(device: str) -> None:
    """The block size of the checkpoint stands in its groups, and that of the optimizer stays."""
    source, saved = saved_by(AdamW8bit, device, block_size=64)
    target, told = loaded(AdamW8bit, saved, device, block_size=256)
    for i in QUANTIZED:
        old, new = states(source)[i], states(target)[i]
        value = dequantize_blockwise(old["exp_avg_codes"], old["exp_avg_scale"], block_size=64)
        codes, scale = quantize_blockwise(value, block_size=256)
        assert bits(new["exp_avg_codes"]) == bits(codes)
        assert bits(new["exp_avg_scale"]) == bits(scale)
    assert target.param_groups[0]["block_size"] == 256
    assert len(told) == 1
    assert "saved with another block_size, and is rounded anew" in told[0]


def test_a_checkpoint_of_torch_loads_into_8bits(device: str) -> None:
    """It has the keys of ours in 32 bits."""
    params = make_params(device=device)
    optimizer = torch.optim.AdamW(params)
    train(optimizer, params, range(2))
    target = AdamW8bit(make_params(device=device), min_8bit_size=SMALL)
    with pytest.warns(UserWarning, match="saved in 32 bits, and is rounded to 8"):
        target.load_state_dict(through_file(optimizer.state_dict()))
    codes, _ = quantize_blockwise(optimizer.state[params[0]]["exp_avg"])
    assert bits(states(target)[0]["exp_avg_codes"]) == bits(codes)


def test_the_same_format_is_not_converted_and_not_spoken_of(device: str) -> None:
    source, saved = saved_by(AdamW8bit, device)
    target, told = loaded(AdamW8bit, saved, device)
    assert told == []
    assert all_bits(target)["states"] == all_bits(source)["states"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("exp_avg_codes", lambda t: t.float()),
        ("exp_avg_codes", lambda t: t[:2]),
        ("exp_avg_scale", lambda t: t.reshape(-1)),
        ("exp_avg_scale", lambda t: t * float("nan")),
        ("exp_avg_sq_scale", lambda t: -t),
    ],
)
def test_damaged_state_is_refused_before_it_is_converted(key: str, value: Any, device: str) -> None:
    _, saved = saved_by(AdamW8bit, device)
    saved["state"][1][key] = value(saved["state"][1][key])
    target = AdamW(make_params(torch.bfloat16, device=device))
    before = all_bits(target)
    with pytest.raises(ValueError, match=f"{key} of parameter 1: expected"):
        target.load_state_dict(saved)
    assert all_bits(target) == before


def test_what_is_not_known_is_refused(device: str) -> None:
    """A later version, a stray state, the parameters in another order; and nothing changes."""
    params = list(zip("abcdefgh", make_params(device=device), strict=True))
    optimizer = AdamW8bit(params, min_8bit_size=SMALL)
    train(optimizer, [p for _, p in params], [0])
    good, before = optimizer.state_dict(), all_bits(optimizer)

    def refused(match: str, **changes: Any) -> None:
        saved = copy.deepcopy(good)
        for name, change in changes.items():
            change(saved[name])
        with pytest.raises(ValueError, match=match):
            optimizer.load_state_dict(saved)
        assert all_bits(optimizer) == before

    refused(
        "state_version: this version of torchao8 reads and writes 1, got 2. A newer one",
        param_groups=lambda groups: groups[0].update(state_version=2),
    )
    refused(
        "state of 8: no parameter group of the checkpoint has it",
        state=lambda state: state.update({8: state[0]}),
    )
    refused(
        "param_names: .* in another order: 'b' where the optimizer has 'a'",
        param_groups=lambda groups: groups[0].update(param_names=list("bacdefgh")),
    )
    renamed = copy.deepcopy(good)  # as a wrapper of the model does
    renamed["param_groups"][0]["param_names"] = [f"module.{c}" for c in "abcdefgh"]
    optimizer.load_state_dict(renamed)
