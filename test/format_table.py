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
from optim_table import OF_8_BITS, OptimizerCase, Options
from torch import Tensor

LAW = formats.MuLaw(signed=4, unsigned=4)


@dataclass(frozen=True)
class FormatCase:
    """A format.

    Attributes:
        name: the option ``state_format``.
        suffixes: of the keys of its codes and of their scales.
        codebook: of signed or of unsigned numbers, the value of each byte at scale 1, float64.
        gap: between the codes around a value at scale 1, at most.
    """

    name: str
    suffixes: tuple[str, str]
    codebook: Callable[[bool], Tensor]
    gap: Callable[[Tensor], Tensor]

    @property
    def options(self) -> Options:
        return {"state_format": self.name}

    def keys(self, state: str) -> tuple[str, str]:
        codes, scale = self.suffixes
        return state + codes, state + scale

    def decode(
        self, codes: Tensor, scale: Tensor, signed: bool, block_size: int = 256
    ) -> tuple[Tensor, Tensor]:
        """The numbers, and the scale of each of them, in float64."""
        shape = tuple(codes.shape)
        if scale.shape == (1,) != reference.scale_shape(shape, block_size):
            scales = scale.double().expand(shape)
        else:
            scales = reference.expand_scale(scale.double(), shape, block_size)
        return self.codebook(signed)[codes.long()] * scales, scales


MULAW = FormatCase(
    "mulaw",
    ("_mulaw", "_mulaw_scale"),
    lambda signed: formats.codebook(LAW, signed),
    lambda values: 2.0**-4 * (values.abs() + 1),
)
FORMAT_CASES = (MULAW,)


def pairs_with(
    cases: tuple[OptimizerCase, ...] = OF_8_BITS,
) -> Iterator[tuple[OptimizerCase, FormatCase]]:
    return ((case, each) for each in FORMAT_CASES for case in cases)


def every_pair(cases: tuple[OptimizerCase, ...] = OF_8_BITS) -> pytest.MarkDecorator:
    """Runs a test over the optimizers and the formats: ``case`` and ``form``."""
    rows = [
        pytest.param(case, form, id=f"{case.cls.__name__}-{form.name}")
        for case, form in pairs_with(cases)
    ]
    return pytest.mark.parametrize(("case", "form"), rows)


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
        for options in case.options
    ]
    return pytest.mark.parametrize(("case", "form", "options"), rows)


def has_blocks(state: dict[str, Tensor], form: FormatCase, name: str) -> bool:
    """Whether a state is in the format; else it is float32."""
    return form.keys(name)[0] in state


def moment(
    case: OptimizerCase, form: FormatCase, state: dict[str, Tensor], name: str
) -> tuple[Tensor, Tensor]:
    """A state in float64, and what the scale of each number is: 0 where it is float32."""
    if not has_blocks(state, form, name):
        return state[name].double(), torch.zeros_like(state[name], dtype=torch.float64)
    codes, scale = (state[key] for key in form.keys(name))
    return form.decode(codes, scale, case.is_signed(name))
