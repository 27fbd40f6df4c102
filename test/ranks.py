"""Real processes that talk over gloo: ``run_ranks`` calls a function on each of several ranks."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The ranks are forks of one process that has imported what takes seconds to import.
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = [
    "torch",
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torchao8",
]
TIMEOUT = 300.0  # seconds: of one call, on a machine that is busy with other things


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``function(rank, world_size, *args)`` on each rank, and returns what they return.

    Function, arguments and results are pickled, so the function must stand at the top of a module;
    results are best plain values. The default process group is there while the function runs.

    Raises:
        AssertionError: a rank raised, died or did not come to an end; with its traceback.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    _CONTEXT.set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        connections, processes = [], []
        for rank in range(world_size):
            ours, theirs = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(
                target=_rank, args=(theirs, store, rank, world_size, function, args), daemon=True
            )
            process.start()
            theirs.close()
            connections.append(ours)
            processes.append(process)
        try:
            return [_result(rank, c) for rank, c in enumerate(connections)]
        finally:
            for process in processes:
                process.join(5)
                process.kill()


def _result(rank: int, connection: Any) -> Any:
    if not connection.poll(TIMEOUT):
        raise AssertionError(f"rank {rank} was not done after {TIMEOUT:g} seconds")
    try:
        failure, result = connection.recv()
    except EOFError:
        raise AssertionError(f"rank {rank} died") from None
    if failure is not None:
        raise AssertionError(f"rank {rank} raised:\n{failure}")
    return result


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
