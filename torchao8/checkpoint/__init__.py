"""Checkpoints beyond ``state_dict``: of other libraries, of another format, for another reader."""

from torchao8.checkpoint.dcp import load_dcp
from torchao8.checkpoint.safetensors_file import load_safetensors, save_safetensors
from torchao8.checkpoint.torch_optim import to_torch

__all__ = ["load_dcp", "load_safetensors", "save_safetensors", "to_torch"]
