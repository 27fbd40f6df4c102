"""NAdam, with 32-bit and with 8-bit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import CommonOptions, Group, check_betas, check_flag, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["NAdam", "NAdam8bit", "PagedNAdam", "PagedNAdam8bit"]


class NAdam(LowPrecisionOptimizer):
    """NAdam with 32-bit state, as ``torch.optim.NAdam``: Adam with Nesterov's momentum.

    With m and v the moving averages of the gradient and of its square, as in
    :class:`torchao8.Adam`, at step t::

        mu_t = beta1 * (1 - 0.5 * 0.96^(t * momentum_decay))
        u = (1 - mu_t) / (1 - mu_1 ... mu_t) * g + mu_(t+1) / (1 - mu_1 ... mu_(t+1)) * m
        p = p - lr * u / (sqrt(v / (1 - beta2^t)) + eps)

    `Incorporating Nesterov Momentum into Adam
    <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_. The product of all mu so far is a
    state, ``mu_product``: one float32 number for each parameter, in 8 bits too.

    Args:
        params: parameters, (name, parameter) pairs or dicts of groups; float32, bfloat16 or
            float16.
        lr: learning rate, a number or a tensor of one element.
        betas: the decay rates of the two averages, in [0, 1).
        eps: added to the root.
        weight_decay: the factor of the decay.
        momentum_decay: how fast mu grows from half of beta1 to beta1.
        decoupled_weight_decay: p = p * (1 - lr * weight_decay) before the update, in place of a
            weight_decay * p that is added to the gradient (L2).
        common: see :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or parameters that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "nadam_step_"
    _torch_class = torch.optim.NAdam

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum_decay: float | Tensor = 4e-3,
        decoupled_weight_decay: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum_decay": momentum_decay,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_betas(group["betas"], 2)
        check_number("eps", group["eps"])
        check_number("weight_decay", group["weight_decay"])
        check_number("momentum_decay", group["momentum_decay"])
        check_flag("decoupled_weight_decay", group["decoupled_weight_decay"])

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (
            State("exp_avg", signed=True),
            State("exp_avg_sq", signed=False),
            State("mu_product", signed=False, initial=1.0, is_scalar=True),
        )

    def _op_flags(self, group: Group) -> dict[str, bool]:
        return {name: group[name] for name in ("decoupled_weight_decay", "maximize")}


class NAdam8bit(NAdam):
    """:class:`NAdam` with 8-bit state: about 2 bytes a parameter in place of 8."""

    _bits = 8


class PagedNAdam(NAdam):
    """:class:`NAdam` with paged state: the default of ``is_paged`` is True."""

    _paged = True


class PagedNAdam8bit(NAdam8bit):
    """:class:`NAdam8bit` with paged state: the default of ``is_paged`` is True."""

    _paged = True
