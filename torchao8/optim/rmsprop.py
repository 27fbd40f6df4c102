"""RMSprop, with 32-bit and with 8-bit state."""

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
    check_flag,
    check_number,
    has_momentum,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["PagedRMSprop", "PagedRMSprop8bit", "RMSprop", "RMSprop8bit"]


class RMSprop(LowPrecisionOptimizer):
    """RMSprop with 32-bit state, as ``torch.optim.RMSprop``.

    With g the gradient plus weight_decay * p (L2), v and a the moving averages of its square and,
    if centered, of itself, and b the momentum buffer::

        v = alpha * v + (1 - alpha) * g^2          a = alpha * a + (1 - alpha) * g
        u = g / (sqrt(v - a^2) + eps)              (a = 0 where not centered)
        b = momentum * b + u
        p = p - lr * b                             p = p - lr * u without momentum

    `Neural Networks for Machine Learning, lecture 6
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_; centered:
    `Generating Sequences With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_. In 8
    bits v - a^2 is no less than v / 64: what is less, rounding may have made.

    Args:
        params: parameters, (name, parameter) pairs or dicts of groups; float32, bfloat16 or
            float16.
        lr: learning rate, a number or a tensor of one element.
        alpha: the decay rate of the averages, in [0, 1).
        eps: added to the root.
        weight_decay: the factor of the L2 penalty.
        momentum: the factor of the buffer. While it is 0 the buffer stays as it is.
        centered: divide by the standard deviation; to be decided before the first step.
        common: see :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or parameters that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "rmsprop_step_"
    _resting = MOMENTUM
    _added = {"centered": "grad_avg"}  # noqa: RUF012 (nobody writes to it)
    _torch_class = torch.optim.RMSprop

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float | Tensor = 0.99,
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        momentum: float = 0,
        centered: bool = False,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_number("alpha", group["alpha"], below=1)
        check_number("eps", group["eps"])
        check_number("weight_decay", group["weight_decay"])
        if isinstance(group["momentum"], Tensor):
            # On a GPU the host would not know whether it is 0, where the buffer rests.
            raise ValueError("momentum: expected a finite number >= 0, got a tensor")
        check_number("momentum", group["momentum"])
        check_flag("centered", group["centered"])

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        states = [State("square_avg", signed=False)]
        if group["centered"]:
            states.append(State("grad_avg", signed=True))
        if has_momentum(group):
            states.append(State("momentum_buffer", signed=True))
        return tuple(states)

    def _mend_decoded(self, state: dict[str, Tensor]) -> None:
        """Rounded to 8 bits, v may be less than a^2, or too little more. The rule has a floor of
        v / 64 under their difference in 8 bits, and none in 32, as torch."""
        if "square_avg" in state and "grad_avg" in state:
            least = state["grad_avg"].square().mul_(64 / 63)
            state["square_avg"] = torch.maximum(state["square_avg"], least)

    def _assumed_steps(self, group: Group) -> int | None:
        return 0  # steps of RMSprop do not depend on their number


class RMSprop8bit(RMSprop):
    """:class:`RMSprop` with 8-bit state: about one byte a parameter and state in place of four."""

    _bits = 8


class PagedRMSprop(RMSprop):
    """:class:`RMSprop` with paged state: the default of ``is_paged`` is True."""

    _paged = True


class PagedRMSprop8bit(RMSprop8bit):
    """:class:`RMSprop8bit` with paged state: the default of ``is_paged`` is True."""

    _paged = True
