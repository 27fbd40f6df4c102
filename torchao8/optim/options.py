"""The options that every optimizer has, behind those of its rule."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, TypedDict, cast, get_type_hints

import torch
from torch import Tensor

from torchao8 import ops
from torchao8._numbers import known
from torchao8.block_layout import check_block_size

# The options of a parameter group, with its "params".
Group = dict[str, Any]

COMMON: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "optim_bits": 32,
    "min_8bit_size": 4096,
    "block_size": 256,
    "state_format": "dynamic",
    "state_rounding": "stochastic",
    "stochastic_rounding": False,
    "seed": 0,
    "percentile_clipping": 100,
    "block_wise": True,
    "is_paged": None,
    "page_dir": "",
}


# Options that pickles of older versions lack, with what these did.
ADDED_LATER: dict[str, Any] = {"state_format": "dynamic"}


class KeywordOptions(TypedDict, total=False):
    """The common options that no optimizer takes by position, see :class:`CommonOptions`."""

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    block_size: int
    state_format: str
    state_rounding: str
    stochastic_rounding: bool
    seed: int
    page_dir: str


class CommonOptions(KeywordOptions, total=False):
    """Keyword arguments of every optimizer, and options of its parameter groups.

    Each group may have its own: ``[{"params": embedding, "optim_bits": 32}, {"params": others}]``.
    Options that lay out the state cannot change after the first step: ``optim_bits``,
    ``min_8bit_size``, ``block_size``, ``state_format``, ``block_wise``, ``is_paged`` and
    ``page_dir``.

    Attributes:
        maximize: step along the gradient, not against it.
        foreach, capturable: accepted for scripts that were written for torch.optim, without
            effect. The step always updates all tensors at once, and is written for CUDA graphs to
            capture it (no GPU has run it yet).
        differentiable: must be False. A step that autograd records is not implemented.
        fused: the step is always fused. True also lets ``torch.amp.GradScaler`` hand the unscaling
            and the skipping of a step to the optimizer.
        optim_bits: how many bits each number of the state has, 4, 8 or 32. Adam, AdamW, Lion and
            SGD have state of 4 bits. It is for those who cannot train otherwise: the update is
            less exact than with 8.
        min_8bit_size: a parameter with fewer elements keeps 32-bit state, and so does a scalar,
            whether the others have 8 bits or 4.
            Sharded parameters (DTensors) keep 32-bit state, too, where they are vectors or have
            fewer than 16 elements in ``shape[1:]``: no block fits all the ways to shard them.
        block_size: how many neighbouring elements, a block, share a scale in state of 8 or 4 bits.
            A power of two from 64 to 2048. Classes of 4 bits take 64 where it is not given.
        state_format: what the codes of 8-bit state stand for. "dynamic" is the map of bitsandbytes.
            "mulaw" codes are the leading bits of a float, which takes less arithmetic. 32-bit state
            has no codes, and 4-bit state has codes of its own, beside which the option must be
            "dynamic".
        state_rounding: how averages and sums of squares are rounded to 8 or 4 bits, "stochastic" or
            "nearest". It also holds for the slow average of AdEMAMix, and with 4 bits for the
            averages of gradients of Lion and SGD. Others are rounded to nearest.
        stochastic_rounding: round bfloat16 parameters stochastically. Rounding to nearest loses
            updates that are smaller than half a unit of a parameter's last place. float32
            parameters are not rounded. float16 ones are refused.
        seed: seed of the stochastic rounding. The same seed, step and gradients give the same bits.
            Parameters with one seed share the random numbers of equal indices.
        percentile_clipping: an int p from 1 to 99 scales a gradient down whose norm is larger than
            the p-th of the last 100 norms of its parameter, in ascending order, to that norm. 100
            turns it off. To be decided before the first step. bitsandbytes had it up to 0.45; here
            the norm is that of the whole parameter, also where it is sharded.
        block_wise: False gives each 8-bit state of a parameter one scale in place of one for each
            block. This is coarser, and a step reads everything twice. ``block_size`` then only says
            which parameters keep 8 bits and how they are rounded. 4-bit state has scales of blocks.
        is_paged: whether the state of parameters of 100,000 elements and more may leave the GPU, or
            RAM, when memory is short. It comes back for each step. On the CPU it lies
            in a file without a name, whose space is reserved at the first step; on a GPU, in CUDA's
            managed memory (no GPU has run it yet).
        page_dir: for parameters on the CPU, the folder of the file of paged state; "" is the
            temporary folder, which may itself be in RAM.
    """

    optim_bits: int
    min_8bit_size: int
    percentile_clipping: int
    block_wise: bool
    is_paged: bool | None


def signature_of(
    constructor: Callable[..., None], defaults: Mapping[str, Any]
) -> inspect.Signature:
    """The arguments of ``__init__``, with all common options by name in place of ``**common``.

    Scripts and configuration tools ask for it: whether there is ``fused``, which options there are.

    Args:
        defaults: of the class, where they are other than those of :data:`COMMON`.
    """
    arguments = list(inspect.signature(constructor).parameters.values())[1:]
    if not arguments or (arguments[-1].name, arguments[-1].kind) != ("common", _KEYWORDS):
        return inspect.Signature(arguments)  # of a subclass with a constructor of its own
    named = {argument.name for argument in arguments}
    types = get_type_hints(CommonOptions)
    options = [
        inspect.Parameter(name, _KEYWORD, default=default, annotation=types[name])
        for name, default in {**COMMON, **defaults}.items()
        if name not in named
    ]
    return inspect.Signature([*arguments[:-1], *options])


_KEYWORD, _KEYWORDS = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD


# Torch's hints of implementation. The step here is always fused, multi-tensor and capturable, so
# they choose nothing, but for fused=True, which opts in to the fused protocol of
# torch.amp.GradScaler.
HINTS = ("foreach", "fused", "capturable", "differentiable")


def plain_hints(options: Group) -> Group:
    """The same options with torch's hints as bools: checkpoint tools take no None."""
    return {k: bool(v) if k in HINTS else v for k, v in options.items()}


def is_int(value: object) -> bool:
    """An int in the sense of an option: True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_number(
    name: str, value: Any, *, below: float | None = None, signed: bool = False
) -> None:
    """Raises ValueError unless ``value`` is a finite number >= 0, and less than ``below`` if given.

    A tensor of one element will do.

    Args:
        signed: whether any finite number will.
    """
    limit = "a finite number >= 0" if below is None else f"a number in [0, {below:g})"
    if signed:
        limit = "a finite number"
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name}: expected {limit}, got a tensor of {value.dtype}")
        if value.numel() != 1:
            raise ValueError(
                f"{name}: expected one element, got a tensor of shape {list(value.shape)}"
            )
    elif not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ValueError(f"{name}: expected {limit}, got {value!r}")
    in_range = value > -math.inf if signed else value >= 0
    if not (in_range and value < (math.inf if below is None else below)):
        raise ValueError(f"{name}: expected {limit}, got {value}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_betas(betas: Any, number: int) -> None:
    """Raises ValueError unless this is a tuple or list of so many decay rates, each in [0, 1)."""
    if not isinstance(betas, (tuple, list)) or len(betas) != number:
        expected = {2: "two", 3: "three"}[number]
        raise ValueError(f"betas: expected {expected} numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta, below=1)


def check_momentum(group: dict[str, Any]) -> None:
    """Raises ValueError unless momentum, dampening and nesterov are in range."""
    check_number("momentum", group["momentum"])
    check_number("dampening", group["dampening"])
    check_flag("nesterov", group["nesterov"])


def check_sum_of_gradients(name: str, saved: dict[str, Any]) -> None:
    """Raises ValueError for options of a checkpoint of Muon, whose momentum buffer is no sum.

    Args:
        name: of the class that loads it.
        saved: a group of the checkpoint.
    """
    if "ns_steps" in saved or "use_muon" in saved:
        raise ValueError(
            f"{name}: expected a momentum_buffer that is a sum of gradients, got a checkpoint of "
            "Muon, whose buffer is an average of them. Muon takes it"
        )


# The option that a schedule may set to 0 for a while, and the state that stays as it is then.
MOMENTUM = {"momentum": "momentum_buffer"}


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether a group keeps a buffer: a tensor may come to be above 0."""
    return isinstance(group["momentum"], Tensor) or group["momentum"] != 0


def check_nesterov(group: dict[str, Any]) -> None:
    """Raises ValueError unless Nesterov's momentum comes with what torch.optim asks for with it, in
    a new group: later a schedule may have set the momentum to 0 for a while."""
    if group["nesterov"] and (group["momentum"] == 0 or group["dampening"] != 0):
        raise ValueError(
            "nesterov: expected a momentum above 0 and a dampening of 0 with it, got "
            f"momentum={group['momentum']!r}, dampening={group['dampening']!r}"
        )


# -- what all optimizers have ------------------------------------------------------------------


# The options that say where the bytes of the state lie, and in which form. They may not change once
# there is state.
LAYOUT_OPTIONS = (
    "optim_bits",
    "min_8bit_size",
    "block_size",
    "state_format",
    "block_wise",
    "is_paged",
    "page_dir",
)
# Of the state as it is saved: the keys, what they hold and how blocks lie. An option of every
# group, because FSDP's state-dict utilities drop the top-level keys of a state dict.
STATE_VERSION = 1
# percentile_clipping, switched off.
NO_CLIPPING = 100


def clips(group: Group) -> bool:
    """Whether the gradients of a group are clipped by a percentile of their norms."""
    return bool(group["percentile_clipping"] != NO_CLIPPING)


def check_common_options(group: Group) -> None:
    """Raises ValueError or NotImplementedError for one of :class:`CommonOptions`, or a learning
    rate, that is out of range."""
    if group["differentiable"]:
        raise NotImplementedError(
            f"differentiable={group['differentiable']!r}: a step that autograd records is not "
            "implemented, it must be False"
        )
    check_flag("maximize", group["maximize"])
    percentile = group["percentile_clipping"]
    if not is_int(percentile) or not 1 <= percentile <= NO_CLIPPING:
        raise ValueError(
            f"percentile_clipping: expected an int from 1 to {NO_CLIPPING - 1}, or {NO_CLIPPING} "
            f"for off, got {percentile!r}"
        )
    _check_paging(group)
    # A schedule that ends at 0 may end at -5e-21, which a step takes, and so do checkpoints.
    check_number("lr", group["lr"], signed=True)
    if not is_int(group["optim_bits"]) or group["optim_bits"] not in (4, 8, 32):
        raise ValueError(f"optim_bits: expected 4, 8 or 32, got {group['optim_bits']!r}")
    if not is_int(group["min_8bit_size"]) or group["min_8bit_size"] < 0:
        raise ValueError(f"min_8bit_size: expected an int >= 0, got {group['min_8bit_size']!r}")
    check_block_size(group["block_size"])
    _check_state_format(group["state_format"])
    check_flag("block_wise", group["block_wise"])
    if group["optim_bits"] == 4:
        check_4bit(group)
    rounding = group["state_rounding"]
    if rounding not in ("stochastic", "nearest"):
        raise ValueError(f"state_rounding: expected 'stochastic' or 'nearest', got {rounding!r}")
    check_flag("stochastic_rounding", group["stochastic_rounding"])
    if not is_int(group["seed"]) or not -(2**63) <= group["seed"] < 2**63:
        raise ValueError(f"seed: expected an int of 64 bits, got {group['seed']!r}")
    if not is_int(group["state_version"]) or group["state_version"] != STATE_VERSION:
        raise ValueError(
            f"state_version: this version of torchao8 reads and writes {STATE_VERSION}, got "
            f"{group['state_version']!r}. A newer one may have saved the checkpoint."
        )


def _check_state_format(value: Any) -> None:
    names = [each.name for each in ops.FORMATS if each.bits == 8]
    if value not in names:
        expected = " or ".join(map(repr, names))
        raise ValueError(f"state_format: expected {expected}, got {value!r}")


def check_4bit(group: Group) -> None:
    """Raises ValueError for options that do not go together with state of 4 bits."""
    if group["state_format"] != "dynamic":
        raise ValueError(
            f"state_format: expected 'dynamic' with optim_bits=4, got {group['state_format']!r}. "
            "4 bits have a format of their own; the others have 8 bits (optim_bits=8)"
        )
    if not group["block_wise"]:
        raise ValueError(
            "block_wise: expected True with optim_bits=4, got False. One scale for a whole tensor "
            "is there with 8 bits (optim_bits=8)"
        )


def _check_paging(group: Group) -> None:
    check_flag("is_paged", group["is_paged"])
    folder = group["page_dir"]
    if not isinstance(folder, str):
        raise ValueError(f"page_dir: expected a str, got {folder!r}")
    if folder and not group["is_paged"]:
        raise ValueError(f"page_dir: expected '', as is_paged is False, got {folder!r}")


def known_options(group: Group) -> Group:
    """The options as a step checks them: what lies on a device is not read, and a rate that is not
    finite is refused later, with the op's words."""
    options = {k: v if k == "params" else known(v) for k, v in group.items()}
    rate = options["lr"]
    is_one = isinstance(rate, float) or (isinstance(rate, Tensor) and rate.numel() == 1)
    if is_one and not math.isfinite(cast(float, rate)):
        options["lr"] = 0.0
    return options
