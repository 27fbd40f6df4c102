"""Checkpoints of optimizers in files of other formats."""

from torchao8.checkpoint.safetensors_file import load_safetensors, save_safetensors

__all__ = ["load_safetensors", "save_safetensors"]
