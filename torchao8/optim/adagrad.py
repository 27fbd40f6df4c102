"""Adagrad, with 32-bit and with 8-bit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import CommonOptions, Group, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Adagrad", "Adagrad8bit", "PagedAdagrad", "PagedAdagrad8bit"]


class Adagrad(LowPrecisionOptimizer):
    """Adagrad with 32-bit state, as ``torch.optim.Adagrad``.

    With g the gradient and s the sum of its squares, at step t::

        g = g + weight_decay * p
        s = s + g^2
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    Source: `Adaptive Subgradient Methods for Online Learning and Stochastic Optimization
    <https://jmlr.org/papers/v12/duchi11a.html>`_.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        lr_decay: how fast the learning rate falls from step to step.
        weight_decay: factor of the decay (L2).
        initial_accumulator_value: s before the first step.
        eps: added to the root, which keeps the update finite.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "adagrad_step_"
    _torch_class = torch.optim.Adagrad
    _torch_state_at_start = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        initial_accumulator_value: float = 0,
        eps: float | Tensor = 1e-10,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        for name in ("lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            check_number(name, group[name])

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (State("sum", signed=False, initial=group["initial_accumulator_value"]),)

    def _assumed_steps(self, group: Group) -> int | None:
        return None if group["lr_decay"] else 0  # lr_decay alone counts them


class Adagrad8bit(Adagrad):
    """Adagrad with 8-bit state: about 1 byte a parameter in place of 4.

    Takes the place of ``torch.optim.Adagrad``.
    """

    _bits = 8


class PagedAdagrad(Adagrad):
    """Adagrad whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Adagrad`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedAdagrad8bit(Adagrad8bit):
    """Adagrad8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Adagrad8bit`. The state lies in memory that the
    system may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the
    CPU. Only the default of ``is_paged`` differs.
    """

    _paged = True
