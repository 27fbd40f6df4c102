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

    With m and v the moving averages of the gradient and of its square, as in
    :class:`torchao8.Adam`, and w the parameter, at step t::

        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * w
        w = w - lr * |w| / |u| * u

    `Large Batch Optimization for Deep Learning: Training BERT in 76 minutes
    <https://arxiv.org/abs/1904.00962>`_, algorithm 2, with the identity for its phi; weight decay
    is decoupled and is part of the ratio. |w| and |u| are 2-norms over the whole parameter, also
    where it is sharded, and leave out elements that are not finite. Where w or u is 0, the ratio is
    1, and it is 2^100 at most. A pass over parameters, gradients and states, which writes nothing,
    measures u before the step: a step of LAMB reads all of them twice.

    The class of this name in bitsandbytes is another one: its ratio is at most 1 (``max_unorm``),
    and is computed without the weight decay.

    Args:
        params: parameters, (name, parameter) pairs or dicts of groups; float32, bfloat16 or
            float16.
        lr: learning rate, a number or a tensor of one element.
        betas: the decay rates of the two averages, in [0, 1).
        eps: added to the root.
        weight_decay: the factor of the decay.
        adaptive: whether there is a ratio; False is AdamW, as biases and the parameters of norms
            are commonly trained.
        common: see :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or parameters that cannot be optimized.
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

    def _op_flags(self, group: Group) -> dict[str, bool]:
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
            maximize=group["maximize"],
        )


class LAMB8bit(LAMB):
    """:class:`LAMB` with 8-bit state: about 2 bytes a parameter in place of 8."""

    _bits = 8


class PagedLAMB(LAMB):
    """:class:`LAMB` with paged state: the default of ``is_paged`` is True."""

    _paged = True


class PagedLAMB8bit(LAMB8bit):
    """:class:`LAMB8bit` with paged state: the default of ``is_paged`` is True."""

    _paged = True
