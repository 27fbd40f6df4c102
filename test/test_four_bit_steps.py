"""Steps on state in the 4-bit format, and its codec as an op.

That every path gives the same bits is in test_paths.py; the codec by itself in
test_four_bit_codec.py.
"""

import math
from typing import Any

import format_reference as formats
import pytest
import reference
import torch
from adam_call import (
    FOUR_BIT,
    Call,
    assert_unbiased,
    copy_call,
    live_state,
    means_over_seeds,
    moment,
    new_call,
    nibbles,
    refused,
    roots,
    run,
    scale_of_each,
    tensors,
)
from cpu_paths import Workers, every_path, every_vector_path
from helpers import bits
from test_mulaw_steps import family_call
from torch import Tensor

from torchao8 import dequantize_blockwise, ops, quantize_blockwise

BLOCK = 64
LISTS = ("exp_avgs", "exp_avg_scales", "exp_avg_sqs", "exp_avg_sq_scales")
both_kinds = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])


def zero(signed: bool) -> int:
    return 7 if signed else 0


# -- the codec's ops -------------------------------------------------------------------------------


def rows_of_scale_one(y: Tensor, signed: bool) -> Tensor:
    """Rows of 64 that begin with the value of the last code."""
    y = torch.cat((y, y.new_zeros(-len(y) % 63))).view(-1, 63)
    return torch.cat((torch.full((len(y), 1), 1.0 if signed else 1.5), y), 1)


def check_nearest(workers: Workers, path: str, y: Tensor, signed: bool) -> None:
    x = rows_of_scale_one(y, signed)
    options = {"signed": signed, "state_format": FOUR_BIT, "block_size": BLOCK}
    codes, scale = workers.get(path)("quantize", x, options)
    assert torch.frombuffer(bytearray(scale), dtype=torch.float32).eq(1).all()
    want = formats.nearest_level(x, 1.0) if signed else formats.nearest_square(x)
    halves = want.view(len(x), 32, 2)
    packed = halves[..., 0] + 16 * halves[..., 1]
    assert torch.equal(torch.frombuffer(bytearray(codes), dtype=torch.uint8), packed.flatten())


@every_path
@both_kinds
def test_nearest_codes(workers: Workers, path: str, signed: bool) -> None:
    """Around each value and midpoint, and many floats up to the largest value."""
    values = formats.levels_of_4bit() if signed else formats.squares_of_4bit()
    points = torch.cat((values, (values[1:] + values[:-1]) / 2)).float().abs().view(torch.int32)
    near = (points[:, None] + torch.arange(-40, 41, dtype=torch.int32)).flatten()
    top = int(values[-1].float().view(torch.int32))
    y = torch.cat((near, torch.arange(0, top + 1, 4999, dtype=torch.int32)))
    y = y.clamp(0, top).view(torch.float32)
    for x in (y, (-y).clamp_min(-7 / 8)) if signed else (y,):
        check_nearest(workers, path, x, signed)


@pytest.mark.slow
@every_path
@both_kinds
def test_nearest_codes_of_every_float(workers: Workers, path: str, signed: bool) -> None:
    top = int(torch.tensor(1.0 if signed else 1.5).view(torch.int32))
    for first in range(0, top + 1, 1 << 22):
        last = min(top, first + (1 << 22) - 1)
        x = torch.arange(first, last + 1, dtype=torch.int32).view(torch.float32)
        check_nearest(workers, path, x, signed)


@both_kinds
@pytest.mark.parametrize("exponent", [-149, -130, -126, -120, -20, 0, 90, 125, 127])
def test_scales_of_blocks(exponent: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(exponent + 200)
    x = torch.ldexp(torch.rand(100, 64, generator=generator) + 0.5, torch.tensor(exponent))
    x *= torch.where(torch.rand(x.shape, generator=generator) < 0.5, -1.0, 1.0) if signed else 1
    codes, scale = quantize_blockwise(x, block_size=64, signed=signed, state_format="4bit")
    for row, found in zip(x.tolist(), scale.flatten().tolist(), strict=True):
        factor = 4.0 if exponent > 120 else 1.0  # for a number that no step leaves
        if signed:
            want = formats.scale_of_levels(max(row) / factor, min(row) / factor) * factor
        else:
            want = formats.scale_of_squares(max(row) / factor) * factor
            want = min(want, 2.0**127) if exponent > 120 else want
        assert found == want
    values = dequantize_blockwise(codes, scale, block_size=64, signed=signed, state_format="4bit")
    step = scale.abs().double() / 16 if signed else x.double() / 3
    error = (values.double() - x.double()).abs()
    largest = 1.5 * scale.double() < x  # beyond the largest scale
    assert (error <= step * (1 + 2.0**-10)).logical_or(scale == 0).logical_or(largest).all()
    assert (codes[(scale == 0).flatten()] == 17 * zero(signed)).all()


@both_kinds
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_block_that_is_not_finite(bad: float, signed: bool) -> None:
    x = torch.ones(3, 64)
    x[1, 5] = bad
    codes, scale = quantize_blockwise(x, block_size=64, signed=signed, state_format="4bit")
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert (codes[1] == 17 * zero(signed)).all()


@both_kinds
@pytest.mark.parametrize(
    "shape", [(3, 77), (2, 5, 70), (40, 3, 3), (129,), (1,), (), (0, 9), (4, 0)]
)
def test_packed_rows(shape: tuple[int, ...], signed: bool) -> None:
    """Each row by itself; what a row leaves over is the code of zero; the shape brings it back."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).abs()
    row_dims = reference.row_dims(shape, BLOCK)
    codes, scale = quantize_blockwise(x, block_size=BLOCK, signed=signed, state_format="4bit")
    assert tuple(codes.shape) == formats.packed_shape(shape, row_dims)
    assert tuple(scale.shape) == reference.scale_shape(shape, BLOCK)
    unpacked = formats.unpack(codes, shape, row_dims)
    assert torch.equal(formats.pack(unpacked, row_dims, zero(signed)), codes)
    options = {"block_size": BLOCK, "signed": signed, "state_format": "4bit"}
    values = dequantize_blockwise(codes, scale, shape=shape, **options)
    book = formats.levels_of_4bit() if signed else formats.squares_of_4bit()
    scales = reference.expand_scale(scale.double(), shape, BLOCK)
    assert torch.equal(values, (book[unpacked.long()] * scales).float())
    whole = dequantize_blockwise(codes, scale, **options)
    assert whole.shape == (*codes.shape[:-1], 2 * codes.shape[-1])


def test_codes_of_another_shape_are_refused() -> None:
    codes, scale = quantize_blockwise(torch.ones(3, 77), block_size=64, state_format="4bit")
    message = r"codes must have shape \[3, 40\] where shape is \[3, 79\], got \[3, 39\]"
    with pytest.raises(ValueError, match=f"dequantize_blockwise: {message}"):
        dequantize_blockwise(codes, scale, block_size=64, state_format="4bit", shape=(3, 79))
    with pytest.raises(RuntimeError, match=r"dequantize_blockwise: codes of 4 bits must have"):
        dequantize_blockwise(codes[0, 0], scale[0, 0], state_format="4bit")
    codes, scale = quantize_blockwise(torch.ones(3, 77))
    with pytest.raises(ValueError, match=r"codes must have shape \[77, 3\]"):
        dequantize_blockwise(codes, scale, shape=(77, 3))


def test_shapes_on_meta() -> None:
    x = torch.ones(3, 77, device="meta")
    codes, scale = quantize_blockwise(x, block_size=64, state_format="4bit")
    assert (codes.shape, scale.shape) == ((3, 39), (3, 2))
    values = dequantize_blockwise(codes, scale, block_size=64, state_format="4bit")
    assert values.shape == (3, 78)


# -- refusals --------------------------------------------------------------------------------------


def four_bit_call(params: list[Tensor], grads: list[Tensor], **options: Any) -> Call:
    return new_call(params, grads, **{"block_size": BLOCK, "state_format": FOUR_BIT, **options})


@pytest.mark.parametrize("family", ops.FAMILIES, ids=lambda family: family.name)
def test_families_without_kernels_are_refused(family: Any) -> None:
    has = family.name in ("adam", "lion", "sgd")
    assert ops.takes_format(family.step_op, "4bit", torch.device("cpu")) == has
    call = family_call(family, FOUR_BIT, flag=False, has_optional=True)
    if has:
        ops.step_(*call["positional"], **call["named"])
        return
    message = (
        f"{family.step_op}: state_format 2 (4bit) has no kernels for {family.name}; it has them "
        "for adam, lion, sgd"
    )
    before = [bits(p) for p in call["positional"][1]]
    with pytest.raises(RuntimeError) as error:
        ops.step_(*call["positional"], **call["named"])
    assert str(error.value).split("\n")[0] == message
    assert [bits(p) for p in call["positional"][1]] == before


def test_one_scale_for_a_tensor_is_refused() -> None:
    call = four_bit_call([torch.ones(64)], [torch.ones(64)], one_scale=True)
    message = (
        "a state in the format 4bit has a scale for each block, and cannot have one for the tensor"
    )
    refused(call, f"adam_extremes: {message}")
    refused({**call, "extremes": [torch.zeros(2, dtype=torch.int64)]}, f"adam_step_: {message}")


def test_the_sums_of_lamb_are_refused() -> None:
    (family,) = (family for family in ops.FAMILIES if family.name == "adam")
    call = family_call(family, FOUR_BIT, flag=False, has_optional=False)["positional"]
    _, params, grads, values, scales, steps, _, numbers, grad_scale, *_ = call
    message = r"lamb_update_sums: state_format 2 \(4bit\) is not there"
    with pytest.raises(RuntimeError, match=message):
        ops.lamb_update_sums(
            params, grads, values[:2], scales[:2], steps, numbers, grad_scale, state_format=FOUR_BIT
        )


def test_codes_of_8_bits_are_refused() -> None:
    call = four_bit_call([torch.ones(3, 77)], [torch.ones(3, 77)])
    call["exp_avgs"] = [torch.zeros(3, 77, dtype=torch.uint8)]
    message = "must have shape [3, 39] (two elements a byte of a row), got [3, 77]"
    refused(call, f"adam_step_: exp_avgs[0] {message}")


# -- steps -----------------------------------------------------------------------------------------

BETA1, BETA2 = 0.9, 0.999


def live_call(**options: Any) -> Call:
    """Tensors of all shapes, in the middle of a run."""
    torch.manual_seed(1)
    return live_state(
        four_bit_call(tensors(), tensors(), step=10, **{"beta1": BETA1, "beta2": BETA2, **options})
    )


def new_moments(call: Call, index: int) -> tuple[Tensor, Tensor]:
    """What a step would make of the moments, in float64."""
    g = call["grads"][index].double()
    m, v = (moment(call, name, index) for name in ("exp_avg", "exp_avg_sq"))
    return BETA1 * m + (1 - BETA1) * g, BETA2 * v + (1 - BETA2) * g * g


MASK = 2**64 - 1


def mixed(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def draws(call: Call, index: int) -> Tensor:
    """The 22 random bits of each second moment."""
    step = int(call["steps"][index]) + 1
    return hashes_of(call["seed"], step, 1, tuple(call["params"][index].shape), BLOCK) >> 10


def hashes_of(seed: int, step: int, state: int, shape: tuple[int, ...], block: int) -> Tensor:
    """The 32 random bits of each number of a state, as csrc/codec/random.h has them."""
    golden = 0x9E3779B97F4A7C15
    key = mixed(mixed(seed + golden & MASK) ^ mixed(4 * step + state))
    factors = [0x6A08, 0xBB61, 0x3C6A, 0xA54B, 0x510C, 0x9B05, 0x1F86, 0x5BE7]
    row = math.prod(shape[reference.row_dims(shape, block) :])
    hashes = []
    for element in range(math.prod(shape)):
        place = element % row % block
        z = mixed(key + golden * (element - place) & MASK)
        w = mixed(z + golden & MASK)
        t, j = factors[place % 8], place // 8
        hashes.append((z + (z >> 32) * t + (w + (w >> 32) * t) * j) % 2**32)
    return torch.tensor(hashes, dtype=torch.int64).reshape(shape)


def blocks(call: Call, index: int) -> list[Tensor]:
    """For each block which elements, as flat indices."""
    shape = tuple(call["params"][index].shape)
    of_each = reference.block_of_element(shape, BLOCK).flatten()
    return [(of_each == block).nonzero().flatten() for block in of_each.unique().tolist()]


def check_codes(before: Call, after: Call, index: int) -> None:
    """All codes and scales that a step has left, but where float64 and float32 may round to
    different sides of a border."""
    m, v = new_moments(before, index)
    drawn = draws(before, index).flatten() if before["stochastic_rounding"] else None
    square_codes = nibbles(after, "exp_avg_sq", index).flatten()
    level_codes = nibbles(after, "exp_avg", index).flatten()
    scales = [scale_of_each(after, name, index).flatten() for name in ("exp_avg", "exp_avg_sq")]
    quotients = m.flatten() / roots(after, index).flatten()
    for block in blocks(before, index):
        signed, unsigned = (float(scale[block[0]]) for scale in scales)
        assert unsigned == formats.scale_of_squares(float(v.flatten()[block].max()))
        y = v.flatten()[block] / unsigned
        close = 2.0**-20
        low, high = y * (1 - close), y * (1 + close)
        if drawn is None:
            sides = [formats.nearest_square(side) for side in (low, high)]
        else:
            sides = [formats.drawn_square(side, drawn[block]) for side in (low, high)]
        assert ((square_codes[block] == sides[0]) | (square_codes[block] == sides[1])).all()
        q = quotients[block]
        want = formats.scale_of_levels(float(q.max()), float(q.min()))
        assert abs(signed / want - 1) < close
        sides = [formats.nearest_level(q + side * abs(signed), signed) for side in (-close, close)]
        assert ((level_codes[block] == sides[0]) | (level_codes[block] == sides[1])).all()


@every_path
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_steps_have_the_codes_of_the_oracle(workers: Workers, path: str, stochastic: bool) -> None:
    call = live_call(stochastic_rounding=stochastic, seed=7)
    changed = workers.get(path)("adam", call, 1, False)
    after = copy_call(call)
    for name in LISTS:
        for tensor, found in zip(after[name], changed[name], strict=True):
            data = torch.frombuffer(bytearray(found), dtype=tensor.dtype) if found else tensor
            tensor.copy_(data.view(tensor.shape))
    for index in range(len(call["params"])):
        check_codes(call, after, index)


def test_rounding_has_no_bias() -> None:
    call = live_call()
    want = [new_moments(call, i)[1] for i in range(len(call["params"]))]
    means, one = means_over_seeds(call, "exp_avg_sq", rounds=400)
    for i, exact in enumerate(want):
        gap = exact / 2  # between the codes around it, at most
        above = exact > scale_of_each(one, "exp_avg_sq", i) / 128
        assert_unbiased(((means[i] - exact) / gap)[above], rounds=400)


def test_second_moments_never_become_zero() -> None:
    call = live_call()
    for _ in range(20):
        run(call)
        call["grads"] = [g * 0.1 for g in call["grads"]]
    for i in range(len(call["params"])):
        assert (moment(call, "exp_avg_sq", i) > 0).all()
        scale = call["exp_avg_sq_scales"][i]
        assert (scale.view(torch.int32) % (1 << 23) == 0).all()


def test_a_step_of_fresh_state_without_gradient_changes_no_state() -> None:
    params = tensors()
    call = four_bit_call(params, [torch.zeros_like(p) for p in params])
    before = copy_call(call)
    run(call)
    for name in LISTS:
        assert all(bits(a) == bits(b) for a, b in zip(call[name], before[name], strict=True))


def test_what_a_row_leaves_over_does_not_matter() -> None:
    """Whatever is in the half byte behind an odd row, it is not looked at, and cleared."""
    call = live_call()
    other = copy_call(call)
    odd = [i for i, p in enumerate(call["params"]) if row_length(p) % 2]
    assert odd
    for i in odd:
        for name, fill in (("exp_avgs", 0xF0), ("exp_avg_sqs", 0xF0)):
            other[name][i][..., -1] |= fill
    run(call)
    run(other)
    for name in ("params", *LISTS):
        assert all(bits(a) == bits(b) for a, b in zip(call[name], other[name], strict=True))
    for i in odd:
        assert (call["exp_avgs"][i][..., -1] >> 4 == zero(True)).all()
        assert (call["exp_avg_sqs"][i][..., -1] >> 4 == zero(False)).all()


def row_length(p: Tensor) -> int:
    shape = tuple(p.shape)
    return math.prod(shape[reference.row_dims(shape, BLOCK) :])


def test_a_momentum_outlives_its_second_moment() -> None:
    """Where squares are below all floats the momentum is kept in units of 1."""
    p = torch.zeros(64)
    call = four_bit_call([p], [torch.linspace(-1e-25, 1e-25, 64)], beta1=0.9, beta2=0.999)
    for _ in range(3):
        run(call)
    assert (call["exp_avg_sq_scales"][0] == 0).all()
    assert (call["exp_avg_sqs"][0] == 0).all()
    want = (1 - 0.9**3) * call["grads"][0].double()
    assert (moment(call, "exp_avg", 0) - want).abs().max() < 3e-25 / 8


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_bad_gradient_stays_alone(bad: float) -> None:
    """Also from the element that shares its byte."""
    call = live_call()
    other = copy_call(call)
    kept = [moment(call, name, 0)[1, 7] for name in ("exp_avg", "exp_avg_sq")]
    param = float(call["params"][0][1, 7])
    call["grads"][0][1, 7] = bad
    other["grads"][0][1, 7] = 0.0
    run(call)
    run(other)
    assert float(call["params"][0][1, 7]) == param
    step = scale_of_each(call, "exp_avg", 0)[1, 7].abs() / 8 * roots(call, 0)[1, 7]
    assert (moment(call, "exp_avg", 0)[1, 7] - kept[0]).abs() <= step * (1 + 2.0**-10)
    stored = moment(call, "exp_avg_sq", 0)[1, 7]
    assert kept[1] / 2 <= stored <= kept[1] * 2
    call["params"][0][1, 7] = other["params"][0][1, 7] = 0.0
    assert all(bits(p) == bits(q) for p, q in zip(call["params"], other["params"], strict=True))
    for name in ("exp_avg", "exp_avg_sq"):
        assert nibbles(call, name, 0)[1, 6] == nibbles(other, name, 0)[1, 6]


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("scale", [math.nan, math.inf, 2.0**126])
def test_a_corrupt_scale_stays_visible(scale: float, name: str) -> None:
    call = live_call()
    call[f"{name}_scales"][0][1, 0] = scale
    before = call["params"][0].clone()
    run(call)
    for each, byte in (("exp_avg", 0x77), ("exp_avg_sq", 0)):
        if each == name:
            assert call[f"{each}_scales"][0][1, 0].isnan()
            assert (call[f"{each}s"][0][1, :32] == byte).all()
    assert torch.equal(call["params"][0][1, :64], before[1, :64])
    assert (call["params"][0][0] != before[0]).any()


# -- every rule that has it ------------------------------------------------------------------------


@every_vector_path
@pytest.mark.parametrize("has_optional", [True, False])
@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("name", ["adam", "lion", "sgd"])
def test_every_rule_on_every_path(
    workers: Workers, path: str, name: str, flag: bool, has_optional: bool
) -> None:
    (family,) = (family for family in ops.FAMILIES if family.name == name)
    call = family_call(family, FOUR_BIT, flag, has_optional)
    want = workers.get("scalar")("step", call, 3)
    assert workers.get(path)("step", call, 3) == want
    assert want[0] != bytes(call["positional"][1][0].numpy().tobytes())  # it has been stepped


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("name", ["lion", "sgd"])
def test_a_momentum_without_squares(name: str, stochastic: bool) -> None:
    """The levels next to what float32 state gets from the same step, by the random numbers."""
    (family,) = (family for family in ops.FAMILIES if family.name == name)
    call = family_call(family, FOUR_BIT, False, True)
    call["named"] |= {"stochastic_rounding": stochastic, "seed": 5}
    op, params, grads, values, scales, *others = call["positional"]
    grads[0][2, 7] = 1.0
    shapes = [tuple(p.shape) for p in params]
    wide = [
        dequantize_blockwise(c, s, shape=shape, state_format="4bit")
        for c, s, shape in zip(values[0], scales[0], shapes, strict=True)
    ]
    copies = [p.clone() for p in params]
    ops.step_(op, copies, grads, [wide], [[]], *others, **dict.fromkeys(family.flags, False))
    ops.step_(*call["positional"], **call["named"])
    for i, shape in enumerate(shapes):
        codes = formats.unpack(values[0][i], shape, reference.row_dims(shape, 256))
        scale = reference.expand_scale(scales[0][i].double(), shape, 256)
        inverse = torch.where(scale != 0, 8 / scale, 0.0)
        drawn = torch.full(shape, 1 << 15)
        if stochastic:
            drawn = hashes_of(5, 6, 0, shape, 256) >> 16
        close = 2.0**-14 * scale.abs()  # states are float32, and the oracle's steps float64
        sides = [formats.drawn_level(wide[i] + side, inverse, drawn) for side in (-close, close)]
        assert ((codes == sides[0]) | (codes == sides[1])).all()
        assert torch.allclose(params[i].float(), copies[i].float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_both_signs_are_kept(stochastic: bool) -> None:
    """There are seven steps in one direction, and a number there that is almost as large as the
    extreme one in the other is not cut to seven eighths of it at every step."""
    (family,) = (family for family in ops.FAMILIES if family.name == "sgd")
    p, g = torch.zeros(16, 64), torch.ones(16, 64)
    g[:, 1::2] = -0.999
    codes, scale = quantize_blockwise(torch.zeros_like(p), block_size=64, state_format="4bit")
    numbers = torch.tensor([0.9, 0.0, 0.0], dtype=torch.float64)
    assert family.numbers == ("momentum", "dampening", "weight_decay")
    step, total, rounds = torch.tensor(0.0), torch.zeros_like(p), 400
    for i in range(rounds):
        ops.step_(
            family.step_op, [p], [g], [[codes]], [[scale]], [step], torch.tensor(0.0), numbers,
            None, [], [], None, state_format=FOUR_BIT, block_size=64, nesterov=False,
            rate_in_buffer=False, maximize=False, count_steps=True,
            stochastic_rounding=stochastic,
        )  # fmt: skip
        if i >= rounds // 2:
            total += dequantize_blockwise(codes, scale, block_size=64, state_format="4bit")
    mean = total / (rounds - rounds // 2)
    for sign in (0, 1):
        found, exact = (t[:, sign::2].mean() for t in (mean, 10 * g))
        assert abs(float(found / exact) - 1) < 0.004


def test_small_numbers_of_an_average_are_kept() -> None:
    """To nearest they would stay 0: a step adds less than half a level to them."""
    (family,) = (family for family in ops.FAMILIES if family.name == "lion")
    p, g = torch.zeros(16, 64), torch.full((16, 64), 0.02)
    g[:, 0] = 1.0
    codes, scale = quantize_blockwise(torch.zeros_like(p), block_size=64, state_format="4bit")
    numbers = torch.tensor([0.9, 0.98, 0.0], dtype=torch.float64)
    assert family.numbers == ("beta1", "beta2", "weight_decay")
    step, total, rounds = torch.tensor(0.0), torch.zeros_like(p), 600
    for i in range(rounds):
        ops.step_(
            family.step_op, [p], [g], [[codes]], [[scale]], [step], torch.tensor(0.0), numbers,
            None, [], [], None, state_format=FOUR_BIT, block_size=64, maximize=False,
            count_steps=True,
        )  # fmt: skip
        if i >= rounds // 2:
            total += dequantize_blockwise(codes, scale, block_size=64, state_format="4bit")
    assert abs(float(total[:, 1:].mean()) / (rounds - rounds // 2) / 0.02 - 1) < 0.2
