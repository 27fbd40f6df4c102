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

    With v the moving average of the square of the gradient g, a that of the gradient itself, if
    centered, and b the momentum buffer::

        g = g + weight_decay * p
        v = alpha * v + (1 - alpha) * g^2
        a = alpha * a + (1 - alpha) * g    (centered; else a = 0)
        u = g / (sqrt(v - a^2) + eps)
        b = momentum * b + u               (without momentum: b = u)
        p = p - lr * b

    In 8 bits, v - a^2 counts as at least v / 64, because a smaller difference may come from
    rounding alone.

    Source: `Neural Networks for Machine Learning, lecture 6
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_; centered:
    `Generating Sequences With Recurrent Neural Networks <https://arxiv.org/abs/1308.0850>`_.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        alpha: decay rate of the averages, in [0, 1).
        eps: added to the root, which keeps the update finite.
        weight_decay: factor of the decay (L2).
        momentum: factor of the buffer, a Python number. While it is 0 the buffer stays as it is.
        centered: divide by the standard deviation, which needs one more state. To be decided before
            the first step.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
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
    """RMSprop with 8-bit state: about 1 byte a parameter in place of 4.

    Takes the place of ``torch.optim.RMSprop``. ``momentum`` and ``centered`` cost a byte more
    each.
    """

    _bits = 8


class PagedRMSprop(RMSprop):
    """RMSprop whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`RMSprop`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedRMSprop8bit(RMSprop8bit):
    """RMSprop8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`RMSprop8bit`. The state lies in memory that the
    system may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the
    CPU. Only the default of ``is_paged`` differs.
    """

    _paged = True
