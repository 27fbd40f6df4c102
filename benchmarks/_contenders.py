"""The optimizers that `step.py` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from _lists import LISTS
from torch import Tensor

BASELINE = "torch"

# Not optimizers: they take the same turns to tell the machine's memory rate.
MEMORY_JOBS = {"copy": "copy of a buffer", "scale": "scaling a buffer in place"}

# The same numbers for everybody; a weight decay of zero would let some of them skip work.
_BETAS = (0.9, 0.999)
_COMMON: dict[str, Any] = {"lr": 1e-3, "betas": _BETAS, "eps": 1e-8, "weight_decay": 1e-2}

_ALL_LISTS = tuple(dict.fromkeys(name for names in LISTS.values() for name in names))


def _all_lists_but(*left_out: str) -> tuple[str, ...]:
    return tuple(name for name in _ALL_LISTS if name not in left_out)


Build = Callable[[list[Tensor]], torch.optim.Optimizer]


class Needs(NamedTuple):
    """A guess of the bytes that an optimizer takes besides parameters and gradients.

    `state` is for a parameter, `temporary` for an element of the largest tensor, in a step or while
    the state is made.
    """

    state: float
    temporary: float = 0


_STATE_32BIT = {"cpu": Needs(8), "cuda": Needs(8)}
_STATE_8BIT = {"cpu": Needs(3), "cuda": Needs(2.2)}


@dataclass(frozen=True)
class Contender:
    """One optimizer, configured.

    `build` makes it from a list of parameters. `lists` are the tensor lists it runs on when no
    contender is named on the command line. `needs` has an entry for each kind of device it runs on:
    by them the harness decides how many fit into memory at a time. `cpu_path` forces a code path of
    torchao8.
    """

    name: str
    label: str
    package: str
    build: Build
    lists: tuple[str, ...] = _ALL_LISTS
    needs: Mapping[str, Needs] = field(default_factory=lambda: _STATE_32BIT)
    compiled: bool = False
    cpu_path: str | None = None


def _torch_fused(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **_COMMON, fused=True)


def _torch_compiled(params: list[Tensor]) -> torch.optim.Optimizer:
    # Not fused: the step that torch.compile is meant to turn into one kernel. The learning rate is
    # a float that never changes, since on the CPU foreach=True takes no tensor.
    return torch.optim.AdamW(params, **_COMMON, foreach=True)


def _torchao8_8bit(**options: Any) -> Build:
    def build(params: list[Tensor]) -> torch.optim.Optimizer:
        import torchao8

        return torchao8.AdamW8bit(params, **_COMMON, **options)

    return build


def _torchao8_32bit(params: list[Tensor]) -> torch.optim.Optimizer:
    import torchao8

    return torchao8.AdamW(params, **_COMMON)


def _bitsandbytes_8bit(params: list[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(params, **_COMMON)


def _bitsandbytes_32bit(params: list[Tensor]) -> torch.optim.Optimizer:
    import bitsandbytes

    return bitsandbytes.optim.AdamW(params, **_COMMON)


def _torchao(params: list[Tensor]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit

    return AdamW8bit(params, **_COMMON)


def _flashoptim(params: list[Tensor]) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    # By default it keeps 8 more bits of each bfloat16 parameter. Nobody else here does, and on
    # float32 parameters it refuses to.
    return FlashAdamW(params, **_COMMON, master_weight_bits=None)


def _deepspeed(params: list[Tensor]) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return DeepSpeedCPUAdam(params, **_COMMON, adamw_mode=True)


_CONTENDERS = [
    Contender(BASELINE, "torch.optim.AdamW(fused=True)", "torch", _torch_fused),
    Contender("8bit", "torchao8.AdamW8bit", "torchao8", _torchao8_8bit(), needs=_STATE_8BIT),
    Contender(
        "8bit-nearest",
        'torchao8.AdamW8bit(state_rounding="nearest")',
        "torchao8",
        _torchao8_8bit(state_rounding="nearest"),
        needs=_STATE_8BIT,
    ),
    Contender(
        "8bit-avx2",
        "torchao8.AdamW8bit, AVX2",
        "torchao8",
        _torchao8_8bit(),
        needs={"cpu": Needs(3)},
        cpu_path="avx2",
    ),
    Contender(
        "8bit-scalar",
        "torchao8.AdamW8bit, plain C++",
        "torchao8",
        _torchao8_8bit(),
        lists=("block",),
        needs={"cpu": Needs(3)},
        cpu_path="scalar",
    ),
    Contender(
        "8bit-all",
        "torchao8.AdamW8bit(min_8bit_size=0)",
        "torchao8",
        _torchao8_8bit(min_8bit_size=0),
        lists=("small",),
        needs=_STATE_8BIT,
    ),
    Contender(
        "8bit-compiled",
        "torch.compile of torchao8.AdamW8bit.step",
        "torchao8",
        _torchao8_8bit(),
        lists=(),
        needs=_STATE_8BIT,
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
    # On a GPU DeepSpeed has another optimizer, which it compiles with nvcc at the first use.
    Contender("deepspeed", "DeepSpeedCPUAdam", "deepspeed", _deepspeed, needs={"cpu": Needs(8)}),
    Contender(
        "bitsandbytes",
        "bitsandbytes AdamW8bit",
        "bitsandbytes",
        _bitsandbytes_8bit,
        needs={"cpu": Needs(3, temporary=28), "cuda": Needs(2.2)},
    ),
    Contender(
        "bitsandbytes-32bit",
        "bitsandbytes AdamW",
        "bitsandbytes",
        _bitsandbytes_32bit,
        needs={"cuda": Needs(8)},
    ),
    # Its state starts as zeros of the parameter's dtype, which it then quantizes. It tunes that
    # kernel for each size: most of a minute on the list of many sizes.
    Contender(
        "flashoptim",
        "FlashOptim FlashAdamW",
        "flashoptim",
        _flashoptim,
        lists=_all_lists_but("resnet101"),
        needs={"cuda": Needs(2.2, temporary=8)},
    ),
    # It compiles a step for each shape, for seconds: the lists of many shapes only when named.
    Contender(
        "torchao",
        "torchao AdamW8bit",
        "torchao",
        _torchao,
        lists=_all_lists_but("llama", "resnet101"),
        needs={"cpu": Needs(3, temporary=18), "cuda": Needs(2.2, temporary=18)},
    ),
]
CONTENDERS = {contender.name: contender for contender in _CONTENDERS}
