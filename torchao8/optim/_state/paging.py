"""Paged state: memory that may leave the GPU, or RAM, when it is short, and comes back for a step.

On the CPU it is a mapped file. The file has no name from its first moment on, so that nothing stays
behind, and all of its space is reserved before there is any state, so that a full disk is an error
at that point and not a crash at a later one. On a GPU it is CUDA's managed memory, which the driver
moves out when other memory is wanted, and back when a kernel wants it.

The ops take such tensors as they take any others: same op, same bits. A step of paged state goes
through a bucket in pieces and asks for the pages of the next piece ahead of it, see
optim/_step/pages.py; csrc/cpu/pages.cpp and csrc/cuda/pages.cu bring them. This module allocates.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import ops
from torchao8._messages import describe
from torchao8.optim._state.dlpack import tensor_on
from torchao8.optim._state.spec import BESIDE_STATES, TensorSpec, is_own
from torchao8.optim.options import Group
from torchao8.sharding import is_dtensor, is_placed_as, local

# Elements of a parameter from which on its state is paged. As for min_8bit_size they are those of
# the whole parameter, so that what is paged does not depend on the number of ranks.
LEAST = 100_000
# Bytes of state that one op call updates while the next ones are on their way. Two of them must fit
# beside everything else, so they may not be large. Each call is a fork and a join of threads, which
# costs time even where no page has to come, so they may not be small.
PIECE = 1 << 28
# A file system that cannot reserve space says one of these; zeros are written there.
_CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

# Where each living tensor of paged state begins, and the pages that it lies in. It does not keep
# them: they go with the last of their tensors.
_pages: weakref.WeakValueDictionary[int, Pages] = weakref.WeakValueDictionary()


# -- options -----------------------------------------------------------------------------------


def check_folder(group: Group) -> None:
    """Raises ValueError unless files can be made in ``page_dir``: before training, not in it."""
    folder = group["page_dir"]
    if folder and not (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        raise ValueError(f"page_dir: expected a folder that can be written to, got {folder!r}")


def folder_of(group: Group, p: Tensor) -> str | None:
    """``page_dir`` where the state of a parameter is to be paged, None where it is not."""
    folder: str = group["page_dir"]
    return folder if group["is_paged"] and p.numel() >= LEAST else None


def check_memory(optimizer: Optimizer, group: Group, p: Tensor, part: Tensor) -> None:
    """Raises RuntimeError if an option was changed after it had said where state lies.

    Args:
        part: a state of ``p``, or what this rank holds of it.
    """
    folder, found = folder_of(group, p), found_in(part)
    if part.numel() and found != folder:
        has = "state that is not paged" if found is None else "paged state"
        raise RuntimeError(
            f"{type(optimizer).__name__}: {describe(optimizer, p)} already has {has}"
            + (f", in page_dir={found!r}" if found else "")
            + f", but its group now says is_paged={group['is_paged']}, "
            f"page_dir={group['page_dir']!r}. Set them back, or build a new optimizer; "
            "optimizer.load_state_dict(optimizer.state_dict()) moves the state."
        )


# -- memory --------------------------------------------------------------------------------------


def any_pages() -> bool:
    """Whether there is any paged state."""
    return len(_pages) > 0


def found_in(part: Tensor) -> str | None:
    """The ``page_dir`` of a tensor, None if it is not one of paged state."""
    pages = _pages.get(part.data_ptr())
    return None if pages is None else pages.folder


def allocate(specs: Sequence[TensorSpec], devices: Sequence[torch.device]) -> list[Tensor]:
    """Memory for what this rank holds of paged tensors, all of it or, where that fails, none.

    Returns:
        Tensors full of zeros.

    Raises:
        OSError: no space for a file, or no way to make one in that folder.
        ValueError: a ``page_dir`` for tensors on a GPU, or another device.
        RuntimeError: no memory on a GPU, or one whose memory cannot be paged.
    """
    places: dict[tuple[torch.device, str], list[int]] = {}
    for i, (spec, device) in enumerate(zip(specs, devices, strict=True)):
        assert spec.pages is not None
        places.setdefault((device, spec.pages), []).append(i)
    made: dict[int, Tensor] = {}
    for (device, folder), members in places.items():
        shapes = [specs[i].part_shape for i in members]
        dtypes = [specs[i].dtype for i in members]
        sizes = [math.prod(s) * d.itemsize for s, d in zip(shapes, dtypes, strict=True)]
        offsets, total = _lay_out(sizes)
        pages = _new_pages(device, folder, total) if total else None
        for i, shape, dtype, size, offset in zip(
            members, shapes, dtypes, sizes, offsets, strict=True
        ):
            if pages is None or not size:
                made[i] = torch.zeros(shape, dtype=dtype, device=device)
            else:
                made[i] = pages.tensor(offset, size).view(dtype).view(shape)
                _pages[made[i].data_ptr()] = pages
    return [made[i] for i in range(len(specs))]


def _lay_out(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Where tensors begin, each at a page of its own, and where the last one ends."""
    offsets, end = [], 0
    for size in sizes:
        offsets.append(end)
        end += -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    return offsets, end


def _new_pages(device: torch.device, folder: str, size: int) -> Pages:
    if device.type == "cpu":
        return _map_file(folder, size)
    if device.type != "cuda":
        raise ValueError(f"is_paged: expected parameters on the CPU or on a GPU, got {device}")
    if ops.CUDA_EXTENSION_FILE is None:
        raise ValueError(
            f"is_paged: expected False, or the library's CUDA kernels, which page the state of "
            f"parameters on {device}, got none: {ops.CUDA_MISSING}"
        )
    if folder:
        raise ValueError(
            f"page_dir: expected '', as parameters are on {device}, where no file backs paged "
            f"state, got {folder!r}"
        )
    return _ManagedMemory(device, size)


class _MappedFile(mmap.mmap):
    """Memory with a file behind it. A tensor on it keeps it; without one it is gone."""

    folder: str

    def tensor(self, offset: int, size: int) -> Tensor:
        return torch.frombuffer(self, dtype=torch.uint8, count=size, offset=offset)


class _ManagedMemory:
    """Memory of CUDA that its driver moves between a GPU and the host."""

    folder = ""

    def __init__(self, device: torch.device, size: int) -> None:
        self.device = device
        self.address = ops.allocate_managed(device, size)
        # Bound here, as modules may be empty when the interpreter ends.
        self._free = weakref.finalize(self, ops.free_managed, self.address, device)
        self._free.atexit = False  # the driver has its own end

    def tensor(self, offset: int, size: int) -> Tensor:
        return tensor_on(self, self.address + offset, size, self.device).zero_()


Pages = _MappedFile | _ManagedMemory


def _map_file(folder: str, size: int) -> _MappedFile:
    """A new file of zeros, without a name, mapped.

    Raises:
        OSError: says where, how much was wanted and how much there is.
    """
    try:
        with tempfile.TemporaryFile(prefix="torchao8-", dir=folder or None) as file:
            _reserve(file.fileno(), size)
            pages = _MappedFile(file.fileno(), size)
    except OSError as error:
        raise _file_error(error, folder, size) from error
    pages.folder = folder
    return pages


def _reserve(file: int, size: int) -> None:
    """Takes the space now: a page that finds none later would end the process."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _CANNOT_RESERVE:
                raise
    zeros = memoryview(bytes(1 << 20))
    while size > 0:
        size -= os.write(file, zeros[: min(size, len(zeros))])
    os.fsync(file)  # some file systems find out only now


def _file_error(error: OSError, folder: str, size: int) -> OSError:
    where, space = folder, ""
    try:
        where = folder or tempfile.gettempdir()
        space = f", {shutil.disk_usage(where).free:,} are free"
    except OSError:  # no such folder, no temporary folder at all
        pass
    return OSError(
        error.errno,
        f"{error.strerror}: no file of {size:,} bytes for paged state in {where!r}{space}; nothing "
        "has changed. Choose another folder with page_dir=, or make room and try again",
    )


# -- states ------------------------------------------------------------------------------------


def new_states(layouts: Sequence[tuple[Tensor, dict[str, TensorSpec]]]) -> list[dict[str, Tensor]]:
    """The states of parameters that have made no step yet, or an error and none of them.

    Raises:
        OSError, ValueError, RuntimeError: as :func:`allocate`.
    """
    parts = iter(_allocate_for([(p, spec) for p, layout in layouts for spec in layout.values()]))

    def new(p: Tensor, spec: TensorSpec) -> Tensor:
        if spec.pages is None:
            return spec.empty(p)
        part = next(parts)
        if spec.fill:  # zeros need not be written
            part.fill_(spec.fill)
        return spec.of_param(p, part)

    return [{key: new(p, spec) for key, spec in layout.items()} for p, layout in layouts]


def rooms_for(
    wanted: Sequence[tuple[Tensor, dict[str, TensorSpec], dict[str, Any]]],
) -> list[dict[str, Tensor]]:
    """Memory for state on its way in, as far as it does not lie where it should already.

    Args:
        wanted: of parameters with their layouts and the state that comes, of any kind.

    Returns:
        For each of them, the keys of what is to be moved, and where to.

    Raises:
        OSError, ValueError, RuntimeError: as :func:`allocate`.
    """
    seen: set[int] = set()

    def is_there(p: Tensor, spec: TensorSpec, value: Any) -> bool:
        if not isinstance(value, Tensor):
            return False
        if is_dtensor(value) and not (is_dtensor(p) and is_placed_as(p, value)):
            return False
        part = local(value)
        known = part.data_ptr() in seen  # one tensor twice, which no step could write to
        seen.add(part.data_ptr())
        fits = (part.dtype, tuple(part.shape)) == (spec.dtype, spec.part_shape)
        here = part.device == local(p).device and found_in(part) == spec.pages
        return fits and here and not known and part.is_contiguous()

    keys = [
        [k for k, s in layout.items() if s.pages is not None and not is_there(p, s, saved.get(k))]
        for p, layout, saved in wanted
    ]
    parts = iter(
        _allocate_for(
            [(p, layout[k]) for (p, layout, _), ks in zip(wanted, keys, strict=True) for k in ks]
        )
    )
    return [{k: next(parts) for k in ks} for ks in keys]


def paged_rooms(rooms: dict[str, Any], owners: dict[str, tuple[Tensor, str]]) -> dict[str, Tensor]:
    """Paged memory in place of tensors to read state into, which nothing has touched yet.

    Args:
        owners: the parameters of some of them, and the folders where their state is to lie.

    Raises:
        OSError, ValueError, RuntimeError: as :func:`allocate`.
    """
    found = {
        name: (p, _spec_of(rooms[name], folder))
        for name, (p, folder) in owners.items()
        if isinstance(rooms[name], Tensor)
        and is_dtensor(rooms[name]) == is_dtensor(p)
        and rooms[name].numel() > 1  # one number is not worth a page
    }
    parts = _allocate_for(list(found.values()))
    return {
        name: spec.of_param(p, part)
        for (name, (p, spec)), part in zip(found.items(), parts, strict=True)
    }


def move_in(parts: dict[str, Tensor], rooms: dict[str, Tensor]) -> None:
    """Brings state into its rooms, in place; what does not fit is left for others to refuse."""
    for key, room in rooms.items():
        if parts[key].shape == room.shape and parts[key].dtype == room.dtype:
            parts[key] = room.copy_(parts[key])


def move_states(groups: Iterable[Group], state: dict[Any, Any]) -> None:
    """Has state lie where its groups want it; that of a copied or unpickled optimizer does not yet.

    Args:
        state: of an optimizer; changed.

    Raises:
        OSError, ValueError, RuntimeError: as :func:`allocate`.
    """
    wanted = []
    for group in groups:
        for p in group["params"]:
            folder, values = folder_of(group, p), state.get(p)
            if values and folder is not None:
                layout = {
                    key: _spec_of(value, folder)
                    for key, value in values.items()
                    if key not in BESIDE_STATES and is_own(key) and value.numel() > 1
                }
                wanted.append((p, layout, values))
    for (p, layout, values), rooms in zip(wanted, rooms_for(wanted), strict=True):
        for key, room in rooms.items():
            values[key] = layout[key].of_param(p, room.copy_(local(values[key])))


def _spec_of(value: Tensor, folder: str) -> TensorSpec:
    part = tuple(local(value).shape) if is_dtensor(value) else None
    return TensorSpec(value.dtype, tuple(value.shape), local_shape=part, pages=folder)


def _allocate_for(wanted: Sequence[tuple[Tensor, TensorSpec]]) -> list[Tensor]:
    paged = [(spec, local(p).device) for p, spec in wanted if spec.pages is not None]
    return allocate([spec for spec, _ in paged], [device for _, device in paged])
