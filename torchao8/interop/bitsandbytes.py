"""The state of bitsandbytes' optimizers: state1, state2 and what belongs to them.

A class with one state keeps it as state1, in the signed map, be it an average or a sum of squares.
AdEMAMix stacks its two averages in state1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao8.interop.moments import (
    Moments,
    Quantized,
    States,
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
# What its groups have beside lr and weight_decay, in all classes, also where it means nothing.
_BNB_OPTIONS = ("betas", "eps", "alpha", "t_alpha", "t_beta3")
# Block sizes that bitsandbytes' kernels take. Older versions used 2048, newer ones use 256.
_BNB_BLOCK_SIZES = (256, 2048, 64, 128, 512, 1024, 4096)


def is_bitsandbytes(saved: Mapping[str, Any]) -> bool:
    """Whether the keys are those of bitsandbytes."""
    return NESTED in saved or any(_is_bnb_key(key) for key in saved)


def is_bitsandbytes_key(key: Any) -> bool:
    """Whether the key is one that bitsandbytes has for a parameter."""
    return key == NESTED or key in _BNB_SCRATCH or _is_bnb_key(key)


def _is_bnb_key(key: Any) -> bool:
    """state1, qmap2, ...: a number goes with each of bitsandbytes' names."""
    return isinstance(key, str) and key[-1:].isdigit() and key[:-1] in _BNB_KEYS


def own_options(
    name: str, saved: Mapping[str, Any], own: Collection[str]
) -> tuple[dict[str, Any], str | None]:
    """The options of a group of bitsandbytes under the names that they have here.

    Its classes with one state save as ``betas`` whatever two options they have: momentum and
    dampening (SGD, LARS), alpha and momentum (RMSprop), nothing (Adagrad). The second of these has
    no effect there, and gets none here.

    Args:
        name: of the class here, for messages.
        own: the names of its options.

    Returns:
        The options, and a warning if one of them was ignored.

    Raises:
        ValueError: options that another class saves.
    """
    options = {k: v for k, v in saved.items() if k in own or k not in _BNB_OPTIONS}
    for key in ("t_alpha", "t_beta3"):
        if key in options:
            options[key] = options[key] or 0  # None, for no warm-up
    betas = saved.get("betas")
    if not isinstance(betas, (tuple, list)) or len(betas) < 2:
        raise ValueError(f"betas: expected two numbers or more of bitsandbytes, got {betas!r}")
    if "eps" not in own and saved.get("eps"):
        _refuse_class(name, "eps", "0.0", saved, "RMSprop, Adagrad or one with two states")
    if "betas" in own and "eps" not in own and not betas[1]:  # Lion
        _refuse_class(name, "betas", "two numbers above 0", saved, "SGD, LARS or Adagrad")
    if "lr_decay" in own and any(betas):
        _refuse_class(name, "betas", "(0.0, 0.0)", saved, "Another class")
    if "betas" in own or "momentum" not in own:
        return options, None
    if not betas[0]:
        _refuse_class(name, "betas", "a first one above 0", saved, "Adagrad")
    first, second = ("momentum", "dampening") if "dampening" in own else ("alpha", "momentum")
    options |= {first: betas[0], second: 0.0}
    if not betas[1]:
        return options, None
    lion = ". Lion has two numbers above 0 there, and its averages are not what this class keeps"
    return options, (
        f"the checkpoint has {second}={betas[1]!r}, which bitsandbytes takes and ignores; here it "
        "is 0, which is the same" + lion * (second == "dampening")
    )


def _refuse_class(name: str, key: str, expected: str, saved: Mapping[str, Any], saver: str) -> None:
    rule = name.removesuffix("8bit").removesuffix("4bit")
    raise ValueError(
        f"{key}: expected {expected}, as the {rule} of bitsandbytes saves, got {saved[key]!r}. "
        f"{saver} saved this checkpoint, and its state means something else"
    )


def read_bitsandbytes(
    label: str,
    saved: Mapping[str, Any],
    shape: tuple[int, ...],
    states: States,
    block_size: int,
) -> Moments:
    """state1, state2 and what belongs to them, as the init_state of its classes makes them."""
    nested = saved.get(NESTED, {})
    if not isinstance(nested, Mapping):
        raise ValueError(f"{NESTED} of {label}: expected a dict, got {type(nested).__name__}")
    flat = {**{k: v for k, v in saved.items() if k != NESTED}, **nested}
    names = list(states)
    stacked = names[:2] == ["exp_avg_fast", "exp_avg_slow"]
    wanted = [f"state{i}" for i in range(1, len(states) + 1 - stacked)]
    got = [key for key in flat if _is_bnb_key(key) and key.startswith("state")]
    if sorted(got) != wanted:
        raise ValueError(
            f"state of {label}: expected {' and '.join(wanted) or 'none'} of bitsandbytes, for "
            f"{' and '.join(names) or 'no state'}, got "
            f"{' and '.join(sorted(got)) or 'none'}." + _bnb_remedy(len(got), names)
        )
    strange = [k for k in flat if k != "step" and k not in _BNB_SCRATCH and not _is_bnb_key(k)]
    if strange:
        raise ValueError(f"state of {label}: expected the keys of bitsandbytes, got {strange} too")
    moments: Moments = {}
    if stacked:
        halves = _halves(label, flat, shape)
        sources = [(halves[0], 1), (halves[1], 1), (flat, 2)]
    else:
        sources = [(flat, i) for i in range(1, len(names) + 1)]
    for (name, signed), (source, i) in zip(states.items(), sources, strict=True):
        moments[name] = _bnb_moment(label, source, i, shape, name, signed, block_size)
    return moments


def _bnb_remedy(number: int, names: Sequence[str]) -> str:
    if number == 2 and "max_exp_avg_sq" in names:
        return " bitsandbytes takes amsgrad=True and ignores it: load with amsgrad=False."
    if number == 1 and "grad_avg" in names:
        return " bitsandbytes has no centered RMSprop: load with centered=False."
    return " Another optimizer than this one saved it."


def _halves(
    label: str, flat: Mapping[str, Any], shape: tuple[int, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fast and the slow average of AdEMAMix, each with keys as if it were the only one.

    Raises:
        ValueError: no two averages; scales that both of them wrote to.
    """
    value = flat["state1"]
    if isinstance(value, Tensor) and tuple(value.shape) == shape:
        raise ValueError(
            f"state1 of {label}: expected {[2, *shape]}, a fast and a slow average, got "
            f"{list(shape)}. AdEMAMix32bit of bitsandbytes has room for one only, which is not "
            "AdEMAMix; another class than AdEMAMix may have saved it, too."
        )
    both = checked_tensor(label, "state1", value, (2, *shape), (torch.uint8, torch.float32))
    halves: list[dict[str, Any]] = [{**flat, "state1": half.clone()} for half in both]
    if both.dtype == torch.uint8:
        numel = both[0].numel()
        scales = flat.get("absmax1")
        wanted = (2, -(-numel // 256))
        scales = checked_tensor(label, "absmax1", scales, wanted, (torch.float32,))
        if numel % 256 and scales.any() and not scales[1, -1]:
            raise ValueError(
                f"absmax1 of {label}: expected a scale for each block of both averages, got 0 as "
                "the last one. On a GPU, bitsandbytes starts the scales of the slow average "
                f"{numel} // 256 numbers after those of the fast one, and not one later, where 256 "
                "does not divide the elements: a block of each overwrote the scale of the other, "
                "and the numbers are lost. Remove the state of this parameter from the state "
                "dict, and it starts anew."
            )
        for half, scale in zip(halves, scales, strict=True):
            half["absmax1"] = scale.clone()
    return halves[0], halves[1]


def _bnb_moment(
    label: str,
    flat: Mapping[str, Any],
    i: int,
    shape: tuple[int, ...],
    name: str,
    signed: bool,
    own_block_size: int,
) -> Quantized | Tensor:
    """A moment: ``state`` and, in 8 bits, ``qmap`` and ``absmax`` or the older ``max``."""
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
    moment: Quantized | Tensor = codes
    if codes.dtype == torch.uint8:
        moment = _bnb_quantized(label, flat, i, codes, own_block_size)
    if i > 1 or signed:
        return moment
    # RMSprop's and Adagrad's, in a map that has codes below 0, too; a dead block may have some.
    squares = moment.dequantize() if isinstance(moment, Quantized) else moment
    if bool((squares < 0).any()):
        raise ValueError(
            f"{key} of {label}: expected numbers >= 0, for {name}, got "
            f"{float(squares[squares < 0][0])}. Another optimizer than this one saved it."
        )
    return squares + 0.0


def _bnb_quantized(
    label: str, flat: Mapping[str, Any], i: int, codes: Tensor, own_block_size: int
) -> Quantized:
    table = checked_map(label, f"qmap{i}", flat.get(f"qmap{i}"), signed=i == 1).to(codes.device)
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
