"""The optimizers that `step.py` compares, and the tensor lists it compares them on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BASELINE = "torch"

# Not optimizers: they take the same turns to tell the machine's memory rate.
MEMORY_JOBS = {"copy": "copy of a buffer", "scale": "scaling a buffer in place"}
MAX_BUFFER_BYTES = 1 << 29  # of one of their buffers: far more than a cache holds

# The same numbers for everybody; a weight decay of zero would let some of them skip work.
_BETAS = (0.9, 0.999)
_COMMON: dict[str, Any] = {"lr": 1e-3, "betas": _BETAS, "eps": 1e-8, "weight_decay": 1e-2}


def _gpt2_block(d: int) -> list[tuple[int, ...]]:
    """The 12 parameters of one GPT-2 block of width `d`, with the weights as (in, out)."""
    norm = [(d,), (d,)]
    attention = [(d, 3 * d), (3 * d,), (d, d), (d,)]
    mlp = [(d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [*norm, *attention, *norm, *mlp]


def gpt2_shapes(
    layers: int = 12, d: int = 768, vocab: int = 50257, context: int = 1024
) -> list[tuple[int, ...]]:
    """Parameter shapes of GPT-2, 124M by default: 148 tensors, the output tied to the embedding."""
    return [(vocab, d), (context, d), *(_gpt2_block(d) * layers), (d,), (d,)]


@dataclass(frozen=True)
class TensorList:
    """A list of parameter shapes to step over."""

    label: str
    shapes: list[tuple[int, ...]]

    @property
    def numel(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max(math.prod(shape) for shape in self.shapes)


TENSOR_LISTS = {
    "gpt2": TensorList("GPT-2 124M (148 tensors)", gpt2_shapes()),
    "block": TensorList("one block of GPT-2 (12 tensors, 7.1M parameters)", _gpt2_block(768)),
    "small": TensorList("1,000 tensors of 1,000 elements", [(1000,)] * 1000),
    "huge": TensorList("one tensor of 256M elements", [(16384, 16384)]),
}


@dataclass(frozen=True)
class Contender:
    """One optimizer, configured.

    `build` makes it from a list of parameters. `lists` are the tensor lists it runs on when no
    contender is named on the command line. `state` and `temporary` guess the bytes that its state
    takes for a parameter, and a step's temporaries for an element of the largest tensor: by them
    the harness decides how many fit into memory at a time. `cpu_path` forces a code path of
    torchao8.
    """

    name: str
    label: str
    package: str
    build: Callable[[list[Tensor]], torch.optim.Optimizer]
    lists: tuple[str, ...] = tuple(TENSOR_LISTS)
    state: int = 8
    temporary: int = 0
    compiled: bool = False
    cpu_path: str | None = None


def _torch_fused(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **_COMMON, fused=True)


def _torch_compiled(params: list[Tensor]) -> torch.optim.Optimizer:
    # Not fused: the step that torch.compile is meant to turn into one kernel. The learning rate is
    # a float that never changes, since on the CPU foreach=True takes no tensor.
    return torch.optim.AdamW(params, **_COMMON, foreach=True)


def _torchao8_8bit(**options: Any) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        import torchao8

        return torchao8.AdamW8bit(params, **_COMMON, **options)

    return build


def _torchao8_32bit(params: list[Tensor]) -> torch.optim.Optimizer:
    import torchao8

    return torchao8.AdamW(params, **_COMMON)


def _bitsandbytes(params: list[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, **_COMMON)


def _torchao(params: list[Tensor]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **_COMMON)


def _deepspeed(params: list[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, **_COMMON, adamw_mode=True)


_CONTENDERS = [
    Contender(BASELINE, "torch.optim.AdamW(fused=True)", "torch", _torch_fused),
    Contender("8bit", "torchao8.AdamW8bit", "torchao8", _torchao8_8bit(), state=3),
    Contender(
        "8bit-nearest",
        'torchao8.AdamW8bit(state_rounding="nearest")',
        "torchao8",
        _torchao8_8bit(state_rounding="nearest"),
        state=3,
    ),
    Contender(
        "8bit-avx2",
        "torchao8.AdamW8bit, AVX2",
        "torchao8",
        _torchao8_8bit(),
        state=3,
        cpu_path="avx2",
    ),
    Contender(
        "8bit-scalar",
        "torchao8.AdamW8bit, plain C++",
        "torchao8",
        _torchao8_8bit(),
        lists=("block",),
        state=3,
        cpu_path="scalar",
    ),
    Contender(
        "8bit-all",
        "torchao8.AdamW8bit(min_8bit_size=0)",
        "torchao8",
        _torchao8_8bit(min_8bit_size=0),
        lists=("small",),
        state=3,
    ),
    Contender(
        "8bit-compiled",
        "torch.compile of torchao8.AdamW8bit.step",
        "torchao8",
        _torchao8_8bit(),
        lists=(),
        state=3,
        compiled=True,
    ),
    Contender("32bit", "torchao8.AdamW", "torchao8", _torchao8_32bit),
    Contender(
        "torch-compiled",
        "torch.compile of torch.optim.AdamW.step",
        "torch",
        _torch_compiled,
        lists=(),
        compiled=True,
    ),
    Contender("deepspeed", "DeepSpeedCPUAdam", "deepspeed", _deepspeed),
    Contender(
        "bitsandbytes",
        "bitsandbytes AdamW8bit",
        "bitsandbytes",
        _bitsandbytes,
        state=3,
        temporary=28,
    ),
    Contender("torchao", "torchao AdamW8bit", "torchao", _torchao, state=3, temporary=18),
]
CONTENDERS = {contender.name: contender for contender in _CONTENDERS}
