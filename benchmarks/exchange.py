"""What the exchange of directions takes in a step of Muon on sharded matrices.

    python -m benchmarks.exchange

Ranks of one thread each talk over gloo on this machine. They step the hidden matrices of GPT-2
124M, sharded by rows, and in turn each rank steps all of them by itself, as data parallelism
without shards does. Two barriers stand around each all-to-all: the time before the first one ends
is time that a rank waits for others, and the time from there on is the exchange. Speed-up and
memory stand beside those of ranks that step all of it.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks import reporting
from benchmarks.process import Worker
from benchmarks.step.devices import Cpu

Shape = tuple[int, ...]
# What is sent does not depend on the state: it is of bfloat16.
OPTIMIZER = "Muon8bit"
_TIMEOUT_S = 600.0


class Clock:
    """Times the all-to-alls of a process: seconds, and bytes that go to other ranks."""

    def __init__(self) -> None:
        self.waited = self.exchanged = 0.0
        self.sent = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        real = dist.all_to_all_single

        def timed(output: Tensor, given: Tensor, of: Any, to: list[int], group: Any) -> None:
            start = time.perf_counter()
            dist.barrier(group)
            ready = time.perf_counter()
            real(output, given, of, to, group)
            dist.barrier(group)
            self.waited += ready - start
            self.exchanged += time.perf_counter() - ready
            mine = to[dist.get_rank(group)]
            self.sent += (given.numel() - mine) * given.itemsize

        with mock.patch.object(dist, "all_to_all_single", timed):
            yield


def hidden_matrices() -> list[Shape]:
    """Of GPT-2 124M."""
    from torchao8._estimate_command import MODELS

    return [s for name, s in MODELS["gpt2"].items() if name.startswith("h.") and len(s) == 2]


def measure(shapes: Sequence[Shape], name: str, dtype: torch.dtype, rounds: int) -> dict[str, Any]:
    """Seconds of the steps of this rank, in every round. All ranks call it."""
    import torchao8

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    whole: list[Tensor] = []
    parts: list[Tensor] = []
    for shape in shapes:
        p, grad = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        whole.append(nn.Parameter(p))
        whole[-1].grad = grad
        mine = [distribute_tensor(t, mesh, [Shard(0)], src_data_rank=None) for t in (p, grad)]
        parts.append(nn.Parameter(mine[0]))
        parts[-1].grad = mine[1]
    cls = getattr(torchao8, name)
    alone, shared = cls(whole), cls(parts)
    found: dict[str, Any] = {"alone": [], "shared": [], "waited": [], "exchanged": []}
    for turn in range(rounds + 1):
        for kind, optimizer in (("alone", alone), ("shared", shared)):
            clock = Clock()
            dist.barrier()
            start = time.perf_counter()
            with clock.running():
                optimizer.step()
            dist.barrier()
            if turn:  # the first one makes the state
                found[kind].append(time.perf_counter() - start)
        if turn:
            found["waited"].append(clock.waited)
            found["exchanged"].append(clock.exchanged)
    memory = Cpu("cpu")
    # All ranks make the same steps here, too.
    peaks = {"alone": memory.peak_extra_bytes(alone.step)}
    dist.barrier()
    peaks["shared"] = memory.peak_extra_bytes(shared.step)
    return {**found, "sent_bytes": clock.sent, "peak_extra_bytes": peaks}


class Rank:
    """A process of several that talk to each other."""

    def __init__(self, rank: int, ranks: int, store: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)

    def measure(self, *arguments: Any) -> dict[str, Any]:
        return measure(*arguments)

    def close(self) -> None:
        dist.barrier()
        dist.destroy_process_group()


def row(name: str, dtype: str, of_ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds: of a round, the mean of the ranks."""

    def mean(key: str) -> list[float]:
        return [statistics.fmean(times) for times in zip(*(r[key] for r in of_ranks), strict=True)]

    alone, shared = mean("alone"), mean("shared")
    waited, exchanged = mean("waited"), mean("exchanged")
    return {
        "optimizer": name,
        "dtype": dtype,
        "alone_ms": 1e3 * statistics.median(alone),
        "ms": 1e3 * statistics.median(shared),
        "waited_ms": 1e3 * statistics.median(waited),
        "exchanged_ms": 1e3 * statistics.median(exchanged),
        "exchanged_share": statistics.median(x / s for x, s in zip(exchanged, shared, strict=True)),
        "speed_up": statistics.median(a / s for a, s in zip(alone, shared, strict=True)),
        "sent_bytes": max(r["sent_bytes"] for r in of_ranks),
        "peak_extra_bytes": _largest(of_ranks, "shared"),
        "alone_peak_extra_bytes": _largest(of_ranks, "alone"),
    }


def _largest(of_ranks: Sequence[dict[str, Any]], kind: str) -> int | None:
    """None where the system does not tell."""
    peaks = [r["peak_extra_bytes"][kind] for r in of_ranks]
    return None if None in peaks else max(peaks)


def table(rows: Sequence[dict[str, Any]]) -> str:
    headers = ["optimizer", "dtype", "ms", "all of it on each rank", "speed-up", "waiting",
               "exchange", "share", "MB sent", "peak extra MiB", "on each rank"]  # fmt: skip
    lines = [
        [
            one["optimizer"],
            one["dtype"],
            f"{one['ms']:.1f}",
            f"{one['alone_ms']:.1f}",
            f"{one['speed_up']:.2f}",
            f"{one['waited_ms']:.1f}",
            f"{one['exchanged_ms']:.1f}",
            f"{one['exchanged_share']:.1%}",
            f"{one['sent_bytes'] / 1e6:.1f}",
            _mebibytes(one["peak_extra_bytes"]),
            _mebibytes(one["alone_peak_extra_bytes"]),
        ]
        for one in rows
    ]
    return reporting.format_table(headers, lines, left=2)


def _mebibytes(value: int | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f}"


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = reporting.parser(__doc__, "muon-exchange")
    add = parser.add_argument
    add("--ranks", type=reporting.at_least(int, 2), default=2, help="processes (2)")
    add("--rounds", type=reporting.at_least(int, 3), default=5, help="timed steps of each kind (5)")
    both = ["float32", "bfloat16"]
    add("--dtype", nargs="+", choices=both, default=both, help="of parameters and gradients (both)")
    return parser.parse_args(argv)


def main(argv: Iterable[str] | None = None) -> None:
    """Runs the measurement with the command line `argv` (of the process if None)."""
    args = _parse(argv)
    shapes, watch = hidden_matrices(), reporting.CpuWatch()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [
            Worker(Rank, rank, args.ranks, store, environment={"OMP_NUM_THREADS": "1"})
            for rank in range(args.ranks)
        ]
        try:
            for dtype in args.dtype:
                asked = shapes, OPTIMIZER, getattr(torch, dtype), args.rounds
                rows.append(row(OPTIMIZER, dtype, _ask(ranks, "measure", *asked)))
            _ask(ranks, "close")
        finally:
            for rank in ranks:
                rank.stop()
    print(table(rows))
    record = {
        "device": {**reporting.describe_machine(1), "cpu_taken_by_others": watch.shares()},
        "versions": reporting.versions([]),
        "ranks": args.ranks,
        "rounds": args.rounds,
        "matrices": len(shapes),
        "elements": sum(map(math.prod, shapes)),
        "rows": rows,
    }
    print(f"wrote {reporting.write_results(args, record)}")


def _ask(ranks: Sequence[Worker], method: str, *arguments: Any) -> list[Any]:
    """What all ranks answer.

    Raises:
        RuntimeError: one of them failed.
    """
    for rank in ranks:
        rank.send(method, *arguments)
    answers = [rank.receive(_TIMEOUT_S) for rank in ranks]
    for error, _ in answers:
        if error is not None:
            raise RuntimeError(error)
    return [answer for _, answer in answers]


if __name__ == "__main__":
    main()
