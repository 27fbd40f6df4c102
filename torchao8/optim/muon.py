"""Muon, with state of 32 and 8 bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8 import matrix_shape, sharding
from torchao8._messages import describe
from torchao8.optim._state.layout import gets_state
from torchao8.optim._state.spec import State
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.options import (
    LAYOUT_OPTIONS,
    CommonOptions,
    Group,
    check_flag,
    check_number,
    is_int,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Muon", "Muon8bit", "PagedMuon", "PagedMuon8bit"]

# What torch.optim.Muon calls the ways to adjust the learning rate to the shape of a matrix.
ADJUST_LR = ("original", "match_rms_adamw")
_MOST_STEPS = 99
# The largest number of float32, in which the products are computed.
_LARGEST = torch.finfo(torch.float32).max


class Muon(LowPrecisionOptimizer):
    """Muon with 32-bit state, as ``torch.optim.Muon``: steps along orthogonal matrices.

    For the matrices of hidden layers. With G the gradient of a matrix and M its momentum buffer::

        M = momentum * M + (1 - momentum) * G
        D = M, or with nesterov momentum * M + (1 - momentum) * G
        O = (nearly) the orthogonal factor of D, in bfloat16
        p = p * (1 - lr * weight_decay) - lr * s * O

    D is divided by its norm (at least eps) and replaced by ``a X + b (X X') X + c (X X')^2 X``, so
    often as ns_steps says, which moves its singular values towards 1.

    Vectors, embeddings and the output layer belong to another optimizer.

    The bits of O depend on PyTorch's matrix products: on the machine, the number of threads and the
    version of PyTorch. All else of a step has the same bits everywhere.

    Source: `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_; for "match_rms_adamw" `Muon is Scalable for LLM
    Training <https://arxiv.org/abs/2502.16982>`_.

    Args:
        params: matrices, (name, matrix) pairs, or dicts of groups. Their dtype is float32, bfloat16
            or float16.
        lr: learning rate.
        weight_decay: a step multiplies the weights by 1 - lr * weight_decay, with lr as you give
            it.
        momentum: how much of the buffer a step keeps, in [0, 1).
        nesterov: Nesterov's momentum.
        ns_coefficients: a, b and c of the Newton-Schulz iterations; or a sequence of such triples,
            one for each iteration, as of `Polar Express <https://arxiv.org/abs/2505.16932>`_.
        eps: what a matrix is divided by at least, in place of its norm. A Python number.
        ns_steps: how many iterations there are, from 1 to 99.
        adjust_lr_fn: the factor s of the formula, for a matrix of r rows and c columns.
            "original", or None: sqrt(max(1, r / c)). "match_rms_adamw": 0.2 * sqrt(max(r, c)), with
            which updates are about as large as those of AdamW, so that its learning rate fits.
        higher_dims: what a parameter of three dimensions or more is. "refuse": an error. "batch":
            the last two dimensions are a matrix, those before them count the matrices, as in
            experts. "flatten": one matrix. The first dimension counts the rows, the others together
            the columns, as in a convolution.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: an option out of range, or a parameter that cannot be optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _op = "muon_step_"
    _own_options = (*LAYOUT_OPTIONS, "higher_dims")
    _torch_class = torch.optim.Muon
    _bad_gradients = (
        "A parameter with a gradient element that is not finite keeps its values and its state, up "
        "to rounding. Its step is counted, and the other parameters are updated."
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float | Tensor = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        higher_dims: str = "refuse",
        **common: Unpack[CommonOptions],
    ) -> None:
        own = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
            "higher_dims": higher_dims,
        }
        super().__init__(params, self._options(own, common))

    @classmethod
    def _normalized(cls, options: Group) -> Group:
        options = super()._normalized(options)
        if options.get("adjust_lr_fn", "") is None:
            options["adjust_lr_fn"] = ADJUST_LR[0]
        return options

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)
        check_number("weight_decay", group["weight_decay"])
        check_number("momentum", group["momentum"], below=1)
        check_flag("nesterov", group["nesterov"])
        _check_iterations(group)
        if group["adjust_lr_fn"] not in (*ADJUST_LR, None):
            expected = ", ".join(map(repr, ADJUST_LR))
            raise ValueError(
                f"adjust_lr_fn: expected {expected} or None, got {group['adjust_lr_fn']!r}"
            )
        if group["higher_dims"] not in matrix_shape.HIGHER_DIMS:
            expected = ", ".join(map(repr, matrix_shape.HIGHER_DIMS))
            raise ValueError(
                f"higher_dims: expected one of {expected}, got {group['higher_dims']!r}"
            )

    @classmethod
    def _why_refused(cls, group: Group, p: Tensor) -> str | None:
        if sharding.is_flattened(p):
            return (
                "it was flattened by FSDP1, which does not tell where the shards of a matrix are; "
                "Muon needs all of it. Shard with fully_shard (FSDP2)"
            )
        try:
            matrix_shape.of(tuple(p.shape), group["higher_dims"])
        except ValueError as error:
            if p.dim() >= 2:
                return str(error)
            other = cls.__name__.replace("Muon", "MuonAdamW")
            return (
                f"{error}. Muon orthogonalizes matrices, AdamW trains the rest: "
                f"{other}(torchao8.param_groups(model, muon=True))"
            )
        return None

    @classmethod
    def _is_of_matrices(cls, group: Group) -> bool:
        return True

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return (State("momentum_buffer", signed=True),)

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        return {"nesterov": group["nesterov"], "maximize": group["maximize"]}

    @classmethod
    def _op_numbers(cls, group: Group, device: torch.device) -> Tensor:
        return super()._op_numbers({**group, "rate_scale": 1.0}, device)

    def _assumed_steps(self, group: Group) -> int | None:
        return 1  # steps of Muon do not depend on their number

    def _check_source(self, saved: Group) -> None:
        if "ns_steps" not in saved and "use_muon" not in saved:
            raise ValueError(
                f"{type(self).__name__}: expected a momentum_buffer that is an average of "
                "gradients, got a checkpoint that has neither ns_steps nor use_muon: the buffers "
                "of SGD and LARS are sums. SGD and LARS take them"
            )

    def _saved_options(self, saved: Group) -> Group:
        return options_of_saved(saved)

    def _warnings_of_load(
        self, groups: Sequence[Group], saved: Sequence[Group], writers: Collection[str]
    ) -> list[str]:
        return warnings_of_rate(self.param_groups, saved)

    def _check_for_torch(self, group: Group) -> None:
        if group["maximize"]:
            raise ValueError(
                "to_torch: expected maximize=False, got True: torch.optim.Muon always steps "
                "against the gradient"
            )
        if not _is_triple(group["ns_coefficients"]):
            raise ValueError(
                "to_torch: expected ns_coefficients to be one triple (a, b, c), got a sequence of "
                f"length {len(group['ns_coefficients'])}: torch.optim.Muon takes one triple for "
                "all iterations"
            )
        for p in group["params"]:
            if gets_state(p) and p.dim() != 2:
                raise ValueError(
                    f"to_torch: {describe(self, p)}: expected a matrix, got the shape "
                    f"{list(p.shape)}: torch.optim.Muon takes no more dimensions"
                )

    def _of_torch(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in state.items() if name != "step"}


def options_of_saved(saved: Group) -> Group:
    """The options of a saved group. One of Keller Jordan's classes has no ``adjust_lr_fn``: its
    learning rate fits the factor that these classes always take, which is "original"."""
    return {"adjust_lr_fn": ADJUST_LR[0], **saved} if _has_no_adjust(saved) else saved


def warnings_of_rate(live: Sequence[Group], saved: Sequence[Group]) -> list[str]:
    """What to tell where :func:`options_of_saved` changes how the learning rate is adjusted.

    Args:
        live: the groups before the load.
    """
    for ours, theirs in zip(live, saved, strict=True):
        if _has_no_adjust(theirs) and ours["adjust_lr_fn"] != ADJUST_LR[0]:
            return [
                "the checkpoint does not say adjust_lr_fn, as those of MuonWithAuxAdam; here it "
                f"was {ours['adjust_lr_fn']!r}, and is {ADJUST_LR[0]!r} from here on, for which "
                f"the learning rate of the checkpoint, {theirs.get('lr')}, was chosen"
            ]
    return []


def _has_no_adjust(saved: Group) -> bool:
    return saved.get("use_muon") is True and "adjust_lr_fn" not in saved


def _check_iterations(group: Group) -> None:
    """Raises ValueError unless the options of the Newton-Schulz iterations fit one another."""
    eps, steps = group["eps"], group["ns_steps"]
    if isinstance(eps, Tensor):
        raise ValueError("eps: expected a Python number, got a tensor")
    check_number("eps", eps)
    if eps > _LARGEST:
        raise ValueError(f"eps: expected a number that float32 can hold, got {eps!r}")
    if not is_int(steps) or not 1 <= steps <= _MOST_STEPS:
        raise ValueError(f"ns_steps: expected an int from 1 to {_MOST_STEPS}, got {steps!r}")
    value = group["ns_coefficients"]
    if _is_triple(value):
        return
    if not isinstance(value, (tuple, list)) or not value or not all(map(_is_triple, value)):
        raise ValueError(
            "ns_coefficients: expected three Python numbers that float32 can hold, or a sequence "
            f"of such triples, one for each iteration, got {value!r}"
        )
    if len(value) != steps:
        triples = "1 triple" if len(value) == 1 else f"{len(value)} triples"
        raise ValueError(
            f"ns_steps: expected {len(value)}, as ns_coefficients has {triples}, got {steps}"
        )


def _is_triple(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 3
        and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)
        and all(-_LARGEST <= v <= _LARGEST for v in value)  # of any size, and false for NaN
    )


class Muon8bit(Muon):
    """Muon with 8-bit state: about 1 byte a parameter in place of 4.

    Takes the place of ``torch.optim.Muon``.
    """

    _bits = 8


class PagedMuon(Muon):
    """Muon whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Muon`. The state lies in memory that the system may
    move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU. Only
    the default of ``is_paged`` differs.
    """

    _paged = True


class PagedMuon8bit(Muon8bit):
    """Muon8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`Muon8bit`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True
