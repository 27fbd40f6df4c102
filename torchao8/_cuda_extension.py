"""Loads torchao8/_C_cuda, the extension with the CUDA kernels, if this torch can use it."""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import re

import torch

NAME = "torchao8._C_cuda"


def runtime_of(file: str) -> int | None:
    """The major release of the CUDA runtime that a library is linked with, read from its file.

    It is known before the library is loaded: loading registers the kernels, which then run.
    """
    with open(file, "rb") as opened:
        if not opened.seek(0, 2):
            return None
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            name = re.search(rb"cudart(?:\.so\.|64_)(\d+)", content)
            return int(name[1]) if name else None


def load() -> tuple[str | None, str]:
    """Returns the file of the CUDA kernels and "", or None and why there are none."""
    if torch.version.cuda is None:
        return None, "torch is built without CUDA"
    spec = importlib.util.find_spec(NAME)
    if spec is not None and spec.origin is not None:
        major = runtime_of(spec.origin)
        # Two releases of the runtime in one process do not know each other's memory and streams.
        if major is not None and str(major) != torch.version.cuda.split(".")[0]:
            return None, (
                f"{spec.origin} is built for CUDA {major}, and torch for CUDA "
                f"{torch.version.cuda}; install a build for the CUDA of torch"
            )
    try:
        return importlib.import_module(NAME).__file__, ""
    except ImportError as error:
        return None, f"torchao8/_C_cuda could not be loaded ({error}); building it takes nvcc"
