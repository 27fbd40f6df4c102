"""The optimizers, drop-in for those of the same name in ``torch.optim`` and bitsandbytes."""

from torchao8.optim.adam import Adam, Adam8bit, AdamW, AdamW8bit

__all__ = ["Adam", "Adam8bit", "AdamW", "AdamW8bit"]
