"""Paged state on a GPU, in managed memory: never more of it than the card has free."""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEVICES, all_bits, assert_same_training, make_params, set_grads
from optim_table import OptimizerCase
from paged import SHAPES, adam, assert_paged, every_family, needs_gpu, paged, params_of, trained

import torchao8
from torchao8 import ops
from torchao8.optim._state import paging

pytestmark = needs_gpu
MIB = 1 << 20


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """There is a GPU: that it is not tested must not look like success."""
    if "cuda" not in DEVICES:
        pytest.fail(f"torchao8 has no kernels for the GPU of this machine: {ops.CUDA_MISSING}")


@every_family()
def test_a_gpu_gives_the_bits_of_the_cpu(
    case: OptimizerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In pieces, of which there are several; some MB of managed memory."""
    monkeypatch.setattr(paging, "PIECE", 1 << 17)
    on_cpu, on_gpu = (
        trained(paged(case, make_params(shapes=SHAPES, device=device)), range(3))
        for device in ("cpu", "cuda")
    )
    assert_paged(on_gpu)
    assert_same_training(on_gpu, on_cpu)
    states = on_gpu.state[params_of(on_gpu)[2]].values()
    assert all(value.is_cuda for value in states)


def test_managed_memory_goes_with_the_optimizer() -> None:
    """Of at most a quarter of what is free."""
    free, _ = torch.cuda.mem_get_info()
    rows = min(free // 4 // (2 * 4096), 16384)
    p = torch.nn.Parameter(torch.ones(rows, 1024, device="cuda"))
    p.grad = torch.ones_like(p)
    allocated = torch.cuda.memory_allocated()
    optimizer = torchao8.PagedAdam([p])
    for _ in range(2):
        optimizer.step()
    assert torch.cuda.memory_allocated() - allocated < 1 << 20  # torch's own memory has no state
    torch.cuda.synchronize()
    in_use, _ = torch.cuda.mem_get_info()
    del optimizer
    gc.collect()
    assert not paging.any_pages()
    assert torch.cuda.mem_get_info()[0] - in_use > rows * 4096


def test_training_goes_on_where_memory_is_short() -> None:
    """1 GiB of state, and less than that left for it on the card. The bits stay the same."""
    free, _ = torch.cuda.mem_get_info()
    if free < 4096 * MIB:
        pytest.skip(f"4 GiB must be free on the GPU, {free / 2**30:.1f} are")
    shapes = [(8192, 1024)] * 16

    def make(cls: Any) -> Any:
        optimizer = cls([torch.nn.Parameter(torch.ones(s, device="cuda")) for s in shapes])
        for i, p in enumerate(params_of(optimizer)):
            p.grad = torch.full_like(p, 0.1 * (i + 1))
        optimizer.step()
        return optimizer

    plain = make(torchao8.Adam)
    for _ in range(2):
        plain.step()
    expected = all_bits(plain)
    del plain
    gc.collect()
    torch.cuda.empty_cache()
    optimizer = make(torchao8.PagedAdam)
    assert_paged(optimizer, of=range(16))
    torch.cuda.synchronize()
    left = torch.cuda.mem_get_info()[0] + 1024 * MIB  # with what the driver can move out
    filler = torch.empty(left - 768 * MIB, dtype=torch.uint8, device="cuda")
    for _ in range(2):
        optimizer.step()
    torch.cuda.synchronize()
    del filler
    torch.cuda.empty_cache()
    assert all_bits(optimizer)["states"] == expected["states"]
    assert all_bits(optimizer)["params"] == expected["params"]


def test_a_captured_step_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches its pages by itself; state that was loaded since is another graph's."""
    monkeypatch.setattr(paging, "PIECE", 1 << 17)
    captured, eager = (adam(device="cuda", lr=torch.tensor(0.01, device="cuda")) for _ in range(2))
    for optimizer in (captured, eager):
        trained(optimizer, range(1))
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        for _ in range(3):
            graph.replay()
            eager.step()
            assert_same_training(captured, eager)
        captured.load_state_dict(copy.deepcopy(captured.state_dict()))
        assert_paged(captured)


def test_a_folder_has_no_use_on_a_gpu(tmp_path: Path) -> None:
    optimizer = adam(device="cuda", page_dir=str(tmp_path))
    set_grads(params_of(optimizer), 0)
    with pytest.raises(ValueError, match="page_dir: expected '', as parameters are on cuda:0"):
        optimizer.step()
    assert not any(optimizer.state.values())


def test_a_size_that_is_none() -> None:
    with pytest.raises(RuntimeError, match="allocate_managed: size must be above 0, got -1"):
        ops.allocate_managed(torch.device("cuda"), -1)
