"""The rounding of second moments: never to zero, unbiased, uncorrelated, repeatable.

All tests drive the op adam_step_ with beta2 = 0, where the new second moment is v = g^2, rounded
once to float32. An element of 1.0 in each block makes the scale 1, so that v is what is encoded.
"""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from adam_call import Call, assert_same_bits, moment, moved, new_call, run, set_moment
from codec_reference import codebook, neighbours
from helpers import make_params, set_grads
from torch import Tensor

from torchao8 import AdamW8bit

COLUMNS = 255  # targets of a block of 256 that ends with 1.0


def grads_for(targets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """A gradient of `rows` blocks that end with 1.0, and the second moments, (255,), of the other
    columns: as close to the targets as squares of float32 numbers are."""
    roots = targets.double().sqrt().float()
    grad = torch.empty(rows, COLUMNS + 1)
    grad[:, -1] = 1.0
    grad[:, :-1] = roots
    return grad, roots * roots


def second_moment_codes(
    grad: Tensor, device: str, *, step: int = 1, amsgrad: bool = False, **options: Any
) -> list[Tensor]:
    """What the `step`-th step stores for v = grad^2, and for its maximum; on the CPU."""
    call = new_call([torch.zeros_like(grad)], [grad], amsgrad=amsgrad, step=step - 1, lr=0.0,
                    beta1=0.0, beta2=0.0, device=device, **options)  # fmt: skip
    run(call)
    assert (call["exp_avg_sq_scales"][0] == 1).all()
    names = ("exp_avg_sqs", "max_exp_avg_sqs") if amsgrad else ("exp_avg_sqs",)
    return [call[name][0].cpu() for name in names]


def between(low: int, fractions: Tensor) -> Tensor:
    """Numbers at fractions of the way from a code to the next."""
    values = codebook(False)
    return values[low] + fractions * (values[low + 1] - values[low])


def spread(low: int) -> Tensor:
    """255 numbers between a code and the next, at even fractions."""
    return between(low, (torch.arange(COLUMNS) + 0.5) / COLUMNS)


# Decade i holds the codes 2^(i+1) - 1 to 2^(i+2) - 2; its last one and the next form a gap.
TARGETS: dict[str, Callable[[], Tensor]] = {
    "first interval": lambda: spread(1),
    "gap after decade 0": lambda: spread(2),
    "inside decade 2": lambda: spread(10),
    "last interval of decade 3": lambda: spread(29),
    "gap after decade 3": lambda: spread(30),
    "first interval of decade 4": lambda: spread(31),
    "gap after decade 4": lambda: spread(62),
    "gap after decade 5": lambda: spread(126),
    "first interval of decade 6": lambda: spread(127),
    "last interval of decade 6": lambda: spread(253),
    "gap below 1.0": lambda: spread(254),
    "every interval at one half": lambda: torch.cat(
        [between(code, torch.tensor([0.5])) for code in range(1, 255)] + [torch.tensor([0.9])]
    ),
    "every interval near its lower end": lambda: torch.cat(
        [between(code, torch.tensor([0.03])) for code in range(1, 255)] + [torch.tensor([0.2])]
    ),
    "all magnitudes": lambda: torch.logspace(-6.2, -1e-4, COLUMNS, dtype=torch.float64),
}

# The position between two codes, a * y + b, is a float32 number below 256, and a * y below 285.
# Half units in the last place of a * y: 3 * 2^-16 (two of y, one of a); of the position, and of its
# sum with the random number: 2 * 2^-17. The line to 1.0 is set 1.1 * 2^-16 low. The random number
# has 14 bits, the rest being half of one: 2^-15. In all 7.1 * 2^-16.
BIAS = 7.1 * 2.0**-16


def goes_up(codes: Tensor, below: Tensor) -> Tensor:
    """How often each column got the code above, of those that v lies between."""
    up = codes[:, :-1] - below.to(torch.uint8)
    assert (up <= 1).all()
    return up.float().sum(0).double()


@pytest.mark.parametrize("name", list(TARGETS))
def test_stochastic_rounding_is_unbiased_and_linear(name: str, device: str) -> None:
    """The chance of the code above is the distance from the one below, in every kind of interval.

    The counts are binomial: each column within 5.5 standard errors, and the sum of the squares of
    all within six of chi-squared's, besides what `BIAS` may shift a chance. A chance that is wrong
    by 1% of an interval would be 3.6 standard errors in every column, and so show in the sum.
    """
    targets = TARGETS[name]()
    rows, repeats = 2048, 16
    grad, v = grads_for(targets, rows)
    below, chance = neighbours(v.double())
    ups = torch.zeros(COLUMNS, dtype=torch.float64)
    for k in range(repeats):
        (codes,) = second_moment_codes(grad, device, step=1 + k % 4, seed=k // 4)
        ups += goes_up(codes, below)
    n = rows * repeats
    uncertain = (chance > 0) & (chance < 1)
    assert (ups[chance == 0] == 0).all()
    variance = n * chance * (1 - chance)
    excess = ((ups - n * chance).abs() - n * BIAS).clamp_min(0)
    z = (excess / variance.sqrt().clamp_min(1))[uncertain]
    assert z.max() < 5.5
    count = len(z)
    assert (z**2).sum() < count + 6 * math.sqrt(2 * count)


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_a_second_moment_above_zero_is_never_stored_as_zero(stochastic: bool, device: str) -> None:
    """What lies below the first code, or nearer to 0 than to it, gets code 1, and 0 gets 0."""
    first = codebook(False)[1].item()
    targets = torch.logspace(-37.9, math.log10(first), COLUMNS, dtype=torch.float64)
    targets[-3:] = 0.0
    grad, v = grads_for(targets, rows=64)
    assert (v[:-3] >= torch.finfo(torch.float32).tiny).all()
    grad[0, 1:4] = torch.tensor([2.0**-74, 2.0**-70, 3 * 2.0**-75])  # v is subnormal
    for seed in range(20):
        (codes,) = second_moment_codes(grad, device, seed=seed, stochastic_rounding=stochastic)
        assert (codes[:, :-4] == 1).all()
        assert (codes[:, -4:-1] == 0).all()


@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
@pytest.mark.parametrize("exponent", [-120, -60, 0, 60, 125])
def test_rounding_beside_any_extreme(exponent: int, stochastic: bool, device: str) -> None:
    """Blocks of second moments of all magnitudes below an extreme of any size: the codes are the
    two neighbours, or the nearest, and 0 for 0 alone. y = v / scale is off by up to 3 * 2^-24."""
    root = 2.0 ** (exponent / 2) * 10.0 ** (-4 * torch.rand(512, 256))
    root[:, 9] = 0.0
    call = new_call([torch.zeros(512, 256)], [root], lr=0.0, beta1=0.0, beta2=0.0,
                    stochastic_rounding=stochastic, device=device)  # fmt: skip
    call = moved(run(call), "cpu")
    v = root * root
    codes, scale = call["exp_avg_sqs"][0].long(), call["exp_avg_sq_scales"][0]
    assert torch.equal(scale, v.amax(1, keepdim=True).where(scale > 0, 0.0))
    live = (scale > 0).expand_as(v)
    assert torch.equal(codes > 0, live & (v > 0))
    assert live.any()
    y = (v.double() / scale.double())[live & (v > 0)]
    codes = codes[live & (v > 0)]
    slack = 3 * 2.0**-24 * y
    below, _ = neighbours((y - slack).clamp_min(2.0**-40))
    above = (neighbours((y + slack).clamp_max(1.0))[0] + 1).where(
        y + slack >= codebook(False)[1], 1
    )
    assert ((below <= codes) & (codes <= above)).all()
    if not stochastic:
        values = codebook(False)
        least = torch.minimum((values[below] - y).abs(), (values[above] - y).abs())
        assert ((values[codes] - y).abs() <= least + 2 * slack).all()
    assert (codes[y == 1] == 255).all()


def mix_bits(z: Tensor) -> Tensor:
    """csrc/codec/random.h, in int64 with logical shifts."""

    def shifted(x: Tensor, bits: int) -> Tensor:
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    def times(x: Tensor, factor: int) -> Tensor:  # modulo 2^64
        return x * (factor - 2**64 if factor >= 2**63 else factor)

    z = times(z ^ shifted(z, 30), 0xBF58476D1CE4E5B9)
    z = times(z ^ shifted(z, 27), 0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def first_draws(rows: int, columns: int, step: int) -> Tensor:
    """The 14 random bits of the first element of each row, of the second moment, with seed 0."""
    golden = 0x9E3779B97F4A7C15 - 2**64
    key = mix_bits(mix_bits(torch.tensor([golden])) ^ mix_bits(torch.tensor([4 * step + 1])))
    z = mix_bits(key + golden * torch.arange(rows) * columns)
    t = 0x6A08  # the lane factor of element 0, whose h is c0 + c1 * t
    h = (z & 0xFFFFFFFF) + ((z >> 32) & 0xFFFFFFFF) * t
    return (h >> 9) & 0x3FFF


def test_the_extreme_element_is_code_255_with_every_draw(device: str) -> None:
    """Divided by itself it is 1 - 2^-24, 1 or 1 + 2^-23; the least and the largest random number
    must neither leave it at code 254 nor carry it over 255. All six pairs occur here."""
    columns, rows, step = 16, 2**19, 5
    generator = torch.Generator().manual_seed(0)
    roots = torch.rand(2**23, generator=generator) + 0.5
    v = (roots * roots).double()
    quotient = (v * (1 / v).float().double() + 2.0**-31).float()
    kinds = [quotient == y for y in (1 - 2.0**-24, 1.0, 1 + 2.0**-23)]
    assert all(kind.any() for kind in kinds)
    assert sum(int(kind.sum()) for kind in kinds) == len(v)
    draws = first_draws(rows, columns, step)
    for kind in kinds:
        candidates = roots[kind]
        grad = torch.full((rows, columns), 1e-3)
        grad[:, 0] = candidates[torch.arange(rows) % len(candidates)]
        call = new_call([torch.zeros_like(grad)], [grad], step=step - 1, lr=0.0, beta1=0.0,
                        beta2=0.0, device=device)  # fmt: skip
        run(call)
        assert (draws == 0).any()
        assert (draws == 2**14 - 1).any()
        assert (call["exp_avg_sqs"][0][:, 0] == 255).all()


def test_the_draws_are_those_of_the_hash(device: str) -> None:
    """The element just above the middle of two codes goes up where its draw is large enough."""
    columns, rows, step = 16, 4096, 7
    grad = torch.full((rows, columns), 1e-3)
    middle = between(150, torch.tensor([0.5])).sqrt().float()
    grad[:, 0], grad[:, 1] = middle, 1.0
    _, chance = neighbours((middle * middle).double())
    call = new_call([torch.zeros_like(grad)], [grad], step=step - 1, lr=0.0, beta1=0.0,
                    beta2=0.0, device=device)  # fmt: skip
    run(call)
    up = call["exp_avg_sqs"][0][:, 0].cpu() == 151
    expected = (first_draws(rows, columns, step) + 0.5) / 2**14 + chance >= 1
    assert (up != expected).sum() <= 4  # draws within the rounding of the position


# -- independence ------------------------------------------------------------------------------


def coin_tosses(chance: float, device: str, rows: int = 2048, **options: Any) -> list[Tensor]:
    """1 where an element went up and 0 where not, less the chance, (rows, 255) for each state."""
    targets = between(150, torch.full((COLUMNS,), chance))
    grad, v = grads_for(targets, rows)
    below, exact = neighbours(v.double())
    return [
        ((codes[:, :-1].long() == below + 1).double() - exact)
        for codes in second_moment_codes(grad, device, **options)
    ]


def assert_uncorrelated(a: Tensor, b: Tensor) -> None:
    """The mean of products of uncorrelated, centred numbers is 0, within five standard errors here.

    Blocks, the rows, draw independently of each other; pairs in a block do not (the products of
    one lane share a coefficient), so the standard error is taken from the blocks' means. Even where
    they are as good as 8 a block, 16,384 of them show a correlation of 2% by seven.
    """
    means = (a * b).mean(1)
    standard_error = means.std() / math.sqrt(len(means))
    assert means.mean().abs() < 5 * standard_error + BIAS


@pytest.mark.parametrize("chance", [0.5, 0.1])
def test_uncorrelated_from_step_to_step(chance: float, device: str) -> None:
    steps = [coin_tosses(chance, device, step=t)[0] for t in range(1, 10)]
    for lag in (1, 2, 4, 8):
        for first, second in zip(steps, steps[lag:], strict=False):
            assert_uncorrelated(first, second)


@pytest.mark.parametrize("chance", [0.5, 0.1])
def test_uncorrelated_from_element_to_element(chance: float, device: str) -> None:
    """Within blocks (lags across the vector width, too), across blocks, and three at a time where
    that is promised: not at multiples of 8 (csrc/codec/random.h)."""
    (tosses,) = coin_tosses(chance, device, rows=16384)
    for lag in (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 64, 100, 127, 128, 129, 200, 253):
        assert_uncorrelated(tosses[:, lag:], tosses[:, :-lag])
    for lag in (1, 2, 3, 4, 8, 16, 64, 256, 1024, 2048):
        assert_uncorrelated(tosses[lag:], tosses[:-lag])
    for lag in (1, 2, 5, 17):
        pair = tosses[:, : -2 * lag] * tosses[:, lag:-lag]
        assert_uncorrelated(pair - pair.mean(), tosses[:, 2 * lag :])


def test_blocks_do_not_resemble_each_other(device: str) -> None:
    """The mean of a block's tosses varies as that of independent ones: neither the same in all
    blocks nor a coin for the whole block. The sum of their squares is within six of chi-squared's
    standard errors; four, in truth, as the draws of a block are independent in pairs only."""
    (tosses,) = coin_tosses(0.5, device, rows=4096)
    for means, n in [(tosses.mean(1), COLUMNS), (tosses.mean(0), 4096)]:
        z2 = (means**2 * 4 * n).sum().item()
        assert abs(z2 - len(means)) < 6 * math.sqrt(2 * len(means))


@pytest.mark.parametrize("chance", [0.5, 0.1])
def test_the_two_second_moments_are_rounded_independently(chance: float, device: str) -> None:
    """Under amsgrad v and its maximum are the same at the first step; their codes are not."""
    v, largest = coin_tosses(chance, device, amsgrad=True)
    assert_uncorrelated(v, largest)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"seed": -1}, {"seed": 2**40}, {"step": 2}], ids=str
)
def test_other_seeds_and_steps_draw_other_numbers(other: dict[str, int], device: str) -> None:
    assert_uncorrelated(coin_tosses(0.5, device)[0], coin_tosses(0.5, device, **other)[0])


def test_parameters_share_the_draws_of_equal_elements(device: str) -> None:
    """Of one step and seed, whatever their values and shapes: the hash does not know parameters.
    Not of other elements, nor with another seed."""
    rows = 2048
    tosses = []
    for low, shape in ((150, (rows, 256)), (170, (rows * 256,)), (150, (rows // 2, 512))):
        grad, v = grads_for(between(low, torch.full((COLUMNS,), 0.5)), rows)
        (codes,) = second_moment_codes(grad.view(shape), device)
        below, chance = neighbours(v.double())
        tosses.append((codes.view(rows, 256)[:, :-1].long() == below + 1).double() - chance)
    for other in tosses[1:]:
        # Of a draw that lies between two chances, which float32 moves from 0.5 by a unit of 14 bits
        # or two, the outcomes differ.
        assert (tosses[0].sign() != other.sign()).double().mean() < 2.0**-12
    assert_uncorrelated(tosses[0][1:], tosses[1][:-1])  # of the next block
    assert_uncorrelated(tosses[0], coin_tosses(0.5, device, rows=rows, seed=1)[0])


def test_a_group_with_a_seed_draws_its_own_numbers(device: str) -> None:
    """Three parameters that are the same: two of one group stay so, the third goes its way."""
    same = [make_params(torch.bfloat16, [(16, 256)], device=device)[0] for _ in range(3)]
    groups: list[dict[str, Any]] = [{"params": same[:2]}, {"params": same[2:], "seed": 1}]
    optimizer = AdamW8bit(groups, lr=1e-3, min_8bit_size=0, stochastic_rounding=True)
    for p in same:
        set_grads([p], 0)
    optimizer.step()
    first, second, third = same
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    codes = [optimizer.state[p]["exp_avg_sq_codes"] for p in same]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])
    assert torch.equal(*(optimizer.state[p]["exp_avg_codes"] for p in same[1:]))  # to nearest


@pytest.mark.parametrize("block_size", [64, 2048])
def test_uncorrelated_in_blocks_of_other_sizes(block_size: int, device: str) -> None:
    target = between(150, torch.tensor([0.5], dtype=torch.float64))
    grad = torch.full((2**23 // block_size, block_size), target.sqrt().item())
    grad[:, -1] = 1.0
    (codes,) = second_moment_codes(grad, device, block_size=block_size)
    tosses = (codes[:, :-1].long() == 151).double() - 0.5
    assert abs(tosses.mean()) < 5 * 0.5 / math.sqrt(tosses.numel()) + 1e-3  # grad is float32
    for lag in {1, 2, 16, block_size // 4, block_size // 2}:
        assert_uncorrelated(tosses[:, lag:], tosses[:, :-lag])


# -- repeatability -----------------------------------------------------------------------------


def test_numbers_depend_on_seed_step_and_element_alone(device: str) -> None:
    """Neither on the other tensors of the call nor on the position among them nor on the dtype."""
    grad, _ = grads_for(spread(200), rows=6)
    want = second_moment_codes(grad, device, step=7, seed=3)[0]
    params = [torch.zeros(5, 300), torch.zeros_like(grad), torch.zeros(1000),
              torch.zeros(6, 256, dtype=torch.bfloat16)]  # fmt: skip
    grads = [torch.rand(p.shape) for p in params]
    grads[1] = grads[3] = grad
    call = new_call(params, grads, step=[0, 6, 3, 6], seed=3, lr=0.0, beta1=0.0, beta2=0.0,
                    device=device)  # fmt: skip
    run(call)
    assert torch.equal(call["exp_avg_sqs"][1].cpu(), want)
    assert torch.equal(call["exp_avg_sqs"][3].cpu(), want)


def training_call(device: str) -> Call:
    shapes = [(40, 300), (700,)]
    return new_call([torch.randn(s) for s in shapes], [torch.empty(s) for s in shapes],
                    amsgrad=True, weight_decay=0.1, device=device)  # fmt: skip


def train(call: Call, first: int, last: int) -> Call:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for grad in call["grads"]:
            grad.copy_(torch.randn(grad.shape, generator=generator))
        run(call)
    return call


def test_a_resumed_run_has_the_same_bits(device: str) -> None:
    """From a copy of the tensors alone, and not from one that has lost its step."""
    call = training_call(device)
    train(call, 0, 5)
    resumed = copy.deepcopy(call)
    forgetful = copy.deepcopy(call)
    train(call, 5, 10)
    assert_same_bits(train(resumed, 5, 10), call)
    for step in forgetful["steps"]:
        step.zero_()
    train(forgetful, 5, 10)
    assert not torch.equal(forgetful["exp_avg_sqs"][0], call["exp_avg_sqs"][0])


# -- what it is for ----------------------------------------------------------------------------


def stored_after_gradients_fell(stochastic: bool, steps: int, device: str) -> tuple[Tensor, float]:
    """Stored second moments of elements whose gradients fell tenfold, and the true one.

    Every block keeps an element whose gradient is still 1, so the scale stays 1.
    """
    beta2, before, after = 0.999, 1.0, 0.1
    grad = torch.full((64, 256), after)
    grad[:, 0] = before
    call = new_call([torch.zeros_like(grad)], [grad], lr=0.0, beta2=beta2,
                    stochastic_rounding=stochastic, device=device)  # fmt: skip
    set_moment(call, "exp_avg_sq", 0, torch.full_like(grad, before**2))
    for _ in range(steps):
        run(call)
    true = after**2 + (before**2 - after**2) * beta2**steps
    return moment(call, "exp_avg_sq", 0)[:, 1:], true


@pytest.mark.parametrize("steps", [1000, 5000])
def test_stochastic_rounding_follows_where_nearest_freezes(steps: int, device: str) -> None:
    """A step at beta2 = 0.999 moves v by less than half a code.

    The expectation of the stored v is the true one: each step multiplies it by beta2 and the
    rounding adds nothing on average but `BIAS` of a gap, which 1 / (1 - beta2) steps add up. A
    rounding adds the variance gap^2 p (1 - p), with p at most (1 - beta2) v / gap, and
    1 / (2 (1 - beta2)) steps add up: at most gap * v / 2 in all, with the largest gap and v of the
    way down. The sample's own standard deviation is held against that, and then used.
    """
    stored, true = stored_after_gradients_fell(True, steps, device)
    largest_gap = codebook(False).diff().max().item()
    deviation = stored.std().item()
    assert deviation**2 < largest_gap * 1.0 / 2
    error = abs(stored.mean().item() - true)
    assert error < 5 * deviation / math.sqrt(stored.numel()) + 1000 * BIAS * largest_gap
    assert 0.5 < stored.median().item() / true < 2

    frozen, true = stored_after_gradients_fell(False, steps, device)
    assert (frozen == 1.0).all()  # it never got away from where it was
    assert frozen.median().item() / true > 2.5
