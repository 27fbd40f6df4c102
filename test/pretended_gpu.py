"""GPUs that are not there, for tests of the tests: ``pytest -p pretended_gpu``.

A tensor "on cuda" is a :class:`Pretended`, whose numbers lie in a tensor on the CPU. Operators and
the library's ops compute there, with the CPU's kernels. So a test for a GPU runs to its end, and
says whether its own calls are right; that its bits are equal says nothing about CUDA.

What is as on a GPU: the device that a tensor names; that tensors of two devices do not mix; the
operators that have the host wait, which raise under ``torch.cuda.set_sync_debug_mode("error")`` and
in a capture; graphs, which hold what was captured and run it at a replay; the bytes that torch's
allocator has given, in units of 512; managed memory, but for its migration. What is not: see
``NOT_LIKE_A_GPU``.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import hashlib
import importlib.metadata
import importlib.util
import mmap
import os
import re
import subprocess
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TEST = Path(__file__).resolve().parent


def load_guard() -> None:
    """Compiles and loads what tells torch of CUDA devices. Torch asks for it when it is imported,
    and only once."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_folder = Path(spec.origin).parent
    source = TEST / "emulation" / "pretended_guard.cpp"
    key = source.read_bytes() + f"{torch_folder} {importlib.metadata.version('torch')}".encode()
    folder = TEST.parent / "build" / "test"
    library = folder / f"{hashlib.sha256(key).hexdigest()[:32]}-pretended_guard.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_name(f"{library.name}.{os.getpid()}")
        compiler = os.environ.get("CXX", "c++")
        libs = torch_folder / "lib"
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}",
                   source, f"-L{libs}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libs}", "-o",
                   unfinished]  # fmt: skip
        subprocess.run(command, check=True)
        unfinished.rename(library)
    ctypes.CDLL(str(library))


load_guard()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils import _pytree as pytree  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from torchao8 import _implementation, ops  # noqa: E402
from torchao8.optim import lars  # noqa: E402
from torchao8.optim._state import paging  # noqa: E402
from torchao8.optim._step import clipping  # noqa: E402
from torchao8.portable import register  # noqa: E402

COUNT = 2
TOTAL = 8 << 30  # bytes of each
GRAIN = 512  # of torch's allocator
aten = torch.ops.aten


# -- memory --------------------------------------------------------------------------------------


class Memory:
    """The bytes of storages that pretended tensors stand on, on all devices together."""

    def __init__(self) -> None:
        self.users: dict[int, int] = {}
        self.held = self.peak = self.managed = 0

    def take(self, tensor: Tensor, owner: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, -(-storage.nbytes() // GRAIN) * GRAIN
        if storage.data_ptr() in managed.tensors:
            return
        if key not in self.users:
            self.held += size
            self.peak = max(self.peak, self.held)
        self.users[key] = self.users.get(key, 0) + 1
        weakref.finalize(owner, self.give_back, key, size).atexit = False

    def give_back(self, key: int, size: int) -> None:
        self.users[key] -= 1
        if not self.users[key]:
            del self.users[key]
            self.held -= size


class Managed:
    """Managed memory: anonymous maps, by address."""

    def __init__(self) -> None:
        self.maps: dict[int, mmap.mmap] = {}
        self.tensors: set[int] = set()

    def allocate(self, size: int) -> int:
        check_mark("paged_cuda")
        if size <= 0:
            raise RuntimeError(f"allocate_managed: size must be above 0, got {size}")
        memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.maps[address] = memory
        return address

    def free(self, address: int) -> None:
        del self.maps[address]  # a mistake keeps its memory for good, or raises

    def held(self) -> int:
        return sum(map(len, self.maps.values()))


memory, managed = Memory(), Managed()


# -- tensors -------------------------------------------------------------------------------------


class Pretended(Tensor):
    """A tensor that says it lies on a GPU, and has its numbers in ``inner``."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Pretended:
        is_dense = inner.layout is torch.strided
        place = (inner.stride(), inner.storage_offset()) if is_dense else (None, None)
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, *place, None, inner.dtype, inner.layout, device
        )
        made.inner = inner
        if is_dense:
            memory.take(inner, made)
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Pretended({self.inner!r}, {self.device})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)
        self.inner = value.inner
        memory.take(self.inner, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _rebuilt(copy.deepcopy(self.inner, memo), *self._told())
            if self.grad is not None:
                memo[id(self)].grad = copy.deepcopy(self.grad, memo)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuilt, (self.inner, *self._told())

    def _told(self) -> tuple[int, bool, bool]:
        return self.device.index, self.requires_grad, isinstance(self, torch.nn.Parameter)


def _rebuilt(inner: Tensor, index: int, requires_grad: bool, is_param: bool) -> Tensor:
    made = Pretended(inner, torch.device("cuda", index))
    if is_param:
        return torch.nn.Parameter(made, requires_grad)
    return made.requires_grad_(requires_grad)


# -- operators -----------------------------------------------------------------------------------

# These read numbers on the host, which waits for them.
READERS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "unique_dim", "_unique2"}
# Their arguments may lie on several devices.
MIXED = {"copy_", "_to_copy", "_foreach_copy_", "set_"}
# These change the shape of a tensor in place, which its Pretended would not notice.
RESHAPING = {"resize_", "set_", "t_", "transpose_", "squeeze_", "unsqueeze_", "as_strided_"}
# Ops of this library: arguments that may lie on the CPU.
NUMBERS = {"lr", "numbers", "grad_scale", "found_inf"}


class State:
    """What the pretended driver is at."""

    sync_mode = "default"
    graph: Graph | None = None
    test: pytest.Item | None = None


def check_mark(name: str) -> None:
    """Runs of the tests select these, see pyproject.toml."""
    if State.test is not None and State.test.get_closest_marker(name) is None:
        raise RuntimeError(f"{State.test.name} must be marked {name}")


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator on what the pretended tensors stand on."""
    flat, _ = pytree.tree_flatten((args, kwargs))
    devices = {x.device for x in flat if isinstance(x, Pretended)}
    target = kwargs.get("device")
    target = None if target is None else _with_index(torch.device(target))
    if not devices and (target is None or target.type != "cuda"):
        return func(*args, **kwargs)
    name = func._schema.name.split("::")[1]
    if func.namespace == "torchao8":
        is_portable = name in PORTABLE_OPS and _implementation.is_portable(next(iter(devices)))
        if is_portable or name in PYTHON_OPS:
            with PretendedMode():  # it calls operators
                return (PORTABLE_OPS if is_portable else PYTHON_OPS)[name](*args, **kwargs)
        check_own(func, name, args, kwargs)
        if name in MANAGED_OPS:
            return MANAGED_OPS[name](*args)
    elif name not in MIXED:
        check_mixed(flat, devices, target)
    if name in RESHAPING:
        raise NotImplementedError(f"{name} of a pretended tensor")
    device = target or next(iter(devices))
    waits = is_wait(name, args, kwargs, device)
    if waits:
        wait(name)
    inners = {id(x.inner): x for x in flat if isinstance(x, Pretended)}
    call = Call(func, args, kwargs, device)
    try:
        result = call.run() if State.graph is None else State.graph.capture(call)
    except RuntimeError as error:
        check_value(error, func, args, kwargs)
        raise
    if device.type != "cuda":
        return result

    def wrap(x: Any) -> Any:
        return inners[id(x)] if id(x) in inners else Pretended(x, device)

    return pytree.tree_map_only(Tensor, wrap, result)


def _with_index(device: torch.device) -> torch.device:
    return torch.device("cuda", 0) if device == torch.device("cuda") else device


class Call:
    """An operator with its arguments on the CPU."""

    def __init__(self, func: Any, args: Any, kwargs: Any, device: torch.device) -> None:
        self.func = func

        def inner(x: Tensor) -> Tensor:
            if isinstance(x, Pretended):
                return x.inner
            return x if State.graph is None else x.clone()  # a graph keeps the number that it read

        self.args, self.kwargs = pytree.tree_map_only(Tensor, inner, (args, kwargs))
        if kwargs.get("device") is not None:
            self.kwargs["device"] = torch.device("cpu")
        if kwargs.get("pin_memory"):
            self.kwargs["pin_memory"] = False
        if func is aten._to_copy.default:  # always a copy
            self.kwargs.pop("non_blocking", None)

    def run(self) -> Any:
        return self.func(*self.args, **self.kwargs)


class ValueRead(Exception):
    """The CPU's kernels refuse a number that lies on the GPU, where nobody reads it."""


# What they say of numbers; the first word is the name of the argument, or of a number of the rule.
OF_NUMBERS = re.compile(
    r"\w+: (\w+)(\[\d+\])? must "
    r"(hold|not be negative|be (finite|positive and finite|in \[0, 1\)|a whole number))"
)


def check_value(error: RuntimeError, func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
    """Raises ValueRead where an op raised for a number on the GPU."""
    found = OF_NUMBERS.match(str(error))
    if found is None:
        return
    given = arguments_of(func, args, kwargs)
    leaves = pytree.tree_leaves(given.get(found[1], given.get("numbers")))
    if any(isinstance(x, Pretended) for x in leaves):
        raise ValueRead(str(error)) from error


def arguments_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = [a.name for a in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def check_mixed(flat: list[Any], devices: set[torch.device], target: Any) -> None:
    """As torch: numbers on the CPU go with tensors on a GPU, and no other tensors do."""
    others = {
        x.device
        for x in flat
        if isinstance(x, Tensor) and not isinstance(x, Pretended) and x.dim() > 0
    }
    if len(devices | others) > 1 and target is None:
        names = " and ".join(sorted(map(str, devices | others)))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two: {names}"
        )


def check_own(func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """As the CUDA kernels: all tensors on one GPU, but for numbers."""
    given = arguments_of(func, args, kwargs)
    on_cpu, on_gpu = [], set()
    for argument, value in given.items():
        for i, x in enumerate(value if isinstance(value, list | tuple) else [value]):
            if isinstance(x, Pretended):
                on_gpu.add(x.device)
            elif isinstance(x, Tensor) and argument not in NUMBERS:
                on_cpu.append((argument, f"[{i}]" if isinstance(value, list | tuple) else "", x))
    for argument, index, x in on_cpu:
        if x.is_meta:
            return  # the CPU's kernels refuse it
        raise RuntimeError(
            f"{name}: {argument}{index} must be on {min(map(str, on_gpu))}, where another argument "
            f"is; it is on the CPU"
        )
    if len(on_gpu) > 1:
        raise RuntimeError(f"{name}: tensors on {sorted(map(str, on_gpu))}")


def is_wait(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], device: Any) -> bool:
    """Whether the host waits for the GPU in an operator."""
    if name in READERS:
        return True
    # A graph would copy from and to memory of the host that is gone when it is replayed.
    if name == "_to_copy":
        waits = not kwargs.get("non_blocking") or State.graph is not None
        return args[0].device.type != device.type and waits
    if name == "copy_":
        waits = not kwargs.get("non_blocking", len(args) > 2 and args[2]) or State.graph is not None
        return args[0].device.type != args[1].device.type and waits
    if name == "index" or name == "index_put_":  # masks are looked for on the host
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return False


def wait(name: str) -> None:
    if State.graph is not None:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({name})")
    if State.sync_mode == "error":
        raise RuntimeError(f"called a synchronizing CUDA operation ({name})")


class PretendedMode(TorchDispatchMode):
    """Sees the operators that make a tensor on a GPU of none."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})


# -- graphs --------------------------------------------------------------------------------------


class Graph:
    """``torch.cuda.CUDAGraph``: operators with their arguments, of which those on the CPU are
    read at the capture."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Call, Any]] = []

    def capture(self, call: Call) -> Any:
        """What writes to memory waits for a replay; the rest has a result at once, which each
        replay writes anew."""
        if call.func._schema.is_mutable:
            written = [
                x
                for x, a in zip(call.args, call.func._schema.arguments, strict=False)
                if a.alias_info is not None and a.alias_info.is_write
            ]
            self.calls.append((call, None))
            return written[0] if call.func._schema.returns else None
        result = call.run()
        is_view = any(r.alias_info is not None for r in call.func._schema.returns)
        if not is_view:
            self.calls.append((call, result))
        return result

    def replay(self) -> None:
        for call, result in self.calls:
            new = call.run()
            if result is not None:
                for old, x in zip(pytree.tree_leaves(result), pytree.tree_leaves(new), strict=True):
                    old.copy_(x)

    def reset(self) -> None:
        self.calls.clear()


@contextlib.contextmanager
def capturing(graph: Graph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """``torch.cuda.graph``."""
    check_mark("captured")
    State.graph = graph
    try:
        yield
    finally:
        State.graph = None


class Stream:
    """``torch.cuda.Stream``, and an event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)

    def synchronize(self) -> None:
        wait("synchronize")

    def is_capturing(self) -> bool:
        return State.graph is not None


# -- the library's ops that do something else on a GPU --------------------------------------------

PYTHON_OPS: dict[str, Callable[..., Any]] = {
    "clip_factors_": clipping.clip_factors_,
    "lars_trust_ratios": lars.lars_trust_ratios,
}
# Those of torchao8.portable.
PORTABLE_OPS: dict[str, Callable[..., Any]] = {}
MANAGED_OPS: dict[str, Callable[..., Any]] = {
    "allocate_managed": lambda like, size: managed.allocate(size),
    "free_managed": lambda like, address: managed.free(address),
    "prefetch_pages_": lambda pages, now: None,
}


# -- torch.cuda ----------------------------------------------------------------------------------


def memory_info(device: Any = None) -> tuple[int, int]:
    return TOTAL - memory.held - managed.held(), TOTAL


def reset_peak(device: Any = None) -> None:
    memory.peak = memory.held


def set_sync_debug_mode(mode: str) -> None:
    State.sync_mode = mode


PROPERTIES = types.SimpleNamespace(
    name="pretended", total_memory=TOTAL, major=9, minor=0, multi_processor_count=132
)
OF_TORCH_CUDA: dict[str, Any] = {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "device_count": lambda: COUNT,
    "current_device": lambda: 0,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_name": lambda device=None: PROPERTIES.name,
    "get_device_properties": lambda device=None: PROPERTIES,
    "manual_seed_all": lambda seed: None,
    "mem_get_info": memory_info,
    "memory_allocated": lambda device=None: memory.held,
    "max_memory_allocated": lambda device=None: memory.peak,
    "reset_peak_memory_stats": reset_peak,
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: wait("synchronize"),
    "set_sync_debug_mode": set_sync_debug_mode,
    "is_current_stream_capturing": lambda: State.graph is not None,
    "CUDAGraph": Graph,
    "graph": capturing,
    "Stream": Stream,
    "Event": Stream,
    "stream": contextlib.nullcontext,
    "current_stream": lambda device=None: Stream(),
}


def pretend() -> None:
    """Has torch and the library believe that there are GPUs, for as long as the process lives."""
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor makes one on the CPU, and copies it
    for name, value in OF_TORCH_CUDA.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    torch.accelerator.current_stream = lambda device=None: Stream()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # no p.data of another type
    torch.compile = torch.library.opcheck = no_tracing
    torch.serialization.add_safe_globals([_rebuilt])

    ops.CUDA_EXTENSION_FILE = __file__
    _implementation._kernels.add("cuda")
    recorder = types.SimpleNamespace(
        impl=lambda op, function, key, allow_override: PORTABLE_OPS.update({op: function})
    )
    register.implement(recorder, ops.FAMILIES, "CUDA")
    tensor_on = paging.tensor_on

    def pretended_tensor_on(of: object, address: int, size: int, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return tensor_on(of, address, size, device)
        managed.tensors.add(address)
        device = _with_index(device)
        there = tensor_on(of, address, size, device)  # which no operator can touch
        assert (there.device, there.data_ptr(), there.nbytes) == (device, address, size)
        return Pretended(tensor_on(of, address, size, torch.device("cpu")), device)

    paging.tensor_on = pretended_tensor_on


# -- pytest --------------------------------------------------------------------------------------

# Tests that fail here and not on a GPU, and with what. Those that compile, or check an op with what
# torch has for that, are skipped where they begin to.
OF_VALUES = "ValueRead"
IS_PLAIN = r"assert False|is Tensor"
NOT_LIKE_A_GPU = {
    # The CPU's kernels look at these values.
    "test_cuda.py::test_a_loss_scale_out_of_range": OF_VALUES,
    "test_cuda.py::test_a_step_count_out_of_range": OF_VALUES,
    # The CPU's kernels copy no gradient.
    "test_cuda.py::test_the_measurement_sees_a_temporary": "assert 0 >=",
    # A pretended tensor is no plain one.
    "test_optim.py::test_states_and_where_they_apply": IS_PLAIN,
    "test_scalar_state.py::test_it_is_there_from_the_first_step": IS_PLAIN,
    "test_scalar_state.py::test_to_torch": IS_PLAIN,
    "test_state_dict.py::test_state_dict_is_plain": IS_PLAIN,
}


def no_tracing(*args: Any, **kwargs: Any) -> Any:
    """In place of torch.compile and opcheck, which refuse to see an operator's modes."""
    pytest.skip("no GPU to compile or to check an op for")


pretend()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Any:
    with PretendedMode():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    name = item.nodeid.split("[")[0].removeprefix("test/")
    State.test, State.graph, State.sync_mode = item, None, "default"
    end = NOT_LIKE_A_GPU.get(name)
    try:
        result = yield
    except Exception as error:
        if end is not None and re.search(end, f"{type(error).__name__}: {error}"):
            pytest.xfail(f"not as on a GPU: {error}")
        raise
    if end is not None:
        pytest.fail(f"{name} runs to its end: NOT_LIKE_A_GPU is out of date")
    return result
