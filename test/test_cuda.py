"""The CUDA kernels on a GPU: the bits of the CPU, no waiting for the device, graphs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from adam_call import (
    DTYPES,
    Call,
    assert_same_bits,
    copy_call,
    live_state,
    new_call,
    run,
    sample_call,
    tensors,
)
from helpers import make_params, set_grads
from optim_table import OptimizerCase, every_optimizer
from torch import Tensor

import torchao8
from torchao8 import AdamW8bit, ops

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or ops.CUDA_EXTENSION_FILE is None,
    reason="no GPU, or torchao8 was built without CUDA: build it on a machine with a GPU and nvcc",
)

# Rows of whole blocks, which take the path through registers, beside those of adam_call.SHAPES.
ALIGNED = [(64, 256), (3, 1024), (7, 576), (40, 24), (5000,), (9, 8, 512)]


def moved(call: Call, device: str, numbers_too: bool = True) -> Call:
    """A copy on another device. Whether lr, grad_scale and found_inf go, too."""
    numbers = ("lr", "grad_scale", "found_inf")

    def move(name: str, value: Any) -> Any:
        if isinstance(value, list):
            return [t.to(device, copy=True) if isinstance(t, Tensor) else t for t in value]
        if isinstance(value, Tensor) and (numbers_too or name not in numbers):
            return value.to(device, copy=True)
        return value

    return {name: move(name, value) for name, value in copy_call(call).items()}


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
        assert_same_bits(call, moved(other, "cpu"))


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
    {"block_size": 2048},
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
    assert_same_bits(call, moved(other, "cpu"))


def test_tiny_and_huge_gradients() -> None:
    shapes = [(8, 512)] * 6
    grads = [torch.randn(s) * scale for s, scale in zip(
        shapes, (0.0, 1e-38, 1e-30, 1e-18, 1e15, 1e18), strict=True)]  # fmt: skip
    call = new_call(tensors(shapes=shapes), grads)
    other = moved(call, DEVICE)
    for _ in range(3):
        run(call)
        run(other)
        assert_same_bits(call, moved(other, "cpu"))


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
    assert_same_bits(call, moved(other, "cpu"))
    assert torch.equal(base, on_gpu.cpu())


def test_found_inf_changes_nothing() -> None:
    call = moved(sample_call(found_inf=torch.tensor(1.0)), DEVICE)
    before = copy_call(call)
    run(call)
    assert_same_bits(moved(call, "cpu"), moved(before, "cpu"))


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


@pytest.fixture
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("no_synchronization")
def test_the_host_waits_for_nothing() -> None:
    call = moved(sample_call(), DEVICE)
    for _ in range(2):
        run(call)


def test_a_captured_step_replays_with_new_numbers() -> None:
    """Changing lr, steps and gradients in place; the replays are the eager steps, to the bit."""
    scale = torch.tensor(2.0)
    call = moved(
        new_call(tensors(shapes=ALIGNED), tensors(shapes=ALIGNED), grad_scale=scale), DEVICE
    )
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
        assert_same_bits(moved(call, "cpu"), moved(eager, "cpu"))


@every_optimizer()
def test_training_has_the_bits_of_the_cpu(case: OptimizerCase) -> None:
    on_cpu, on_gpu = (
        make_params(),
        [torch.nn.Parameter(p.detach().to(DEVICE)) for p in make_params()],
    )
    first, second = case.cls(on_cpu), case.cls(on_gpu)
    for seed in range(3):
        set_grads(on_cpu, seed)
        for p, q in zip(on_cpu, on_gpu, strict=True):
            assert p.grad is not None
            q.grad = p.grad.to(DEVICE)
        first.step()
        second.step()
    for p, q in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(p, q.cpu())
        for key, value in first.state[p].items():
            assert torch.equal(value, second.state[q][key].cpu()), key


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
    assert_same_bits(call, moved(other, "cpu"))


def test_messages() -> None:
    call = moved(sample_call(), DEVICE)
    call["grads"][0] = call["grads"][0].cpu()
    with pytest.raises(
        RuntimeError, match=r"grads\[0\] must be on cuda:0, as the first parameter is"
    ):
        run(call)
