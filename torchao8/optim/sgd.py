"""Stochastic gradient descent with momentum, with state of 32, 8 and 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import (
    MOMENTUM,
    CommonOptions,
    Group,
    check_momentum,
    check_nesterov,
    check_number,
    check_sum_of_gradients,
    has_momentum,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SGD", "PagedSGD", "PagedSGD4bit", "PagedSGD8bit", "SGD4bit", "SGD8bit"]


class SGD(LowPrecisionOptimizer):
    """SGD with momentum in 32 bits, as ``torch.optim.SGD``.

    With g the gradient and b the momentum buffer::

        g = g + weight_decay * p
        b = momentum * b + (1 - dampening) * g    (at the first step: b = g)
        p = p - lr * b
        p = p - lr * (g + momentum * b)           (nesterov, in place of the line above)

    Without momentum, b = g, and there is no state but the number of steps: 8 bits save nothing.

    Source: `On the importance of initialization and momentum in deep learning
    <https://proceedings.mlr.press/v28/sutskever13.html>`_.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        momentum: factor of the buffer. While it is 0 the buffer stays as it is. (8-bit state that
            came from bitsandbytes is then rounded once more.)
        dampening: reduces what the gradient adds to the buffer.
        weight_decay: factor of the decay (L2).
        nesterov: Nesterov's momentum. Needs momentum > 0 and dampening = 0.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "sgd_step_"
    _has_4bit = True
    _resting = MOMENTUM
    _torch_class = torch.optim.SGD

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_momentum(group)
        check_number("weight_decay", group["weight_decay"])

    @classmethod
    def _check_new_group(cls, group: Group) -> None:
        check_nesterov(group)

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (State("momentum_buffer", signed=True),) if has_momentum(group) else ()

    def _check_source(self, saved: Group) -> None:
        check_sum_of_gradients(type(self).__name__, saved)
        if "trust_coefficient" in saved:
            raise ValueError(
                f"{type(self).__name__}: expected a momentum_buffer of gradients, got a checkpoint "
                "of LARS, whose buffer holds them times the learning rates of their steps"
            )

    def _assumed_steps(self, group: Group) -> int | None:
        return 1  # after the first one, which sets the buffer, their number does not matter

    def _of_torch(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        if state["step"] == 0:
            return {}  # torch takes its first gradient for the buffer where there is none
        return {name: value for name, value in state.items() if name != "step"}

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        flags = {name: group[name] for name in ("nesterov", "maximize")}
        return {**flags, "rate_in_buffer": False}


class SGD8bit(SGD):
    """SGD with 8-bit state: about 1 byte a parameter in place of 4, with momentum.

    Takes the place of ``torch.optim.SGD``.
    """

    _bits = 8


class SGD4bit(SGD):
    """SGD with 4-bit state: about 0.6 bytes a parameter in place of 4, with momentum.

    It is for those who cannot train otherwise: the update is less exact than with 8 bits.
    """

    _bits = 4


class PagedSGD(SGD):
    """SGD whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`SGD`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedSGD8bit(SGD8bit):
    """SGD8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`SGD8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedSGD4bit(SGD4bit):
    """SGD4bit whose 4-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`SGD4bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True
