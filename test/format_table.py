"""Every format of quantized state beside the dynamic one, with what tests must know of it.

The oracles are those of format_reference.py. Tests of the promises run over pairs of an optimizer
and a format; those of the dynamic format are in the files of their subjects.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import format_reference as formats
import pytest
import reference
import torch
from optim_table import FEW, OF_4_BITS, OF_8_BITS, OptimizerCase, Options
from torch import Tensor

import torchao8
from torchao8.block_layout import row_start

LAW = formats.MuLaw(signed=4, unsigned=4)


@dataclass(frozen=True)
class FormatCase:
    """A format.

    Attributes:
        name: of its record.
        cases: the optimizers that have it.
        options: with which they do.
        suffixes: of the keys of its codes and of their scales.
        codebook: of signed or of unsigned numbers, the value of each code at scale 1, float64.
        smallest: what a number above 0 is at least, at scale 1, in an unsigned state.
        gap: between the codes around a value at scale 1, at most; signed or not.
        bits: of a code.
        block_wise: the values of the option that it takes.
    """

    name: str
    cases: tuple[OptimizerCase, ...]
    options: Options
    suffixes: tuple[str, str]
    codebook: Callable[[bool], Tensor]
    smallest: float
    gap: Callable[[Tensor, bool], Tensor]
    bits: int = 8
    block_wise: tuple[bool, ...] = (True, False)

    def keys(self, state: str) -> tuple[str, str]:
        codes, scale = self.suffixes
        return state + codes, state + scale

    def decode(
        self, codes: Tensor, scale: Tensor, signed: bool, shape: tuple[int, ...], block_size: int
    ) -> tuple[Tensor, Tensor]:
        """The numbers, and the scale of each of them, in float64."""
        if self.bits == 4:
            codes = formats.unpack(codes, shape, row_start(shape, block_size))
        if scale.shape == (1,) != reference.scale_shape(shape, block_size):
            scales = scale.double().expand(shape)
        else:
            scales = reference.expand_scale(scale.double(), shape, block_size)
        return self.codebook(signed)[codes.long()] * scales, scales


def gap_in_4_bits(values: Tensor, signed: bool) -> Tensor:
    if signed:
        return torch.full_like(values, 1 / 8)
    return torch.ldexp(torch.ones_like(values), torch.frexp(values)[1] - 2)


MULAW = FormatCase(
    "mulaw",
    OF_8_BITS,
    {"state_format": "mulaw"},
    ("_mulaw", "_mulaw_scale"),
    lambda signed: formats.codebook(LAW, signed),
    2.0**-4,
    lambda values, signed: 2.0**-4 * (values.abs() + 1),
)
FOUR_BIT = FormatCase(
    "4bit",
    OF_4_BITS,
    {},
    ("_4bit", "_4bit_scale"),
    lambda signed: formats.levels_of_4bit() if signed else formats.squares_of_4bit(),
    2.0**-7,
    gap_in_4_bits,
    bits=4,
    block_wise=(True,),
)
FORMAT_CASES = (MULAW, FOUR_BIT)


def pairs_with() -> Iterator[tuple[OptimizerCase, FormatCase]]:
    return ((case, each) for each in FORMAT_CASES for case in each.cases)


def every_pair() -> pytest.MarkDecorator:
    """Runs a test over the optimizers and the formats: ``case`` and ``form``."""
    rows = [
        pytest.param(case, form, id=f"{case.cls.__name__}-{form.name}")
        for case, form in pairs_with()
    ]
    return pytest.mark.parametrize(("case", "form"), rows)


def few_pairs() -> pytest.MarkDecorator:
    """The same where rules differ little: each format with rules that are built differently, in 4
    bits one with a second moment and one without. The others are thorough."""
    few = {*FEW, torchao8.AdamW4bit, torchao8.SGD4bit}
    rows = [
        pytest.param(
            case,
            form,
            id=f"{case.cls.__name__}-{form.name}",
            marks=() if case.cls in few else pytest.mark.thorough,
        )
        for case, form in pairs_with()
    ]
    return pytest.mark.parametrize(("case", "form"), rows)


def every_pair_and_scales(of_elements: bool = False) -> pytest.MarkDecorator:
    """The same with a scale for each block, and one for a tensor: ``block_wise``.

    Args:
        of_elements: only the optimizers of optim_table.OF_ELEMENTS.
    """
    rows = [
        pytest.param(
            case,
            form,
            block_wise,
            id=f"{'blocks' if block_wise else 'one-scale'}-{case.cls.__name__}-{form.name}",
        )
        for case, form in pairs_with()
        for block_wise in form.block_wise
        if not (of_elements and case.matrices)
    ]
    return pytest.mark.parametrize(("case", "form", "block_wise"), rows)


def every_pair_and_options() -> pytest.MarkDecorator:
    """The same with each set of options of the optimizer: ``case``, ``form`` and ``options``."""
    rows = [
        pytest.param(
            case,
            form,
            options,
            id=f"{case.cls.__name__}-{form.name}-"
            + (",".join(f"{k}={v}" for k, v in options.items()) or "defaults"),
        )
        for case, form in pairs_with()
        for options in case.options + case.own_options
    ]
    return pytest.mark.parametrize(("case", "form", "options"), rows)


def has_blocks(state: dict[str, Tensor], form: FormatCase, name: str) -> bool:
    """Whether a state is in the format; else it is float32."""
    return form.keys(name)[0] in state


def moment(
    case: OptimizerCase,
    form: FormatCase,
    state: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
) -> tuple[Tensor, Tensor]:
    """A state in float64, and what the scale of each number is: 0 where it is float32.

    A first moment of 4 bits is in units of the root of the stored second one, if that has a scale.
    """
    if not has_blocks(state, form, name):
        return state[name].double(), torch.zeros_like(state[name], dtype=torch.float64)
    codes, scale = (state[key] for key in form.keys(name))
    block_size = 64 if form.bits == 4 else 256
    signed = case.is_signed(name)
    value, scales = form.decode(codes, scale, signed, shape, block_size)
    if form.bits == 4 and signed and case.rule == "adam":
        squares, _ = moment(case, form, state, "exp_avg_sq", shape)
        roots = torch.where(squares > 0, squares.sqrt().float().double(), 1.0)
        return value.float().double() * roots, scales * roots  # each product is rounded
    return value, scales
