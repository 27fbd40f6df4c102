"""The state of an optimizer here as ``torch.optim.Adam`` and ``AdamW`` load it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from torchao8.block_layout import Scales
from torchao8.checkpoint._names import check_own
from torchao8.optim import _clipping
from torchao8.optim._checkpoint import in_32bit

if TYPE_CHECKING:
    from torchao8.optim.base import LowPrecisionOptimizer

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
        parameter, on its device, and sharded as it is. ``param_groups``: the options of
        ``torch.optim.AdamW``, ``params``, ``param_names`` if the parameters have names, and keys
        that no optimizer here knows, such as a scheduler's ``initial_lr``. No moment and no step
        shares memory with the optimizer.

    Raises:
        TypeError: no optimizer of this library.
        NotImplementedError: an optimizer without the moments of Adam.
    """
    check_own("to_torch", optimizer)
    saved = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    groups = []
    for live, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        states = optimizer._states(live)
        if not {"exp_avg", "exp_avg_sq"} <= {state.name for state in states}:
            raise NotImplementedError(
                f"to_torch: expected an optimizer of the Adam family, got "
                f"{type(optimizer).__name__} with the states {[state.name for state in states]}"
            )
        for p, index in zip(live["params"], group["params"], strict=True):
            if saved["state"].get(index):
                moments = in_32bit(p, states, optimizer.state[p], Scales.of(live))
                state[index] = {
                    k: v.detach().clone() for k, v in moments.items() if k != _clipping.KEY
                }
                state[index]["step"] = state[index]["step"].cpu()
        ours = set(optimizer.defaults) - _OPTIONS
        groups.append({**{k: v for k, v in group.items() if k not in ours}, **_HINTS})
    return {"state": state, "param_groups": groups}
