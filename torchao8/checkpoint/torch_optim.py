"""The state of an optimizer here as the class of ``torch.optim`` loads it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchao8.block_layout import Scales
from torchao8.checkpoint._names import check_own
from torchao8.optim import classes
from torchao8.optim._state.formats import format_in
from torchao8.optim._state.layout import layout_of
from torchao8.optim._state.moments import decoded
from torchao8.optim._state.spec import has_state, is_own
from torchao8.optim.contract import bare_name
from torchao8.optim.options import COMMON, HINTS

if TYPE_CHECKING:
    from torchao8.optim.base import LowPrecisionOptimizer


def to_torch(optimizer: LowPrecisionOptimizer) -> dict[str, Any]:
    """The state dict that the class of ``torch.optim`` takes in ``load_state_dict``.

        >>> theirs = torch.optim.AdamW(model.parameters())
        >>> theirs.load_state_dict(torchao8.checkpoint.to_torch(ours))

    Nothing is lost on the way: 8-bit states become the float32 numbers that the next step here
    would have started from. The rounding to 8 bits is in these already, and does not go away. One
    state is changed: the ``square_avg`` of a centered RMSprop8bit is raised to at least 64 / 63 of
    the square of ``grad_avg``, since torch takes the root of their difference without a floor.
    ``torch.optim`` itself keeps states in the dtype of the parameter and rounds them to it when it
    loads them, for bfloat16 and float16 parameters.

    ``torch.optim.AdamW`` always decays decoupled, whatever is loaded; ``torch.optim.Adam`` takes
    the kind of decay from the groups.

    Args:
        optimizer: of a class that ``torch.optim`` has too, with 8-bit or 32-bit state.

    Returns:
        ``state``, by the number of the parameter: ``step``, a 0-d float32 tensor on the CPU, which
        SGD and Muon do not have, other numbers of a parameter in the same form, and the states of
        :mod:`torch.optim`, float32 of the shape of the parameter, on its device, and sharded as it
        is. A parameter that has made no step has none, but with Adagrad, which has it from the
        start. ``param_groups``: the options of the class of ``torch.optim``, ``params``,
        ``param_names`` if the parameters have names, and keys that no optimizer here knows, such as
        a scheduler's ``initial_lr``. No state shares memory with the optimizer.

    Raises:
        TypeError: no optimizer of this library.
        NotImplementedError: a class that ``torch.optim`` does not have.
        ValueError: an option that its class does not have, as Muon's ``maximize``, or a parameter
            that it does not take.
    """
    check_own("to_torch", optimizer)
    torch_cls = _torch_class(optimizer)
    for group in optimizer.param_groups:
        optimizer._check_for_torch(group)
    # A matrix, since Muon takes nothing else.
    options = torch_cls([torch.zeros((1, 1), dtype=torch.float32, device="cpu")]).defaults
    # How torch makes its step is for torch to choose.
    hints = {name: COMMON[name] for name in HINTS if name in options}
    saved = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    groups = []
    for live, group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for p, index in zip(live["params"], group["params"], strict=True):
            theirs = _state(optimizer, live, p)
            if theirs:
                state[index] = theirs
        ours = set(optimizer.defaults) - set(options)
        groups.append({**{k: v for k, v in group.items() if k not in ours}, **hints})
    return {"state": state, "param_groups": groups}


def _torch_class(optimizer: LowPrecisionOptimizer) -> Any:
    """The class of torch.optim with the rule of an optimizer."""
    if optimizer._torch_class is not None:
        return optimizer._torch_class
    name = type(optimizer).__name__
    known = [n for n, cls in vars(classes).items() if getattr(cls, "_torch_class", None)]
    *names, last = [n for n in known if n == bare_name(n)]
    raise NotImplementedError(
        f"to_torch: expected {', '.join(names)} or {last}, in 4, 8 or 32 bits, got {name}; "
        f"torch.optim has no {bare_name(name)}"
    )


def _state(optimizer: LowPrecisionOptimizer, group: dict[str, Any], p: Tensor) -> dict[str, Tensor]:
    """The state of a parameter as torch has it; none before the first step."""
    own = optimizer.state.get(p, {})
    if not has_state(own):
        if not optimizer._torch_state_at_start:
            return _copied(own)
        layout = layout_of(optimizer, group, p)
        own = {**own, **{key: spec.empty(p) for key, spec in layout.items()}}
    states = optimizer._states_in(group, own)
    theirs = {"step": own["step"].detach().clone(), **decoded(p, states, own, Scales.of(group))}
    if format_in(states, own).is_quantized:
        optimizer._mend_decoded(theirs)
    for key in ("step", *(state.name for state in states if state.is_scalar)):
        theirs[key] = theirs[key].cpu()
    return {
        **optimizer._of_torch(theirs),
        **_copied({k: v for k, v in own.items() if not is_own(k)}),
    }


def _copied(others: dict[str, Any]) -> dict[str, Any]:
    """What others keep for a parameter, which may be part of a graph."""
    return {
        k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v)
        for k, v in others.items()
    }
