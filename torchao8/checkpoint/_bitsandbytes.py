"""The state of bitsandbytes' optimizers: state1, state2 and what belongs to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao8.checkpoint._moments import (
    Moments,
    Quantized,
    StateSpec,
    checked_map,
    checked_scale,
    checked_tensor,
)

# Where newer versions of bitsandbytes hide tensors from FSDP1, which would gather them as if they
# were shaped as the parameter: Optimizer8bit.state_dict in bitsandbytes/optim/optimizer.py.
NESTED = "__bnb_optimizer_quant_state__"
# Everything that bitsandbytes ever kept for a parameter. Those that to_own does not read hold what
# the last step left behind: norms for clipping, and the other half of max1 and max2.
_BNB_SCRATCH = frozenset(("new_max1", "new_max2", "gnorm_vec", "unorm_vec"))
_BNB_KEYS = frozenset(("state", "qmap", "absmax", "max"))
# Block sizes that bitsandbytes' kernels take. Older versions used 2048, newer ones use 256.
_BNB_BLOCK_SIZES = (256, 2048, 64, 128, 512, 1024, 4096)


def is_bitsandbytes(saved: Mapping[str, Any]) -> bool:
    """Whether the keys are those of bitsandbytes."""
    return NESTED in saved or any(_is_bnb_key(key) for key in saved)


def _is_bnb_key(key: Any) -> bool:
    """state1, qmap2, ...: a number goes with each of bitsandbytes' names."""
    return isinstance(key, str) and key[-1:].isdigit() and key[:-1] in _BNB_KEYS


def read_bitsandbytes(
    label: str,
    saved: Mapping[str, Any],
    shape: tuple[int, ...],
    states: Sequence[StateSpec],
    block_size: int,
) -> Moments:
    """state1, state2 and what belongs to them, as Optimizer2State.init_state makes them."""
    nested = saved.get(NESTED, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{NESTED} of {label}: expected a dict, got {type(nested).__name__}")
    flat = {**{k: v for k, v in saved.items() if k != NESTED}, **nested}
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
) -> Quantized | Tensor:
    """The i-th moment: ``state`` and, in 8 bits, ``qmap`` and ``absmax`` or the older ``max``."""
    key = f"state{i}"
    codes = checked_tensor(label, key, flat[key], shape, (torch.uint8, torch.float32))
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
    table = checked_map(label, f"qmap{i}", flat.get(f"qmap{i}"), state.signed).to(codes.device)
    if f"absmax{i}" not in flat and f"max{i}" in flat:  # block_wise=False, in older versions
        most = checked_scale(label, f"max{i}", flat[f"max{i}"], (1,)).to(codes.device)
        return Quantized(codes, most, table, max(codes.numel(), 1))
    absmax = checked_scale(label, f"absmax{i}", flat.get(f"absmax{i}")).to(codes.device)
    size = _bnb_block_size(label, f"absmax{i}", codes.numel(), absmax, own_block_size)
    return Quantized(codes, absmax, table, size)


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
