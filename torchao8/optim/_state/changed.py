"""Which option of a group was changed after it had laid out the state of a parameter."""

from __future__ import annotations

from torch import Tensor

from torchao8.block_layout import BLOCK_SIZES, Scales
from torchao8.optim._state.formats import Format
from torchao8.optim.options import Group
from torchao8.state_bits import TOO_SMALL


def changed_options(
    group: Group, p: Tensor, found: Format, scale: Tensor | None, kept: str | None
) -> str:
    """The options that the state contradicts, with what they are and, where the state tells it,
    what they were.

    Args:
        found: the format that the state has.
        scale: of its first state; None where it has none.
        kept: why the parameter would keep 32 bits under the options, if it would.
    """
    if scale is None:
        names = ("optim_bits", "min_8bit_size", "block_size")
        said = ", ".join(f"{name}={group[name]}" for name in names)
        return f"{said}, by which it would have {group['optim_bits']} bits"
    if group["optim_bits"] != found.bits:
        changed = [_changed(group, "optim_bits", found.bits)]
    elif kept == TOO_SMALL and p.numel() < group["min_8bit_size"]:
        changed = [_changed(group, "min_8bit_size", f"{p.numel()} or less")]
    elif kept is not None:
        changed = [_changed(group, "block_size", "another")]
    elif found.bits == 8 and group["state_format"] != found.name:
        changed = [_changed(group, "state_format", repr(found.name))]
    else:
        changed = []
    return ", ".join([*changed, *_changed_blocks(group, p, scale)])


def _changed_blocks(group: Group, p: Tensor, scale: Tensor) -> list[str]:
    """The same for the options that the shape of the scales tells of."""
    if scale.shape == Scales.of(group).shape(p.shape):
        return []
    fit = [size for size in BLOCK_SIZES if scale.shape == Scales(size).shape(p.shape)]
    if not fit:
        return [_changed(group, "block_wise", not group["block_wise"])]
    changed = [] if group["block_wise"] else [_changed(group, "block_wise", True)]
    if group["block_size"] not in fit:
        changed.append(_changed(group, "block_size", " or ".join(map(str, fit))))
    return changed


def _changed(group: Group, name: str, was: object) -> str:
    return f"{name}={group[name]!r} (it was {was})"
