"""Adam and AdamW, with state of 32, 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import (
    CommonOptions,
    Group,
    KeywordOptions,
    check_betas,
    check_flag,
    check_number,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "Adam",
    "Adam4bit",
    "Adam8bit",
    "AdamW",
    "AdamW4bit",
    "AdamW8bit",
    "PagedAdam",
    "PagedAdam4bit",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW4bit",
    "PagedAdamW8bit",
]


class _Adam(LowPrecisionOptimizer):
    """What the classes below share: they differ in their defaults and in the kind of decay."""

    # A checkpoint does not change the kind of decay, which is what people choose the class for.
    _own_options = (*LowPrecisionOptimizer._own_options, "decoupled_weight_decay")
    _op = "adam_step_"
    _has_4bit = True
    _added = {"amsgrad": "max_exp_avg_sq"}  # noqa: RUF012 (nobody writes to it)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        betas: tuple[float | Tensor, float | Tensor],
        eps: float | Tensor,
        weight_decay: float | Tensor,
        amsgrad: bool,
        common: CommonOptions,
        **others: bool,
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            **others,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_betas(group["betas"], 2)
        check_number("eps", group["eps"])
        check_number("weight_decay", group["weight_decay"])
        for name in ("amsgrad", "decoupled_weight_decay"):
            check_flag(name, group[name])

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        states = (
            State("exp_avg", signed=True, squares="exp_avg_sq"),
            State("exp_avg_sq", signed=False),
        )
        return (*states, State("max_exp_avg_sq", signed=False)) if group["amsgrad"] else states

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        decoupled = group["decoupled_weight_decay"]
        return {"decoupled_weight_decay": decoupled, "maximize": group["maximize"]}

    def _saved_options(self, saved: Group) -> Group:
        if saved.get("use_muon") is not False or "adamw_eps" not in saved:
            return saved
        # MuonAdamW saved it: its ``eps`` is Muon's.
        return {k: v for k, v in saved.items() if k != "adamw_eps"} | {"eps": saved["adamw_eps"]}

    def _warnings_of_load(
        self, groups: Sequence[Group], saved: Sequence[Group], writers: Collection[str]
    ) -> list[str]:
        warnings, kind = [], "decoupled_weight_decay"
        for ours, theirs in zip(groups, saved, strict=True):
            if theirs.get(kind, ours[kind]) != ours[kind] and theirs["weight_decay"]:
                warnings.append(
                    f"the checkpoint has weight_decay={theirs['weight_decay']} and "
                    f"{kind}={theirs[kind]}; here it is {ours[kind]}, and stays so"
                )
                break
        if "bitsandbytes" in writers and any(g["weight_decay"] and not g[kind] for g in groups):
            warnings.append(
                "the checkpoint is one of bitsandbytes, whose Adam decays weights decoupled, as "
                "AdamW8bit does; this class adds weight_decay to the gradient"
            )
        return warnings


class Adam(_Adam):
    """Adam with 32-bit state, as ``torch.optim.Adam``: weight decay is added to the gradient (L2).

    With m and v the moving averages of the gradient g and of its square, at step t::

        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Source: `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_,
    algorithm 1. With amsgrad, the largest v so far takes the place of v:
    `On the Convergence of Adam and Beyond <https://openreview.net/forum?id=ryQu7f-RZ>`_.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        betas: decay rates of the two averages, in [0, 1).
        eps: added to the root, which keeps the update finite.
        weight_decay: factor of the decay.
        amsgrad: divide by the largest second moment so far, which is one more state. To be decided
            before the first step.
        decoupled_weight_decay: decay as :class:`AdamW` does.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _torch_class = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        kind = {"decoupled_weight_decay": decoupled_weight_decay}
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, common, **kind)


class AdamW(_Adam):
    """Adam with decoupled weight decay and 32-bit state, as ``torch.optim.AdamW``.

    With m and v the moving averages of the gradient g and of its square, at step t::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p * (1 - lr * weight_decay)
        p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Source: `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_,
    algorithm 2. With amsgrad, the largest v so far takes the place of v:
    `On the Convergence of Adam and Beyond <https://openreview.net/forum?id=ryQu7f-RZ>`_.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        betas: decay rates of the two averages, in [0, 1).
        eps: added to the root, which keeps the update finite.
        weight_decay: factor of the decay, which does not go through the averages.
        amsgrad: divide by the largest second moment so far, which is one more state. To be decided
            before the first step.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _fixed = {"decoupled_weight_decay": True}  # noqa: RUF012 (nobody writes to it)
    _torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, common)


class Adam8bit(_Adam):
    """Adam with 8-bit state: about 2 bytes a parameter in place of 8.

    Takes the place of ``torch.optim.Adam``: weight decay is added to the gradient (L2). The class
    of this name in bitsandbytes decays decoupled, as :class:`AdamW8bit` does. ``optim_bits`` to
    ``is_paged`` may be given by position, as in bitsandbytes.

    How the state is kept: `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_.
    """

    _bits = 8
    _fixed = {"decoupled_weight_decay": False}  # noqa: RUF012 (nobody writes to it)
    _torch_class = torch.optim.Adam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        **common: Unpack[KeywordOptions],
    ) -> None:
        all_common = _with_positional(
            optim_bits, min_8bit_size, percentile_clipping, block_wise, is_paged, common
        )
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, all_common)


class AdamW8bit(_Adam):
    """Adam with decoupled weight decay and 8-bit state: about 2 bytes a parameter in place of 8.

    Takes the place of ``torch.optim.AdamW`` and of ``AdamW8bit`` in bitsandbytes. ``optim_bits`` to
    ``is_paged`` may be given by position, as in bitsandbytes.

    How the state is kept: `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_.
    """

    _bits = 8
    _fixed = {"decoupled_weight_decay": True}  # noqa: RUF012 (nobody writes to it)
    _torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        **common: Unpack[KeywordOptions],
    ) -> None:
        all_common = _with_positional(
            optim_bits, min_8bit_size, percentile_clipping, block_wise, is_paged, common
        )
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, all_common)


class Adam4bit(Adam):
    """Adam with 4-bit state: about 1.1 bytes a parameter in place of 8.

    It is for those who cannot train otherwise: the update is less exact than with 8 bits.
    Weight decay is added to the gradient (L2).

    Idea: `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_. The
    codes here are others: no second moment is rounded to zero, and a first moment is rounded in
    units of the root of its second one.
    """

    _bits = 4


class AdamW4bit(AdamW):
    """Adam with decoupled weight decay and 4-bit state: about 1.1 bytes a parameter in place of 8.

    It is for those who cannot train otherwise: the update is less exact than with 8 bits.

    Idea: `Memory Efficient Optimizers with 4-bit States <https://arxiv.org/abs/2309.01507>`_. The
    codes here are others: no second moment is rounded to zero, and a first moment is rounded in
    units of the root of its second one.
    """

    _bits = 4


def _with_positional(
    optim_bits: int,
    min_8bit_size: int,
    percentile_clipping: int,
    block_wise: bool,
    is_paged: bool | None,
    others: KeywordOptions,
) -> CommonOptions:
    """All common options of a class that takes some of them by position."""
    return {
        "optim_bits": optim_bits,
        "min_8bit_size": min_8bit_size,
        "percentile_clipping": percentile_clipping,
        "block_wise": block_wise,
        "is_paged": is_paged,
        **others,
    }


class PagedAdam(Adam):
    """Adam whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Adam`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedAdam8bit(Adam8bit):
    """Adam8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Adam8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedAdamW(AdamW):
    """AdamW whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`AdamW`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedAdamW8bit(AdamW8bit):
    """AdamW8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`AdamW8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedAdam4bit(Adam4bit):
    """Adam4bit whose 4-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Adam4bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedAdamW4bit(AdamW4bit):
    """AdamW4bit whose 4-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`AdamW4bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True
