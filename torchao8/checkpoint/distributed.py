"""Loading ``torch.distributed.checkpoint`` folders that hold the state in another format."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from torchao8.optim.base import LowPrecisionOptimizer
from torchao8.sharding import is_dtensor, like, local


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
        ValueError: no state of a parameter in the checkpoint, or one that does not fit.
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
    for name, live in state_dict["state"].items():
        start = f"{key}.state.{name}."
        keys = {k[len(start) :]: entry for k, entry in saved.items() if k.startswith(start)}
        if not keys:
            raise ValueError(f"{checkpoint_id}: no state of {name}, expected keys {start}*")
        if set(keys) != set(live):
            p = params[name]
            state_dict["state"][name] = {k: _room(p, live, k, entry) for k, entry in keys.items()}
    groups = {k for k in saved if k.startswith(f"{key}.param_groups.")}
    dcp.load(
        {key: state_dict},
        checkpoint_id=checkpoint_id,
        planner=DefaultLoadPlanner(allow_partial_load=not groups),
    )
    set_optimizer_state_dict(model, optimizer, state_dict)
