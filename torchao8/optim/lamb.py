"""LAMB, with 32-bit and with 8-bit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8 import ops
from torchao8.optim._state.spec import State
from torchao8.optim._step.bucket import Bucket
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import (
    CommonOptions,
    Group,
    check_betas,
    check_flag,
    check_number,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LAMB", "LAMB8bit", "PagedLAMB", "PagedLAMB8bit"]


class LAMB(LowPrecisionOptimizer):
    """LAMB with 32-bit state: AdamW whose learning rate follows the norm of each parameter.

    With m and v the moving averages of the gradient g and of its square, at step t::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
        p = p - lr * |p| / |u| * u

    ``|p|`` and ``|u|`` are 2-norms over the whole parameter, also where it is sharded. They leave
    out elements that are not finite. Where one of them is 0, the ratio is 1. It is at most 2^100.
    To measure u, a step of LAMB reads parameters, gradients and states twice.

    The class of this name in bitsandbytes is another one: its ratio is at most 1 (``max_unorm``)
    and leaves out the weight decay.

    Source: `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
    <https://arxiv.org/abs/1904.00962>`_, algorithm 2, with the identity for its phi.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        betas: decay rates of the two averages, in [0, 1).
        eps: added to the root, which keeps the update finite.
        weight_decay: factor of the decay, which is part of u.
        adaptive: whether the ratio is used. False is AdamW, as biases and norms are commonly
            trained.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "adam_step_"
    _compares_updates = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-6,
        weight_decay: float | Tensor = 0.01,
        *,
        adaptive: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "adaptive": adaptive,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_betas(group["betas"], 2)
        check_number("eps", group["eps"])
        check_number("weight_decay", group["weight_decay"])
        check_flag("adaptive", group["adaptive"])

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (State("exp_avg", signed=True), State("exp_avg_sq", signed=False))

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        return {"decoupled_weight_decay": True, "maximize": group["maximize"]}

    def _has_trust_ratios(self, group: Group) -> bool:
        return bool(group["adaptive"])

    def _trust_ratios(self, group: Group, param_norms: Tensor, norms: Tensor) -> Tensor:
        return torch.where((param_norms > 0) & (norms > 0), param_norms / norms, 1.0)

    def _update_sums(
        self, group: Group, bucket: Bucket, factors: list[Tensor], grad_scale: Tensor | None
    ) -> Tensor:
        return ops.lamb_update_sums(
            bucket.params,
            bucket.grads,
            [bucket.values[name] for name in self._op_states[:2]],
            [bucket.scales[name] for name in self._op_states[:2]],
            bucket.steps,
            self._op_numbers(group, bucket.params[0].device),
            grad_scale,
            factors=factors,
            block_size=group["block_size"],
            block_wise=group["block_wise"],
            state_format=bucket.state_format,
            maximize=group["maximize"],
        )


class LAMB8bit(LAMB):
    """LAMB with 8-bit state: about 2 bytes a parameter in place of 8.

    AdamW whose learning rate follows the norm of each parameter.
    """

    _bits = 8


class PagedLAMB(LAMB):
    """LAMB whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`LAMB`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedLAMB8bit(LAMB8bit):
    """LAMB8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`LAMB8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True
