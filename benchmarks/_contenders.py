"""The optimizers that `step.py` compares."""

from __future__ import annotations

from typing import Any

import torch
from _contender import ALL_LISTS, STATE_8BIT, Build, Contender, Needs
from _family import RULES
from torch import Tensor

BASELINE = "torch"

# Not optimizers: they take the same turns to tell the machine's memory rate.
MEMORY_JOBS = {"copy": "copy of a buffer", "scale": "scaling a buffer in place"}

# The same numbers for everybody; a weight decay of zero would let some of them skip work.
_BETAS = (0.9, 0.999)
_COMMON: dict[str, Any] = {"lr": 1e-3, "betas": _BETAS, "eps": 1e-8, "weight_decay": 1e-2}


def _all_lists_but(*left_out: str) -> tuple[str, ...]:
    return tuple(name for name in ALL_LISTS if name not in left_out)


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
    Contender("8bit", "torchao8.AdamW8bit", "torchao8", _torchao8_8bit(), needs=STATE_8BIT),
    Contender(
        "8bit-nearest",
        'torchao8.AdamW8bit(state_rounding="nearest")',
        "torchao8",
        _torchao8_8bit(state_rounding="nearest"),
        needs=STATE_8BIT,
    ),
    Contender(
        "8bit-one-scale",
        "torchao8.AdamW8bit(block_wise=False)",
        "torchao8",
        _torchao8_8bit(block_wise=False),
        lists=(),
        needs=STATE_8BIT,
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
        needs=STATE_8BIT,
    ),
    Contender(
        "8bit-compiled",
        "torch.compile of torchao8.AdamW8bit.step",
        "torchao8",
        _torchao8_8bit(),
        lists=(),
        needs=STATE_8BIT,
        compiled=True,
    ),
    Contender("32bit", "torchao8.AdamW", "torchao8", _torchao8_32bit),
    Contender(
        "32bit-compiled",
        "torch.compile of torchao8.AdamW.step",
        "torchao8",
        _torchao8_32bit,
        lists=(),
        compiled=True,
    ),
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
_OF_THE_FAMILY = [contender for rule in RULES.values() for contender in rule.contenders()]
CONTENDERS = {contender.name: contender for contender in [*_CONTENDERS, *_OF_THE_FAMILY]}
