"""Stage 0 of `make gpu`: says the versions, and sees to it that the extension loads.

A carried torchao8/_C_cuda.abi3.so that runs on this GPU is taken as it is; else one is built in
place, for this GPU alone. Exits with 1 where neither works, and with 3 where there is no GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from stages import NO_GPU

ROOT = Path(__file__).resolve().parents[2]
# Seconds. The first import of torch reads gigabytes from the disk.
PATIENCE = 100.0  # for all but the build
OF_TRY = 45.0  # for a process that loads the extension
NO_ANSWER = 124  # the exit status of a command whose seconds are over
NEEDED = ("hypothesis", "numpy", "pytest", "xdist")
# What the extension must do: load, and run one kernel.
TRY = """
import torch, torchao8
from torchao8 import ops
if ops.CUDA_EXTENSION_FILE is None:
    raise SystemExit(ops.CUDA_MISSING)
codes, scale = torchao8.quantize_blockwise(torch.ones(300, device="cuda"))
if scale.tolist() != [1.0, 1.0] or set(codes.tolist()) != {255}:
    raise SystemExit("quantize_blockwise of ones gives other codes than 255")
print(ops.CUDA_EXTENSION_FILE)
"""


def output_of(*command: str, seconds: float = 10) -> tuple[int, str]:
    """Exit status, and output with errors, of a command that is given some seconds."""
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=seconds, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    except FileNotFoundError:
        return 127, "not found"
    except subprocess.TimeoutExpired:
        return NO_ANSWER, f"no answer within {seconds:.0f} s"
    return done.returncode, done.stdout.strip()


def versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version(), "torch": torch.__version__}
    query = "--query-gpu=name,driver_version,clocks.sm,clocks.mem,memory.total"
    commands = {name: (name, "--version") for name in ("nvcc", "ncu", "compute-sanitizer")}
    commands["GPU"] = ("nvidia-smi", query, "--format=csv,noheader")
    with ThreadPoolExecutor() as pool:  # all at a time: a slow one has no other wait
        answers = dict(
            zip(commands, pool.map(lambda c: output_of(*c), commands.values()), strict=True)
        )
    status, text = answers.pop("GPU")
    gpus = text if status == 0 else torch.cuda.get_device_name()
    for name, (status, text) in answers.items():
        found[name] = text.splitlines()[-1] if status == 0 and text else "none"
    return {**found, "GPU": gpus}


def build() -> int:
    import torch

    arch = ".".join(str(n) for n in torch.cuda.get_device_capability())
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": arch}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def load() -> int:
    """0 if a carried extension runs, or one that was built now."""
    status, text = output_of(sys.executable, "-c", TRY, seconds=OF_TRY)
    if status not in (0, NO_ANSWER):  # a GPU that does not answer needs no other extension
        print(f"{text}\nbuilding in place", flush=True)
        faulthandler.cancel_dump_traceback_later()
        if build() != 0:
            print("the build failed")
            return 1
        status, text = output_of(sys.executable, "-c", TRY, seconds=OF_TRY)
    print(text if status else f"loaded {text.splitlines()[-1]}")
    return min(status, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figures", type=Path, required=True, help="folder for versions.json")
    args = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print(f"{sys.executable} has no torch")
        return 1
    faulthandler.dump_traceback_later(PATIENCE, exit=True)  # a GPU that does not answer
    import torch

    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no GPU")
        return NO_GPU
    found = versions()
    for name, version in found.items():
        print(f"{name:<18}{version}")
    args.figures.joinpath("versions.json").write_text(json.dumps(found, indent=1))
    for name in NEEDED:
        if importlib.util.find_spec(name) is None:
            print(f"stages that run tests will fail: {sys.executable} has no {name}")
    return load()


if __name__ == "__main__":
    sys.exit(main())
