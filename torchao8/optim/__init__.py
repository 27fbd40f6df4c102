"""The optimizers, drop-in for those of the same name in ``torch.optim`` and bitsandbytes."""

from torchao8.optim.adagrad import Adagrad, Adagrad8bit, PagedAdagrad, PagedAdagrad8bit
from torchao8.optim.adam import (
    Adam,
    Adam8bit,
    AdamW,
    AdamW8bit,
    PagedAdam,
    PagedAdam8bit,
    PagedAdamW,
    PagedAdamW8bit,
)
from torchao8.optim.ademamix import AdEMAMix, AdEMAMix8bit, PagedAdEMAMix, PagedAdEMAMix8bit
from torchao8.optim.lamb import LAMB, LAMB8bit, PagedLAMB, PagedLAMB8bit
from torchao8.optim.lars import LARS, LARS8bit, PagedLARS, PagedLARS8bit
from torchao8.optim.lion import Lion, Lion8bit, PagedLion, PagedLion8bit
from torchao8.optim.options import CommonOptions
from torchao8.optim.rmsprop import PagedRMSprop, PagedRMSprop8bit, RMSprop, RMSprop8bit
from torchao8.optim.sgd import SGD, PagedSGD, PagedSGD8bit, SGD8bit

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "AdEMAMix",
    "AdEMAMix8bit",
    "Adagrad",
    "Adagrad8bit",
    "Adam",
    "Adam8bit",
    "AdamW",
    "AdamW8bit",
    "CommonOptions",
    "LAMB8bit",
    "LARS8bit",
    "Lion",
    "Lion8bit",
    "PagedAdEMAMix",
    "PagedAdEMAMix8bit",
    "PagedAdagrad",
    "PagedAdagrad8bit",
    "PagedAdam",
    "PagedAdam8bit",
    "PagedAdamW",
    "PagedAdamW8bit",
    "PagedLAMB",
    "PagedLAMB8bit",
    "PagedLARS",
    "PagedLARS8bit",
    "PagedLion",
    "PagedLion8bit",
    "PagedRMSprop",
    "PagedRMSprop8bit",
    "PagedSGD",
    "PagedSGD8bit",
    "RMSprop",
    "RMSprop8bit",
    "SGD8bit",
]
