"""What a call of an op owns: it lets go of all arguments, also when it refuses them."""

import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_op_errors import call_arguments
from torch import Tensor

from torchao8 import ops


def tensors_of(arguments: dict[str, Any]) -> list[Tensor]:
    lists = [v if isinstance(v, list) else [v] for v in arguments.values()]
    return [t for values in lists for t in values if isinstance(t, Tensor)]


def uses(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """The owners of each, in C++ and in Python."""
    return [(t._use_count(), sys.getrefcount(t)) for t in tensors]  # type: ignore[attr-defined]


def accepted(arguments: dict[str, Any]) -> None:
    torch.ops.torchao8.adam_step_(**arguments)


def refused_at_once(arguments: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="block_size"):
        torch.ops.torchao8.adam_step_(**{**arguments, "block_size": 100})


def refused_halfway(arguments: dict[str, Any]) -> None:
    steps = [arguments["steps"][0], torch.tensor(-1.0)]
    with pytest.raises(RuntimeError, match=r"steps\[1\] must be a whole number"):
        torch.ops.torchao8.adam_step_(**{**arguments, "steps": steps})


def refused_for_a_list(arguments: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="must have 2 elements"):
        torch.ops.torchao8.adam_step_(**{**arguments, "grads": arguments["grads"][:1]})


def counted(arguments: dict[str, Any]) -> None:
    ops.count_step_(arguments["steps"], None)


def summed(arguments: dict[str, Any]) -> None:
    ops.sum_squares(arguments["grads"])


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(
    "call",
    [accepted, refused_at_once, refused_halfway, refused_for_a_list, counted, summed],
)
def test_nothing_is_kept(call: Callable[[dict[str, Any]], None], quantized: bool) -> None:
    arguments = call_arguments(quantized)
    tensors = tensors_of(arguments)
    call(arguments)
    before = uses(tensors)
    for _ in range(3):
        call(arguments)
    gc.collect()
    assert uses(tensors) == before


def test_the_memory_of_many_calls() -> None:
    """Lists, handles and what a call allocates: a thousand calls take no more memory than one."""
    resource = pytest.importorskip("resource")
    arguments = call_arguments(quantized=True)
    many = {
        name: value * 500 if isinstance(value, list) and value else value
        for name, value in arguments.items()
    }

    def refuse() -> None:
        for _ in range(100):
            with pytest.raises(RuntimeError, match="same memory twice"):
                torch.ops.torchao8.adam_step_(**many)

    refuse()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse()
    # A handle of each tensor that is lost would be 100 * 8,000 allocations.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 10


def test_addresses_are_those_of_the_call() -> None:
    """Memory that a tensor gets between two calls is the one that the next call works on."""
    arguments = call_arguments(quantized=False)
    accepted(arguments)
    param = arguments["params"][0]
    old = param.detach().clone()
    param.data = old.clone()
    accepted(arguments)
    assert not torch.equal(param, old)


def test_a_thread_that_runs_python_is_asked_for_its_lock_once() -> None:
    """Not for each tensor: who wants Python's lock may have to wait for 5 ms each time."""
    steps = [torch.zeros(()) for _ in range(2000)]
    running, stop = threading.Event(), threading.Event()

    def spin() -> None:
        while not stop.is_set():
            running.set()

    busy = threading.Thread(target=spin)
    busy.start()
    running.wait()
    try:
        times = []
        for _ in range(9):
            start = time.perf_counter()
            ops.count_step_(steps, None)
            times.append(time.perf_counter() - start)
    finally:
        stop.set()
        busy.join()
    # It takes 1 or 2 waits, with a lock for each tensor about 50.
    assert statistics.median(times) < 12 * sys.getswitchinterval()
