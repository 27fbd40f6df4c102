"""Paged state on a GPU, in managed memory.

One test reads what is free on the card: run these alone, with ``pytest -m paged_cuda``.
"""

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import DEVICES, assert_same_training, make_params, set_grads
from optim_table import OptimizerCase
from paged import SHAPES, adam, assert_paged, every_family, needs_gpu, paged, params_of, trained

import torchao8
from torchao8 import ops
from torchao8.optim._state import paging
from torchao8.optim._state.dlpack import tensor_on

pytestmark = [needs_gpu, pytest.mark.paged_cuda]
MIB = 1 << 20
MOST = 256 * MIB  # of managed memory that a test here may hold at a time


@pytest.fixture(autouse=True)
def _bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that allocates more managed memory than it should, before it gets any.

    More of it than the card has free can hang the card.
    """
    if "cuda" not in DEVICES:  # there is a GPU: that it is not tested must not look like success
        pytest.fail(f"torchao8 has no kernels for the GPU of this machine: {ops.CUDA_MISSING}")
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * MOST:
        pytest.skip(f"{4 * MOST // MIB} MiB must be free on the GPU, {free // MIB} are")
    allocate, release = ops.allocate_managed, ops.free_managed
    sizes: dict[int, int] = {}

    def bounded_allocate(device: torch.device, size: int) -> int:
        assert sum(sizes.values()) + size <= MOST
        address = allocate(device, size)
        sizes[address] = size
        return address

    def counted_release(address: int, device: torch.device) -> None:
        del sizes[address]
        release(address, device)

    monkeypatch.setattr(ops, "allocate_managed", bounded_allocate)
    monkeypatch.setattr(ops, "free_managed", counted_release)


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
    """64 MiB of it."""
    size = 64 * MIB
    p = torch.nn.Parameter(torch.ones(size // 8192, 1024, device="cuda"))
    p.grad = torch.ones_like(p)
    allocated = torch.cuda.memory_allocated()
    optimizer = torchao8.PagedAdam([p])
    for _ in range(2):
        optimizer.step()
    assert torch.cuda.memory_allocated() - allocated < MIB  # torch's own memory has no state
    torch.cuda.synchronize()
    before, _ = torch.cuda.mem_get_info()
    del optimizer
    gc.collect()
    assert not paging.any_pages()
    assert torch.cuda.mem_get_info()[0] - before > size // 2


def take_to_the_host(optimizer: Any) -> None:
    """Moves the pages of all paged state there, as CUDA's driver does where the card is full: the
    host reads them."""
    torch.cuda.synchronize()
    for state in optimizer.state.values():
        for t in state.values():
            if paging.found_in(t) is not None:
                seen = tensor_on(optimizer, t.data_ptr(), t.nbytes, torch.device("cpu"))
                assert torch.equal(seen, t.view(-1).view(torch.uint8).cpu())


def test_pages_that_the_host_has_taken_come_back() -> None:
    """64 MiB. The card is not filled up to have its pages moved: that could hang it."""
    plain, optimizer = (
        cls([torch.nn.Parameter(torch.ones(512, 1024, device="cuda")) for _ in range(16)])
        for cls in (torchao8.Adam, torchao8.PagedAdam)
    )
    for step in range(3):
        if step > 0:
            take_to_the_host(optimizer)
        for each in (plain, optimizer):
            trained(each, [step])
        assert_paged(optimizer, of=range(16))
        assert_same_training(optimizer, plain)


@pytest.mark.captured
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
