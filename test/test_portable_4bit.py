"""Steps of 4-bit state in plain PyTorch operators, against those of the kernels, as ops."""

import math
from itertools import chain
from typing import Any

import pytest
import torch
from adam_call import (
    CHANGED,
    FOUR_BIT,
    MOMENTS,
    Call,
    assert_same_bits,
    copy_call,
    live_state,
    new_call,
    nibbles,
    run,
    sample_call,
    tensors,
)
from helpers import SMALL, bits, make_params, needs_kernels, set_grads, through_file
from optim_table import OF_4_BITS, OptimizerCase
from portable_steps import Differences, copy_state, portable, step_portably
from test_mulaw_steps import family_call
from torch import Tensor

import torchao8
from torchao8 import ops
from torchao8.portable import compiled, pieces

pytestmark = needs_kernels
TAKEN = [f for f in ops.FAMILIES if f.name in ("adam", "lion", "sgd")]
OTHERS = [f for f in ops.FAMILIES if f not in TAKEN]


def four_bit_call(dtype: torch.dtype = torch.float32, **options: Any) -> Call:
    return sample_call(dtype, state_format=FOUR_BIT, block_size=64, **options)


def run_portably(call: Call, compiles: bool = False) -> Call:
    with portable(compiles=compiles):
        return run(call)


def compare(a: Call, b: Call, differences: Differences) -> None:
    for p, q in zip(a["params"], b["params"], strict=True):
        unit = 0.0 if p.dtype == torch.float32 else torch.finfo(p.dtype).eps
        torch.testing.assert_close(p, q, rtol=1e-4 + unit, atol=1e-5, equal_nan=True)
    for name in MOMENTS:
        for i in range(len(a[f"{name}s"])):
            differences.add(nibbles(a, name, i), nibbles(b, name, i))
            scales = (call[f"{name}_scales"][i] for call in (a, b))
            torch.testing.assert_close(*scales, rtol=1e-5, atol=0, equal_nan=True)
            if a["params"][i].shape[-1:] == (17,):  # what is left over in the last byte of a row
                assert torch.equal(*(call[f"{name}s"][i][:, -1] >> 4 for call in (a, b)))


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_steps_like_the_kernels(dtype: torch.dtype, amsgrad: bool) -> None:
    """Each from the same state: no error adds up."""
    theirs = four_bit_call(
        dtype,
        amsgrad=amsgrad,
        weight_decay=0.1,
        stochastic_rounding=amsgrad,
        stochastic_params=dtype == torch.bfloat16,
    )
    differences = Differences()
    for _ in range(5):
        ours = copy_call(theirs)
        run(theirs)
        run_portably(ours)
        compare(theirs, ours, differences)
    assert differences.codes > 20_000
    differences.check()


def test_blocks_that_are_not_like_others() -> None:
    """Gradients that are not finite and tiny ones, and scales that are none.

    None is zero: quotients of an average that only decays lie halfway between two codes, and then
    the last rounding decides.
    """
    theirs = four_bit_call()
    grad = theirs["grads"][0]  # (3, 300): five blocks a row
    grad[0, 3], grad[0, 70], grad[1, :64] = math.nan, math.inf, -math.inf
    grad[1, 64:128] = 1e30  # its square is infinite
    grad[1, 128:192] *= 1e-30
    theirs["exp_avg_sq_scales"][0][2, :3] = torch.tensor([math.nan, -1.0, 0.0])
    theirs["exp_avg_scales"][0][2, 3:] = torch.tensor([math.inf, 0.0])
    ours, differences = copy_call(theirs), Differences()
    run(theirs)
    run_portably(ours)
    compare(theirs, ours, differences)
    differences.check()


@pytest.mark.parametrize(("flag", "stochastic"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("family", TAKEN, ids=lambda family: family.name)
def test_every_family_that_has_it(family: Any, flag: bool, stochastic: bool) -> None:
    """States that are given to the nearest code, rounded stochastically and to nearest."""
    pair = [family_call(family, FOUR_BIT, flag, True) for _ in range(2)]
    for call, choose in zip(pair, (False, True), strict=True):
        call["named"]["stochastic_rounding"] = stochastic
        if choose:
            with portable():
                ops.step_(*call["positional"], **call["named"])
        else:
            ops.step_(*call["positional"], **call["named"])
    differences = Differences()
    (_, ps, _, values, scales, *_), (_, qs, _, values_2, scales_2, *_) = (
        call["positional"] for call in pair
    )
    for p, q in zip(ps, qs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    for a, b in zip(chain(*values), chain(*values_2), strict=True):
        differences.add(a & 15, b & 15)
        differences.add(a >> 4, b >> 4)
    for a, b in zip(chain(*scales), chain(*scales_2), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    assert differences.codes > 0
    differences.check()


@pytest.mark.parametrize("family", OTHERS, ids=lambda family: family.name)
def test_other_families_refuse_it(family: Any) -> None:
    """In the words of the kernels, and so the optimizers know."""
    call = family_call(family, FOUR_BIT, False, True)
    said = []
    for implementation in ("kernels", "operators"):
        with portable("cpu" if implementation == "operators" else "meta"):
            with pytest.raises(RuntimeError, match="4bit") as error:
                ops.step_(*call["positional"], **call["named"])
            assert not ops.takes_format(family.step_op, "4bit", torch.device("cpu"))
        said.append(str(error.value).split("\n")[0])
    assert said[0] == said[1]


def test_the_optimizers_know_who_has_it() -> None:
    with portable():
        for family in TAKEN:
            assert ops.takes_format(family.step_op, "4bit", torch.device("cpu"))


def test_pieces_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1 << 18, 128):
        monkeypatch.setattr(pieces, "PIECE", size)
        torch.manual_seed(0)
        results.append(run_portably(four_bit_call(torch.bfloat16, stochastic_params=True)))
    assert_same_bits(*results)


def test_a_compiled_step(fresh_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_compiled", {})
    shapes = [(6, 128), (5, 128)]
    params, grads = tensors(shapes=shapes), tensors(shapes=shapes)
    eager = live_state(
        new_call(params, grads, state_format=FOUR_BIT, block_size=64, amsgrad=True, step=5)
    )
    compiling, differences = copy_call(eager), Differences()
    run_portably(eager)
    run_portably(compiling, compiles=True)
    assert len(compiled._compiled) == 1
    compare(eager, compiling, differences)
    differences.check()


@pytest.mark.parametrize("signed", [True, False])
def test_the_codec(signed: bool) -> None:
    """Scales of every size, those that are none, and rows of odd lengths."""
    options: dict[str, Any] = {"block_size": 64, "signed": signed, "state_format": "4bit"}
    for shape in ((3, 300), (5001,), (2, 3, 35), (40, 8), (0, 4), (1,), ()):
        for scale in (1.0, 1e-30, 1e-38, 1e-41, 3e38):
            x = torch.randn(shape) * scale
            x.view(-1)[100::1001], x.view(-1)[7::999] = math.nan, math.inf
            wanted = torchao8.quantize_blockwise(x, **options)
            expected = torchao8.dequantize_blockwise(*wanted, **options, shape=shape)
            with portable():
                found = torchao8.quantize_blockwise(x, **options)
                back = torchao8.dequantize_blockwise(*wanted, **options, shape=shape)
            assert [bits(t) for t in found] == [bits(t) for t in wanted]
            torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", OF_4_BITS, ids=lambda case: case.cls.__name__)
@pytest.mark.parametrize("saved_by", ["kernels", "operators"])
def test_state_goes_from_one_to_the_other(case: OptimizerCase, saved_by: str) -> None:
    """And steps of optimizers are alike."""
    pair = [case.make(make_params(), min_8bit_size=SMALL, **case.full) for _ in range(2)]
    steps = [lambda o: o.step(), step_portably]
    write, read = steps if saved_by == "kernels" else steps[::-1]
    params = [o.param_groups[0]["params"] for o in pair]
    for seed in range(3):
        for ps in params:
            set_grads(ps, seed)
        write(pair[0])
        read(pair[1])
        differences = Differences()
        for p, q in zip(*params, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            for key, value in pair[0].state[p].items():
                if key.endswith("_4bit"):
                    for shift in (0, 4):
                        differences.add(value >> shift & 15, pair[1].state[q][key] >> shift & 15)
        assert differences.codes > 0
        differences.check()
        pair[1].load_state_dict(through_file(pair[0].state_dict()))
        copy_state(*pair)


def all_tensors(call: Call) -> list[Tensor]:
    return [t for name in CHANGED for t in call[name]]


def test_found_inf_changes_nothing() -> None:
    call = four_bit_call(found_inf=torch.tensor(1.0), stochastic_params=False)
    before = [bits(t) for t in all_tensors(call)]
    run_portably(call)
    assert [bits(t) for t in all_tensors(call)] == before
