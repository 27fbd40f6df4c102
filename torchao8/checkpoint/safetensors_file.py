"""The state of an optimizer as one safetensors file.

Each state tensor is an entry of the file, ``<parameter>.<key>``, with the bytes that it has in
``optimizer.state_dict()``. What is not a tensor stands in the file's metadata, under the one key
``torchao8_optimizer``, as JSON::

    {"format_version": 1,
     "state": {"<parameter>": ["step", "exp_avg_codes", ...], ...},
     "others": {"<parameter>": {"<key>": 0.5, ...}, ...},
     "param_groups": [{"params": ["<parameter>", ...], "options": {"lr": 0.001, ...}}, ...],
     "crc32": {"<parameter>.step": 1234567890, ...},
     "own_crc32": 1234567890}

``others`` holds values that other code keeps in the optimizer's state and that are not tensors. The
key is missing if there are none.

The checksums are those of zlib, of the bytes of each entry and of this JSON without the last item.

One key, because safetensors writes several in random order: the same state gives the same file.
"""

from __future__ import annotations

import ctypes
import json
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchao8._messages import warn_caller
from torchao8._modes import normal_tensors
from torchao8._numbers import plain
from torchao8.checkpoint._names import check_own, names_of
from torchao8.optim._state.load import all_or_none, ranks_of
from torchao8.optim._state.spec import is_own
from torchao8.sharding import is_dtensor

if TYPE_CHECKING:
    from torchao8.optim.base import LowPrecisionOptimizer

FORMAT_VERSION = 1
_METADATA_KEY = "torchao8_optimizer"

_Path = str | os.PathLike[str]


class _Header(NamedTuple):
    """What the metadata of a file say.

    Attributes:
        state: the keys of the state of each parameter that has one.
        others: values of its state that are not entries of the file.
        params: the parameters of each group, by the names that they have in the file.
        options: those of each group; a tuple or a tensor is a dict that says so.
        option_tensors: the entries that stand for options, or in ``others``.
        crc32: the checksum of the bytes of each entry, as of zlib.
    """

    state: dict[str, list[str]]
    others: dict[str, dict[str, Any]]
    params: list[list[str]]
    options: list[dict[str, Any]]
    option_tensors: set[str]
    crc32: dict[str, int]


def save_safetensors(
    optimizer: Optimizer, path: _Path, *, state_dict: dict[str, Any] | None = None
) -> None:
    """Saves state and options of an optimizer as one safetensors file.

    Parameters go by their names where every group has ``param_names`` or the state dict is one of
    ``get_optimizer_state_dict``, and by their numbers otherwise. Dtypes and bytes are kept, and so
    is every bit of an option.

    The file is written in a temporary folder beside it (``.<name>.<random>.tmp``), flushed to the
    disk and then renamed. A save that is killed therefore leaves the old file or none, and maybe
    that folder, which may be deleted. It takes the room of a second file on the disk.

    Sharded state must be gathered first. This one file is then written by one rank::

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        full = get_optimizer_state_dict(model, optimizer, options=options)  # on all ranks
        if torch.distributed.get_rank() == 0:
            save_safetensors(optimizer, path, state_dict=full)
        ...
        load_safetensors(optimizer, path, model=model)  # on all ranks

    Args:
        optimizer: any optimizer of this library.
        path: of the file; one that is there is replaced.
        state_dict: saved in place of ``optimizer.state_dict()``.

    Raises:
        ImportError: the package safetensors is not installed.
        TypeError: no optimizer of this library.
        ValueError: a state that is no plain dense tensor, DTensors among them, or an option that is
            no number, string, bool, None, tensor, or list or tuple of such. Nothing is written.

    What others keep in the state of a parameter is saved too where it is one of these things. One
    warning names the first of what is left out.
    """
    check_own("save_safetensors", optimizer)
    save_file = _import_save_file()
    saved = optimizer.state_dict() if state_dict is None else state_dict
    tensors, metadata = _flatten(saved)
    with _replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


@normal_tensors()
def load_safetensors(
    optimizer: LowPrecisionOptimizer, path: _Path, *, model: nn.Module | None = None
) -> None:
    """Loads a file of :func:`save_safetensors`, or raises and changes nothing.

    The same as ``optimizer.load_state_dict`` of what was saved, with all its checks and
    conversions. Tensors move to the device of their parameter, and an option that is a tensor to
    that of the option in whose place it comes. Where parameters are DTensors, every rank calls this
    and takes its part of the whole.

    Args:
        model: whose parameters the optimizer has. A file that has names is then loaded by them,
            in any order and whatever wraps the model. Without it, an optimizer of
            ``named_parameters()`` must have the same order, and any other one is refused.

    Raises:
        ImportError: the package safetensors is not installed.
        TypeError: no optimizer of this library.
        OSError: the file is not there or cannot be read.
        ValueError: the file is damaged, of a newer version or another kind, or does not fit the
            optimizer.
    """
    check_own("load_safetensors", optimizer)
    with all_or_none(ranks_of(optimizer)):
        header, tensors = _read(os.fspath(path))
        numbers = _numbers(os.fspath(path), header, optimizer, model)
    groups: list[dict[str, Any]] = []
    for names, options in zip(header.params, header.options, strict=True):
        group = {name: _decode(value, tensors) for name, value in options.items()}
        if model is not None:
            group.pop("param_names", None)
            names = sorted(names, key=numbers.__getitem__)
        groups.append({**group, "params": [numbers[name] for name in names]})
    for live, group in zip(optimizer.param_groups, groups, strict=False):
        for name, value in group.items():
            if isinstance(value, Tensor) and isinstance(live.get(name), Tensor):
                group[name] = value.to(live[name].device)
    state: dict[int, dict[str, Any]] = {
        numbers[name]: {key: tensors[f"{name}.{key}"] for key in keys}
        for name, keys in header.state.items()
    }
    for name, values in header.others.items():
        others = {key: _decode(value, tensors) for key, value in values.items()}
        state.setdefault(numbers[name], {}).update(others)
    optimizer.load_state_dict({"state": state, "param_groups": groups})


# -- writing -----------------------------------------------------------------------------------


def _flatten(saved: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The entries and the metadata of the file."""
    if not {"state", "param_groups"} <= set(saved):
        raise ValueError(
            f"state_dict: expected the keys 'state' and 'param_groups', got {sorted(saved)}. "
            "Where a full state dict was gathered with cpu_offload=True, only rank 0 has it"
        )
    tensors: dict[str, Tensor] = {}
    entries: dict[str, list[str]] = {}
    others: dict[str, dict[str, Any]] = {}
    left_out: list[str] = []
    names = _file_names(saved["param_groups"])
    for param, values in saved["state"].items():
        if param not in names:
            raise ValueError(f"state of {param!r}: no parameter group of the state dict has it")
        entries[names[param]] = []
        for key, value in values.items():
            name = f"{names[param]}.{key}"
            if is_own(key) or (isinstance(key, str) and _is_dense(value) and _holds(value)):
                _add(tensors, name, value)
                entries[names[param]].append(key)
                continue
            extra: dict[str, Tensor] = {}
            try:
                encoded = _encode(name, value, extra)
            except ValueError:
                encoded = _NOT_HELD
            if encoded is _NOT_HELD or not isinstance(key, str) or extra.keys() & tensors.keys():
                left_out.append(name)
            else:
                tensors.update(extra)
                others.setdefault(names[param], {})[key] = encoded
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        warn_caller(
            f"save_safetensors: {left_out[0]}{more} in the state of the optimizer is not saved: "
            "what others keep there can be tensors, numbers, strings, bools, None, and lists and "
            "tuples of such"
        )
    groups = []
    for number, group in enumerate(saved["param_groups"]):
        options = {
            option: _encode(f"param_groups.{number}.{option}", value, tensors)
            for option, value in group.items()
            if option != "params"
        }
        groups.append({"params": [names[p] for p in group["params"]], "options": options})
    content = {
        "format_version": FORMAT_VERSION,
        "state": {name: keys for name, keys in entries.items() if keys},
        **({"others": others} if others else {}),
        "param_groups": groups,
    }
    apart = _apart(tensors)
    content["crc32"] = {name: _crc32(tensor) for name, tensor in apart.items()}
    content["own_crc32"] = _crc32_of_json(content)
    return apart, {_METADATA_KEY: json.dumps(content)}


def _file_names(groups: list[dict[str, Any]]) -> dict[Any, str]:
    """What each parameter of a state dict is called in the file."""
    params = [p for group in groups for p in group["params"]]
    if all(isinstance(p, str) for p in params):
        return {p: p for p in params}
    names = [str(name) for group in groups for name in group.get("param_names", ())]
    if len(names) != len(params) or len(set(names)) != len(names):
        names = [str(number) for number in range(len(params))]
    return dict(zip(params, names, strict=True))


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout is torch.strided and not is_dtensor(value)


# Of safetensors 0.5, the oldest that is supported.
_DTYPES = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
           torch.float16, torch.bfloat16, torch.float32, torch.float64}  # fmt: skip
_NOT_HELD = object()


def _holds(value: Tensor) -> bool:
    """Whether a file can hold a dense tensor."""
    return value.dtype in _DTYPES and not value.is_meta


def _add(tensors: dict[str, Tensor], name: str, value: Any) -> None:
    """Raises ValueError unless the value can be an entry of the file and the name is free."""
    if is_dtensor(value):
        raise ValueError(
            f"{name}: expected a plain tensor, got a DTensor. Gather the state first, with "
            "get_optimizer_state_dict and full_state_dict=True, and pass it as state_dict"
        )
    if not _is_dense(value):
        kind = value.layout if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name}: expected a dense tensor, got {kind}")
    if not _holds(value):
        raise ValueError(
            f"{name}: expected a tensor with values, of a dtype that a safetensors file can hold, "
            f"got {value.dtype} on {value.device}"
        )
    if name in tensors:
        raise ValueError(f"{name}: two tensors have this name in the file")
    tensors[name] = value


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values on the CPU, contiguous, no two in one storage: safetensors asks for that."""
    storages: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        result[name] = value
    return result


def _crc32(tensor: Tensor) -> int:
    """Of the bytes of a contiguous tensor on the CPU."""
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.numel() == 0:
        return 0
    return zlib.crc32((ctypes.c_char * flat.numel()).from_address(flat.data_ptr()))


def _crc32_of_json(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


def _encode(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """An option as JSON; a tensor becomes an entry of the file."""
    value = plain(value)
    if isinstance(value, Tensor):
        _add(tensors, name, value)
        return {"tensor": name}
    if isinstance(value, (list, tuple)):
        items = [_encode(f"{name}.{i}", item, tensors) for i, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value  # json writes a float with as many digits as tell it from all others
    raise ValueError(
        f"{name}: expected a number, string, bool, None, tensor, or a list or tuple of such, got "
        f"{type(value).__name__}"
    )


@contextmanager
def _replacing(path: _Path) -> Iterator[str]:
    """Gives the name of a file to write, which takes the place of another one when it is whole."""
    target = os.path.realpath(path)  # of a link, the file that it points to
    folder, name = os.path.split(target)
    # In a folder of its own: safetensors writes under yet another name, beside the one it is given.
    with tempfile.TemporaryDirectory(".tmp", f".{name}.", folder) as scratch:
        temporary = os.path.join(scratch, name)
        with open(temporary, "xb") as file:
            mode = os.stat(file.fileno()).st_mode  # as open() makes files; safetensors takes 0600
        yield temporary
        os.chmod(temporary, stat.S_IMODE(mode))
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())  # or a crash of the machine could leave the name without bytes
        os.replace(temporary, target)
    if hasattr(os, "O_DIRECTORY"):  # the new name lies in the folder; Windows flushes none
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# -- reading -----------------------------------------------------------------------------------


def _read(path: str) -> tuple[_Header, dict[str, Tensor]]:
    """The header and every tensor of a file, after all checks that need no optimizer."""
    safe_open, error_type = _import_safe_open()
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _read_header(path, file.metadata() or {})
            _check_names(path, header, set(file.keys()))
            # Copies: what the file gives are views of its mapping, at any alignment.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
            for name, tensor in tensors.items():
                if header.crc32.get(name) != _crc32(tensor):
                    raise ValueError(
                        f"{path}: the tensor {name!r} is damaged: its bytes are not those that "
                        "were saved. Load an older checkpoint."
                    )
    except error_type as error:
        raise ValueError(
            f"{path}: damaged, or no safetensors file ({error}). Load an older checkpoint."
        ) from error
    return header, tensors


def _read_header(path: str, metadata: dict[str, str]) -> _Header:
    if _METADATA_KEY not in metadata:
        raise ValueError(
            f"{path}: a safetensors file, but none of save_safetensors: its metadata lack "
            f"{_METADATA_KEY!r}"
        )
    try:
        content = json.loads(metadata[_METADATA_KEY])
        version = content["format_version"]
        if version == FORMAT_VERSION:
            if content.pop("own_crc32") != _crc32_of_json(content):
                raise ValueError("a checksum")
            groups = content["param_groups"]
            header = _Header(
                {str(name): [str(key) for key in keys] for name, keys in content["state"].items()},
                {str(name): dict(values) for name, values in content.get("others", {}).items()},
                [[str(name) for name in group["params"]] for group in groups],
                [dict(group["options"]) for group in groups],
                {
                    name
                    for values in (
                        *(group["options"] for group in groups),
                        *content.get("others", {}).values(),
                    )
                    for value in values.values()
                    for name in _tensor_names(value)
                },
                {str(name): int(number) for name, number in content["crc32"].items()},
            )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path}: the metadata {_METADATA_KEY!r} are damaged ({error!r}). Load an older "
            "checkpoint."
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path}: format_version: this version of torchao8 reads {FORMAT_VERSION}, got "
            f"{version!r}. A newer one may have saved the file."
        )
    return header


def _check_names(path: str, header: _Header, found: set[str]) -> None:
    """Raises ValueError unless the file has what its header names, and nothing else."""
    params = [name for group in header.params for name in group]
    stray = sorted({*header.state, *header.others} - set(params))
    if len(set(params)) != len(params) or stray:
        which = f"of {stray[0]!r} is in none of them" if stray else "of one is in two of them"
        raise ValueError(f"{path}: expected parameters in one group each, but the state {which}")
    named = {f"{name}.{key}" for name, keys in header.state.items() for key in keys}
    named |= header.option_tensors
    if named - found:
        raise ValueError(
            f"{path}: {_first(named - found)} missing, which the metadata of the file name. "
            "Load an older checkpoint."
        )
    if found - named:
        raise ValueError(
            f"{path}: {_first(found - named)} too many: the metadata of the file do not name it"
        )


def _first(names: set[str]) -> str:
    others = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"the tensor {min(names)!r}{others} is"


def _tensor_names(value: Any) -> Iterator[str]:
    """The entries that an encoded option stands for, at any depth."""
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        if kind == "tensor":
            yield str(content)
        elif kind == "tuple":
            yield from _tensor_names(list(content))
        else:
            raise ValueError(f"an option of the kind {kind!r}")
    elif isinstance(value, list):
        for item in value:
            yield from _tensor_names(item)


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The reverse of :func:`_encode`, of what :func:`_tensor_names` has checked."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return tensors[str(content)] if kind == "tensor" else tuple(_decode(content, tensors))
    return value


def _numbers(
    path: str, header: _Header, optimizer: LowPrecisionOptimizer, model: nn.Module | None
) -> dict[str, int]:
    """The number in the state dict of each parameter in the file.

    Raises:
        ValueError: names that this optimizer does not know, or that stand in other groups.
    """
    names = [name for group in header.params for name in group]
    in_order = {name: number for number, name in enumerate(names)}
    if all(name == str(number) for name, number in in_order.items()):
        return in_order
    if model is None:
        if not all("param_names" in group for group in optimizer.param_groups):
            raise ValueError(
                f"{path}: has parameters by their names ({names[0]!r}, ...), which this optimizer "
                "does not know. Pass model=model, or build the optimizer from "
                "model.named_parameters()"
            )
        return in_order
    known = names_of(model, optimizer)
    ours = [[known[p] for p in group["params"]] for group in optimizer.param_groups]
    if [sorted(group) for group in ours] != [sorted(group) for group in header.params]:
        raise ValueError(f"{path}: expected groups of the parameters {ours}, got {header.params}")
    return {name: i for i, name in enumerate(name for group in ours for name in group)}


# -- the package -------------------------------------------------------------------------------

_MISSING = (
    "safetensors files need the package safetensors, and numpy to write them: "
    "pip install safetensors numpy"
)


def _import_save_file() -> Callable[..., None]:
    try:
        import numpy  # noqa: F401  # what safetensors needs, but does not ask pip for
        from safetensors.torch import save_file
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return save_file


def _import_safe_open() -> tuple[Any, type[Exception]]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(_MISSING) from error
    return safe_open, SafetensorError
