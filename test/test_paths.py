"""The same bits on all paths of the CPU and on a GPU, for any threads, grouping, float mode."""

import functools
import math
import platform
from typing import Any

import format_reference
import hypothesis
import hypothesis.strategies as st
import pytest
import reference
import torch
from adam_call import (
    CHANGED,
    DYNAMIC,
    FLOATS,
    FOUR_BIT,
    MOMENTS,
    MULAW,
    STATE_LISTS,
    Call,
    assert_same_bits,
    copy_call,
    live_state,
    moved,
    moved_tensor,
    new_call,
    run,
)
from codec_reference import thresholds
from cpu_paths import FLAGS, PATHS, Workers, every_path, every_vector_path, processor_flags
from helpers import DEVICES, bits
from path_worker import Worker
from torch import Tensor

from torchao8 import dequantize_blockwise, quantize_blockwise

# -- the processes -----------------------------------------------------------------------------


@every_path
def test_a_path_can_be_forced(workers: Workers, path: str) -> None:
    assert workers.get(path).greeting["path"] == path


def test_the_default_is_the_best_path(workers: Workers) -> None:
    flags = processor_flags()
    if flags is None:
        pytest.skip("needs a system that lists the processor's flags in /proc/cpuinfo")
    best = [path for path in PATHS if flags >= FLAGS[path]][-1]
    assert workers.get(None).greeting["path"] == best


def test_an_unknown_path_is_refused() -> None:
    worker = Worker("sse9")
    worker.close()
    assert worker.greeting["path"] is None
    message = "TORCHAO8_CPU must be avx512, avx2, scalar or portable, got sse9"
    assert worker.greeting["error"].endswith(message)


# -- cases, as far from ordinary as they may be ------------------------------------------------

SPECIAL = [0.0, -0.0, math.nan, -math.nan, math.inf, -math.inf, 2.0**-149, -1e-40, 2.0**-126, 1e-30,
           1e19, -2.0**62, 2.0**63, -2.0**64, 1e30, 3.4e38]  # fmt: skip


def floats(shape: tuple[int, ...], exponent: int, special: float, rng: torch.Generator) -> Tensor:
    """Normal numbers of a few decades around 2^exponent; a share of them replaced."""
    x = torch.randn(shape, generator=rng) * 10.0 ** (-4 * torch.rand(shape, generator=rng))
    x = torch.ldexp(x, torch.tensor(exponent))
    if special > 0:
        which = torch.randint(0, len(SPECIAL), shape, generator=rng)
        replaced = torch.rand(shape, generator=rng) < special
        x = torch.where(replaced, torch.tensor(SPECIAL)[which], x)
    return x


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, elsewhere in memory."""
    if layout == "odd offset" or x.dim() == 0:
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if layout == "transposed":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    if layout == "gaps":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1] + 1)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    assert layout == "contiguous"
    return x


SHAPES = st.one_of(
    st.tuples(st.integers(1, 5000)),
    st.tuples(st.integers(1, 5), st.integers(1, 700)),
    st.tuples(st.integers(1, 700), st.integers(1, 15)),  # one row
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 300)),
    st.tuples(st.sampled_from([0, 1, 7]), st.sampled_from([0, 16, 255, 256, 257, 512, 2048])),
    st.just(()),
)
LAYOUTS = st.sampled_from(["contiguous", "odd offset", "transposed", "gaps"])
BETAS = st.sampled_from([0.0, 0.5, 0.9, 0.95, 0.999, 1 - 2.0**-24])
BLOCK_SIZES = st.sampled_from([64, 128, 256, 512, 1024, 2048])
SHARES = st.sampled_from([0.0, 0.0, 0.001, 0.05])  # of special numbers
ALL_FORMATS = (DYNAMIC, MULAW, FOUR_BIT)


@st.composite
def step_calls(draw: st.DrawFn, formats: tuple[int, ...] = ALL_FORMATS) -> Call:
    """Arguments of adam_step_ with 1 to 4 tensors, of any codes and scales."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    exponent, special = draw(st.integers(-70, 40)), draw(SHARES)
    state_bits = draw(st.sampled_from([8, 8, 32]))
    state_format = DYNAMIC if state_bits == 32 else draw(st.sampled_from(formats))
    rounds_params = draw(st.booleans())
    params, grads = [], []
    for shape in shapes:
        p = floats(shape, draw(st.sampled_from([0, 0, -130])), special, rng)
        g = floats(shape, exponent, special, rng)
        dtype = draw(st.sampled_from(FLOATS[:2] if rounds_params else FLOATS))
        params.append(laid_out(p.to(dtype), draw(LAYOUTS)))
        grads.append(laid_out(g.to(draw(st.sampled_from(FLOATS))), draw(LAYOUTS)))
    grad_scale = draw(st.sampled_from([None, 3.0, 65536.0]))
    offsets = [draw(st.integers(0, 2**40)) for _ in shapes] if draw(st.booleans()) else []
    call = new_call(
        params, grads, state_bits=state_bits, amsgrad=draw(st.booleans()),
        one_scale=draw(st.booleans()) and state_format != FOUR_BIT,
        step=[draw(st.sampled_from([0, 1, 10, 12345])) for _ in shapes],
        lr=draw(st.sampled_from([0.0, 1e-3, 0.3])), beta1=draw(BETAS), beta2=draw(BETAS),
        eps=draw(st.sampled_from([0.0, 1e-8, 0.1])),
        weight_decay=draw(st.sampled_from([0.0, 0.1])),
        decoupled_weight_decay=draw(st.booleans()), maximize=draw(st.booleans()),
        stochastic_rounding=draw(st.booleans()), stochastic_params=rounds_params,
        shard_offsets=offsets, shard_row_strides=[draw(st.integers(1, 9000)) for _ in offsets],
        block_size=draw(BLOCK_SIZES),
        state_format=state_format,
        seed=draw(st.integers(-(2**63), 2**63 - 1)),
        grad_scale=None if grad_scale is None else torch.tensor(grad_scale),
    )  # fmt: skip
    for name in MOMENTS:
        fill_moment(call, name, exponent, draw(SHARES), rng)
    for name in STATE_LISTS:
        if draw(st.booleans()):
            call[name] = [laid_out(t, "odd offset") for t in call[name]]
    return call


def fill_moment(call: Call, name: str, exponent: int, special: float, rng: torch.Generator) -> None:
    """Any codes, and scales of a size that the gradients' exponent leads to."""
    signed = name == "exp_avg"
    size = exponent if signed else 2 * exponent
    in_8bit = bool(call[f"{name}_scales"])
    for state in call[f"{name}s"]:
        if in_8bit:
            state.copy_(torch.randint(0, 256, state.shape, generator=rng, dtype=torch.uint8))
    for t in call[f"{name}_scales" if in_8bit else f"{name}s"]:
        x = floats(tuple(t.shape), size, special, rng)
        t.copy_(x if signed and call["state_format"] != MULAW else x.abs())


EXAMPLES = hypothesis.settings(
    max_examples=100, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


@every_vector_path
@EXAMPLES
@hypothesis.given(call=step_calls())
def test_steps(workers: Workers, path: str, call: Call) -> None:
    assert workers.get(path)("adam", call, 2, False) == workers.get("scalar")(
        "adam", call, 2, False
    )


@st.composite
def codec_inputs(
    draw: st.DrawFn, formats: tuple[int, ...] = ALL_FORMATS
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """A tensor to quantize; codes and scales to decode; the options of both."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    shape = draw(SHAPES)
    options = {"block_size": draw(BLOCK_SIZES), "signed": draw(st.booleans()),
               "state_format": draw(st.sampled_from(formats))}  # fmt: skip
    x = floats(shape, draw(st.integers(-140, 126)), draw(SHARES), rng)
    x = laid_out(x.to(draw(st.sampled_from(FLOATS))), draw(LAYOUTS))
    codes_shape = shape
    if options["state_format"] == FOUR_BIT:
        row_dims = reference.row_dims(shape, options["block_size"])
        codes_shape = format_reference.packed_shape(shape, row_dims)
    codes = torch.randint(0, 256, codes_shape, generator=rng, dtype=torch.uint8)
    scale_shape = reference.scale_shape(shape, options["block_size"])
    scale = floats(scale_shape, draw(st.integers(-140, 126)), draw(SHARES), rng)
    return x, codes, scale, options


@every_vector_path
@EXAMPLES
@hypothesis.given(inputs=codec_inputs(), dtype=st.sampled_from(FLOATS))
def test_codec(
    workers: Workers, path: str, inputs: tuple[Tensor, Tensor, Tensor, dict[str, Any]],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    x, codes, scale, options = inputs
    one, other = workers.get(path), workers.get("scalar")
    assert one("quantize", x, options) == other("quantize", x, options)
    options = {**options, "dtype": dtype}
    assert one("dequantize", codes, scale, options) == other("dequantize", codes, scale, options)


@every_vector_path
@pytest.mark.parametrize("signed", [False, True])
def test_codec_around_thresholds(workers: Workers, path: str, signed: bool) -> None:
    """Forty floats on either side of each, where a path that is only nearly exact would differ.

    Each in a vector of its own: a path may take the exact way for all of one of which one needs it.
    """
    steps = torch.arange(-40, 41, dtype=torch.int32)
    y = (thresholds(signed).view(torch.int32)[:, None] + steps).view(torch.float32).clamp_max(1)
    y = (torch.cat([y, -y]) if signed else y).reshape(-1, 1)
    x = torch.cat([torch.ones(len(y), 1), y, torch.zeros(len(y), 14)], 1)  # a row: scale 1, one y
    options = {"block_size": 64, "signed": signed}
    one, other = workers.get(path), workers.get("scalar")
    assert one("quantize", x, options) == other("quantize", x, options)


# -- a GPU -------------------------------------------------------------------------------------

on_a_gpu = pytest.mark.skipif(
    "cuda" not in DEVICES,
    reason="no GPU, or no kernels for it: run `make gpu` on a machine with one",
)


def one_nan(t: Tensor) -> Tensor:
    """A GPU knows one NaN; the CPU keeps what was in it."""
    return t.where(~t.isnan(), math.nan) if t.is_floating_point() else t


@on_a_gpu
@EXAMPLES
@hypothesis.given(call=step_calls((DYNAMIC,)))
def test_steps_on_a_gpu(call: Call) -> None:
    other = moved(call, "cuda")
    for _ in range(2):
        run(call)
        run(other)
    for each in (call, other):
        each.update({name: [one_nan(t) for t in each[name]] for name in CHANGED})
    assert_same_bits(call, other)


@on_a_gpu
@EXAMPLES
@hypothesis.given(inputs=codec_inputs((DYNAMIC,)), dtype=st.sampled_from(FLOATS))
def test_codec_on_a_gpu(
    inputs: tuple[Tensor, Tensor, Tensor, dict[str, Any]], dtype: torch.dtype
) -> None:
    x, codes, scale, options = inputs
    del options["state_format"]
    want = [*quantize_blockwise(x, **options),
            dequantize_blockwise(codes, scale, dtype=dtype, **options)]  # fmt: skip
    x, codes, scale = (moved_tensor(t, "cuda") for t in (x, codes, scale))
    got = [*quantize_blockwise(x, **options),
           dequantize_blockwise(codes, scale, dtype=dtype, **options)]  # fmt: skip
    assert [bits(one_nan(t)) for t in got] == [bits(one_nan(t)) for t in want]


# -- threads, grouping, the floating-point mode ------------------------------------------------


# What the state of a call is like.
KINDS: list[dict[str, Any]] = [
    {"state_bits": 8},
    {"state_bits": 8, "one_scale": True},
    {"state_bits": 8, "state_format": MULAW},
    {"state_bits": 8, "state_format": FOUR_BIT, "block_size": 64},
    {"state_bits": 32},
]


def large_call(state_bits: int, **options: Any) -> Call:
    """Enough work for several threads, in one huge tensor beside small ones of all kinds."""
    return copy_call(_large_call(state_bits, **options))


@functools.cache  # its state takes seconds: with one scale the reference quantizes it
def _large_call(state_bits: int, **options: Any) -> Call:
    shapes = [(150_001,), (3, 300), (40, 4096), (9, 6001), (), (17,), *[(30, 40)] * 30]
    rng = torch.Generator().manual_seed(0)
    params = [floats(s, 0, 1e-4, rng).to(FLOATS[i % 3]) for i, s in enumerate(shapes)]
    grads = [floats(s, -3, 1e-4, rng).to(FLOATS[i % 2]) for i, s in enumerate(shapes)]
    step = [i % 4 for i in range(len(shapes))]
    call = new_call(params, grads, state_bits=state_bits, weight_decay=0.1, step=step, **options)
    return live_state(call)


@every_path
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_threads_and_grouping(workers: Workers, path: str, kind: dict[str, Any]) -> None:
    call = large_call(amsgrad=True, **kind)
    worker = workers.get(path)
    want = worker("adam", call, 2, False, threads=1)
    for threads in (2, 3):
        assert worker("adam", call, 2, False, threads=threads) == want
    assert worker("adam", call, 2, True, threads=1) == want
    assert worker("adam", reversed_call(call), 2, False, threads=2) == {
        name: tensors[::-1] for name, tensors in want.items()
    }
    assert want["params"][0] != call["params"][0].numpy().tobytes()  # the worker had a copy


def reversed_call(call: Call) -> Call:
    return {n: v[::-1] if isinstance(v, list) else v for n, v in copy_call(call).items()}


@every_path
def test_codec_threads(workers: Workers, path: str) -> None:
    x = floats((500, 1001), 0, 1e-4, torch.Generator().manual_seed(0))
    worker = workers.get(path)
    for options in ({"signed": True}, {"signed": False, "block_size": 64}):
        want = worker("quantize", x, options)
        assert all(worker("quantize", x, options, threads=n) == want for n in (2, 3))


@every_path
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_flushed_denormals(workers: Workers, path: str, kind: dict[str, Any]) -> None:
    """torch.set_flush_denormal(True) holds for the thread that called it, and so must not matter:
    neither for one call nor for a process that starts with it and builds its tables then."""
    worker, flushed = workers.get(path), workers.get(None, flush_denormal=True)
    rng = torch.Generator().manual_seed(0)
    shapes = [(60, 2048), (9, 300), (700,)]
    for exponent, dtype in [(-62, torch.float32), (-65, torch.bfloat16), (-10, torch.float16)]:
        params = [floats(s, -128, 0.0, rng).to(dtype) for s in shapes]
        grads = [floats(s, exponent, 0.0, rng).to(dtype) for s in shapes]
        call = new_call(
            params, grads, lr=2.0**-100, weight_decay=0.1, **kind
        )  # fmt: skip
        want = worker("adam", call, 3, False, threads=2)
        for threads in (1, 2):
            got = worker("adam", call, 3, False, threads=threads, flush_denormal=True)
            assert got == want
        assert flushed("adam", call, 3, False) == want
    for exponent in (-140, -128, 127):
        x = floats((9, 300), exponent, 0.01, rng)
        for options in (
            {"signed": s, "state_format": f} for s in (True, False) for f in ALL_FORMATS
        ):
            want = worker("quantize", x, options)
            assert worker("quantize", x, options, flush_denormal=True) == want
            assert flushed("quantize", x, options) == want
    if platform.machine().lower() in ("x86_64", "amd64"):
        assert flushed.greeting["flushes"]
