"""Adam and AdamW, with 32-bit and with 8-bit state."""

from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import Group, check_betas, check_flag, check_number


class _Adam(LowPrecisionOptimizer):
    """What the four classes below share: they differ in their defaults and in the kind of decay."""

    # The kind of decay is what the class is for; a checkpoint does not change it.
    _own_options = (*LowPrecisionOptimizer._own_options, "decoupled_weight_decay")
    _op = "adam_step_"
    _op_states = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def _check_options(self, group: Group) -> None:
        super()._check_options(group)
        check_betas(group["betas"], 2)
        check_number("eps", group["eps"])
        check_number("weight_decay", group["weight_decay"])
        for name in ("amsgrad", "decoupled_weight_decay"):
            check_flag(name, group[name])

    def _states(self, group: Group) -> tuple[State, ...]:
        states = (State("exp_avg", signed=True), State("exp_avg_sq", signed=False))
        return (*states, State("max_exp_avg_sq", signed=False)) if group["amsgrad"] else states

    def _op_flags(self, group: Group) -> dict[str, bool]:
        decoupled = group["decoupled_weight_decay"]
        return {"decoupled_weight_decay": decoupled, "maximize": group["maximize"]}


def _options(arguments: dict[str, Any], *, decoupled_weight_decay: bool) -> Group:
    """A constructor's local variables as the options of a group: all arguments but ``params``."""
    options = {k: v for k, v in arguments.items() if k not in ("self", "params", "__class__")}
    return {**options, "decoupled_weight_decay": decoupled_weight_decay}


class Adam(_Adam):
    """Adam with 32-bit state, as ``torch.optim.Adam``: weight decay is added to the gradient (L2).

    With m and v the moving averages of the gradient g and of its square, at step t::

        m = beta1 * m + (1 - beta1) * g            v = beta2 * v + (1 - beta2) * g^2
        p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    `Adam: A Method for Stochastic Optimization <https://arxiv.org/abs/1412.6980>`_. amsgrad takes
    the largest v so far: `On the Convergence of Adam and Beyond
    <https://openreview.net/forum?id=ryQu7f-RZ>`_.

    Moments are float32 whatever the dtype of the parameter. An element whose gradient is not finite
    keeps its value and its moments.

    Every argument but ``params`` is an option of the parameter groups and may be set for each of
    them: ``[{"params": embedding, "optim_bits": 32}, {"params": others}]``.

    Args:
        params: parameters, (name, parameter) pairs or dicts of groups; float32, bfloat16 or
            float16.
        lr: learning rate. This and each other number may be a tensor of one element, which may
            change from step to step under ``torch.compile`` without a recompilation.
        betas: the decay rates of the two averages, in [0, 1).
        eps: added to the root.
        weight_decay: the factor of the decay.
        amsgrad: divide by the largest second moment so far.
        maximize: ascend.
        foreach, capturable: hints for torch.optim, accepted and without effect: the step is always
            multi-tensor and capturable.
        fused: the step is always fused; True also lets ``torch.amp.GradScaler`` leave unscaling and
            the skipping of a step to the op.
        differentiable: must be False.
        optim_bits: 8 or 32, the bits of a state value.
        min_8bit_size: a parameter with fewer elements keeps 32-bit state, and so do scalars. Of
            DTensors so do vectors, and what has fewer than 16 elements in ``shape[1:]`` (a matrix
            of LoRA of rank 8): no block fits all the ways to shard them.
        block_size: elements that share a scale in 8 bits, a power of two from 64 to 2048.
        state_rounding: how second moments are rounded to 8 bits, "stochastic" or "nearest". First
            moments are always rounded to nearest.
        stochastic_rounding: write bfloat16 parameters back with stochastic rounding, in place of
            nearest, which loses updates of less than half a unit of a parameter's last place.
            float32 parameters need none and take none; float16 ones are refused.
        seed: of the stochastic rounding. The same seed, step and gradients give the same bits. The
            draws of a parameter are independent of each other; parameters of one seed share those
            of equal indices at equal steps.
        percentile_clipping: p scales a gradient down whose norm is larger than the p-th of its
            parameter's last 100, in ascending order, to that norm; 100 is off. As in bitsandbytes
            up to 0.45, but for the norm of the whole parameter where it is sharded, and for zeros
            before any other norm, which do not count. To be decided before the first step.
        block_wise: False gives each 8-bit state of a parameter one scale in place of one a block,
            as bitsandbytes up to 0.45 could: coarser, and a step reads everything twice.
            ``block_size`` then only says which parameters keep 8 bits and how they are rounded.
        is_paged, page_dir: where state lies, see :class:`torchao8.optim.CommonOptions`.
        decoupled_weight_decay: decay as :class:`AdamW` does.

    Raises:
        ValueError: an option out of range, or parameters that cannot be optimized.
        NotImplementedError: an option of a later version.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        state_rounding: str = "stochastic",
        stochastic_rounding: bool = False,
        seed: int = 0,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        page_dir: str = "",
        decoupled_weight_decay: bool = False,
    ) -> None:
        options = _options(locals(), decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, options)


class AdamW(_Adam):
    """:class:`Adam` with decoupled weight decay, as ``torch.optim.AdamW``.

    Before the update, p = p * (1 - lr * weight_decay).

    `Decoupled Weight Decay Regularization <https://arxiv.org/abs/1711.05101>`_. Arguments and
    errors are those of :class:`Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        optim_bits: int = 32,
        min_8bit_size: int = 4096,
        block_size: int = 256,
        state_rounding: str = "stochastic",
        stochastic_rounding: bool = False,
        seed: int = 0,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        page_dir: str = "",
    ) -> None:
        super().__init__(params, _options(locals(), decoupled_weight_decay=True))


class Adam8bit(_Adam):
    """:class:`Adam` with 8-bit state: about 2 bytes a parameter in place of 8.

    Weight decay is L2, as in ``torch.optim.Adam``; the class of this name in bitsandbytes decays
    decoupled, as :class:`AdamW8bit` does. `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_. Arguments and errors are those of :class:`Adam`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 0,
        amsgrad: bool = False,
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        *,
        page_dir: str = "",
        block_size: int = 256,
        state_rounding: str = "stochastic",
        stochastic_rounding: bool = False,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, _options(locals(), decoupled_weight_decay=False))


class AdamW8bit(_Adam):
    """:class:`AdamW` with 8-bit state: about 2 bytes a parameter in place of 8.

    Arguments and errors are those of :class:`Adam8bit`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float | Tensor = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        optim_bits: int = 8,
        min_8bit_size: int = 4096,
        percentile_clipping: int = 100,
        block_wise: bool = True,
        is_paged: bool | None = None,
        *,
        page_dir: str = "",
        block_size: int = 256,
        state_rounding: str = "stochastic",
        stochastic_rounding: bool = False,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        super().__init__(params, _options(locals(), decoupled_weight_decay=True))


class PagedAdam(Adam):
    """:class:`Adam` with paged state: the default of ``is_paged`` is True."""

    _paged = True


class PagedAdam8bit(Adam8bit):
    """:class:`Adam8bit` with paged state: the default of ``is_paged`` is True."""

    _paged = True


class PagedAdamW(AdamW):
    """:class:`AdamW` with paged state: the default of ``is_paged`` is True."""

    _paged = True


class PagedAdamW8bit(AdamW8bit):
    """:class:`AdamW8bit` with paged state: the default of ``is_paged`` is True."""

    _paged = True
