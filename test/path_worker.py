"""A process that runs the ops on one CPU path: reads pickled jobs, answers with pickled bytes.

The path is chosen by TORCHAO8_CPU when the process starts, which is why it is one of its own; it
stays for many jobs because starting takes seconds. `Worker` is the caller's side of it.
"""

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

# The first answer of a worker, before any job.
Greeting = dict[str, Any]


def send(stream: BinaryIO, message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError
    return pickle.loads(stream.read(*struct.unpack("<Q", header)))


class Worker:
    """Runs jobs in a process on the given path (None: the default one).

    Args:
        path: "scalar", "avx2" or "avx512".
        flush_denormal: start the process with subnormal numbers flushed to zero, so that the
            library's tables are built in that state too.
    """

    def __init__(self, path: str | None, flush_denormal: bool = False) -> None:
        root = str(Path(torch_module_of("torchao8")).parents[1])
        paths = [root, os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        environment.pop("TORCHAO8_CPU", None)
        if path is not None:
            environment["TORCHAO8_CPU"] = path
        self.process = subprocess.Popen(
            [sys.executable, __file__, *(["--flush-denormal"] if flush_denormal else [])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.greeting: Greeting = receive(self.stdout)  # type: ignore[arg-type]

    def __call__(self, op: str, *args: Any, threads: int = 1, flush_denormal: bool = False) -> Any:
        """What `op`, one of OPERATIONS, returns."""
        send(self.stdin, (op, args, threads, flush_denormal))  # type: ignore[arg-type]
        answer = receive(self.stdout)  # type: ignore[arg-type]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self.stdin.close()
        self.process.wait(timeout=30)
        self.stdout.close()


def torch_module_of(name: str) -> str:
    file = sys.modules[name].__file__ if name in sys.modules else __import__(name).__file__
    assert file is not None
    return file


def storage_bytes(tensor: torch.Tensor) -> bytes:
    """All of the memory that a tensor is a view of."""
    storage = tensor.untyped_storage()
    return torch.tensor([], dtype=torch.uint8).set_(storage).numpy().tobytes()


def adam(call: dict[str, Any], steps: int, singly: bool) -> dict[str, list[bytes]]:
    from adam_call import CHANGED, one_by_one, run

    for _ in range(steps):
        for part in one_by_one(call) if singly else [call]:
            run(part)
    return {name: [storage_bytes(t) for t in call[name]] for name in (*CHANGED, "grads")}


def step(call: dict[str, Any], steps: int) -> list[bytes]:
    """Any step op, by the arguments of :func:`torchao8.ops.step_`."""
    from torchao8 import ops

    for _ in range(steps):
        ops.step_(*call["positional"], **call["named"])
    _, params, _, values, scales, *_ = call["positional"]
    return [storage_bytes(t) for tensors in (params, *values, *scales) for t in tensors]


def lamb(arguments: list[Any], options: dict[str, Any]) -> list[bytes]:
    from torchao8 import ops

    return [storage_bytes(ops.lamb_update_sums(*arguments, **options))]


def quantize(x: torch.Tensor, options: dict[str, Any]) -> list[bytes]:
    return [storage_bytes(t) for t in torch.ops.torchao8.quantize_blockwise(x, **options)]


def dequantize(codes: torch.Tensor, scale: torch.Tensor, options: dict[str, Any]) -> list[bytes]:
    return [storage_bytes(torch.ops.torchao8.dequantize_blockwise(codes, scale, **options))]


def sums(tensors: list[torch.Tensor]) -> list[bytes]:
    rows = torch.ops.torchao8.sum_squares(tensors)
    return [storage_bytes(rows), storage_bytes(torch.ops.torchao8.norms(rows))]


OPERATIONS: dict[str, Callable[..., Any]] = {
    "adam": adam,
    "lamb": lamb,
    "step": step,
    "quantize": quantize,
    "dequantize": dequantize,
    "sums": sums,
}


def serve(jobs: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            op, args, threads, flush_denormal = receive(jobs)
        except EOFError:
            return
        torch.set_num_threads(threads)
        try:
            if flush_denormal:
                torch.set_flush_denormal(True)
            answer = OPERATIONS[op](*args)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        finally:
            if flush_denormal:
                torch.set_flush_denormal(False)
        send(answers, answer)


def main() -> None:
    # What a library prints must not get among the answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    flushes = "--flush-denormal" in sys.argv and torch.set_flush_denormal(True)
    try:
        from torchao8 import ops

        greeting: Greeting = {"path": ops.cpu_capability(), "flushes": flushes, "error": None}
    except (ImportError, RuntimeError) as error:
        greeting = {"path": None, "flushes": flushes, "error": str(error).split("\n")[0]}
    send(answers, greeting)
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
