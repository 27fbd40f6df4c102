"""State as bitsandbytes, torchao and torch.optim save it, read as ours.

Of torchao that of Adam, of the others that of every class. Both libraries number the blocks of a
moment over the flattened tensor, and their dynamic map is ours up to the rounding of its entries.
Where their blocks are our blocks (:func:`_same_blocks`), 8 bits stay the 8 bits that they are.
Elsewhere a moment becomes the float32 numbers that the other library itself would have read.

Neither library is imported: what is read are plain tensors, and the attributes of tensor
subclasses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.block_layout import Scales, row_length
from torchao8.interop.bitsandbytes import (
    NESTED,
    is_bitsandbytes,
    is_bitsandbytes_key,
    own_options,
    read_bitsandbytes,
)
from torchao8.interop.moments import Quantized, States, checked_scale, checked_step
from torchao8.interop.torchao import is_torchao, read_torchao

__all__ = ["norm_history", "own_options", "reads", "to_own", "who_wrote"]

# Entries of their maps differ from ours by up to 6e-8: they were rounded more often.
_MAP_TOLERANCE = 1e-6


def who_wrote(saved: Mapping[str, Any]) -> str | None:
    """``"bitsandbytes"``, ``"torchao"``, or None: the state of a parameter tells by its keys and
    classes."""
    if is_bitsandbytes(saved):
        return "bitsandbytes"
    if is_torchao(saved):
        return "torchao"
    return None


def reads(key: Any) -> bool:
    """Whether a key of the state of a parameter may be one of another library, not ours."""
    return is_bitsandbytes_key(key)


def to_own(
    label: str,
    saved: Mapping[str, Any],
    shape: Sequence[int],
    states: States,
    block_size: int,
    block_wise: bool = True,
) -> dict[str, Any] | None:
    """The state of one parameter, saved by another library, under the keys of this one.

    Of bitsandbytes: 32-bit, 8-bit with blocks of any size its kernels know, and the older 8-bit
    with one block a tensor; nested or not. Of torchao: 8-bit, 4-bit and fp8. Of torch.optim, and of
    torchao's small parameters: moments in bfloat16 or float16.

    Which optimizer of bitsandbytes wrote a state does not show in it: LAMB's looks like Adam's, and
    is the same. Where it would be another thing, :func:`own_options` refuses what gives it away.

    Args:
        label: of the parameter, for messages: ``"parameter 3 (layer.weight)"``.
        saved: the entry of the parameter in the ``state`` of the state dict.
        shape: of the whole parameter, were it sharded.
        states: of each state that the optimizer keeps, by its name, whether it is signed; in the
            order of bitsandbytes: averages, then squares.
        block_size, block_wise: of the optimizer.

    Returns:
        None if there is nothing to convert: state of this library, or float32 state of torch.optim,
        checked or not. Otherwise ``step``, a 0-d float32 tensor, and of all states either
        ``<name>_codes`` (uint8 of the given shape) and ``<name>_scale`` (float32 of the shape
        ``Scales(block_size, block_wise).shape(shape)``) or ``<name>``, float32 of the given shape;
        on the device of the saved tensors, and contiguous.

        8 bits come back where all states are 8-bit, in our map, and in blocks that are ours. Codes
        and scales are then the saved ones, and may share memory with them. A second moment that
        the other library rounded to 0 stays 0. Sums and averages of squares of bitsandbytes'
        RMSprop and Adagrad, which have the map of signed numbers there, come back in float32.

        Float32 moments of torch.optim and torchao that were saved as such come back as they are.

    Raises:
        ValueError: states of another number or name, and tensors of another dtype or shape than
            such a state has, or with a scale that no step could have left; sharded tensors.
    """
    writer, shape = who_wrote(saved), tuple(shape)
    if writer is None:
        return _widened(saved, states)
    if writer == "bitsandbytes":
        moments = read_bitsandbytes(label, saved, shape, states, block_size)
    else:
        moments = read_torchao(label, saved, shape, states)
    own: dict[str, Any] = {"step": checked_step(label, saved)}
    quantized = {k: m for k, m in moments.items() if isinstance(m, Quantized)}
    scales = Scales(block_size, block_wise)
    if len(quantized) == len(states) and all(
        _is_ours(quantized[name], signed, shape, scales) for name, signed in states.items()
    ):
        for name, moment in quantized.items():
            own[f"{name}_codes"] = moment.codes
            own[f"{name}_scale"] = moment.scale.reshape(scales.shape(shape))
        return own
    for name, m in moments.items():
        own[name] = m.dequantize() if isinstance(m, Quantized) else m
    return own


def norm_history(label: str, saved: Mapping[str, Any]) -> Tensor | None:
    """The norms of the last 100 gradients, which bitsandbytes keeps squared, or None.

    Raises:
        ValueError: what stands there is no such thing.
    """
    nested = saved.get(NESTED, {})
    squares = {**saved, **nested}.get("gnorm_vec")
    if squares is None:
        return None
    return checked_scale(label, "gnorm_vec", squares, (100,)).sqrt()


def _widened(saved: Mapping[str, Any], states: States) -> dict[str, Any] | None:
    """torch.optim keeps moments in the dtype of the parameter, we keep float32. Its SGD and
    Muon count no steps, of which only the first one of SGD differs, and SGD saves None in place of
    no buffer. Returns None if there is nothing to change."""
    if "step" not in saved and set(saved) <= {"momentum_buffer"}:
        present = {key: value for key, value in saved.items() if value is not None}
        saved = {"step": torch.tensor(1.0, dtype=torch.float32, device="cpu"), **present}
        return _widened(saved, states) or saved
    narrow = {
        name: saved[name].to(torch.float32)
        for name in states
        if isinstance(saved.get(name), Tensor)
        and saved[name].dtype in (torch.bfloat16, torch.float16)
    }
    return {**saved, **narrow} if narrow else None


def _is_ours(moment: Quantized, signed: bool, shape: Sequence[int], scales: Scales) -> bool:
    """Whether the codes and scales mean the same here."""
    if scales.block_wise:
        if moment.block_size != scales.block_size or not _same_blocks(shape, scales.block_size):
            return False
    elif moment.scale.numel() != 1:
        return False
    ours = ops.dynamic_map(signed).to(moment.map.device)
    return bool(((moment.map - ours).abs() <= _MAP_TOLERANCE).all())


def _same_blocks(shape: Sequence[int], block_size: int) -> bool:
    """Whether blocks of the flattened tensor are ours: no row of several starts inside of one."""
    row = row_length(shape, block_size)
    return len(shape) > 0 and (row % block_size == 0 or row == math.prod(shape))
