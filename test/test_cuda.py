"""The CUDA kernels on a GPU: the bits of the CPU, no waiting for the device, graphs.

What holds on every device is tested on all of them in the other files, through their argument
`device`. Here is what compares two devices, and what a GPU does otherwise.
"""

import gc
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from adam_call import (
    DTYPES,
    Call,
    assert_same_bits,
    call_bits,
    copy_call,
    live_state,
    moved,
    new_call,
    run,
    sample_call,
    tensors,
)
from helpers import (
    DEVICES,
    SMALL,
    all_bits,
    assert_same_training,
    make_params,
    set_grads,
    through_file,
    train,
)
from optim_table import OptimizerCase, every_optimizer
from test_corrupt_state import BAD_SCALES, corrupt_call
from test_op_errors import BAD_CALLS, BY_DISPATCHER, ON_THE_CPU, refusal

import torchao8
from torchao8 import AdamW8bit, _implementation, ops
from torchao8.portable import compiled

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU that this torch can use: run `make gpu` on a machine with one, and with nvcc",
)


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """There is a GPU: that it is not tested must not look like success."""
    if DEVICE not in DEVICES:
        pytest.fail(f"torchao8 has no kernels for the GPU of this machine: {ops.CUDA_MISSING}")


# Rows of whole blocks, which take the path through registers, beside those of adam_call.SHAPES.
ALIGNED = [(64, 256), (3, 1024), (7, 576), (40, 24), (5000,), (9, 8, 512)]


def assert_steps_alike(call: Call, steps: int = 3, numbers_too: bool = True) -> None:
    """Steps on both devices with the same gradients leave the same bits."""
    other = moved(call, DEVICE, numbers_too)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for on_cpu, on_gpu in zip(call["grads"], other["grads"], strict=True):
            on_cpu.copy_(torch.randn(on_cpu.shape, generator=generator) * 10.0 ** (-step))
            on_gpu.copy_(on_cpu)
        run(call)
        run(other)
        assert_same_bits(call, other)


@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize(("dtype", "grad_dtype"), DTYPES, ids=str)
def test_same_bits_for_every_dtype(
    dtype: torch.dtype, grad_dtype: torch.dtype, state_bits: int
) -> None:
    assert_steps_alike(sample_call(dtype, grad_dtype, state_bits=state_bits, weight_decay=0.1))
    params, grads = tensors(dtype, ALIGNED), tensors(grad_dtype, ALIGNED)
    assert_steps_alike(live_state(new_call(params, grads, state_bits=state_bits)))


OPTIONS: list[dict[str, Any]] = [
    {"amsgrad": True},
    {"decoupled_weight_decay": False, "weight_decay": 0.3},
    {"maximize": True, "amsgrad": True, "decoupled_weight_decay": False, "weight_decay": 0.3},
    {"stochastic_rounding": False},
    {"seed": -5},
    {"eps": 0.0},
    {"beta1": 0.0, "beta2": 0.0},
    {"lr": 0.0},
    {"lr": 1.5, "lr_dtype": torch.float64},
    {"block_size": 64},
    {"block_size": 128},
    {"block_size": 512},
    {"block_size": 2048},
    {"block_size": 512, "amsgrad": True, "decoupled_weight_decay": False, "weight_decay": 0.3},
    {"grad_scale": torch.tensor(1024.0)},
]


@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_bits_for_every_option(options: dict[str, Any], state_bits: int) -> None:
    shapes = [*ALIGNED, (3, 300), (5, 17), (), (1,)]
    params, grads = tensors(shapes=shapes), tensors(shapes=shapes)
    call = live_state(new_call(params, grads, state_bits=state_bits, **options))
    assert_steps_alike(copy_call(call))
    assert_steps_alike(call, numbers_too=False)


@pytest.mark.parametrize("block_size", [64, 256, 512])
@pytest.mark.parametrize(("state_bits", "one_scale"), [(8, False), (8, True), (32, False)], ids=str)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_parameters_rounded_stochastically(
    grad_dtype: torch.dtype, state_bits: int, one_scale: bool, block_size: int
) -> None:
    """Of whole tensors, and of shards whose rows lie apart."""
    shapes = [*ALIGNED, (3, 300), (5, 17), (9, 251), (), (1,)]
    params, grads = tensors(torch.bfloat16, shapes), tensors(grad_dtype, shapes)
    call = live_state(
        new_call(
            params, grads, state_bits=state_bits, one_scale=one_scale, block_size=block_size,
            stochastic_params=True,
        )
    )  # fmt: skip
    assert_steps_alike(copy_call(call))
    call["shard_offsets"] = [1000 * i + 77 * (i % 3) for i in range(len(shapes))]
    call["shard_row_strides"] = [20_000 + i for i in range(len(shapes))]
    assert_steps_alike(call)


@pytest.mark.parametrize("state_bits", [8, 32])
def test_bad_gradients(state_bits: int) -> None:
    """What is not finite, or whose square is not, stays where it is, in aligned blocks as well."""
    params, grads = tensors(shapes=ALIGNED), tensors(shapes=ALIGNED)
    for i, bad in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, torch.nan, torch.inf)):
        grads[i].view(-1)[3 * i :: 97] = bad
    call = live_state(new_call(params, grads, state_bits=state_bits))
    other = moved(call, DEVICE)
    run(call)
    run(other)
    assert_same_bits(call, other)


def test_tiny_and_huge_gradients() -> None:
    shapes = [(8, 512)] * 6
    grads = [torch.randn(s) * scale for s, scale in zip(
        shapes, (0.0, 1e-38, 1e-30, 1e-18, 1e15, 1e18), strict=True)]  # fmt: skip
    call = new_call(tensors(shapes=shapes), grads)
    other = moved(call, DEVICE)
    for _ in range(3):
        run(call)
        run(other)
        assert_same_bits(call, other)


def test_roots_and_reciprocals_of_many_numbers() -> None:
    """Those of healthy blocks stand on the GPU's approximations, refined without a look at what
    they are. Of 2^26 elements, eight on average meet each of a reciprocal's 2^23 mantissas, and
    four each of a root's 2^24."""
    shape = (1 << 18, 256)
    call = new_call([torch.zeros(shape)], [torch.empty(shape)])
    assert_steps_alike(call, steps=2)


@pytest.mark.parametrize("options", [
    {},
    {"block_size": 64},
    {"block_size": 2048},
    {"amsgrad": True},
    {"decoupled_weight_decay": False, "weight_decay": 0.3, "grad_scale": torch.tensor(8.0)},
    {"state_bits": 32},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_warp_takes_several_units(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Of one tensor, and of several: more than the device has warps, in all ways to lie in them."""
    shapes = [(12_000, 1024), (700, 2048), (300, 1000), (100_003,)]
    call = new_call(tensors(dtype, shapes), tensors(dtype, shapes), step=[9, 0, 5, 70], **options)
    assert_steps_alike(call, steps=2)


def test_a_warp_refills_its_random_numbers() -> None:
    """It hashes for 32 blocks at a time: on a large GPU that takes 132 * 24 * 32 of them."""
    assert_steps_alike(new_call([torch.zeros(150_000, 256)], [torch.zeros(150_000, 256)]), steps=1)


def test_a_thread_block_goes_through_many_tensors() -> None:
    """It makes the rules of 32 at a time; each of these has its own."""
    shapes = [(1, 24)] * 150 + [(25_000, 1024)] + [(2, 24)] * 100
    step = [7 * i % 50 for i in range(len(shapes))]
    for state_bits in (8, 32):
        call = new_call(
            tensors(shapes=shapes), tensors(shapes=shapes), step=step, state_bits=state_bits
        )
        assert_steps_alike(call, steps=2)


@pytest.mark.parametrize(
    ("name", "scale"), [(name, scale) for name, all_ in BAD_SCALES.items() for scale in all_]
)
def test_a_bad_scale(name: str, scale: float) -> None:
    """The same bits, but for those of a NaN."""
    call = corrupt_call(name, scale, stochastic=True)
    other = moved(call, DEVICE)
    for _ in range(2):
        run(call)
        run(other)
        back = moved(other, "cpu")
        for kind in ("params", "exp_avgs", "exp_avg_sqs", "exp_avg_scales", "exp_avg_sq_scales"):
            for a, b in zip(call[kind], back[kind], strict=True):
                assert torch.equal(a.nan_to_num(nan=12345), b.nan_to_num(nan=12345))


def test_every_reciprocal() -> None:
    """With these options the denominator is minus the magnitude of the gradient: all mantissas."""
    grad = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)
    call = new_call([torch.zeros(1 << 15, 256)], [grad.view(1 << 15, 256)],
                    beta1=0.0, beta2=0.0, eps=0.0, lr=1.0)  # fmt: skip
    other = moved(call, DEVICE)
    run(call)
    run(other)
    assert_same_bits(call, other)


def test_more_tensors_than_one_launch_takes() -> None:
    shapes = [(4, 256), (3, 30), (100,)] * 400
    assert_steps_alike(new_call(tensors(shapes=shapes), tensors(shapes=shapes)), steps=2)


def test_views_at_odd_addresses_and_strides() -> None:
    base, grad_base = torch.randn(20001), torch.randn(20001)
    params = [base[1:8193].view(32, 256), base[8200:16392].view(256, 32).t()]
    grads = [grad_base[3:8195].view(32, 256), grad_base[8200:16392].view(32, 256)]
    call = new_call(params, grads)
    on_gpu, grads_on_gpu = base.to(DEVICE), grad_base.to(DEVICE)
    other = moved(call, DEVICE)
    other["params"] = [on_gpu[1:8193].view(32, 256), on_gpu[8200:16392].view(256, 32).t()]
    other["grads"] = [grads_on_gpu[3:8195].view(32, 256), grads_on_gpu[8200:16392].view(32, 256)]
    run(call)
    run(other)
    assert_same_bits(call, other)
    assert torch.equal(base, on_gpu.cpu())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("block_size", [64, 256, 2048])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_codec(dtype: torch.dtype, block_size: int, signed: bool) -> None:
    for x in tensors(dtype, [(7, 700), (5000,), (3, 17), (), (0, 4)]):
        x = x if signed else x.abs()
        codes, scale = torchao8.quantize_blockwise(x, block_size=block_size, signed=signed)
        codes2, scale2 = torchao8.quantize_blockwise(
            x.to(DEVICE), block_size=block_size, signed=signed
        )
        assert torch.equal(codes, codes2.cpu())
        assert torch.equal(scale, scale2.cpu())
        back, back2 = (
            torchao8.dequantize_blockwise(
                c, s, block_size=block_size, signed=signed, dtype=dtype
            ).cpu()
            for c, s in ((codes, scale), (codes2, scale2))
        )
        assert torch.equal(back, back2)


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Whatever has the host wait for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_waits_for_nothing() -> None:
    call = sample_call(device=DEVICE)
    with no_synchronization():
        for _ in range(2):
            run(call)
    with no_synchronization(), pytest.raises(RuntimeError, match="synchronizing"):
        call["lr"].item()


@pytest.mark.captured
def test_captured_sums_replay_with_new_numbers() -> None:
    values = [torch.randn(shape, device=DEVICE) for shape in [(5000,), (3, 70), (), (0,)]]
    ops.norms(ops.sum_squares(values))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        sums = ops.sum_squares(values)
        norms = ops.norms(sums)
    for scale in (1.0, 1e-20, 1e30):
        for x in values:
            x.mul_(scale)
        graph.replay()
        expected = ops.sum_squares([x.cpu() for x in values])
        assert torch.equal(sums.cpu(), expected)
        assert torch.equal(norms.cpu(), ops.norms(expected))


@every_optimizer()
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_the_host_waits_for_nothing_in_a_step(case: OptimizerCase, lr: str) -> None:
    """From the first step on, which makes the state; under GradScaler too."""
    params = make_params(device=DEVICE)
    value = torch.tensor(1e-3, device=DEVICE) if lr == "tensor" else 1e-3
    optimizer = case.make(params, lr=value, min_8bit_size=SMALL, fused=True)
    set_grads(params, 0)
    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(0.0, device=DEVICE)
    with no_synchronization():
        for _ in range(2):
            optimizer.step()


def growth_of_a_step(step: Callable[[], Any]) -> int:
    """Bytes that a step takes for a while; the one before it makes the state and loads kernels."""
    step()
    gc.collect()  # nothing of earlier models is freed in between
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - held


# What a tensor of a few numbers takes of torch's allocator.
SMALLEST = 512


@every_optimizer()
def test_no_temporary_grows_with_the_model(case: OptimizerCase) -> None:
    """Sums of squares, norms and factors are small tensors: LARS holds ten of them at a time."""
    growths = set()
    for rows in (16, 1024, 16384):
        params = [torch.nn.Parameter(torch.ones(rows, 1024, device=DEVICE)) for _ in range(2)]
        for p in params:
            p.grad = torch.ones_like(p)
        growths.add(growth_of_a_step(case.make(params, **case.full).step))
    assert len(growths) == 1
    assert growths.pop() <= 16 * SMALLEST


def test_the_measurement_sees_a_temporary() -> None:
    """A gradient that is not dense is copied, which the CPU does without."""
    grad = torch.randn(1024, 512, device=DEVICE).t()
    call = new_call([torch.randn(512, 1024)], [grad], device=DEVICE)
    assert growth_of_a_step(lambda: run(call)) >= grad.nbytes


@pytest.mark.captured
def test_a_captured_step_replays_with_new_numbers() -> None:
    """Changing lr, steps and gradients in place; the replays are the eager steps, to the bit."""
    params, grads = tensors(shapes=ALIGNED), tensors(shapes=ALIGNED)
    call = new_call(params, grads, grad_scale=torch.tensor(2.0), device=DEVICE)
    eager = moved(call, DEVICE)
    warm_up = moved(call, DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(warm_up)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(call)
    for step in range(4):
        for each in (call, eager):
            each["lr"].fill_(0.1 / (step + 1))
            each["grad_scale"].fill_(2.0**step)
        graph.replay()
        run(eager)
        assert_same_bits(call, eager)


@every_optimizer()
@pytest.mark.captured
def test_a_captured_optimizer(case: OptimizerCase) -> None:
    """The whole of `optimizer.step()`, after one step that has made the state."""
    eager, captured = (
        case.make(
            make_params(device=DEVICE), lr=torch.tensor(1e-2, device=DEVICE), min_8bit_size=SMALL
        )
        for _ in range(2)
    )
    for optimizer in (eager, captured):
        train(optimizer, optimizer.param_groups[0]["params"], [0])
    graph = torch.cuda.CUDAGraph()
    before = all_bits(captured)
    with torch.cuda.graph(graph):
        captured.step()
    assert all_bits(captured) == before
    for i in range(3):
        for optimizer in (eager, captured):
            optimizer.param_groups[0]["lr"].fill_(10.0 ** -(i + 1))
        eager.step()
        graph.replay()
        assert_same_training(eager, captured)


@pytest.mark.captured
def test_captured_numbers() -> None:
    """Betas, eps and weight decay on the GPU, written to between replays; the CPU's are numbers."""
    betas = tuple(torch.tensor(b, dtype=torch.float64, device=DEVICE) for b in (0.9, 0.999))
    options = {
        name: torch.tensor(value, dtype=torch.float64, device=DEVICE)
        for name, value in {"lr": 0.01, "eps": 1e-8, "weight_decay": 0.1}.items()
    }
    captured = AdamW8bit(make_params(device=DEVICE), betas=betas, min_8bit_size=SMALL, **options)
    plain = AdamW8bit(make_params(), lr=0.01, weight_decay=0.1, min_8bit_size=SMALL)
    params, others = captured.param_groups[0]["params"], plain.param_groups[0]["params"]
    for optimizer, ps in ((captured, params), (plain, others)):
        train(optimizer, ps, [0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for seed, (beta1, decay) in enumerate([(0.9, 0.1), (0.5, 0.2), (0.8, 0.0)], 1):
        betas[0].fill_(beta1)
        options["weight_decay"].fill_(decay)
        plain.param_groups[0].update(betas=(beta1, 0.999), weight_decay=decay)
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(params, others, strict=True):
            q.grad = torch.randn(q.shape, generator=generator)
            p.grad.copy_(q.grad)
        graph.replay()
        plain.step()
        assert_same_training(captured, plain)


@pytest.fixture
def _portable() -> Iterator[None]:
    _implementation.choose_portable(DEVICE)
    yield
    _implementation.choose_portable(DEVICE, False)


@pytest.mark.captured
@pytest.mark.usefixtures("_portable")
def test_a_step_in_pytorch_operators_is_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers would be those of the capture."""
    monkeypatch.setattr(compiled, "devices", set())  # no compiler: it is not the subject
    optimizer = AdamW8bit(make_params(device=DEVICE), min_8bit_size=SMALL)
    train(optimizer, optimizer.param_groups[0]["params"], [0])
    before = all_bits(optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="no CUDA graph being recorded"):
        optimizer.step()
    assert all_bits(optimizer) == before


@every_optimizer()
def test_training_has_the_bits_of_the_cpu(case: OptimizerCase) -> None:
    first, second = (case.make(make_params(device=d), min_8bit_size=SMALL) for d in DEVICES)
    for optimizer in (first, second):
        train(optimizer, optimizer.param_groups[0]["params"], range(3))
    assert_same_training(first, second)


@every_optimizer()
@pytest.mark.parametrize(("source", "target"), [("cpu", DEVICE), (DEVICE, "cpu")])
def test_a_checkpoint_of_one_device_goes_on_upon_the_other(
    case: OptimizerCase, source: str, target: str
) -> None:
    """In bfloat16, to which torch would cast the state."""
    params = make_params(torch.bfloat16, device=source)
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params, range(3))
    saved = through_file(optimizer.state_dict())
    other_params = [p.detach().to(target).requires_grad_() for p in params]
    other = case.make(other_params, min_8bit_size=SMALL)
    other.load_state_dict(saved)
    assert all_bits(other)["states"] == all_bits(optimizer)["states"]
    assert {v.device.type for s in other.state.values() for v in s.values()} == {target}
    train(optimizer, params, range(3, 5))
    train(other, other_params, range(3, 5))
    assert_same_training(optimizer, other)


@every_optimizer()
def test_a_group_on_two_devices(case: OptimizerCase) -> None:
    """Each is stepped where it lies, and GradScaler's numbers, which lie on one of them, reach
    both. A scale of a power of two leaves the bits as they are."""

    def make() -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        return make_params(), make_params(seed=1, device=DEVICE)

    (here, there), (p, q) = make(), make()
    joint = case.make([*here, *there], min_8bit_size=SMALL)
    apart = case.make(p, min_8bit_size=SMALL), case.make(q, min_8bit_size=SMALL)
    joint.grad_scale = torch.tensor(1024.0, device=DEVICE)
    for step in range(3):
        for params, seed in ((here, step), (there, step + 5)):
            set_grads(params, seed, scale=1024.0)
        for found_inf in (1.0, 0.0):
            joint.found_inf = torch.tensor(found_inf, device=DEVICE)
            joint.step()
        train(apart[0], p, [step])
        train(apart[1], q, [step + 5])
    both = case.make([*p, *q])
    both.state.update({**apart[0].state, **apart[1].state})
    assert_same_training(joint, both)


def test_a_learning_rate_on_another_device() -> None:
    """A CPU tensor serves parameters on the GPU, as it is; one on the GPU is brought to others."""
    results = []
    for lr in (torch.tensor(0.1), torch.tensor(0.1, device=DEVICE)):
        for device in DEVICES:
            params = make_params(device=device)
            optimizer = AdamW8bit(params, lr=lr, min_8bit_size=SMALL)
            train(optimizer, params, range(2))
            results.append(all_bits(optimizer))
    assert all(result["params"] == results[0]["params"] for result in results)
    assert all(result["states"] == results[0]["states"] for result in results)


def test_a_compiled_step() -> None:
    params = [torch.nn.Parameter(torch.randn(64, 256, device=DEVICE)) for _ in range(3)]
    optimizer = AdamW8bit(params, lr=torch.tensor(1e-3))
    step = torch.compile(optimizer.step, fullgraph=True)
    twin = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = AdamW8bit(twin, lr=torch.tensor(1e-3))
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        for p, q in zip(params, twin, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(DEVICE)
            q.grad = p.grad.clone()
        step()
        other.step()
    for p, q in zip(params, twin, strict=True):
        assert torch.equal(p, q)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU: needs a second one")
def test_parameters_on_another_device() -> None:
    call = sample_call()
    other = moved(call, "cuda:1")
    run(call)
    run(other)
    assert_same_bits(call, other)


# -- what is refused, and what the host cannot see ---------------------------------------------


def test_refusals_in_the_words_of_the_cpu() -> None:
    for name in BAD_CALLS:
        if name not in BY_DISPATCHER + ON_THE_CPU:
            assert refusal(name, DEVICE).replace("cuda:0", "cpu") == refusal(name), name


@pytest.mark.parametrize("name", ["grads", "steps", "exp_avgs", "exp_avg_sq_scales"])
def test_tensors_on_two_devices_are_refused(name: str) -> None:
    call = sample_call(device=DEVICE)
    call[name][1] = call[name][1].cpu()
    before = call_bits(call)
    words = (
        rf"adam_step_: {name}\[1\] must be on cuda:0, where another argument is; it is on the CPU"
    )
    with pytest.raises(RuntimeError, match=words):
        run(call)
    assert call_bits(call) == before


def test_a_parameter_on_the_cpu_among_others_on_the_gpu_is_refused() -> None:
    call = sample_call(device=DEVICE)
    call["lr"] = call["lr"].cpu()  # as it is where it was given as a number
    call["params"][0] = call["params"][0].cpu()
    before = call_bits(call)
    with pytest.raises(RuntimeError, match=r"adam_step_: params\[0\] must be on .* on the CPU"):
        run(call)
    assert call_bits(call) == before


def test_a_codec_on_two_devices_is_refused() -> None:
    codes, scale = torchao8.quantize_blockwise(torch.randn(3, 300, device=DEVICE))
    with pytest.raises(RuntimeError, match="dequantize_blockwise: scale must be on cuda:0"):
        torchao8.dequantize_blockwise(codes, scale.cpu())
    with pytest.raises(RuntimeError, match=r"dequantize_blockwise: codes must be on .* on the CPU"):
        torchao8.dequantize_blockwise(codes.cpu(), scale)


@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize(
    ("scale", "grad"), [(0.0, math.nan), (math.nan, math.nan), (math.inf, 0.0), (-1.0, -1.0)]
)
def test_a_loss_scale_out_of_range(scale: float, grad: float, state_bits: int) -> None:
    """Refused on the CPU; on the GPU nobody looks at it. It does to gradients of 1 what arithmetic
    says: a scale of 0 makes them infinite, and such a gradient changes nothing."""
    shapes = [(64, 256), (3, 300), (5,)]
    params = tensors(shapes=shapes)
    strange, plain = (
        live_state(new_call(params, [torch.full(s, g) for s in shapes], state_bits=state_bits,
                            grad_scale=torch.tensor(x), device=DEVICE))
        for x, g in ((scale, 1.0), (1.0, grad))
    )  # fmt: skip
    assert_same_bits(run(strange), run(plain))


@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_step_count_out_of_range(state_bits: int) -> None:
    """Refused on the CPU. On the GPU a count of 2^24, up to which float32 counts, stays there, and
    training goes on; a fraction is dropped."""
    call = sample_call(state_bits=state_bits, device=DEVICE)
    for step in call["steps"]:
        step.fill_(2.0**24)
    before = copy_call(call)
    run(call)
    assert all(step == 2**24 for step in call["steps"])
    assert not torch.equal(call["params"][0], before["params"][0])
    assert all(p.isfinite().all() for p in call["params"])
    whole, broken = copy_call(before), copy_call(before)
    for a, b in zip(whole["steps"], broken["steps"], strict=True):
        a.fill_(7.0)
        b.fill_(7.5)
    assert_same_bits(run(broken), run(whole))
