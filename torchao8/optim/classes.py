"""All optimizer classes: a line for each file. Every list of classes follows from this one."""

from typing import TYPE_CHECKING

from torchao8.optim.adagrad import *
from torchao8.optim.adam import *
from torchao8.optim.ademamix import *
from torchao8.optim.docstrings import complete as _complete
from torchao8.optim.lamb import *
from torchao8.optim.lars import *
from torchao8.optim.lion import *
from torchao8.optim.muon import *
from torchao8.optim.muon_adamw import *
from torchao8.optim.nadam import *
from torchao8.optim.rmsprop import *
from torchao8.optim.sgd import *

if not TYPE_CHECKING:  # type checkers take the names from the imports, and only know literal lists
    __all__ = sorted(name for name, value in globals().items() if isinstance(value, type))
    # All texts first: each is made from those in the source.
    _texts = {name: _complete(globals()[name], globals()) for name in __all__}
    for _name, _text in _texts.items():
        globals()[_name].__doc__ = _text
