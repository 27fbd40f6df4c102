"""Parameters, gradients, checkpoints, and comparisons of bits that several tests share."""

import contextlib
import io
import math
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import ops

# Where every test runs that has an argument `device`; parametrized in conftest.py. A GPU that the
# library has no kernels for is no reason to be content with the CPU: test_cuda.py fails there.
DEVICES = ["cpu"]
if torch.cuda.is_available() and ops.CUDA_EXTENSION_FILE is not None:
    DEVICES.append("cuda")

# Of tests whose subject are the kernels: bits that they promise, or what has to be float64 in full.
needs_kernels = pytest.mark.skipif(
    ops.is_portable(torch.device("cpu")),
    reason="about the kernels, which TORCHAO8_CPU=portable puts aside",
)

# With min_8bit_size=100, all are quantized, in rows of 300, 70, 700 (a vector), 45, 400 and 900 (a
# matrix of three columns) elements, but for (5,), which is too small, and the scalar.
SHAPES = ((3, 300), (40, 70), (700,), (4, 6, 9, 5), (2, 3, 400), (5,), (300, 3), ())
SMALL = 100
# Set for the tests of an optimizer that takes matrices alone, see conftest.py.
as_matrices = False


def make_params(
    dtype: torch.dtype = torch.float32,
    shapes: Iterable[Sequence[int]] = SHAPES,
    seed: int = 0,
    device: str = "cpu",
    matrices: bool | None = None,
) -> list[torch.nn.Parameter]:
    """The same parameters at every call with the same arguments, and the same on every device.

    Args:
        matrices: whether all of them are to be matrices, see :func:`as_matrix`; None if the
            optimizer that the test is given decides it.
    """
    generator = torch.Generator().manual_seed(seed)
    if as_matrices if matrices is None else matrices:
        shapes = [as_matrix(shape) for shape in shapes]
    values = [torch.randn(s, generator=generator) for s in shapes]
    return [torch.nn.Parameter(x.to(device, dtype)) for x in values]


@contextlib.contextmanager
def params_for(case: Any) -> Iterator[None]:
    """Parameters that the optimizer of a case takes: matrices alone, where it multiplies them.

    Also one thread for such products, whose bits may depend on their number: as ranks.py has.
    """
    global as_matrices
    before = as_matrices, torch.get_num_threads()
    as_matrices = case.matrices
    if case.matrices:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        as_matrices = before[0]
        torch.set_num_threads(before[1])


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """A vector or a scalar as one row, more dimensions as the columns of a matrix."""
    first, *others = (1,) * (2 - len(shape)) + tuple(shape)
    return first, math.prod(others)


def set_grads(
    params: Iterable[Tensor], seed: int, dtype: torch.dtype | None = None, scale: float = 1.0
) -> None:
    """Gradients that depend on the seed alone, of magnitudes from 1e-3 to 1 times ``scale``."""
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        magnitude = 10.0 ** -(3 * torch.rand(p.shape, generator=generator))
        grad = scale * magnitude * torch.randn(p.shape, generator=generator)
        if dtype is not None and dtype != p.dtype:
            p.grad_dtype = None
        p.grad = grad.to(p.device, dtype or p.dtype)


def train(
    optimizer: Optimizer, params: Iterable[Tensor], steps: Iterable[int], **grad_options: Any
) -> None:
    """Steps with the gradients of the given seeds."""
    params = list(params)
    for seed in steps:
        set_grads(params, seed, **grad_options)
        optimizer.step()


def bits(tensor: Tensor) -> bytes:
    """The bytes of the elements, whatever the strides; NaNs compare as the bits that they are."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def through_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Saved and loaded the safe way, which only takes plain tensors and containers."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def _is_dense(grad: Tensor | None) -> bool:
    return grad is not None and grad.layout is torch.strided


def all_bits(optimizer: Optimizer) -> dict[str, Any]:
    """Everything a step could change: parameters, gradients, states, options."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "params": [bits(p) for p in params],
        "grads": [bits(p.grad) if _is_dense(p.grad) else None for p in params],
        "states": [
            {k: (v.dtype, v.shape, bits(v)) for k, v in optimizer.state.get(p, {}).items()}
            for p in params
        ],
        "options": [
            {k: str(v) for k, v in group.items() if k != "params"}
            for group in optimizer.param_groups
        ],
    }


def assert_same_training(a: Optimizer, b: Optimizer) -> None:
    """Parameters and states of two optimizers have the same bits."""
    left, right = all_bits(a), all_bits(b)
    assert left["params"] == right["params"]
    assert left["states"] == right["states"]


def reset_compiler() -> None:
    """Dynamo's reset, and what it misses.

    Dynamo has one variable for every None, True and False, and where it traces ``p.grad`` that is
    None it writes into it where it was read (torch 2.13, TensorVariable.var_getattr). A function
    compiled later that returns None is then told to read it there too: "'model' not in
    cell_and_freevars".
    """
    torch._dynamo.reset()
    for value in (None, True, False):
        torch._dynamo.variables.ConstantVariable.create(value).source = None


def report(lines: Iterable[str]) -> str:
    """Messages as a text of a width that fits in here."""
    return "\n".join(textwrap.fill(line, 94, subsequent_indent="    ") for line in lines)
