"""Loading ``torch.distributed.checkpoint`` folders that hold the state in another format."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchao8.sharding import is_dtensor, like, local

if TYPE_CHECKING:
    from torchao8.optim.base import LowPrecisionOptimizer


def load_dcp(
    model: nn.Module,
    optimizer: LowPrecisionOptimizer,
    checkpoint_id: str | os.PathLike[str],
    *,
    key: str = "optimizer",
) -> None:
    """Loads the state of an optimizer from a checkpoint, whatever precision it was saved in.

    ``dcp.load`` reads what the live state has and knows no other format: it fails where the
    checkpoint holds 32-bit state of what is kept in 8 bits here, or the reverse. So where the
    formats differ, because of options, of the way a parameter is sharded or because
    ``torch.optim.AdamW`` saved it, this reads what is there and ``optimizer.load_state_dict``
    converts it. What has the same format is read as ``dcp.load`` does, byte for byte. Options that
    the checkpoint lacks stay as they are.

    A collective where the process group is initialized: every rank calls it.

    Args:
        model: whose parameters the optimizer has; their names are those of the checkpoint.
        checkpoint_id: the folder that ``dcp.save`` wrote.
        key: under which ``get_optimizer_state_dict(model, optimizer)`` was saved in it.

    Raises:
        ValueError: no state of a parameter or no options in the checkpoint, or such that do not
            fit.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    saved = dcp.FileSystemReader(checkpoint_id).read_metadata().state_dict_metadata
    state_dict: dict[str, Any] = get_optimizer_state_dict(model, optimizer)
    params = dict(model.named_parameters())
    converted = []
    for name, live in state_dict["state"].items():
        start = f"{key}.state.{name}."
        keys = {k[len(start) :]: entry for k, entry in saved.items() if k.startswith(start)}
        if not keys:
            raise ValueError(f"{checkpoint_id}: no state of {name}, expected keys {start}*")
        if _differs(keys, live):
            p = params[name]
            converted.append(name)
            state_dict["state"][name] = {k: _room(p, entry) for k, entry in keys.items()}
    if not any(k.startswith(f"{key}.param_groups.0.") for k in saved):
        raise ValueError(f"{checkpoint_id}: no options, expected keys {key}.param_groups.0.*")
    # Partial: options that only live groups have. No state can be missing here.
    planner = DefaultLoadPlanner(allow_partial_load=True)
    dcp.load({key: state_dict}, checkpoint_id=checkpoint_id, planner=planner)
    for name in converted:
        state = state_dict["state"][name]
        # torch.optim keeps moments in the dtype of the parameter.
        state.update({k: v.float() for k, v in state.items() if v.dtype in _HALF})
    set_optimizer_state_dict(model, optimizer, state_dict)


_HALF = (torch.bfloat16, torch.float16)


def _differs(saved: dict[str, Any], live: dict[str, Tensor]) -> bool:
    """Whether state is to be converted: it has other keys, dtypes or scales."""
    return set(saved) != set(live) or any(
        (entry.properties.dtype, tuple(entry.size)) != (live[k].dtype, tuple(live[k].shape))
        for k, entry in saved.items()
        if k != "step"
    )


def _room(p: Tensor, entry: Any) -> Tensor:
    """A tensor to read one of the checkpoint into: sharded as the parameter where it is a moment.

    Codes and scales are read whole: where this is called, shards need not hold whole blocks.
    """
    size, dtype = tuple(entry.size), entry.properties.dtype
    device = local(p).device
    if is_dtensor(p) and size == tuple(p.shape) and dtype.is_floating_point:
        return like(p, torch.empty(local(p).shape, dtype=dtype, device=device), size)
    return torch.empty(size, dtype=dtype, device=device)
