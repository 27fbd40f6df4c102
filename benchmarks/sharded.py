"""What sharding costs: a step on DTensors against one on the local shards, and checkpoint sizes.

Every rank makes its shards by FSDP2's rule (rows), steps over them as DTensors and over copies of
the local tensors as plain parameters, in turns, and takes the medians; the ranks run at the same
time, over gloo. The overhead is the difference for each parameter. Then the state is saved by
`torch.distributed.checkpoint`, that of `torch.optim.AdamW` too, and the files are weighed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from _common import RESULTS, CpuWatch, describe_machine, format_table, versions, write_results
from _lists import Shape, TensorList, tensor_list
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import torchao8

# Beside the lists of step.py: what shows the cost of a call alone.
TINY = TensorList("500 tensors of 64 x 64", [(64, 64)] * 500)


def _list(name: str) -> TensorList:
    return TINY if name == "tiny" else tensor_list(name)


def _params(shapes: list[Shape], mesh: Any, dtype: torch.dtype) -> list[nn.Parameter]:
    """DTensors sharded by rows, with gradients."""
    params = []
    for shape in shapes:
        values = (torch.randn(shape).to(dtype) for _ in range(2))
        p, grad = (distribute_tensor(v, mesh, [Shard(0)], src_data_rank=None) for v in values)
        params.append(nn.Parameter(p))
        params[-1].grad = grad
    return params


def _local_copies(params: list[nn.Parameter]) -> list[nn.Parameter]:
    copies = []
    for p in params:
        copies.append(nn.Parameter(p.detach().to_local().clone()))
        copies[-1].grad = p.grad.to_local().clone()
    return copies


def _time(step: Any) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _measure(rank: int, shapes: list[Shape], dtype: torch.dtype, rounds: int) -> dict[str, float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    params = _params(shapes, mesh, dtype)
    # No threshold: shards are smaller than their parameters, and both shall have the same format.
    # Vectors keep 32 bits when sharded, so the plain ones do so by an option.
    matrices = [p for p in params if p.ndim > 1]
    vectors = [p for p in params if p.ndim == 1]
    sharded = torchao8.AdamW8bit([{"params": matrices}, {"params": vectors}], min_8bit_size=0)
    groups = [{"params": _local_copies(matrices)}]
    groups.append({"params": _local_copies(vectors), "optim_bits": 32})
    plain = torchao8.AdamW8bit(groups, min_8bit_size=0)
    for optimizer in (sharded, plain):
        optimizer.step()
    times: dict[str, list[float]] = {"sharded": [], "plain": []}
    for _ in range(rounds):
        dist.barrier()
        times["sharded"].append(_time(sharded.step))
        dist.barrier()
        times["plain"].append(_time(plain.step))
    return {name: statistics.median(values) for name, values in times.items()}


def _save(shapes: list[Shape], dtype: torch.dtype, folder: str) -> dict[str, int]:
    """Bytes of the files of each optimizer's state."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sizes = {}
    for name, cls in (("8-bit", torchao8.AdamW8bit), ("torch.optim.AdamW", torch.optim.AdamW)):
        params = _params(shapes, mesh, dtype)
        optimizer = cls(params)
        optimizer.step()
        path = Path(folder) / name
        dcp.save({"state": optimizer.state_dict()["state"]}, checkpoint_id=path)
        dist.barrier()
        sizes[name] = sum(f.stat().st_size for f in path.iterdir())
        dist.barrier()
    return sizes


def _rank(rank: int, world_size: int, folder: str, args: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    rows = []
    for name in args.lists:
        for dtype in (torch.float32, torch.bfloat16):
            shapes = _list(name).shapes
            times = _measure(rank, shapes, dtype, args.rounds)
            rows.append({"list": name, "dtype": str(dtype), "tensors": len(shapes), **times})
    saved = [
        {"dtype": str(dtype), **_save(_list(args.saved).shapes, dtype, f"{folder}/{dtype}")}
        for dtype in (torch.float32, torch.bfloat16)
    ]
    results.put((rank, rows, saved))
    dist.barrier()
    dist.destroy_process_group()


def run(args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows of the slowest rank, and the sizes of the checkpoints."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, args.ranks, folder, args, results))
            for rank in range(args.ranks)
        ]
        for process in processes:
            process.start()
        by_rank = sorted((results.get(timeout=args.timeout) for _ in processes), key=lambda r: r[0])
        for process in processes:
            process.join()
    rows = []
    for of_ranks in zip(*(rows for _, rows, _ in by_rank), strict=True):
        slowest = max(of_ranks, key=_excess)
        rows.append({**slowest, "ratio": slowest["sharded"] / slowest["plain"],
                     "excess_us_per_tensor": 1e6 * _excess(slowest),
                     "allowed": _allowed(slowest)})  # fmt: skip
    return rows, by_rank[0][2]


def _excess(row: dict[str, Any]) -> float:
    """Seconds that a sharded parameter costs more than a plain one."""
    return (row["sharded"] - row["plain"]) / row["tensors"]


def _allowed(row: dict[str, Any]) -> bool:
    """The bar: 1.1 times the step on plain shards, and 30 us a parameter."""
    return row["sharded"] <= 1.1 * row["plain"] + 30e-6 * row["tensors"]


def _parse(argv: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=2, help="processes (2)")
    add("--lists", nargs="+", default=["gpt2", "tiny"], help="of tensors (gpt2 tiny)")
    add("--saved", default="gpt2", help="the list whose state is saved (gpt2)")
    add("--rounds", type=int, default=15, help="steps of each kind (15)")
    add("--timeout", type=float, default=900, help="seconds for all of it (900)")
    add("--name", default="sharded-cpu", help="name of the result file (sharded-cpu)")
    add("--out", type=Path, default=RESULTS, help="folder of the result file")
    return parser.parse_args(argv)


def main(argv: Iterable[str] | None = None) -> None:
    """Runs the benchmark with the command line `argv` (of the process if None)."""
    args = _parse(argv)
    watch = CpuWatch()
    rows, saved = run(args)
    for row in saved:
        row["share"] = row["8-bit"] / row["torch.optim.AdamW"]
    print(
        format_table(
            ["list", "dtype", "sharded ms", "plain ms", "ratio", "us more a tensor", "in the bar"],
            [
                [r["list"], r["dtype"], f"{1e3 * r['sharded']:.2f}", f"{1e3 * r['plain']:.2f}",
                 f"{r['ratio']:.3f}", f"{r['excess_us_per_tensor']:.1f}",
                 "yes" if r["allowed"] else "NO"]
                for r in rows
            ],
            left=2,
        )
    )  # fmt: skip
    print(
        "\n"
        + format_table(
            ["checkpoint", "8-bit MB", "torch.optim.AdamW MB", "share"],
            [
                [f"{args.saved}, {r['dtype']}", f"{r['8-bit'] / 1e6:.1f}",
                 f"{r['torch.optim.AdamW'] / 1e6:.1f}", f"{r['share']:.2%}"]
                for r in saved
            ],
        )
    )  # fmt: skip
    record = {
        "device": describe_machine(1),
        "versions": versions(["torchao8"]),
        "ranks": args.ranks,
        "rounds": args.rounds,
        "cpu_time_of_others": watch.shares(),
        "steps": rows,
        "checkpoints": saved,
    }
    print(f"\nwrote {write_results(args.name, record, args.out)}")


if __name__ == "__main__":
    main()
