"""Real processes that talk over gloo: ``run_ranks`` calls a function on each of several ranks.

Each call has processes of its own, so that a rank that raises, dies or patches a module disturbs no
later test. They are forks of one process that has imported what the tests' modules import from
outside: such a start takes a tenth of a second, a new interpreter with torch takes two.
"""

import gc
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

TIMEOUT = 300.0  # seconds: of one call, on a machine that is busy with other things
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "hypothesis",
    "pytest",
    "safetensors.torch",
    "torch",
    "torch._dynamo.testing",
    "torch._inductor.utils",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.profiler",
    "torchao8",
]


def forking_context() -> Any:
    """The context of multiprocessing whose processes are those forks. Modules that are not there
    are passed over."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    return _CONTEXT


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``function(rank, world_size, *args)`` on each rank, and returns what they return.

    Function, arguments and results are pickled, so the function must stand at the top of a module;
    results are best plain values. The default process group is there while the function runs.

    Raises:
        AssertionError: a rank raised, died or did not come to an end; with the traceback of the
            first one.
    """
    context = forking_context()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        connections, processes = [], []
        is_over = False
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(
                    target=_rank,
                    args=(theirs, store, rank, world_size, function, args),
                    daemon=True,
                )
                process.start()
                theirs.close()
                connections.append(ours)
                processes.append(process)
            results = _results(connections)
            is_over = True
            return results
        finally:
            # After a failure, the other ranks may wait for ever for the one that failed.
            for process in processes:
                process.join(5 if is_over else 0)
                process.kill()
            for process in processes:
                process.join()
            for connection in connections:
                connection.close()


def _results(connections: list[Any]) -> list[Any]:
    """What the ranks return; raises at the first failure, which the others' may follow from."""
    results: dict[int, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(results) < len(connections):
        waiting = {c: rank for rank, c in enumerate(connections) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise AssertionError(
                f"ranks {[*waiting.values()]} were not done after {TIMEOUT:g} seconds"
            )
        for connection in ready:
            rank = waiting[connection]
            try:
                failure, results[rank] = connection.recv()
            except EOFError:
                raise AssertionError(f"rank {rank} died") from None
            if failure is not None:
                raise AssertionError(f"rank {rank} raised:\n{failure}")
    return [results[rank] for rank in range(len(connections))]


def _rank(
    connection: Any,
    store: str,
    rank: int,
    world_size: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch
    import torch.distributed as dist

    gc.freeze()  # a collection that looked at what was imported would copy its memory
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = _loopback()
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(world_size)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        outcome = None, function(rank, world_size, *args)
    except BaseException:
        outcome = traceback.format_exc(), None
    connection.send(outcome)
    if outcome[0] is None:
        dist.barrier()  # without it gloo sometimes aborts
        dist.destroy_process_group()


def _loopback() -> str:
    names = [name for _, name in socket.if_nameindex()]
    return "lo" if "lo" in names else next(name for name in names if name.startswith("lo"))
