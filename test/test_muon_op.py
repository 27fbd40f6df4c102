"""The op of Muon: the direction call, with momentum buffers, and the update call, without.

The matrix products between the two are not here. Oracles: torch.optim.Muon's own formulas, and the
rule in float64 with the bounds of reference_rules.py.
"""

import itertools
import math
from typing import Any

import pytest
import reference_rules
import torch
from cpu_paths import Workers, every_vector_path
from helpers import bits, needs_kernels
from portable_steps import portable
from torch import Tensor

from torchao8 import dequantize_blockwise, ops, quantize_blockwise

OP = "muon_step_"
CPU = torch.device("cpu")
# Rows around a block, short ones, a batch of matrices, an empty one.
SHAPES = [(3, 300), (5, 17), (2, 3, 256), (40, 64), (0, 4), (1, 1)]
NUMBERS = {"momentum": 0.95, "weight_decay": 0.1, "rate_scale": 0.2 * 768**0.5}
FLAGS = {"nesterov": True, "maximize": False}
# The largest distance of a nearest code, as a share of the number and of the scale.
CODE_ERRORS = {"dynamic": (0.0, 0.5 * 0.9 / 64), "mulaw": (2.0**-5, 2.0**-5)}


def randn(seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(s, generator=generator)).to(dtype) for s in SHAPES]


class MuonCall:
    """Tensors and options of a call, which step_() runs.

    Args:
        state: of the buffers: "float32", a name of ops.FORMATS, or "none" for the update call.
    """

    def __init__(
        self,
        state: str,
        params: list[Tensor],
        grads: list[Tensor],
        buffers: list[Tensor] | None = None,
        *,
        lr: float = 0.0,
        one_scale: bool = False,
        factors: list[Tensor] | None = None,
        grad_scale: float | None = None,
        found_inf: float | None = None,
        numbers: dict[str, float] | None = None,
        **options: Any,
    ) -> None:
        self.params, self.grads = params, grads
        buffers = randn(9) if buffers is None else buffers
        self.buffers: list[Tensor] = [] if state == "none" else [b.clone() for b in buffers]
        self.scales: list[Tensor] = []
        self.format = state if state not in ("none", "float32") else None
        self.one_scale = one_scale
        if self.format:
            pairs = [self._encode(b) for b in buffers]
            self.buffers, self.scales = [c for c, _ in pairs], [s for _, s in pairs]
        self.steps = [torch.tensor(float(i)) for i in range(len(params))]
        self.lr = torch.tensor(lr, dtype=torch.float64)
        self.numbers = ops.rule_numbers(OP, {**NUMBERS, **(numbers or {})}, CPU)
        self.factors = factors or []
        self.grad_scale = None if grad_scale is None else torch.tensor(grad_scale)
        self.found_inf = None if found_inf is None else torch.tensor(found_inf)
        self.flags = {name: options.pop(name, value) for name, value in FLAGS.items()}
        self.options = options

    def _encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        assert self.format
        if not self.one_scale:
            return quantize_blockwise(x, state_format=self.format)
        return quantize_blockwise(x, state_format=self.format)[0], torch.ones(1)

    def arguments(self) -> dict[str, Any]:
        """For a process of another path, too."""
        shared: list[Any] = [
            OP, self.params, self.grads, [self.buffers], [self.scales], self.steps, self.lr,
            self.numbers, self.grad_scale, self.factors,
        ]  # fmt: skip
        extremes: list[Tensor] = []
        named = {**self.flags, "state_format": ops.FORMAT_NUMBERS[self.format or "dynamic"]}
        if self.one_scale:
            extremes = list(ops.extremes(*shared, **named).unbind())
        positional = [*shared, extremes, self.found_inf]
        return {"positional": positional, "named": {**named, **self.options}}

    def step_(self) -> "MuonCall":
        arguments = self.arguments()
        ops.step_(*arguments["positional"], **arguments["named"])
        return self

    def values(self) -> list[Tensor]:
        """The buffers in float32."""
        if not self.format:
            return [b.clone() for b in self.buffers]
        return [
            dequantize_blockwise(codes, scale, state_format=self.format)
            for codes, scale in zip(self.buffers, self.scales, strict=True)
        ]

    def bits(self) -> list[bytes]:
        return [bits(t) for t in (*self.params, *self.buffers, *self.scales, *self.steps)]


def zeros(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(s, dtype=dtype) for s in SHAPES]


def oracle(call: MuonCall, index: int, lr: float = 1e-300) -> reference_rules.Result:
    """What a call is to make of a tensor, before it is made."""
    gain = 1.0 if call.grad_scale is None else 1 / float(call.grad_scale)
    if call.factors:
        gain, lr = gain * float(call.factors[index][0]), lr * float(call.factors[index][1])
    old = {"momentum_buffer": call.values()[index].double()} if call.buffers else {}
    numbers = dict(zip(ops.NUMBERS[OP], call.numbers.tolist(), strict=True))
    options = {**numbers, **call.flags, "lr": lr}
    p, g = call.params[index].double(), call.grads[index].double() * gain
    return reference_rules.muon(p, g, old, 1, options, call.format is not None)


# -- the formulas --------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_the_oracle_is_torchs(nesterov: bool, maximize: bool) -> None:
    """torch.optim.Muon's lines around the matrix product, in float64."""
    generator = torch.Generator().manual_seed(0)
    p, g, buffer = torch.randn(3, 20, 30, generator=generator, dtype=torch.float64)
    options = {**NUMBERS, "nesterov": nesterov, "maximize": maximize, "lr": 0.02}
    direction, new = reference_rules.exact(
        "muon", torch.zeros_like(p), g, {"momentum_buffer": buffer}, 1, options, False
    )
    g = -g if maximize else g
    wanted = buffer.lerp(g, 1 - NUMBERS["momentum"])
    torch.testing.assert_close(new["momentum_buffer"], wanted, rtol=1e-14, atol=1e-14)
    wanted = g.lerp(wanted, NUMBERS["momentum"]) if nesterov else wanted
    torch.testing.assert_close(direction, wanted, rtol=1e-14, atol=1e-14)
    options["maximize"] = False
    moved, new = reference_rules.exact("muon", p, direction, {}, 1, options, False)
    rate = options["lr"] * NUMBERS["rate_scale"]
    wanted = p * (1 - options["lr"] * NUMBERS["weight_decay"]) - rate * direction
    torch.testing.assert_close(moved, wanted, rtol=1e-14, atol=1e-14)
    assert new == {}


@pytest.mark.parametrize("state", ["float32", "dynamic", "mulaw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_directions(state: str, nesterov: bool, grad_dtype: torch.dtype) -> None:
    factors = [torch.tensor([0.5 + i, 3.0], dtype=torch.float64) for i in range(len(SHAPES))]
    call = MuonCall(
        state, zeros(), randn(1, grad_dtype), nesterov=nesterov, maximize=True, grad_scale=4.0,
        factors=factors,
    )  # fmt: skip
    for _ in range(3):
        wanted = [oracle(call, i) for i in range(len(SHAPES))]
        call.step_()
        for i, (p, buffer) in enumerate(zip(call.params, call.values(), strict=True)):
            exact, found = wanted[i].states["momentum_buffer"], buffer.double()
            assert ((p.double() - wanted[i].param).abs() <= wanted[i].param_error).all()
            error = wanted[i].errors["momentum_buffer"]
            if call.format and p.numel():
                of_number, of_scale = CODE_ERRORS[call.format]
                scale = exact.abs().amax(-1, keepdim=True)  # at least that of each block
                error = 1.01 * (of_number * exact.abs() + of_scale * scale) + error
            assert ((found - exact).abs() <= error).all()
            p.zero_()


def test_directions_in_bfloat16_are_rounded_once() -> None:
    """They are those in float32, rounded to nearest: adding zero loses nothing."""
    narrow = MuonCall("dynamic", zeros(torch.bfloat16), randn(2)).step_()
    wide = MuonCall("dynamic", zeros(), randn(2)).step_()
    for p, q in zip(narrow.params, wide.params, strict=True):
        assert bits(p) == bits(q.bfloat16())
    assert [bits(b) for b in narrow.buffers] == [bits(b) for b in wide.buffers]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_updates(dtype: torch.dtype) -> None:
    """By orthogonal matrices in bfloat16, at the unadjusted rate for the decay."""
    factors = [torch.tensor([1.0, 0.5 + i], dtype=torch.float64) for i in range(len(SHAPES))]
    call = MuonCall("none", randn(3, dtype), randn(4, torch.bfloat16), lr=0.02, factors=factors)
    wanted = [oracle(call, i, lr=0.02) for i in range(len(SHAPES))]
    call.step_()
    for p, result in zip(call.params, wanted, strict=True):
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        error = result.param_error + rounding * result.param.abs() * 1.01 + 6e-8
        assert ((p.double() - result.param).abs() <= error).all()


def test_updates_of_bfloat16_are_rounded_stochastically() -> None:
    """Without a bias: the mean over seeds is the exact number."""
    start, grads = randn(3, torch.bfloat16), randn(4, torch.bfloat16)
    total, rounds = [torch.zeros(s, dtype=torch.float64) for s in SHAPES], 300
    wanted = [oracle(MuonCall("none", start, grads, lr=1e-3), i, 1e-3) for i in range(len(SHAPES))]
    for seed in range(rounds):
        params = [p.clone() for p in start]
        MuonCall("none", params, grads, lr=1e-3, stochastic_params=True, seed=seed).step_()
        for sum_, p in zip(total, params, strict=True):
            sum_ += p
    for sum_, result in zip(total, wanted, strict=True):
        gap = 2.0**-7 * result.param.abs() + 1e-30
        assert ((sum_ / rounds - result.param).abs() <= 5 * 0.5 * gap / rounds**0.5).all()


# -- gradients that are not finite ---------------------------------------------------------------


@pytest.mark.parametrize("state", ["float32", "dynamic", "mulaw", "none"])
def test_a_factor_of_nan_leaves_a_matrix_as_it_is(state: str) -> None:
    """And its neighbours get what they get without it."""
    skipped = 2
    ones = [torch.ones(2, dtype=torch.float64) for _ in SHAPES]
    with_nan = [f.clone() for f in ones]
    with_nan[skipped][0] = math.nan
    call, other = (
        MuonCall(state, randn(5), randn(6), lr=0.02, count_steps=True).step_() for _ in range(2)
    )
    call.factors, other.factors = with_nan, ones
    before, values = bits(call.params[skipped]), call.values()
    call.step_()
    other.step_()
    assert bits(call.params[skipped]) == before
    assert bits(other.params[skipped]) != before
    assert [float(s) for s in call.steps] == [i + 2 for i in range(len(SHAPES))]
    for lists in ("params", "buffers", "scales"):
        for i, pair in enumerate(zip(getattr(call, lists), getattr(other, lists), strict=True)):
            assert i == skipped or bits(pair[0]) == bits(pair[1])
    if state == "none":
        return
    kept, value = call.values()[skipped], values[skipped]
    if state == "mulaw":  # its scale was a bound of the numbers, and now is the least that fits
        error = 1.01 * CODE_ERRORS[state][0] * (value.abs() + value.abs().max())
        assert ((kept - value).abs() <= error).all()
    else:
        torch.testing.assert_close(kept, value, rtol=0 if state == "float32" else 1e-6, atol=0)


@pytest.mark.parametrize("state", ["dynamic", "none"])
def test_a_bad_element_stays_alone(state: str) -> None:
    """As in every element rule. The optimizer keeps such a matrix from its product."""
    call = MuonCall(state, randn(5), randn(6), lr=0.02)
    call.grads[0][1, 7] = math.inf
    before, value = call.params[0].clone(), float(call.params[0][1, 7])
    call.step_()
    assert float(call.params[0][1, 7]) == value
    assert int((call.params[0] != before).sum()) == before.numel() - 1


def test_found_inf_changes_nothing() -> None:
    for state in ("dynamic", "none"):
        call = MuonCall(state, randn(5), randn(6), lr=0.02, found_inf=1.0, count_steps=True)
        before = call.bits()
        assert call.step_().bits() == before


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numbers": {"momentum": 1.0}}, "momentum must be in [0, 1), got 1"),
        ({"numbers": {"weight_decay": -0.1}}, "weight_decay must not be negative, got -0.1"),
        ({"numbers": {"rate_scale": math.nan}}, "rate_scale must not be negative, got nan"),
        ({"lr": math.inf}, "lr must be finite, got inf"),
    ],
)
def test_numbers_out_of_their_range(changes: dict[str, Any], message: str) -> None:
    for state in ("dynamic", "none"):
        call = MuonCall(state, randn(5), randn(6), **changes)
        before = call.bits()
        with pytest.raises(RuntimeError) as error:
            call.step_()
        assert str(error.value).split("\n")[0] == f"muon_step_: {message}"
        assert call.bits() == before


@pytest.mark.parametrize(
    ("index", "value", "shown"),
    [(0, -1.0, "-1"), (0, math.inf, "inf"), (1, math.nan, "nan"), (1, -0.5, "-0.5")],
)
def test_factors_that_are_none(index: int, value: float, shown: str) -> None:
    factors = [torch.ones(2, dtype=torch.float64) for _ in SHAPES]
    factors[3][index] = value
    call = MuonCall("dynamic", randn(5), randn(6), factors=factors)
    before = call.bits()
    with pytest.raises(RuntimeError) as error:
        call.step_()
    assert str(error.value).split("\n")[0] == (
        "muon_step_: factors[3] must hold finite numbers that are not negative (the first may be "
        f"NaN), got {shown}"
    )
    assert call.bits() == before


def test_four_bits_are_refused_by_name() -> None:
    assert not ops.takes_format(OP, "4bit", CPU)
    call = MuonCall("dynamic", randn(5), randn(6), state_format=ops.FORMAT_NUMBERS["4bit"])
    with pytest.raises(RuntimeError, match=r"\(4bit\) has no kernels for muon; it has them for"):
        call.step_()


# -- promises ------------------------------------------------------------------------------------


@needs_kernels
@every_vector_path
@pytest.mark.parametrize("state", ["float32", "dynamic", "mulaw", "one scale", "none"])
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "bfloat16 float32", "float32 bfloat16"])
def test_every_path_gives_the_same_bits(
    workers: Workers, path: str, state: str, dtypes: str
) -> None:
    of_param, of_grad = (getattr(torch, dtypes.split()[i]) for i in (0, -1))
    params, grads = randn(7, of_param), randn(8, of_grad)
    grads[0][1, 7] = math.nan
    factors = [torch.tensor([1.0, 1.0], dtype=torch.float64) for _ in SHAPES]
    factors[3][0] = math.nan
    one_scale = state == "one scale"
    arguments = MuonCall(
        "dynamic" if one_scale else state, params, grads, lr=0.02, grad_scale=0.25,
        one_scale=one_scale, factors=factors, stochastic_params=of_param == torch.bfloat16,
        nesterov=of_grad == torch.float32,
    ).arguments()  # fmt: skip
    before = bits(params[0])
    want = workers.get("scalar")("step", arguments, 1)
    assert workers.get(path)("step", arguments, 1) == want
    assert want[0] != before


@pytest.mark.parametrize("state", ["float32", "dynamic", "mulaw", "none"])
def test_shards_get_the_bits_of_the_whole(state: str) -> None:
    """Pieces of rows that know where they lie, with parameters rounded stochastically."""
    shape, borders = (11, 300), (0, 1, 7, 7, 11)
    generator = torch.Generator().manual_seed(3)
    p, g, b = (torch.randn(shape, generator=generator) for _ in range(3))
    p = p.bfloat16()
    options: dict[str, Any] = {"lr": 0.02, "stochastic_params": True, "seed": 5}
    whole = MuonCall(state, [p.clone()], [g], [b], **options)
    pieces = [slice(*pair) for pair in itertools.pairwise(borders)]
    parts = MuonCall(
        state,
        [p[piece].clone() for piece in pieces],
        [g[piece] for piece in pieces],
        [b[piece].clone() for piece in pieces],
        **options,
        shard_offsets=[piece.start * shape[1] for piece in pieces],
        shard_row_strides=[shape[1] for _ in pieces],
    )
    for step in parts.steps:
        step.zero_()
    whole.step_()
    parts.step_()
    assert bits(whole.params[0]) == bits(torch.cat(parts.params))
    for lists in ("buffers", "scales"):
        if tensors := getattr(whole, lists):
            assert bits(tensors[0]) == bits(torch.cat(getattr(parts, lists)))


@needs_kernels
@pytest.mark.parametrize("state", ["float32", "dynamic", "mulaw", "none"])
def test_portable_operators_are_alike(state: str) -> None:
    """The buffers are within a code of each other, parameters within their rounding."""
    factors = [torch.ones(2, dtype=torch.float64) for _ in SHAPES]
    factors[0][0] = math.nan
    kernels, operators = (
        MuonCall(state, randn(5), randn(6), lr=0.02, grad_scale=2.0, factors=factors)
        for _ in range(2)
    )
    before = kernels.params[0].clone()
    kernels.step_()
    with portable():
        operators.step_()
    for p, q in zip(kernels.params, operators.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert torch.equal(operators.params[0], before)
    of_number, of_scale = CODE_ERRORS[kernels.format] if kernels.format else (1e-5, 1e-6)
    for b, c in zip(kernels.values(), operators.values(), strict=True):
        if b.numel():
            atol = 2 * of_scale * float(b.abs().max())
            torch.testing.assert_close(b, c, rtol=2 * of_number, atol=atol)


@pytest.mark.parametrize("state", ["dynamic", "none"])
def test_opcheck(state: str) -> None:
    call = MuonCall(state, randn(5, torch.bfloat16)[:2], randn(6)[:2], randn(9)[:2], lr=0.02)
    _, params, grads, values, scales, steps, lr, numbers, grad_scale, factors, extremes, found = (
        call.arguments()["positional"]
    )
    args = (
        params,
        grads,
        *values,
        *scales,
        steps,
        factors,
        extremes,
        lr,
        numbers,
        grad_scale,
        found,
    )
    torch.library.opcheck(torch.ops.torchao8.muon_step_.default, args, dict(call.flags))
