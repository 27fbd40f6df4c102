"""Modes of torch that the library leaves for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Makes tensors that can be changed outside of ``torch.inference_mode()``, too.

    ``torch.inference_mode(False)`` alone would turn gradients on, under ``torch.no_grad()``, too.
    """
    gradients = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):
        yield
