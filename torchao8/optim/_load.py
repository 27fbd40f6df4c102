"""``load_state_dict``: checks of a whole checkpoint, and its conversion to what is kept here."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor
from torch.optim import Optimizer

from torchao8 import sharding
from torchao8.block_layout import check_block_size
from torchao8.checkpoint import foreign
from torchao8.optim._buckets import Group
from torchao8.optim._checkpoint import Layout, convert, parts_of, seal
from torchao8.optim._checks import describe

if TYPE_CHECKING:
    from torchao8.optim.base import LowPrecisionOptimizer

# Torch's hints of implementation. The step here is always fused, multi-tensor and capturable, so
# they choose nothing, but for fused=True, which opts in to the fused protocol of
# torch.amp.GradScaler.
HINTS = ("foreach", "fused", "capturable", "differentiable")


def seal_state_dict(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """Load hook: checks a checkpoint against the optimizer and protects its tensors from a cast.

    Where parameters are sharded, all ranks refuse what one of them does.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    loading, refusal = _Loading(cast("LowPrecisionOptimizer", optimizer), state_dict), None
    fits = [len(group["params"]) for group in optimizer.param_groups] == [
        len(group["params"]) for group in state_dict["param_groups"]
    ]
    try:
        if fits:
            loading.convert()
            loading.seal()
    except Exception as error:
        refusal = error
    refused = not fits or refusal is not None
    if sharding.agree(params, refused) and not refused:
        raise ValueError("another rank refused the checkpoint, and says why; nothing has changed")
    if refusal is not None:
        raise refusal
    if not fits:
        return None  # torch refuses it, and says so
    loading.tell()
    return {**state_dict, "state": loading.state, "param_groups": loading.groups}


class _Loading:
    """A checkpoint on its way into an optimizer.

    In two parts, as ranks must not part while they talk: first all that may be a collective, then
    the look at values, which differ from rank to rank.
    """

    def __init__(self, optimizer: LowPrecisionOptimizer, state_dict: dict[str, Any]) -> None:
        self.optimizer = optimizer
        self.saved_groups = state_dict["param_groups"]
        self.state = dict(state_dict["state"])
        self.groups: list[Group] = []
        self.parts: list[tuple[Any, str, Layout, dict[str, Tensor]]] = []
        # What to tell of: the parameters that were converted, by how, and who wrote their state.
        self.converted: dict[str, list[str]] = {}
        self.authors: set[str] = set()

    def convert(self) -> None:
        """Brings options and state into the format of the optimizer."""
        for live, saved in zip(self.optimizer.param_groups, self.saved_groups, strict=True):
            _check_order(live, saved)
            kept = {name: live[name] for name in self.optimizer._own_options}
            missing = {name: live[name] for name in self.optimizer.defaults}
            group = {**missing, **plain_hints(saved), **kept}
            self.optimizer._check_options(group)
            self.groups.append(group)
            block_size = saved.get("block_size", group["block_size"])
            check_block_size(block_size)
            for p, saved_id in zip(live["params"], saved["params"], strict=True):
                if self.state.get(saved_id):
                    if "state_version" not in saved:
                        self._read_foreign(group, p, saved_id)
                    self._convert_state(group, p, saved_id, block_size)
        known = {saved_id for group in self.saved_groups for saved_id in group["params"]}
        stray = [key for key in self.state if key not in known]
        if stray:
            raise ValueError(f"state of {stray[0]!r}: no parameter group of the checkpoint has it")

    def _read_foreign(self, group: Group, p: Tensor, saved_id: Any) -> None:
        values, states = self.state[saved_id], self.optimizer._states(group)
        label = describe(self.optimizer, p)
        own = foreign.to_own(label, values, p.shape, states, group["block_size"])
        if own is not None:
            self.authors.add(foreign.who_wrote(values) or "torch.optim")
            self.state[saved_id] = own

    def _convert_state(self, group: Group, p: Tensor, saved_id: Any, saved_block_size: int) -> None:
        values, states = self.state[saved_id], self.optimizer._states(group)
        label, layout = describe(self.optimizer, p), self.optimizer._layout(group, p)
        if not isinstance(values, dict):
            raise ValueError(f"state of {label}: expected a dict, got {type(values).__name__}")
        new = convert(label, layout, states, values, group["block_size"], saved_block_size)
        if new is not values:
            was_8bit, is_8bit = (any(k.endswith("_codes") for k in keys) for keys in (values, new))
            how = (
                "in 8 bits, and is kept in 32 from here on"
                if not is_8bit
                else "with another block_size, and is rounded anew"
                if was_8bit
                else "in 32 bits, and is rounded to 8"
            )
            self.converted.setdefault(how, []).append(label)
        self.parts.append((saved_id, label, layout, parts_of(label, p, layout, new)))

    def seal(self) -> None:
        """Checks the values on this rank."""
        for saved_id, label, layout, parts in self.parts:
            self.state[saved_id] = seal(label, layout, parts)

    def tell(self) -> None:
        """Warns of what was converted, once for each kind of conversion."""
        name = type(self.optimizer).__name__
        for how, labels in self.converted.items():
            others = f" and {len(labels) - 1} more" if len(labels) > 1 else ""
            _warn(
                f"{name}: the state of {labels[0]}{others} was saved {how}, as optim_bits, "
                "min_8bit_size, block_size or the sharding ask for here"
            )
        decays = any(
            g["weight_decay"] and not g.get("decoupled_weight_decay", True) for g in self.groups
        )
        if "bitsandbytes" in self.authors and decays:
            _warn(
                f"{name}: the checkpoint is one of bitsandbytes, whose Adam decays weights "
                "decoupled, as AdamW8bit does; this class adds weight_decay to the gradient"
            )


def _warn(message: str) -> None:
    """Points at the line that called ``load_state_dict``."""
    warnings.warn(message, stacklevel=7)


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


def plain_hints(options: Group) -> Group:
    """The same options with torch's hints as bools: checkpoint tools take no None."""
    return {k: bool(v) if k in HINTS else v for k, v in options.items()}
