"""Adam's state as bitsandbytes, torchao and torch.optim save it, read as ours.

Both libraries number the blocks of a moment over the flattened tensor, and their dynamic map is
ours up to the rounding of its entries. Where their blocks are our blocks (:func:`_same_blocks`), 8
bits stay the 8 bits that they are. Elsewhere a moment becomes the float32 numbers that the other
library itself would have read.

Only this file knows their keys and classes, and it imports neither: what is read are plain tensors,
and the attributes of tensor subclasses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.block_layout import row_length, scale_shape
from torchao8.optim._checks import is_dtensor, kind

# Where newer versions of bitsandbytes hide tensors from FSDP1, which would gather them as if they
# were shaped as the parameter: Optimizer8bit.state_dict in bitsandbytes/optim/optimizer.py.
_NESTED = "__bnb_optimizer_quant_state__"
# Everything that bitsandbytes ever kept for a parameter. Those that to_own does not read hold what
# the last step left behind: norms for clipping, and the other half of max1 and max2.
_BNB_SCRATCH = frozenset(("new_max1", "new_max2", "gnorm_vec", "unorm_vec"))
_BNB_KEYS = frozenset(("state", "qmap", "absmax", "max"))
# Block sizes that bitsandbytes' kernels take. Older versions used 2048, newer ones use 256.
_BNB_BLOCK_SIZES = (256, 2048, 64, 128, 512, 1024, 4096)

_TORCHAO_8BIT = "OptimState8bit"
_TORCHAO_OTHERS = ("OptimState4bit", "OptimStateFp8")

# Entries of their maps differ from ours by up to 6e-8: they were rounded more often.
_MAP_TOLERANCE = 1e-6


class StateSpec(Protocol):
    """What :class:`torchao8.optim.base.State` says of a state."""

    @property
    def name(self) -> str: ...
    @property
    def signed(self) -> bool: ...


class _Quantized(NamedTuple):
    """A moment in 8 bits: ``map[codes] * scale``, a number of ``scale`` for each ``block_size``
    elements of the flattened tensor, the last block may be short."""

    codes: Tensor
    scale: Tensor
    map: Tensor
    block_size: int

    def dequantize(self) -> Tensor:
        """float32, one rounding an element, as in both libraries."""
        values = self.map[self.codes.reshape(-1).int()]
        whole = values.numel() // self.block_size
        split = whole * self.block_size
        values[:split].view(whole, self.block_size).mul_(self.scale[:whole, None])
        values[split:].mul_(self.scale[whole:])
        return values.view(self.codes.shape)


_Moments = dict[str, "_Quantized | Tensor"]


def who_wrote(saved: Mapping[str, Any]) -> str | None:
    """``"bitsandbytes"``, ``"torchao"``, or None: the state of a parameter tells by its keys and
    classes."""
    if _NESTED in saved or any(_is_bnb_key(key) for key in saved):
        return "bitsandbytes"
    if any(_torchao_class(value) for value in saved.values()):
        return "torchao"
    return None


def to_own(
    label: str,
    saved: Mapping[str, Any],
    shape: Sequence[int],
    states: Sequence[StateSpec],
    block_size: int,
) -> dict[str, Any] | None:
    """The state of one parameter, saved by another library, under the keys of this one.

    Of bitsandbytes: 32-bit, 8-bit with blocks of any size its kernels know, and the older 8-bit
    with one block a tensor; nested or not. Of torchao: 8-bit, 4-bit and fp8. Of torch.optim, and of
    torchao's small parameters: moments in bfloat16 or float16.

    Which optimizer of bitsandbytes wrote a state does not show in it: LAMB's looks like Adam's.

    Args:
        label: of the parameter, for messages: ``"parameter 3 (layer.weight)"``.
        saved: the entry of the parameter in the ``state`` of the state dict.
        shape: of the whole parameter, were it sharded.
        states: what the optimizer keeps, in the order of bitsandbytes: first moment, second.
        block_size: of the optimizer.

    Returns:
        None if there is nothing to convert: state of this library, or float32 state of torch.optim,
        checked or not. Otherwise ``step``, a 0-d float32 tensor, and of all states either
        ``<name>_codes`` (uint8 of the given shape) and ``<name>_scale`` (float32 of the shape
        ``scale_shape(shape, block_size)``) or ``<name>``, float32 of the given shape; on the device
        of the saved tensors, and contiguous.

        8 bits come back where all states are 8-bit, in our map, and in blocks that are ours. Codes
        and scales are then the saved ones, and may share memory with them. A second moment that
        the other library rounded to 0 stays 0.

        Float32 moments of torch.optim and torchao that were saved as such come back as they are.

    Raises:
        ValueError: states of another number or name, and tensors of another dtype or shape than
            such a state has, or with a scale that no step could have left; sharded tensors.
    """
    writer, shape = who_wrote(saved), tuple(shape)
    if writer is None:
        return _widened(saved, states)
    if writer == "bitsandbytes":
        moments = _bitsandbytes(label, saved, shape, states, block_size)
    else:
        moments = _torchao(label, saved, shape, states)
    own: dict[str, Any] = {"step": _step(label, saved)}
    quantized = {k: m for k, m in moments.items() if isinstance(m, _Quantized)}
    if len(quantized) == len(states) and all(
        _is_ours(quantized[s.name], s.signed, shape, block_size) for s in states
    ):
        for name, moment in quantized.items():
            own[f"{name}_codes"] = moment.codes
            own[f"{name}_scale"] = moment.scale.reshape(scale_shape(shape, block_size))
        return own
    for name, m in moments.items():
        own[name] = m.dequantize() if isinstance(m, _Quantized) else m
    return own


def _widened(saved: Mapping[str, Any], states: Sequence[StateSpec]) -> dict[str, Any] | None:
    """torch.optim keeps moments in the dtype of the parameter, we keep float32; None if that is
    what they are."""
    narrow = {
        s.name: saved[s.name].to(torch.float32)
        for s in states
        if isinstance(saved.get(s.name), Tensor)
        and saved[s.name].dtype in (torch.bfloat16, torch.float16)
    }
    return {**saved, **narrow} if narrow else None


def _is_ours(moment: _Quantized, signed: bool, shape: Sequence[int], block_size: int) -> bool:
    """Whether the codes and scales mean the same here."""
    if moment.block_size != block_size or not _same_blocks(shape, block_size):
        return False
    ours = ops.dynamic_map(signed).to(moment.map.device)
    return bool(((moment.map - ours).abs() <= _MAP_TOLERANCE).all())


def _same_blocks(shape: Sequence[int], block_size: int) -> bool:
    """Whether blocks of the flattened tensor are blocks of its rows: no row starts inside one."""
    row = row_length(shape, block_size)
    return len(shape) > 0 and (row % block_size == 0 or row == math.prod(shape))


# -- bitsandbytes ------------------------------------------------------------------------------


def _is_bnb_key(key: Any) -> bool:
    """state1, qmap2, ...: a number goes with each of bitsandbytes' names."""
    return isinstance(key, str) and key[-1:].isdigit() and key[:-1] in _BNB_KEYS


def _bitsandbytes(
    label: str,
    saved: Mapping[str, Any],
    shape: tuple[int, ...],
    states: Sequence[StateSpec],
    block_size: int,
) -> _Moments:
    """state1, state2 and what belongs to them, as Optimizer2State.init_state makes them."""
    nested = saved.get(_NESTED, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{_NESTED} of {label}: expected a dict, got {type(nested).__name__}")
    flat = {**{k: v for k, v in saved.items() if k != _NESTED}, **nested}
    wanted = [f"state{i}" for i in range(1, len(states) + 1)]
    got = [key for key in flat if _is_bnb_key(key) and key.startswith("state")]
    if sorted(got) != wanted:
        raise ValueError(
            f"state of {label}: expected {' and '.join(wanted)} of bitsandbytes, for "
            f"{' and '.join(s.name for s in states)}, got {' and '.join(sorted(got)) or 'none'}."
            + _bnb_remedy(len(got), states)
        )
    strange = [k for k in flat if k != "step" and k not in _BNB_SCRATCH and not _is_bnb_key(k)]
    if strange:
        raise ValueError(f"state of {label}: expected the keys of bitsandbytes, got {strange} too")
    return {
        state.name: _bnb_moment(label, flat, i, shape, state, block_size)
        for i, state in enumerate(states, 1)
    }


def _bnb_remedy(number: int, states: Sequence[StateSpec]) -> str:
    if number == 2 and states[-1].name == "max_exp_avg_sq":
        return " bitsandbytes takes amsgrad=True and ignores it: load with amsgrad=False."
    return " Another optimizer than this one saved it."


def _bnb_moment(
    label: str,
    flat: Mapping[str, Any],
    i: int,
    shape: tuple[int, ...],
    state: StateSpec,
    own_block_size: int,
) -> _Quantized | Tensor:
    """The i-th moment: ``state`` and, in 8 bits, ``qmap`` and ``absmax`` or the older ``max``."""
    key = f"state{i}"
    codes = _tensor(label, key, flat[key], shape, (torch.uint8, torch.float32))
    if not codes.is_contiguous():
        # zeros_like(p) takes the strides of p. Then p is made contiguous, and the CUDA kernels go
        # through all of them by address, the CPU ones by index.
        raise ValueError(
            f"{key} of {label}: expected a contiguous tensor, got strides {list(codes.stride())}. "
            "bitsandbytes fills it in the order of memory on a GPU, but in that of the elements on "
            "the CPU, which does not show. Of a GPU: "
            f"{key} = {key}.as_strided({key}.shape, torch.empty({key}.shape).stride()); "
            f"of the CPU: {key} = {key}.contiguous()."
        )
    if codes.dtype == torch.float32:
        return codes
    table = _map(label, f"qmap{i}", flat.get(f"qmap{i}"), state.signed).to(codes.device)
    if f"absmax{i}" not in flat and f"max{i}" in flat:  # block_wise=False, in older versions
        most = _scale(label, f"max{i}", flat[f"max{i}"], (1,)).to(codes.device)
        return _Quantized(codes, most, table, max(codes.numel(), 1))
    absmax = _scale(label, f"absmax{i}", flat.get(f"absmax{i}")).to(codes.device)
    size = _bnb_block_size(label, f"absmax{i}", codes.numel(), absmax, own_block_size)
    return _Quantized(codes, absmax, table, size)


def _bnb_block_size(label: str, key: str, numel: int, absmax: Tensor, own: int) -> int:
    """The block size, which is not saved, by the number of blocks.

    Of sizes that double, only one gives the same number of blocks, except where it is 1: then all
    of them mean the same, and ours will do.
    """
    for size in sorted(_BNB_BLOCK_SIZES, key=lambda size: size != own):
        if absmax.numel() == -(-numel // size):
            return size
    numbers = [-(-numel // size) for size in _BNB_BLOCK_SIZES[:2]]
    raise ValueError(
        f"{key} of {label}: expected {numbers[0]} numbers for blocks of 256 elements, or "
        f"{numbers[1]} for 2048, got {absmax.numel()}"
    )


# -- torchao -----------------------------------------------------------------------------------


def _torchao_class(value: Any) -> str | None:
    """The name of torchao's tensor subclass, also where a DTensor holds it."""
    local = getattr(value, "_local_tensor", value) if is_dtensor(value) else value
    name = type(local).__name__
    return name if name in (_TORCHAO_8BIT, *_TORCHAO_OTHERS) else None


def _torchao(
    label: str, saved: Mapping[str, Any], shape: tuple[int, ...], states: Sequence[StateSpec]
) -> _Moments:
    """exp_avg and exp_avg_sq as tensor subclasses: torchao/optim/subclass_8bit.py, 4bit and fp8."""
    wanted = ["step", *(s.name for s in states)]
    if set(saved) - {"step"} != set(wanted) - {"step"}:
        raise ValueError(
            f"state of {label}: expected the keys {wanted} of torchao, got {list(saved)}"
        )
    return {s.name: _torchao_moment(label, s, saved[s.name], shape) for s in states}


def _torchao_moment(
    label: str, state: StateSpec, value: Any, shape: tuple[int, ...]
) -> _Quantized | Tensor:
    key, name = state.name, _torchao_class(value)
    if is_dtensor(value):
        raise ValueError(f"{key} of {label}: {_SHARDED}")
    if name is None:
        floats = (torch.float32, torch.bfloat16, torch.float16)
        return _tensor(label, key, value, shape, floats).to(torch.float32).contiguous()
    if name in _TORCHAO_OTHERS:
        return _dequantized(label, key, name, value, shape)
    for part in ("codes", "scale", "qmap", "signed"):
        if not hasattr(value, part):
            raise ValueError(f"{key} of {label}: expected a {name} with {part}, got one without")
    if bool(value.signed) != state.signed:
        raise ValueError(
            f"{key}.signed of {label}: expected {state.signed}, got {bool(value.signed)}"
        )
    codes = _tensor(label, f"{key}.codes", value.codes, shape, (torch.uint8,)).contiguous()
    scale = _scale(label, f"{key}.scale", value.scale).to(codes.device)
    blocks = scale.numel()
    if blocks == 0 or codes.numel() == 0 or codes.numel() % blocks:
        raise ValueError(
            f"{key}.scale of {label}: expected a number of scales that divides the "
            f"{codes.numel()} elements, got {blocks}"
        )
    table = _map(label, f"{key}.qmap", value.qmap, state.signed).to(codes.device)
    return _Quantized(codes, scale, table, codes.numel() // blocks)


def _dequantized(label: str, key: str, name: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """4-bit and fp8 have no format here to be copied into; the class knows its own values."""
    try:
        values = value.dequantize()
    except (AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f"{key} of {label}: {name} cannot be dequantized: {error}") from error
    values = _tensor(label, key, values, shape, (torch.float32,)).contiguous()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{key} of {label}: expected a {name} of finite numbers, got some not")
    return values


# -- checks ------------------------------------------------------------------------------------

_SHARDED = (
    "expected a whole tensor, got a shard (a DTensor): the blocks of a shard are not those of the "
    "parameter. Gather a full state dict with the library that saved it."
)


def _tensor(
    label: str, key: str, value: Any, shape: tuple[int, ...] | None, dtypes: Sequence[torch.dtype]
) -> Tensor:
    """The value, if it is a dense tensor of one of the dtypes, and of the shape if one is given."""
    if is_dtensor(value):
        raise ValueError(f"{key} of {label}: {_SHARDED}")
    expected = " or ".join(str(dtype) for dtype in dtypes)
    expected += f" of shape {list(shape)}" if shape is not None else " in one dimension"
    if not isinstance(value, Tensor):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"{key} of {label}: expected {expected}, got {got}")
    fits = tuple(value.shape) == shape if shape is not None else value.dim() == 1
    if value.layout is not torch.strided or value.dtype not in dtypes or not fits:
        raise ValueError(
            f"{key} of {label}: expected {expected}, got {kind(value)} of shape {list(value.shape)}"
        )
    return value.detach()


def _scale(label: str, key: str, value: Any, shape: tuple[int, ...] | None = None) -> Tensor:
    """The largest magnitude of each block: finite, and with no sign."""
    scale = _tensor(label, key, value, shape, (torch.float32,)).contiguous()
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{key} of {label}: expected finite numbers, got some that are not")
    if bool(scale.signbit().any()):
        raise ValueError(
            f"{key} of {label}: expected numbers >= 0, got {float(scale[scale.signbit()][0])}"
        )
    return scale


def _map(label: str, key: str, value: Any, signed: bool) -> Tensor:
    """The value of each code. Any map will do, but not one for the other kind of moment."""
    table = _tensor(label, key, value, (256,), (torch.float32,))
    if not bool(table.isfinite().all()):
        raise ValueError(f"{key} of {label}: expected finite numbers, got some that are not")
    if bool((table < 0).any()) != signed:
        kinds = ("numbers >= 0, for a second moment", "numbers of both signs, for a first moment")
        raise ValueError(
            f"{key} of {label}: expected {kinds[signed]}, got {kinds[not signed].split(',')[0]}"
        )
    return table


def _step(label: str, saved: Mapping[str, Any]) -> Tensor:
    """An int of bitsandbytes, a 0-d tensor of torchao."""
    value = saved.get("step")
    single = isinstance(value, Tensor) and value.numel() == 1 and not is_dtensor(value)
    if not (single or (isinstance(value, (int, float)) and not isinstance(value, bool))):
        got = "nothing" if value is None else type(value).__name__
        raise ValueError(f"step of {label}: expected a number, got {got}")
    number = float(value)  # type: ignore[arg-type]
    if not 0 <= number < 2**24 or number != int(number):
        raise ValueError(
            f"step of {label}: expected a whole number from 0 to 2^24 - 1, got {number}"
        )
    return torch.tensor(number, dtype=torch.float32)
