"""Muon for the matrices of hidden layers and AdamW for the rest, with state of 32 and 8 bits."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from torchao8.optim._state.spec import State
from torchao8.optim.adam import AdamW
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.contract import OptimizerContract
from torchao8.optim.muon import Muon, options_of_saved, warnings_of_rate
from torchao8.optim.options import LAYOUT_OPTIONS, CommonOptions, Group, check_betas, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MuonAdamW", "MuonAdamW8bit", "PagedMuonAdamW", "PagedMuonAdamW8bit"]

# Muon's eps. In a group of AdamW it has no effect, and is this number: any other is refused.
_EPS = 1e-7


class MuonAdamW(LowPrecisionOptimizer):
    """Muon for the matrices of hidden layers, AdamW for the rest of a model, with 32-bit state.

    Each group says by ``use_muon``, True or False, which rule it gets::

        groups = torchao8.param_groups(model, muon=True)
        optimizer = torchao8.MuonAdamW(groups, lr=1e-3, weight_decay=0.1)

    With use_muon=True, the rule is that of :class:`torchao8.Muon`, with G the gradient of a matrix
    and M its momentum buffer::

        M = momentum * M + (1 - momentum) * G
        D = M, or with nesterov momentum * M + (1 - momentum) * G
        O = (nearly) the orthogonal factor of D, in bfloat16
        p = p * (1 - lr * weight_decay) - lr * s * O

    With use_muon=False, it is that of :class:`torchao8.AdamW`. Both share lr and weight_decay: with
    ``adjust_lr_fn="match_rms_adamw"`` an update of Muon is about as large as one of AdamW.

    Source: `Muon: An optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, `Muon is Scalable for LLM Training
    <https://arxiv.org/abs/2502.16982>`_ and `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_.

    Args:
        params: dicts of groups, each with ``use_muon``. The dtype of parameters is float32,
            bfloat16 or float16.
        lr: learning rate of both rules.
        weight_decay: of both rules: a step multiplies the weights by 1 - lr * weight_decay, with lr
            as you give it.
        momentum: of Muon: how much of the buffer a step keeps, in [0, 1).
        nesterov: of Muon: Nesterov's momentum.
        ns_coefficients: of Muon: a, b and c of the Newton-Schulz iterations; or a sequence of such
            triples, one for each iteration.
        eps: of Muon: what a matrix is divided by at least, in place of its norm. A Python number.
            A group with use_muon=False that gives it gets it as adamw_eps; later, change adamw_eps.
        ns_steps: of Muon: how many iterations there are, from 1 to 99.
        adjust_lr_fn: of Muon: the factor s of the formula, for a matrix of r rows and c columns.
            "match_rms_adamw": 0.2 * sqrt(max(r, c)), with which updates are about as large as those
            of AdamW. "original", or None: sqrt(max(1, r / c)).
        betas: of AdamW: decay rates of its two averages, in [0, 1).
        adamw_eps: of AdamW: added to the root, which keeps the update finite.
        higher_dims: of Muon: what a parameter of three dimensions or more is. "refuse": an error.
            "batch": the last two dimensions are a matrix, those before them count the matrices, as
            in experts. "flatten": one matrix. The first dimension counts the rows, the
            others together the columns, as in a convolution.
        common: the options of every optimizer, by keyword: :class:`torchao8.optim.CommonOptions`.

    Raises:
        ValueError: a group without use_muon, an option out of range, or a parameter that cannot be
            optimized.
        NotImplementedError: ``differentiable=True``.
        TypeError: an unknown argument.
    """

    _own_options = (*LAYOUT_OPTIONS, "use_muon", "higher_dims")
    _kinds = ({"use_muon": True}, {"use_muon": False})
    _bad_gradients = (
        "A parameter of Muon with a gradient element that is not finite keeps its values and its "
        "state, up to rounding. Of AdamW's parameters, the element keeps its value and its state."
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float | Tensor = 0.1,
        momentum: float | Tensor = 0.95,
        nesterov: bool = True,
        ns_coefficients: Sequence[float] | Sequence[Sequence[float]] = (3.4445, -4.775, 2.0315),
        eps: float = _EPS,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = "match_rms_adamw",
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.95),
        adamw_eps: float | Tensor = 1e-8,
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
            "betas": betas,
            "adamw_eps": adamw_eps,
            "higher_dims": higher_dims,
        }
        super().__init__(params, self._options(own, common))

    def add_param_group(self, param_group: Group) -> None:
        if isinstance(param_group, dict):
            _rename_eps(param_group)  # in place: as in torch.optim, the dict becomes the group
        super().add_param_group(param_group)

    # -- options -------------------------------------------------------------------------------

    @classmethod
    def _normalized(cls, options: Group) -> Group:
        options = Muon._normalized(options)
        _rename_eps(options)
        return options

    @classmethod
    def _check_options(cls, group: Group) -> None:
        super()._check_options(group)  # with the name of this class
        Muon._check_options(group)
        check_betas(group["betas"], 2)
        check_number("adamw_eps", group["adamw_eps"])
        if group.get("amsgrad"):
            raise ValueError(
                f"amsgrad: expected False, got {group['amsgrad']!r}: the AdamW of MuonAdamW has no "
                "such state. Muon and AdamW are also two classes, for two optimizers"
            )
        # The defaults have no parameters and do not say it.
        if "params" in group and not isinstance(group.get("use_muon"), bool):
            got = repr(group["use_muon"]) if "use_muon" in group else "a group without it"
            raise ValueError(
                f"use_muon: expected True or False in each group, got {got}. "
                f"{cls.__name__}(torchao8.param_groups(model, muon=True)) says of each parameter "
                "whether Muon trains it: an embedding and a head are matrices, too, but AdamW's"
            )
        if "params" in group and not group["use_muon"] and group["eps"] != _EPS:
            raise ValueError(
                f"eps: expected {_EPS}, which has no effect in a group with use_muon=False, got "
                f"{group['eps']!r}. Its eps is adamw_eps={group['adamw_eps']!r}: change that one"
            )

    @classmethod
    def _why_refused(cls, group: Group, p: Tensor) -> str | None:
        why = cls._rule(group)._why_refused(group, p)
        if why is not None and p.dim() < 2 and group["use_muon"]:
            return (
                f"expected a matrix, as its group has use_muon=True, got the shape {list(p.shape)}."
                " AdamW trains the rest: use_muon=False, as in torchao8.param_groups(model, "
                "muon=True)"
            )
        return why

    # -- the rule of a group -------------------------------------------------------------------

    @classmethod
    def _rule(cls, group: Group) -> type[OptimizerContract]:
        return Muon if group["use_muon"] else AdamW

    @classmethod
    def _is_of_matrices(cls, group: Group) -> bool:
        return bool(group["use_muon"])

    @classmethod
    def _states(cls, group: Group) -> tuple[State, ...]:
        return cls._rule(group)._states(_as_its_rule_has_it(group))

    @classmethod
    def _op_flags(cls, group: Group) -> dict[str, bool]:
        return cls._rule(group)._op_flags(_as_its_rule_has_it(group))

    @classmethod
    def _op_numbers(cls, group: Group, device: torch.device) -> Tensor:
        return cls._rule(group)._op_numbers(_as_its_rule_has_it(group), device)

    # -- checkpoints ---------------------------------------------------------------------------

    def _assumed_steps(self, group: Group) -> int | None:
        return 1 if group["use_muon"] else None

    def _check_source(self, saved: Group) -> None:
        if "use_muon" not in saved:
            raise ValueError(
                f"{type(self).__name__}: expected groups that say use_muon, got a checkpoint that "
                "does not tell which of its states are Muon's. Those of torch.optim.Muon and of "
                "torch.optim.AdamW are loaded by Muon and by AdamW"
            )

    def _saved_options(self, saved: Group) -> Group:
        return options_of_saved(saved)

    def _warnings_of_load(
        self, groups: Sequence[Group], saved: Sequence[Group], writers: Collection[str]
    ) -> list[str]:
        return warnings_of_rate(self.param_groups, saved)


def _rename_eps(options: Group) -> None:
    """In a group of AdamW the name that other libraries, and their checkpoints, have for its eps
    becomes ours, in place."""
    if options.get("use_muon") is False:
        if "eps" in options and "adamw_eps" not in options:
            options["adamw_eps"] = options.pop("eps")
        options.setdefault("eps", _EPS)


def _as_its_rule_has_it(group: Group) -> Group:
    """The options of a group under the names that its rule has for them."""
    if group["use_muon"]:
        return group
    fixed = {"amsgrad": False, "decoupled_weight_decay": True}
    return {**group, **fixed, "eps": group["adamw_eps"]}


class MuonAdamW8bit(MuonAdamW):
    """Muon and AdamW with 8-bit state: about 1 byte a parameter of Muon in place of 4.

    What AdamW trains takes about 2 bytes a parameter in place of 8.
    """

    _bits = 8


class PagedMuonAdamW(MuonAdamW):
    """MuonAdamW whose 32-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`MuonAdamW`. The state lies in memory that the system
    may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the CPU.
    Only the default of ``is_paged`` differs.
    """

    _paged = True


class PagedMuonAdamW8bit(MuonAdamW8bit):
    """MuonAdamW8bit whose 8-bit state may leave the GPU, or RAM, when memory is short.

    The step and its bits are those of :class:`MuonAdamW8bit`. The state lies in memory that the
    system may move out, and comes back for each step: CUDA's managed memory on a GPU, a file on the
    CPU. Only the default of ``is_paged`` differs.
    """

    _paged = True
