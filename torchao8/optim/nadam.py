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

    With m and v the moving averages of the gradient g and of its square, at step t::

        g = g + weight_decay * p
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        mu_t = beta1 * (1 - 0.5 * 0.96^(t * momentum_decay))
        u = (1 - mu_t) / (1 - mu_1 ... mu_t) * g + mu_(t+1) / (1 - mu_1 ... mu_(t+1)) * m
        p = p - lr * u / (sqrt(v / (1 - beta2^t)) + eps)

    With decoupled_weight_decay, p = p * (1 - lr * weight_decay) takes the place of the first line.
    The product of all mu so far is a state too: one float32 number for each parameter tensor.

    Source: `Incorporating Nesterov Momentum into Adam
    <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        betas: decay rates of the two averages, in [0, 1).
        eps: added to the root, which keeps the update finite.
        weight_decay: factor of the decay.
        momentum_decay: how fast mu grows from half of beta1 to beta1.
        decoupled_weight_decay: shrink the parameter in place of adding to the gradient.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
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

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        return {name: group[name] for name in ("decoupled_weight_decay", "maximize")}


class NAdam8bit(NAdam):
    """NAdam with 8-bit state: about 2 bytes a parameter in place of 8.

    Takes the place of ``torch.optim.NAdam``.
    """

    _bits = 8


class PagedNAdam(NAdam):
    """NAdam whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`NAdam`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedNAdam8bit(NAdam8bit):
    """NAdam8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`NAdam8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True
