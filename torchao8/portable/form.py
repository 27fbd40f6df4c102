"""What the code of a step is chosen by and works on, and what it asks a format of state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8._families import FamilyState
from torchao8.portable.rules import Numbers, Old


class FormState(NamedTuple):
    """A state of a form.

    Attributes:
        still: whether a step moves it by less than a code, which is why a rule has it rounded
            stochastically if the caller wants to.
        stochastic: whether the step rounds it so. The format decides this, and the caller.
    """

    name: str
    signed: bool
    still: bool
    stochastic: bool


class Form(NamedTuple):
    """What pieces that are stepped by the same code have in common.

    Attributes:
        rule: of RULES.
        states: those that there are.
        numbers: the names of the rule's numbers.
        format: of torchao8.portable.formats; none where states are float32.
    """

    rule: str
    states: tuple[FormState, ...]
    numbers: tuple[str, ...]
    format: str | None


class Tensors(NamedTuple):
    """A piece with the numbers of its step, as the code of a form takes it.

    Attributes:
        numbers: those that the form names.
        tables: of each state with codes, what its format looks up.
        draws: of each state that is rounded stochastically, what its random numbers are made of.
        hashes: of the parameter, where it is.
        extremes: of each state, where a whole tensor shares a scale.
        skip: whether nothing is to change, where there is a found_inf.
    """

    param: Tensor
    grad: Tensor
    values: list[Tensor]
    scales: list[Tensor]
    numbers: Tensor
    tables: list[Any]
    draws: Sequence[tuple[Tensor, ...]] = ()
    hashes: Tensor | None = None
    extremes: Sequence[Tensor] = ()
    skip: Tensor | None = None


class Made(NamedTuple):
    """What a step would make of a piece: how far it moves parameters down, and the new states in
    their units; where an element is usable; and the states that were stored."""

    step: Tensor
    new: list[Tensor]
    good: Tensor
    old: list[Old]


# What is to be written, and where.
Changes = list[tuple[Tensor, Tensor]]


def declared(rule: str, state: FamilyState) -> bool:
    return state.stochastic


class Format(NamedTuple):
    """A format of state with scales, each part with a block in the last dimension.

    Attributes:
        tables: (signed, device): what its codec looks up.
        decode: the states that are stored.
        draws: (key, first elements of blocks): what the random numbers of a state are made of.
        encode: of each state, its new codes and, unless a whole tensor shares a scale, the scales.
        scale_of: (extreme element, unit, state): the scale of a tensor that has one.
        quantize: (numbers, signed, tables): codes to nearest, and scales.
        values: (codes, signed, tables): at scale 1.
        stochastic: (rule, state): whether it is rounded stochastically if the caller wants to; as
            its family says where the format does not say more.
        most_kept: what a number that a step leaves counts as at most, in units: the largest that
            can be in a state, where codes may lie above what they were rounded from.
    """

    tables: Callable[[bool, torch.device], Any]
    decode: Callable[[Form, Tensors], list[Old]]
    draws: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    encode: Callable[[Form, Tensors, Numbers, Made], list[Changes]]
    scale_of: Callable[[Tensor, Tensor, FormState], Tensor]
    quantize: Callable[[Tensor, bool, Any], tuple[Tensor, Tensor]]
    values: Callable[[Tensor, bool, Any], Tensor]
    stochastic: Callable[[str, FamilyState], bool] = declared
    most_kept: float = math.inf
