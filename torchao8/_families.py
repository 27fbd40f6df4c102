"""What the extension tells of the families of update rules (csrc/rules) and of the formats of state
(csrc/formats)."""

from typing import NamedTuple


class FamilyState(NamedTuple):
    """A state of a family of update rules; its lists in the op are <name>s and <name>_scales."""

    name: str
    optional: bool  # the lists may be empty
    signed: bool
    # Rounded so, where the caller says so. A format may do the same with others.
    stochastic: bool
    scalar: bool  # one float32 number a parameter, of shape (), without scales


class Family(NamedTuple):
    """A family of update rules, as the extension names it (csrc/rules)."""

    name: str
    step_op: str
    extremes_op: str  # finds what the step has to know of tensors with one scale
    states: tuple[FamilyState, ...]
    numbers: tuple[str, ...]  # in the order of the op's tensor of them
    flags: tuple[str, ...]
    rules: tuple[int, ...]  # the number of states of each


class StateFormat(NamedTuple):
    """A format of state with scales, as the extension names it (csrc/formats)."""

    name: str
    bits: int  # of a code
