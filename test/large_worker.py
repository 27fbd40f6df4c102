"""What test_large.py runs in processes of their own: `large_worker.py FUNCTION ARGUMENTS`.

Each function prints a line of numbers, as key=value.
"""

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from adam_call import Call, new_call, run
from torch import Tensor


def peak_memory(device: str = "cpu") -> int:
    """Bytes, of the process so far; on a GPU, since its peak was last forgotten.

    Linux tells it of the program; getrusage also counts the larger process that started this one.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def report(**numbers: int) -> None:
    print(" ".join(f"{key}={value}" for key, value in numbers.items()))


def touched(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Ones, written, so that the pages are there."""
    return torch.empty(shape, dtype=dtype).fill_(1)


def sized_call(case: str, state_bits: int, rows: int) -> Call:
    """Of rows * 4096 elements in all."""
    options: dict[str, Any] = {"state_bits": state_bits, "amsgrad": True, "weight_decay": 0.1}
    shape = (rows, 4096)
    if case == "strided":
        param = touched(4096, rows).t()
        return new_call([param], [touched(rows, 1).expand(shape)], **options)
    if case == "float16":
        params = [touched(*shape, dtype=torch.float16)]
        return new_call(params, [touched(*shape)], **options)
    if case == "many":
        params = [touched(4, 1024) for _ in range(rows)]
        return new_call(params, [touched(4, 1024) for _ in range(rows)], **options)
    return new_call([touched(*shape)], [touched(*shape)], **options)


def peak_of_a_step(case: str, state_bits: str) -> None:
    """By how much a step raises the peak, above what its arguments have taken."""
    torch.set_num_threads(2)
    before = peak_memory()
    call = sized_call(case, int(state_bits), rows=4096)
    # The first call of an op loads code, starts threads and builds tables: let a small one do so.
    small = sized_call(case, int(state_bits), rows=64)
    run(small)
    held = peak_memory()
    run(call)
    if case == "temporary":
        touched(4096 * 4096, dtype=torch.uint8)
    elements = sum(p.numel() for p in call["params"])
    report(
        elements=elements,
        tensors=len(call["params"]),
        held=held - before,
        growth=peak_memory() - held,
    )


COLUMNS = 4096


def huge_tensor(shape: str, grad_kind: str, device: str) -> None:
    """Steps a tensor of 2^31 + 4096 elements whose rows of 4096 are alike, and checks it."""
    rows = 2**31 // COLUMNS + 1
    size = (rows, COLUMNS) if shape == "matrix" else (rows * COLUMNS,)
    row = torch.randn(COLUMNS).to(device, torch.bfloat16)
    grad_row = torch.randn(COLUMNS).to(device, torch.bfloat16)
    if grad_kind == "one number":
        grad_row.fill_(0.5)

    param = row.new_empty(rows, COLUMNS)
    param.copy_(row.expand_as(param))
    if grad_kind == "dense":
        grad = torch.empty_like(param).copy_(grad_row.expand_as(param)).view(size)
    elif grad_kind == "one number":
        grad = grad_row[:1].expand(size)
    else:
        grad = grad_row.expand(size)
    options: dict[str, Any] = {"weight_decay": 0.1, "step": 3, "seed": 1, "device": device}
    call = new_call([param.view(size)], [grad], **options)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    held = peak_memory(device)
    run(call)
    growth = peak_memory(device) - held

    # All of it was stepped: parameters and first moments of all rows have become alike.
    for tensor in (call["params"][0], call["exp_avgs"][0]):
        matrix = tensor.view(rows, COLUMNS)
        first = matrix[:1].clone()
        assert not torch.equal(first[0], row)
        for part in matrix.split(2**16):
            assert torch.equal(part, first.expand_as(part))
    blocks = COLUMNS // call["block_size"]
    assert (call["exp_avg_sq_scales"][0] > 0).all()
    # Second moments are rounded at random, so rows differ: compare with small tensors.
    compared = 0
    for at in (0, 2**30 // COLUMNS, rows - 2, rows - 1):
        place: dict[str, Any] = {"shard_offsets": [at * COLUMNS], "shard_row_strides": [COLUMNS]}
        small = new_call([row.view(1, -1).clone()], [grad_row.view(1, -1)], **options, **place)
        run(small)
        local = {
            "params": call["params"][0].view(rows, COLUMNS)[at],
            "exp_avgs": call["exp_avgs"][0].view(rows, COLUMNS)[at],
            "exp_avg_sqs": call["exp_avg_sqs"][0].view(rows, COLUMNS)[at],
            "exp_avg_scales": call["exp_avg_scales"][0].view(rows, blocks)[at],
            "exp_avg_sq_scales": call["exp_avg_sq_scales"][0].view(rows, blocks)[at],
        }
        for name, got in local.items():
            assert torch.equal(got, small[name][0][0]), (at, name)
        compared += 1
    report(elements=param.numel(), compared=compared, growth=growth)


if __name__ == "__main__":
    {"peak_of_a_step": peak_of_a_step, "huge_tensor": huge_tensor}[sys.argv[1]](*sys.argv[2:])
