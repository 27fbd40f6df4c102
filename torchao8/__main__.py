"""``python -m torchao8``: what a bug report needs. Exits with 1 where something does not work.

``python -m torchao8 estimate`` prints the memory of training instead, see :mod:`torchao8.estimate`.
"""

import argparse
import os
import platform
import sys
from collections.abc import Sequence

import torch

from torchao8 import __version__, _selfcheck


def main() -> int:
    _line("torchao8", __version__)
    _line("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")
    _line("python", f"{platform.python_version()} ({sys.executable})")
    _line("platform", f"{platform.platform()}, {platform.machine()}")
    _line("CUDA devices", ", ".join(_cuda_devices()) or "none")
    _line("threads", f"{torch.get_num_threads()} of {os.cpu_count()} CPUs")
    try:
        from torchao8 import ops
    except ImportError as error:
        _line("extension", "NOT LOADED")
        print(error)
        return 1
    _line("extension", ops.EXTENSION_FILE)
    _line("CUDA kernels", ops.CUDA_EXTENSION_FILE or f"none: {ops.CUDA_MISSING}")
    for device_type in _device_types():
        portable = ops.is_portable(torch.device(device_type))
        _line("steps on", f"{device_type}: {_PORTABLE if portable else 'the kernels of torchao8'}")
    forced = os.environ.get("TORCHAO8_CPU")
    try:
        _line("CPU path", ops.cpu_capability() + (f" (TORCHAO8_CPU={forced})" if forced else ""))
    except RuntimeError as error:
        _line("CPU path", error)
        return 1
    results = _selfcheck.run()
    for result in results:
        _line("self-check", f"{'ok' if result.passed else 'FAILED'}: {result.name}")
        _line("", result.detail)
    return 0 if all(result.passed for result in results) else 1


_PORTABLE = "PyTorch operators (torchao8.portable)"


def _device_types() -> list[str]:
    """The CPU, and the accelerator that torch finds."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def _line(name: str, value: object) -> None:
    print(f"{name:<14}{value}")


def _cuda_devices() -> list[str]:
    return [
        f"{torch.cuda.get_device_name(i)} (sm_{major}{minor})"
        for i in range(torch.cuda.device_count())
        for major, minor in [torch.cuda.get_device_capability(i)]
    ]


def command(arguments: Sequence[str]) -> int:
    """Runs the command that the arguments name; the report where there are none."""
    if arguments[:1] == ["estimate"]:
        return _estimate(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m torchao8",
        description="Without a command: prints versions, what was built and a self-check.",
    )
    parser.add_subparsers(title="commands", metavar="command").add_parser(
        "estimate",
        help="the memory of parameters, gradients and optimizer state on each rank",
    )
    parser.parse_args(arguments)
    return main()


def _estimate(arguments: Sequence[str]) -> int:
    try:
        # Not at the top: it asks the optimizer classes, which the report does without.
        from torchao8 import _estimate_command
    except ImportError as error:
        print(error, file=sys.stderr)
        return 1
    return _estimate_command.command(arguments)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
