"""What all tests of clients need before a client is imported: no network, the CPU, torchvision.

A module, not a conftest: ranks are processes that import it anew.
"""

import os
from importlib import util

import torch

for _name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "WANDB_DISABLED"):
    os.environ[_name] = "1"  # no test loads or sends anything
os.environ.setdefault("ACCELERATE_USE_CPU", "true")

_libraries = []  # torch forgets the operators of a library that nobody holds


def _declare_torchvision_operators() -> None:
    """Lets torchvision's Python part load where its operators do not.

    timm and fastai import torchvision. PyPI's wheel is built for a torch with CUDA; beside a torch
    for the CPU only, its operators do not load, and the import stops at two of them, which it
    expects to be declared. No test calls them.
    """
    if util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


_declare_torchvision_operators()
