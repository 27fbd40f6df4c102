"""Lion, with 32-bit and with 8-bit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import CommonOptions, Group, check_betas, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Lion", "Lion8bit", "PagedLion", "PagedLion8bit"]


class Lion(LowPrecisionOptimizer):
    """Lion with 32-bit state.

    With m the moving average of the gradient g::

        c = beta1 * m + (1 - beta1) * g            m = beta2 * m + (1 - beta2) * g
        p = p * (1 - lr * weight_decay) - lr * sign(c)

    where the sign of zero is zero. `Symbolic Discovery of Optimization Algorithms
    <https://arxiv.org/abs/2302.06675>`_, algorithm 2, with its decoupled decay. Every element moves
    by lr, so that it is to be 3 to 10 times smaller than for Adam, and weight_decay as much larger.

    Args:
        params: parameters, (name, parameter) pairs or dicts of groups; float32, bfloat16 or
            float16.
        lr: learning rate, a number or a tensor of one element.
        betas: of the interpolation and of the average, in [0, 1).
        weight_decay: the factor of the decay.
        common: see :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or parameters that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "lion_step_"

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
    """:class:`Lion` with 8-bit state: about one byte a parameter in place of four."""

    _bits = 8


class PagedLion(Lion):
    """:class:`Lion` with paged state: the default of ``is_paged`` is True."""

    _paged = True


class PagedLion8bit(Lion8bit):
    """:class:`Lion8bit` with paged state: the default of ``is_paged`` is True."""

    _paged = True
