"""The device of new_device.cpp: what compiles it, and what sets it up in a process of a test.

PyTorch has one such device in a process, for good. So tests step on it in processes of their own.
"""

import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

from torchao8 import _numbers
from torchao8._implementation import choose_portable
from torchao8.optim._muon import update
from torchao8.portable import compiled, register

NAME = "newdevice"
HERE = f"{NAME}:0"
_SOURCE = Path(__file__).with_name("new_device.cpp")
_BUILD = _SOURCE.parent.parent / "build" / NAME


def library() -> Path:
    """Compiled code of the device, for this torch. Skips the test where there is no compiler."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no C++ compiler {compiler[0]}: install g++ or clang, or set CXX")
    torch_path = Path(torch.__file__).parent
    command = [
        *compiler,
        *("-std=c++20", "-O0", "-fPIC", "-shared", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        *("-isystem", str(torch_path / "include")),
        *(str(_SOURCE), "-L", str(torch_path / "lib"), "-ltorch_cpu", "-lc10"),
    ]
    key = "\n".join([*command, torch.__version__, _SOURCE.read_text()])
    file = _BUILD / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    _BUILD.mkdir(parents=True, exist_ok=True)
    with (_BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one compiles
        if not file.exists():
            unfinished = file.with_suffix(".unfinished")
            run = subprocess.run(
                [*command, "-o", str(unfinished)], capture_output=True, text=True, check=False
            )
            assert run.returncode == 0, run.stderr
            unfinished.rename(file)
    return file


def run_there(file: Path, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function that stands at the top of a module, in a process that has the device.

    There the CPU has the portable implementation, too, run operator by operator, and its norms are
    float32, so that results can be compared.
    """
    (result,) = run_ranks(1, _with_device, str(file), function, args)
    return result


def _with_device(
    rank: int, world_size: int, file: str, function: Callable[..., Any], args: tuple[Any, ...]
) -> Any:
    torch.ops.load_library(file)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    compiled.devices.clear()
    choose_portable("cpu")
    _use_float32_norms()
    return function(*args)


def _use_float32_norms() -> None:
    """On the CPU, whose ops take factors in float64 alone. The step rounds them to float32."""
    _numbers._HAVE_FLOAT64.discard("cpu")
    check = register._check

    def check_with_float64(op: str, arguments: dict[str, Any]) -> None:
        factors = [f.double() if f.is_cpu else f for f in arguments.get("factors", ())]
        check(op, {**arguments, "factors": factors})

    register._check = check_with_float64
    check_muon = update._check_step_

    def check_muon_with_float64(*arguments: Any, **options: Any) -> None:
        *tensors, factors = arguments[:6]
        factors = [f.double() if f.is_cpu else f for f in factors]
        check_muon(*tensors, factors, *arguments[6:], **options)

    update._check_step_ = check_muon_with_float64


def _module() -> types.ModuleType:
    """What torch asks of a device in Python."""
    module = types.ModuleType(f"torch.{NAME}")
    module.is_available = lambda: True  # type: ignore[attr-defined]
    module.is_initialized = lambda: True  # type: ignore[attr-defined]
    module.device_count = lambda: 1  # type: ignore[attr-defined]
    module.current_device = lambda: 0  # type: ignore[attr-defined]
    module._is_in_bad_fork = lambda: False  # type: ignore[attr-defined]
    module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
    sys.modules[module.__name__] = module
    return module


def waits() -> int:
    """How often the host has had to wait for the device."""
    return int(torch.ops.new_device.waits())
