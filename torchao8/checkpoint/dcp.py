"""Loading ``torch.distributed.checkpoint`` folders, whatever format the state in them has."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from torchao8 import sharding
from torchao8._modes import normal_tensors
from torchao8.block_layout import codes_shape, scale_shape
from torchao8.checkpoint._names import check_own, names_of
from torchao8.optim._state import paging
from torchao8.optim._state.load import all_or_none
from torchao8.optim._state.spec import BESIDE_STATES, is_own

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from torchao8.optim.base import LowPrecisionOptimizer


@normal_tensors()
def load_dcp(
    model: nn.Module,
    optimizer: LowPrecisionOptimizer,
    checkpoint_id: str | os.PathLike[str],
    *,
    key: str = "optimizer",
    process_group: ProcessGroup | None = None,
    no_dist: bool = False,
) -> None:
    """Loads the state of an optimizer from a ``dcp.save`` folder, or raises and changes nothing.

    ``dcp.load`` reads into the live state: what fails half-way leaves half of it changed, and
    state of another format, as 32-bit where 8 bits are kept here or the reverse, cannot be read at
    all. This reads into memory of its own (paged, where state is), a second copy of the state on
    this rank while it loads, and hands it to ``optimizer.load_state_dict``, which checks and
    converts it. So it also takes what ``torch.optim.AdamW`` saved. Options that the checkpoint
    lacks stay as they are.

    Parameters go by their names, whatever their order and whatever wraps the model. A state dict
    that was saved flat, as torchtitan saves it
    (``StateDictOptions(flatten_optimizer_state_dict=True)``), is read in the same way. A collective
    where the process group is initialized: every rank calls it.

    Args:
        model: whose parameters the optimizer has; of several, as of pipeline stages that were saved
            flat into one folder, the one of this optimizer.
        checkpoint_id: the folder that ``dcp.save`` wrote.
        key: under which ``get_optimizer_state_dict(model, optimizer)`` was saved in it; "" if it
            was saved without a key.
        process_group, no_dist: as of ``torch.distributed.checkpoint.load``.

    Raises:
        TypeError: no optimizer of this library.
        ValueError: no state of a parameter or no options in the checkpoint, or such that do not
            fit.
        OSError: no such folder, or no space for paged state.
        torch.distributed.checkpoint.CheckpointException: files that are missing or damaged.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemReader, load

    check_own("load_dcp", optimizer)

    def read(rooms: dict[str, Any]) -> dict[str, Any]:
        """Everything that there is room for: a tensor to read into, or None for a plain value."""
        reader = FileSystemReader(checkpoint_id)
        load(rooms, storage_reader=reader, process_group=process_group, no_dist=no_dist)
        return rooms

    def agree(refused: bool) -> bool:
        if no_dist or not dist.is_initialized():
            return refused
        votes = [refused] * dist.get_world_size(process_group)
        dist.all_gather_object(votes, refused, group=process_group)
        return any(votes)

    top = f"{key}." if key else ""
    start = f"{top}param_groups."
    with all_or_none(agree):
        metadata = FileSystemReader(checkpoint_id).read_metadata()
        saved = metadata.state_dict_metadata
        paths = metadata.planner_data if isinstance(metadata.planner_data, Mapping) else {}
        option_keys = [k for k in saved if k.startswith(start)]
        if not option_keys:
            raise ValueError(f"{checkpoint_id}: no options, expected keys {start}0.*")
    with all_or_none(agree):
        names = names_of(model, optimizer)
        is_flat = not any(re.fullmatch(r"\d+\.params", k[len(start) :]) for k in option_keys)
        if is_flat:  # each parameter has its own options, and the folder may hold other models'
            known = set(names.values())
            option_keys = [
                k for k in option_keys if _owner(_split(k, paths, top)[0], start) in known
            ]
        option_rooms = {k: _plain_room(saved[k]) for k in option_keys}
    options = _folded(read(option_rooms), paths, top)
    with all_or_none(agree):
        options_of = _flat_options if is_flat else _options_of_groups
        saved_groups = options_of(str(checkpoint_id), optimizer, names, options, start)
        groups, numbers = _groups(optimizer, saved_groups)
        rooms: dict[str, Any] = {}
        owners: dict[str, tuple[Tensor, str]] = {}  # of rooms that are to be paged
        for group, live in zip(groups, optimizer.param_groups, strict=True):
            needs_state = bool(optimizer._states({**live, **group}))  # torch's SGD may keep nothing
            for p in live["params"]:
                prefix = f"{top}state.{names[p]}."
                entries = {k: entry for k, entry in saved.items() if k.startswith(prefix)}
                has_entries = any(is_own(k[len(prefix) :]) for k in entries)
                if not has_entries and p.requires_grad and needs_state:
                    raise ValueError(
                        f"{checkpoint_id}: no state of {names[p]}, expected keys {prefix}*"
                    )
                block_size = group.get("block_size")
                rooms.update({k: _room(p, entry, block_size) for k, entry in entries.items()})
                folder = paging.folder_of(live, p)
                if folder is not None:
                    beside = [prefix + name for name in BESIDE_STATES]
                    own = [k for k in entries if is_own(k[len(prefix) :]) and k not in beside]
                    owners.update(dict.fromkeys(own, (p, folder)))
        rooms.update(paging.paged_rooms(rooms, owners))
    values = _folded(read(rooms), paths, top)
    state: dict[int, dict[str, Any]] = {}
    for p, number in numbers.items():
        prefix = f"{top}state.{names[p]}."
        found = {k[len(prefix) :]: v for k, v in values.items() if k.startswith(prefix)}
        if found:
            state[number] = found
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _options_of_groups(
    folder: str,
    optimizer: LowPrecisionOptimizer,
    names: Mapping[Tensor, str],
    options: Mapping[str, Any],
    start: str,
) -> list[dict[str, Any]]:
    """For each group of the optimizer, the options of the group in the checkpoint that has its
    parameters."""
    saved: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        number, _, option = key[len(start) :].partition(".")
        saved.setdefault(number, {})[option] = value
    found_groups: list[dict[str, Any]] = []
    for i, live in enumerate(optimizer.param_groups):
        wanted = {names[p] for p in live["params"]}
        found = [n for n, group in saved.items() if wanted & set(group.get("params", ()))]
        if not wanted:
            found = [str(i)] if str(i) in saved else []
        if len(found) != 1:
            raise ValueError(
                f"{folder}: expected the parameters of group {i} of the optimizer in one group of "
                f"the checkpoint, got them in {len(found)}. "
                + ("The options of which should hold?" if found else "Names differ.")
            )
        found_groups.append(saved[found[0]])
    return found_groups


def _flat_options(
    folder: str,
    optimizer: LowPrecisionOptimizer,
    names: Mapping[Tensor, str],
    options: Mapping[str, Any],
    start: str,
) -> list[dict[str, Any]]:
    """The same of a flat checkpoint, in which each parameter has the options of its group."""
    saved: dict[str, dict[str, Any]] = {}
    for key, value in options.items():
        name = _owner(key, start)
        option = key[len(start) + len(name) + 1 :]
        if option != "param_names":
            saved.setdefault(name, {})[option] = value
    found_groups: list[dict[str, Any]] = []
    for i, live in enumerate(optimizer.param_groups):
        wanted = [names[p] for p in live["params"]]
        found = [name for name in wanted if name in saved]
        if wanted and not found:
            raise ValueError(
                f"{folder}: no options of {wanted[0]}, expected keys {start}{wanted[0]}.*"
            )
        for name in found[1:]:
            ours, theirs = saved[found[0]], saved[name]
            for option in (*ours, *theirs):
                first, other = ours.get(option), theirs.get(option)
                if not _is_same(first, other):
                    raise ValueError(
                        f"{folder}: expected the same options for all parameters of group {i} of "
                        f"the optimizer, got {option}={first!r} for {found[0]} and "
                        f"{option}={other!r} for {name}. Give the optimizer the parameter groups "
                        "that the checkpoint was saved with"
                    )
        found_groups.append(saved[found[0]] if found else {})
    return found_groups


def _owner(key: str, start: str) -> str:
    """The parameter that an option in a flat checkpoint is of."""
    return key[len(start) :].rpartition(".")[0]


_Paths = Mapping[str, tuple[Any, ...]]


class _Taken(dict[Any, Any]):
    """A dict or list that torch has saved item by item, as ``param_groups.0.own.a``."""


def _folded(values: Mapping[str, Any], paths: _Paths, top: str) -> dict[str, Any]:
    """Entries of a folder, with the dicts and lists among them in one piece again.

    Args:
        paths: of the entries in the dict that was saved.
        top: what the keys of the optimizer begin with.
    """
    whole: dict[str, Any] = {}
    for key, value in values.items():
        base, inner = _split(key, paths, top)
        *above, last = base, *inner
        node = whole
        for name in above:
            node = node.setdefault(name, _Taken())
        node[last] = value
    return {key: _in_one_piece(value) for key, value in whole.items()}


def _split(key: str, paths: _Paths, top: str) -> tuple[str, tuple[Any, ...]]:
    """The key that an option, or a state, has as a whole, and where in it an entry stands.

    It is behind ``param_groups`` and the number of a group, or ``state`` and the name of a
    parameter. In a flat state dict these three are one key.
    """
    path = paths.get(key, ())
    for i, part in enumerate(path):
        if "".join(f"{above}." for above in path[:i]) == top:
            length = i + (1 if "." in str(part) else 3)
            return ".".join(map(str, path[:length])), path[length:]
    return key, ()


def _in_one_piece(value: Any) -> Any:
    if not isinstance(value, _Taken):
        return value
    items = {name: _in_one_piece(item) for name, item in value.items()}
    is_list = all(isinstance(name, int) for name in items)
    return [items[i] for i in sorted(items)] if is_list else items


def _is_same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_is_same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(_is_same, a, b))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    return bool(a == b)


def _groups(
    optimizer: LowPrecisionOptimizer, saved_groups: Iterable[dict[str, Any]]
) -> tuple[list[dict[str, Any]], dict[Tensor, int]]:
    """The groups of a state dict: the optimizer's, with the options of those in the checkpoint.

    Also the number of each parameter in them.
    """
    groups: list[dict[str, Any]] = []
    numbers: dict[Tensor, int] = {}
    for live, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        group = dict(saved)
        for option, value in group.items():
            if isinstance(value, Tensor) and isinstance(live.get(option), Tensor):
                group[option] = value.to(live[option].device)
        group["params"] = list(range(len(numbers), len(numbers) + len(live["params"])))
        group.pop("param_names", None)  # they would be those of the checkpoint's order
        numbers.update(zip(live["params"], group["params"], strict=True))
        groups.append(group)
    return groups, numbers


def _plain_room(entry: Any) -> Tensor | None:
    """A tensor to read one of the checkpoint's into, None for what is no tensor."""
    if not hasattr(entry, "size"):
        return None
    return torch.empty(tuple(entry.size), dtype=entry.properties.dtype, device="cpu")


def _room(p: Tensor, entry: Any, block_size: int | None) -> Tensor | None:
    """The same for state of ``p``: sharded as ``p`` is, where its shards hold whole blocks.

    Elsewhere every rank reads all of the codes, to cut them anew.
    """
    room = _plain_room(entry)
    if room is None or not sharding.is_dtensor(p):
        return None if room is None else room.to(p.device)
    size, dtype, part = tuple(room.shape), room.dtype, sharding.local(p)
    shape: tuple[int, ...] | None = None
    whole = tuple(p.shape)
    if size == whole and dtype.is_floating_point:
        shape = tuple(part.shape)
    elif block_size is not None:
        bits = 4 if dtype == torch.uint8 and size != whole else 8
        where = sharding.shard_rows(p, block_size, bits)
        if where is not None and dtype == torch.uint8:
            shape = {codes_shape(whole, block_size, bits): where.codes_shape(bits)}.get(size)
        elif where is not None:
            shape = {scale_shape(whole, block_size): where.scale_shape}.get(size)
    if shape is None or not size:
        return room.to(part.device)
    return sharding.like(p, torch.empty(shape, dtype=dtype, device=part.device), size)
