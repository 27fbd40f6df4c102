"""LARS, with 32-bit and with 8-bit state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8._numbers import one_number
from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import (
    MOMENTUM,
    CommonOptions,
    Group,
    check_flag,
    check_momentum,
    check_nesterov,
    check_number,
    check_sum_of_gradients,
    has_momentum,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["LARS", "LARS8bit", "PagedLARS", "PagedLARS8bit"]


class LARS(LowPrecisionOptimizer):
    """LARS with momentum in 32 bits: SGD whose learning rate follows the norm of each parameter.

    With g the gradient and b the momentum buffer, which starts at 0::

        ratio = trust_coefficient * |p| / (|g| + weight_decay * |p|)
        u = lr * ratio * (g + weight_decay * p)
        b = momentum * b + (1 - dampening) * u    (at the first step: b = u)
        p = p - b
        p = p - (u + momentum * b)                (nesterov, in place of the line above)

    Without momentum, b = u, and there is no state but the number of steps. ``|p|`` and ``|g|`` are
    2-norms over the whole parameter, also where it is sharded. They leave out elements that are not
    finite. Where p or the denominator is 0, the ratio is 1. It is at most 2^100. For the norms, a
    step reads parameters and gradients once more.

    A step moves a parameter by about lr * trust_coefficient of its norm. So lr should be far above
    that of SGD.

    The class of this name in bitsandbytes is another one: it has no ratio, and bounds the norm of
    the update by ``max_unorm`` times that of the parameter.

    Source: `Large Batch Training of Convolutional Networks <https://arxiv.org/abs/1708.03888>`_,
    algorithm 1.

    Args:
        params: parameters, (name, parameter) pairs, or dicts of groups. Their dtype is float32,
            bfloat16 or float16.
        lr: learning rate.
        momentum: factor of the buffer. While it is 0 the buffer stays as it is. (8-bit state that
            came from bitsandbytes is then rounded once more.)
        dampening: reduces what the gradient adds to the buffer.
        weight_decay: factor of the decay (L2).
        nesterov: Nesterov's momentum. Needs momentum > 0 and dampening = 0.
        trust_coefficient: factor of the ratio.
        adaptive: whether the ratio is used. False is SGD with the learning rate inside of the
            buffer, as biases and norms are commonly trained.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "sgd_step_"
    _resting = MOMENTUM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float | Tensor = 0,
        dampening: float | Tensor = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        trust_coefficient: float | Tensor = 0.001,
        adaptive: bool = True,
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "trust_coefficient": trust_coefficient,
            "adaptive": adaptive,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_momentum(group)
        check_number("weight_decay", group["weight_decay"])
        check_number("trust_coefficient", group["trust_coefficient"])
        check_flag("adaptive", group["adaptive"])

    @classmethod
    def _check_new_group(cls, group: Group) -> None:
        check_nesterov(group)

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (State("momentum_buffer", signed=True),) if has_momentum(group) else ()

    def _check_source(self, saved: Group) -> None:
        check_sum_of_gradients(type(self).__name__, saved)
        if "trust_coefficient" not in saved:
            raise ValueError(
                f"{type(self).__name__}: expected a momentum_buffer of gradients times the "
                "learning rates and trust ratios of their steps, got a checkpoint that has no "
                "trust_coefficient: the buffers of SGD, of torch.optim and of the LARS of "
                "bitsandbytes hold gradients alone. SGD takes them; or take the state out of the "
                "state dict, and the buffer starts anew"
            )

    def _assumed_steps(self, group: Group) -> int | None:
        return 1  # after the first one, which sets the buffer, their number does not matter

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        flags = {name: group[name] for name in ("nesterov", "maximize")}
        return {**flags, "rate_in_buffer": True}

    def _has_trust_ratios(self, group: Group) -> bool:
        return bool(group["adaptive"])

    def _trust_ratios(self, group: Group, param_norms: Tensor, norms: Tensor) -> Tensor:
        numbers = map(one_number, (group["trust_coefficient"], group["weight_decay"]))
        ratios: Tensor = torch.ops.torchao8.lars_trust_ratios(
            param_norms,
            norms,
            *(n.to(norms.dtype) if n.is_cpu else n.to(norms.device) for n in numbers),
        )
        return ratios


class LARS8bit(LARS):
    """LARS with 8-bit state: about 1 byte a parameter in place of 4, with momentum.

    SGD whose learning rate follows the norm of each parameter.
    """

    _bits = 8


class PagedLARS(LARS):
    """LARS whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`LARS`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedLARS8bit(LARS8bit):
    """LARS8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`LARS8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


def lars_trust_ratios(
    param_norms: Tensor, grad_norms: Tensor, trust_coefficient: Tensor, weight_decay: Tensor
) -> Tensor:
    """An op, so that no compiler contracts the product and the sum."""
    below = grad_norms + weight_decay * param_norms
    ratios = trust_coefficient * param_norms / below
    return torch.where((param_norms > 0) & (below > 0), ratios, 1.0)


torch.library.impl("torchao8::lars_trust_ratios", "CompositeExplicitAutograd", lars_trust_ratios)


@torch.library.register_fake("torchao8::lars_trust_ratios")
def _(
    param_norms: Tensor, grad_norms: Tensor, trust_coefficient: Tensor, weight_decay: Tensor
) -> Tensor:
    return torch.empty_like(grad_norms)
