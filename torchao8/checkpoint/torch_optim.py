"""The state of an optimizer here as ``torch.optim.Adam`` and ``AdamW`` load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.optim._checks import is_dtensor

if TYPE_CHECKING:
    from torchao8.optim.base import Group, LowPrecisionOptimizer

# How torch makes its step is for torch to choose: None lets it, and True for two of them at once is
# an error there.
_HINTS = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
# What a group of torch.optim.AdamW has besides the hints and the parameters.
_OPTIONS = frozenset(
    ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay")
)


def to_torch(optimizer: LowPrecisionOptimizer) -> dict[str, Any]:
    """The state dict that ``torch.optim.Adam`` or ``AdamW`` takes in ``load_state_dict``.

        >>> theirs = torch.optim.AdamW(model.parameters())
        >>> theirs.load_state_dict(torchao8.checkpoint.to_torch(ours))

    Nothing is lost on the way: 8-bit moments become the float32 numbers that the next step here
    would have started from. The rounding to 8 bits is in these already, and does not go away.
    ``torch.optim`` itself keeps moments in the dtype of the parameter and rounds them to it when it
    loads them, for bfloat16 and float16 parameters.

    ``torch.optim.AdamW`` always decays decoupled, whatever is loaded; ``torch.optim.Adam`` takes
    the kind of decay from the groups.

    Args:
        optimizer: one of the Adam family; parameters without state have none in the result.

    Returns:
        ``state``, by the number of the parameter: ``step``, a 0-d float32 tensor on the CPU, and
        ``exp_avg``, ``exp_avg_sq`` and with amsgrad ``max_exp_avg_sq``, float32 of the shape of the
        parameter, on its device. ``param_groups``: the options of ``torch.optim.AdamW``,
        ``params``, ``param_names`` if the parameters have names, and keys that no optimizer here
        knows, such as a scheduler's ``initial_lr``. No moment and no step shares memory with the
        optimizer.

    Raises:
        NotImplementedError: an optimizer without the moments of Adam, or sharded state.
    """
    saved = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    groups = []
    for live, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        signed = {state.name: state.signed for state in optimizer._states(live)}
        if not {"exp_avg", "exp_avg_sq"} <= set(signed):
            raise NotImplementedError(
                f"to_torch: expected an optimizer of the Adam family, "
                f"got {type(optimizer).__name__} with the states {list(signed)}"
            )
        for index in group["params"]:
            if saved["state"].get(index):
                state[index] = _param_state(index, saved["state"][index], signed, live)
        ours = set(optimizer.defaults) - _OPTIONS
        groups.append({**{k: v for k, v in group.items() if k not in ours}, **_HINTS})
    return {"state": state, "param_groups": groups}


def _param_state(
    index: int, saved: dict[str, Tensor], signed: dict[str, bool], group: Group
) -> dict[str, Tensor]:
    """The state of one parameter in 32 bits."""
    for key, value in saved.items():
        if is_dtensor(value):
            raise NotImplementedError(
                f"to_torch: {key} of parameter {index} is sharded (a DTensor). Gather a full state "
                "dict first (torch.distributed.checkpoint.state_dict, full_state_dict=True), load "
                "it into an unsharded optimizer, and convert that one."
            )
    state = {"step": saved["step"].to("cpu", torch.float32, copy=True)}
    for name, is_signed in signed.items():
        if name in saved:
            state[name] = saved[name].to(torch.float32, copy=True)
        else:
            state[name] = ops.dequantize_blockwise(
                saved[f"{name}_codes"],
                saved[f"{name}_scale"],
                block_size=group["block_size"],
                signed=is_signed,
            )
    return state
