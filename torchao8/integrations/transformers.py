"""The optimizer of transformers' ``Trainer``, made from its ``TrainingArguments``.

>>> from torchao8.integrations.transformers import trainer_optimizer
>>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(args), ...)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from torchao8.groups import Options, param_groups
from torchao8.optim.adam import AdamW8bit
from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.optim.muon_adamw import MuonAdamW

try:
    from transformers import Trainer
except ImportError as error:
    raise ImportError(
        "torchao8.integrations.transformers needs transformers and accelerate: "
        "pip install 'transformers[torch]'"
    ) from error

if TYPE_CHECKING:
    from transformers import TrainingArguments

__all__ = ["create_optimizer", "trainer_optimizer"]


def trainer_optimizer(
    args: TrainingArguments,
    cls: type[LowPrecisionOptimizer] = AdamW8bit,
    *,
    embeddings_in_32bit: bool = True,
    patterns: Mapping[str, Options] | None = None,
    **options: Any,
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The argument ``optimizer_cls_and_kwargs`` of a ``Trainer`` of transformers 5 or newer.

    The Trainer makes the optimizer when it starts to train, see :func:`create_optimizer`, which
    has the same arguments.

    >>> trainer = Trainer(model, args, optimizer_cls_and_kwargs=trainer_optimizer(args), ...)
    """
    settings = {"embeddings_in_32bit": embeddings_in_32bit, "patterns": patterns}
    return _factory, {"args": args, "cls": cls, **settings, **options}


def create_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    cls: type[LowPrecisionOptimizer] = AdamW8bit,
    *,
    embeddings_in_32bit: bool = True,
    patterns: Mapping[str, Options] | None = None,
    **options: Any,
) -> LowPrecisionOptimizer:
    """An optimizer with the learning rate and the other numbers of ``TrainingArguments``.

    >>> trainer = Trainer(model, args, optimizers=(create_optimizer(model, args), None), ...)

    ``learning_rate`` and ``weight_decay`` of the arguments are used for every class; ``adam_beta1``
    and ``adam_beta2`` for those with ``betas``, and ``adam_epsilon`` for those of them with
    ``eps``. Of :class:`torchao8.MuonAdamW` it is ``adamw_eps``, and Muon trains what
    ``param_groups(model, muon=True)`` says. ``optim`` and ``optim_args`` are not read. The
    parameters without weight decay are those that the Trainer itself chooses: biases and norms.

    Args:
        model: whose parameters are trained; frozen ones are left out.
        args: the ``TrainingArguments``.
        cls: any class of this library.
        embeddings_in_32bit: True keeps the state of ``nn.Embedding`` weights in 32 bits, as the
            Trainer's own ``adamw_bnb_8bit`` does.
        patterns: options for the parameters whose names match, see :func:`torchao8.param_groups`.
        options: further options of the optimizer. They hold before those of ``args``.

    Raises:
        TypeError: a class that is none of this library, or an option that it does not have.
        ValueError: an option out of range, or a pattern that matches no parameter.
    """
    if not (isinstance(cls, type) and issubclass(cls, LowPrecisionOptimizer)):
        raise TypeError(f"cls: expected a class of torchao8, as torchao8.AdamW8bit, got {cls!r}")
    decayed = Trainer.get_decay_parameter_names(cast(Any, None), model)  # it reads only the model
    groups = _split_by_decay(
        param_groups(
            model,
            decay_vectors=True,
            embeddings_in_32bit=embeddings_in_32bit,
            muon=issubclass(cls, MuonAdamW),
            patterns=patterns,
        ),
        decayed,
    )
    make = cast(Callable[..., LowPrecisionOptimizer], cls)
    return make(groups, **{**_numbers_of(args, cls), **options})


def _factory(*args: Any, **options: Any) -> Callable[..., LowPrecisionOptimizer]:
    """What the Trainer calls first, without arguments; it calls the result with the model."""
    if args or options:
        raise TypeError(
            "trainer_optimizer: expected transformers 5 or newer, which gives the model to what "
            "makes its optimizer; this Trainer gave groups of parameters. Pass "
            "optimizers=(create_optimizer(model, args), None) to the Trainer instead."
        )
    return create_optimizer


def _split_by_decay(groups: list[dict[str, Any]], decayed: Collection[str]) -> list[dict[str, Any]]:
    """The same groups, those whose weight decay is open cut in two: one of them has none."""
    names, split = set(decayed), []
    for group in groups:
        if "weight_decay" in group:  # a pattern decided
            split.append(group)
            continue
        with_decay = [pair for pair in group["params"] if pair[0] in names]
        without = [pair for pair in group["params"] if pair[0] not in names]
        if with_decay:
            split.append({**group, "params": with_decay})
        if without:
            split.append({**group, "params": without, "weight_decay": 0.0})
    return split


def _numbers_of(args: TrainingArguments, cls: type[LowPrecisionOptimizer]) -> dict[str, Any]:
    """The numbers of the arguments that the class has."""
    numbers: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    defaults = inspect.signature(cls).parameters
    if "betas" in defaults:
        numbers["betas"] = (args.adam_beta1, args.adam_beta2, *defaults["betas"].default[2:])
        eps = "adamw_eps" if "adamw_eps" in defaults else "eps"
        if eps in defaults:
            numbers[eps] = args.adam_epsilon
    return numbers
