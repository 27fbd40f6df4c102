"""Lion, with state of 32, 8 and 4 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import CommonOptions, Group, check_betas, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion", "Lion4bit", "Lion8bit", "PagedLion", "PagedLion4bit", "PagedLion8bit"]


class Lion(LowPrecisionOptimizer):
    """Lion with 32-bit state: the sign of an average of the gradients, with decoupled weight decay.

    With m the moving average of the gradient g::

        c = beta1 * m + (1 - beta1) * g
        m = beta2 * m + (1 - beta2) * g
        p = p * (1 - lr * weight_decay) - lr * sign(c)

    The sign of zero is zero. Every element moves by lr. So lr should be 3 to 10 times smaller than
    for Adam, and weight_decay larger by the same factor.

    Source: `Symbolic Discovery of Optimization Algorithms <https://arxiv.org/abs/2302.06675>`_,
    algorithm 2.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        betas: decay rates of the interpolation c and of the average m, in [0, 1).
        weight_decay: factor of the decay.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "lion_step_"
    _has_4bit = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float | Tensor = 0,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {"lr": lr, "betas": betas, "weight_decay": weight_decay}
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_betas(group["betas"], 2)
        check_number("weight_decay", group["weight_decay"])

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (State("exp_avg", signed=True),)

    def _assumed_steps(self, group: Group) -> int | None:
        return 0  # steps of Lion do not depend on their number


class Lion8bit(Lion):
    """Lion with 8-bit state: about 1 byte a parameter in place of 4.

    Decay is decoupled, as in bitsandbytes' class of this name.
    """

    _bits = 8


class Lion4bit(Lion):
    """Lion with 4-bit state: about 0.6 bytes a parameter in place of 4.

    It is for those who cannot train otherwise: the update is less exact than with 8 bits. Of the
    two models of our study, one ended with a higher loss than with 32 bits, for every seed.
    :class:`Lion8bit` is the safer choice.
    """

    _bits = 4


class PagedLion(Lion):
    """Lion whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Lion`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedLion8bit(Lion8bit):
    """Lion8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Lion8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedLion4bit(Lion4bit):
    """Lion4bit whose 4-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Lion4bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True
