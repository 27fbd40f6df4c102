"""AdEMAMix, with 32-bit and with 8-bit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import (
    CommonOptions,
    Group,
    check_betas,
    check_number,
    is_int,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdEMAMix", "AdEMAMix8bit", "PagedAdEMAMix", "PagedAdEMAMix8bit"]


class AdEMAMix(LowPrecisionOptimizer):
    """AdEMAMix with 32-bit state: Adam with a second, slow average of the gradients.

    With m the fast and s the slow average of the gradient g, and v that of its square, at step t::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        s = beta3(t) * s + (1 - beta3(t)) * g
        u = (m / (1 - beta1^t) + alpha(t) * s) / (sqrt(v / (1 - beta2^t)) + eps)
        p = p * (1 - lr * weight_decay) - lr * u

    alpha(t) grows linearly to alpha in t_alpha steps. beta3(t) goes from beta1 to beta3 in t_beta3
    steps, so that its half-life grows linearly. In 8 bits the slow average is rounded
    stochastically, as v is: rounding to nearest would lose its small changes.

    Source: `The AdEMAMix Optimizer: Better, Faster, Older <https://arxiv.org/abs/2409.03137>`_,
    algorithm 1.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        betas: decay rates beta1, beta2 and beta3, in [0, 1).
        alpha: weight of the slow average.
        t_alpha, t_beta3: steps of the two warm-ups, 0 or None for none. Python ints.
        eps: added to the root, which keeps the update finite.
        weight_decay: factor of the decay.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "ademamix_step_"

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor, float | Tensor] = (0.9, 0.999, 0.9999),
        alpha: float | Tensor = 5.0,
        t_alpha: int | None = 0,
        t_beta3: int | None = 0,
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": 0 if t_alpha is None else t_alpha,  # checkpoint tools take no None
            "t_beta3": 0 if t_beta3 is None else t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_betas(group["betas"], 3)
        for name in ("alpha", "eps", "weight_decay"):
            check_number(name, group[name])
        for name in ("t_alpha", "t_beta3"):
            if not is_int(group[name]) or group[name] < 0:
                raise ValueError(f"{name}: expected an int >= 0, got {group[name]!r}")

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (
            State("exp_avg_fast", signed=True),
            State("exp_avg_slow", signed=True),
            State("exp_avg_sq", signed=False),
        )


class AdEMAMix8bit(AdEMAMix):
    """AdEMAMix with 8-bit state: about 3 bytes a parameter in place of 12.

    Adam with a second, slow average of the gradients.
    """

    _bits = 8


class PagedAdEMAMix(AdEMAMix):
    """AdEMAMix whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`AdEMAMix`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedAdEMAMix8bit(AdEMAMix8bit):
    """AdEMAMix8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`AdEMAMix8bit`. The state lies in memory that the
    system may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the
    CPU. Only the default of ``is_paged`` differs.
    """

    _paged = True
