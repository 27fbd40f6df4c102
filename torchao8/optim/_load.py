"""``load_state_dict``: checks of a whole checkpoint, and its conversion to what is kept here."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

from torch.optim import Optimizer

from torchao8 import sharding
from torchao8.block_layout import check_block_size
from torchao8.optim._buckets import Group
from torchao8.optim._checkpoint import convert, seal
from torchao8.optim._checks import describe

if TYPE_CHECKING:
    from torchao8.optim.base import LowPrecisionOptimizer

# Torch's hints of implementation. The step here is always fused, multi-tensor and capturable, so
# they choose nothing, but for fused=True, which opts in to the fused protocol of
# torch.amp.GradScaler.
HINTS = ("foreach", "fused", "capturable", "differentiable")


def seal_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Load hook: checks a checkpoint against the optimizer and protects its tensors from a cast."""
    live, saved = optimizer.param_groups, state_dict["param_groups"]
    if [len(g["params"]) for g in live] != [len(g["params"]) for g in saved]:
        return None  # torch refuses it, and says so
    params = [p for group in live for p in group["params"]]
    refusal: Exception | None = None
    try:
        sealed = _sealed(cast("LowPrecisionOptimizer", optimizer), state_dict)
    except Exception as error:
        refusal = error
    if sharding.agree(params, refused=refusal is not None) and refusal is None:
        raise ValueError("another rank refused the checkpoint, and says why; nothing has changed")
    if refusal is not None:
        raise refusal
    return sealed


def _sealed(optimizer: LowPrecisionOptimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    groups, state = [], dict(state_dict["state"])
    to_8bit: list[str] = []
    to_32bit: list[str] = []
    reblocked: list[str] = []
    for live, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        _check_order(live, saved)
        kept = {name: live[name] for name in optimizer._own_options}
        missing = {name: live[name] for name in optimizer.defaults}
        group = {**missing, **plain_hints(saved), **kept}
        optimizer._check_options(group)
        groups.append(group)
        states = optimizer._states(group)
        saved_block_size = saved.get("block_size", group["block_size"])
        check_block_size(saved_block_size)
        for p, saved_id in zip(live["params"], saved["params"], strict=True):
            values = state.get(saved_id)
            if not values:
                continue
            label, layout = describe(optimizer, p), optimizer._layout(group, p)
            converted = convert(
                label, layout, states, values, group["block_size"], saved_block_size
            )
            if converted is not values:
                was_8bit, is_8bit = (any(k.endswith("_codes") for k in s) for s in (values, layout))
                (to_32bit if not is_8bit else reblocked if was_8bit else to_8bit).append(label)
            state[saved_id] = seal(label, p, layout, converted)
    known = {saved_id for group in state_dict["param_groups"] for saved_id in group["params"]}
    stray = [key for key in state if key not in known]
    if stray:
        raise ValueError(f"state of {stray[0]!r}: no parameter group of the checkpoint has it")
    _tell_of_conversion(optimizer, to_8bit, "in 32 bits, and is rounded to 8")
    _tell_of_conversion(optimizer, to_32bit, "in 8 bits, and is kept in 32 from here on")
    _tell_of_conversion(optimizer, reblocked, "with another block_size, and is rounded anew")
    return {**state_dict, "state": state, "param_groups": groups}


def _check_order(live: Group, saved: Group) -> None:
    """Names may differ, as wrappers of modules change them, but not be those of other parameters.

    Raises:
        ValueError: the same names in another order.
    """
    ours, theirs = live.get("param_names"), saved.get("param_names")
    if ours and theirs and list(ours) != list(theirs) and sorted(ours) == sorted(theirs):
        i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        raise ValueError(
            f"param_names: the checkpoint has the parameters in another order: {theirs[i]!r} where "
            f"the optimizer has {ours[i]!r}"
        )


def _tell_of_conversion(optimizer: Optimizer, labels: list[str], how: str) -> None:
    if labels:
        others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
        warnings.warn(
            f"{type(optimizer).__name__}: the state of {labels[0]}{others} was saved {how}, as "
            "optim_bits, min_8bit_size, block_size or the sharding ask for here",
            stacklevel=2,
        )


def plain_hints(options: Group) -> Group:
    """The same options with torch's hints as bools: checkpoint tools take no None."""
    return {k: bool(v) if k in HINTS else v for k, v in options.items()}
