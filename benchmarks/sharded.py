"""What sharding costs: a step on DTensors against one on the local shards, and checkpoint sizes.

    python -m benchmarks.sharded

Every rank makes its shards by FSDP2's rule (rows), steps over them as DTensors and over copies of
the local tensors as plain parameters, in turns, and takes the medians; the ranks run at the same
time, over gloo. The overhead is the difference for each parameter. Then the state is saved by
`torch.distributed.checkpoint`, that of `torch.optim.AdamW` too, and the files are weighed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchao8
from benchmarks import reporting
from benchmarks.step.process import Worker
from benchmarks.step.tensor_lists import Shape, TensorList, tensor_list

# Beside the lists of `benchmarks.step`: what shows the cost of a call alone.
TINY = TensorList("500 tensors of 64 x 64", [(64, 64)] * 500)


def _shapes(name: str) -> list[Shape]:
    return (TINY if name == "tiny" else tensor_list(name)).shapes


class Rank:
    """A rank of the benchmark, in a process of its own."""

    def __init__(self, rank: int, world_size: int, folder: str) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
        self._mesh = init_device_mesh("cpu", (world_size,))
        self._folder = Path(folder)

    def _params(self, list_name: str, dtype: str) -> list[nn.Parameter]:
        """DTensors sharded by rows, with gradients."""
        params = []
        for shape in _shapes(list_name):
            values = (torch.randn(shape).to(getattr(torch, dtype)) for _ in range(2))
            p, grad = (distribute_tensor(v, self._mesh, [Shard(0)], src_data_rank=None)
                       for v in values)  # fmt: skip
            params.append(nn.Parameter(p))
            params[-1].grad = grad
        return params

    def step(self, list_name: str, dtype: str, rounds: int) -> dict[str, float]:
        """Median seconds of a step on DTensors and on copies of their shards."""
        params = self._params(list_name, dtype)
        # No threshold: shards are smaller than their parameters, and both shall have the same
        # format. Vectors keep 32 bits when sharded, so the plain ones do so by an option.
        groups = [[p for p in params if p.ndim > 1], [p for p in params if p.ndim == 1]]
        sharded = torchao8.AdamW8bit([{"params": group} for group in groups], min_8bit_size=0)
        copies = [{"params": _local_copies(group)} for group in groups]
        copies[1]["optim_bits"] = 32
        plain = torchao8.AdamW8bit(copies, min_8bit_size=0)
        for optimizer in (sharded, plain):
            optimizer.step()
        times: dict[str, list[float]] = {"sharded": [], "plain": []}
        for _ in range(rounds):
            for name, optimizer in (("sharded", sharded), ("plain", plain)):
                dist.barrier()
                times[name].append(_seconds(optimizer.step))
        return {name: median(values) for name, values in times.items()}

    def save(self, list_name: str, dtype: str) -> dict[str, int]:
        """Bytes of the files of each optimizer's state."""
        sizes = {}
        for name, cls in (("8-bit", torchao8.AdamW8bit), ("torch.optim.AdamW", torch.optim.AdamW)):
            optimizer = cls(self._params(list_name, dtype))
            optimizer.step()
            path = self._folder / dtype / name
            dcp.save({"state": optimizer.state_dict()["state"]}, checkpoint_id=path)
            dist.barrier()
            sizes[name] = sum(f.stat().st_size for f in path.iterdir())
            dist.barrier()
        return sizes

    def end(self) -> None:
        """Leaves the group."""
        dist.barrier()
        dist.destroy_process_group()


def _local_copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    copies = []
    for p in params:
        copies.append(nn.Parameter(p.detach().to_local().clone()))
        copies[-1].grad = p.grad.to_local().clone()
    return copies


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def slowest(list_name: str, dtype: str, ranks: list[dict[str, float]]) -> dict[str, Any]:
    """The row of the rank whose DTensors cost most more than plain tensors."""
    count = len(_shapes(list_name))
    worst = max(ranks, key=lambda times: times["sharded"] - times["plain"])
    return {
        "list": list_name,
        "dtype": f"torch.{dtype}",
        "tensors": count,
        **worst,
        "ratio": worst["sharded"] / worst["plain"],
        "excess_us_per_tensor": 1e6 * (worst["sharded"] - worst["plain"]) / count,
        # The bar: 1.1 times the step on plain shards, and 30 us a parameter.
        "allowed": worst["sharded"] <= 1.1 * worst["plain"] + 30e-6 * count,
    }


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the slowest rank, and the sizes of the checkpoints."""
    dtypes = ("float32", "bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [Worker(Rank, rank, args.ranks, folder, threads=1) for rank in range(args.ranks)]

        def ask(method: str, *arguments: Any) -> list[Any]:
            for worker in ranks:
                worker.send(method, *arguments)
            return [worker.receive(args.timeout) for worker in ranks]

        try:
            rows = [slowest(name, dtype, ask("step", name, dtype, args.rounds))
                    for name in args.lists for dtype in dtypes]  # fmt: skip
            saved = [{"dtype": f"torch.{dtype}", **ask("save", args.saved, dtype)[0]}
                     for dtype in dtypes]  # fmt: skip
            ask("end")
        finally:
            for worker in ranks:
                worker.stop()
    for row in saved:
        row["share"] = row["8-bit"] / row["torch.optim.AdamW"]
    return rows, saved


def tables(rows: list[dict[str, Any]], saved: list[dict[str, Any]], saved_list: str) -> str:
    """Both results for people."""
    headers = ["list", "dtype", "sharded ms", "plain ms", "ratio", "us more a tensor", "in the bar"]
    lines = [
        [r["list"], r["dtype"], f"{1e3 * r['sharded']:.2f}", f"{1e3 * r['plain']:.2f}",
         f"{r['ratio']:.3f}", f"{r['excess_us_per_tensor']:.1f}", "yes" if r["allowed"] else "NO"]
        for r in rows
    ]  # fmt: skip
    of_files = [
        [f"{saved_list}, {r['dtype']}", f"{r['8-bit'] / 1e6:.1f}",
         f"{r['torch.optim.AdamW'] / 1e6:.1f}", f"{r['share']:.2%}"]
        for r in saved
    ]  # fmt: skip
    files = reporting.format_table(
        ["checkpoint", "8-bit MB", "torch.optim.AdamW MB", "share"], of_files
    )
    return f"{reporting.format_table(headers, lines, left=2)}\n\n{files}"


def main(argv: Iterable[str] | None = None) -> None:
    """Runs the benchmark with the command line `argv` (of the process if None)."""
    parser = reporting.parser(__doc__, "sharded-cpu")
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes (2)")
    add("--lists", nargs="+", default=["gpt2", "tiny"], help="of tensors (gpt2 tiny)")
    add("--saved", default="gpt2", help="the list whose state is saved (gpt2)")
    add("--rounds", type=int, default=15, help="steps of each kind (15)")
    add("--timeout", type=float, default=900, help="seconds for each list (900)")
    args = parser.parse_args(argv)
    watch = reporting.CpuWatch()
    rows, saved = run(args)
    print(tables(rows, saved, args.saved))
    record = {
        "device": reporting.describe_machine(1),
        "versions": reporting.versions(["torchao8"]),
        "ranks": args.ranks,
        "rounds": args.rounds,
        "cpu_time_of_others": watch.shares(),
        "steps": rows,
        "checkpoints": saved,
    }
    print(f"\nwrote {reporting.write_results(args.name, record, args.out)}")


if __name__ == "__main__":
    main()
