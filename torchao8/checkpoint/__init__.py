"""Checkpoints of other libraries: their state as ours, and ours as that of ``torch.optim``."""

from torchao8.checkpoint.torch_optim import to_torch

__all__ = ["to_torch"]
