"""Make test/data/foreign/*.pt with the real packages: `make_foreign_checkpoints.py [FOLDER]`.

Needs `pip install bitsandbytes torchao` and torchao8. Each file is a dict of plain tensors, numbers
and strings, so that the tests load it with weights_only=True and without the packages:

    versions    of the packages that made it
    parameters  for each parameter: shape, state (as the package saves it), and moments (float32, as
                the package itself dequantizes it)

The files of bitsandbytes' other optimizers, bitsandbytes_lion.pt and so on, also hold

    options     the parameter group
    parameters  the package's next step, too: before, grad and after, in float32

A tensor subclass of torchao is saved as a dict of its class, its tensors and `signed`.
"""

from __future__ import annotations

import copy
import functools
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "test" / "data" / "foreign"
# Rows that blocks of 256 divide, rows that they do not, a vector, a convolution, a small vector.
BNB_SHAPES = ((4, 256), (2, 512), (3, 300), (600,), (4, 4, 3, 3), (5,))
# torchao quantizes tensors of at least 4096 elements that blocks divide.
TORCHAO_SHAPES = ((8, 512), (256, 17), (5, 30))
# The same blocks as ours, other blocks, and 32-bit state.
FAMILY_SHAPES = ((1, 256), (3, 60), (5,))
# Options that give every term of an update a weight, and our names of the states.
FAMILY: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "Adagrad": ({"weight_decay": 0.1}, ("sum",)),
    "AdEMAMix": ({"t_alpha": 9}, ("exp_avg_fast", "exp_avg_slow", "exp_avg_sq")),
    "LAMB": ({"weight_decay": 0.1}, ("exp_avg", "exp_avg_sq")),
    "LARS": ({"momentum": 0.9}, ("momentum_buffer",)),
    "Lion": ({"weight_decay": 0.1}, ("exp_avg",)),
    "RMSprop": ({"weight_decay": 0.1, "momentum": 0.5}, ("square_avg",)),
    "SGD": ({"weight_decay": 0.1, "momentum": 0.9, "dampening": 0.5}, ("momentum_buffer",)),
}
STEPS = 3


def train(make: Callable[[list[Any]], torch.optim.Optimizer], shapes: Any) -> dict[str, Any]:
    """The state dict after a few steps, with gradients of many magnitudes and a row of zeros."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    optimizer = make(params)
    for _ in range(STEPS):
        for p in params:
            magnitude = 10.0 ** -(3 * torch.rand(p.shape, generator=generator))
            p.grad = magnitude * torch.randn(p.shape, generator=generator)
            p.grad[0] = 0
        optimizer.step()
    return optimizer.state_dict()


def make_bitsandbytes(shapes: Any = BNB_SHAPES) -> dict[str, Any]:
    """8-bit state in the nested layout; the last parameter keeps 32 bits."""
    import bitsandbytes

    def make(params: list[Any]) -> torch.optim.Optimizer:
        return bitsandbytes.optim.AdamW(params, lr=0.01, optim_bits=8, min_8bit_size=100)

    parameters = []
    for shape, state in zip(shapes, train(make, shapes)["state"].values(), strict=True):
        first, second = dequantized(state)
        moments = {"exp_avg": first, "exp_avg_sq": second}
        parameters.append({"shape": list(shape), "state": state, "moments": moments})
    return {"versions": versions(bitsandbytes), "parameters": parameters}


def make_bitsandbytes_of(name: str) -> dict[str, Any]:
    """8-bit state of another class; the last parameter keeps 32 bits."""
    import bitsandbytes

    options, states = FAMILY[name]
    made: list[tuple[torch.optim.Optimizer, list[Any]]] = []

    def make(params: list[Any]) -> torch.optim.Optimizer:
        cls = getattr(bitsandbytes.optim, name)
        made.append((cls(params, lr=0.01, optim_bits=8, min_8bit_size=100, **options), params))
        return made[0][0]

    saved = copy.deepcopy(train(make, FAMILY_SHAPES))
    optimizer, params = made[0]
    before = [p.detach().clone() for p in params]
    generator = torch.Generator().manual_seed(1)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    parameters = [
        {
            "shape": list(p.shape),
            "state": state,
            "moments": dict(zip(states, dequantized(state), strict=True)),
            "before": old,
            "grad": p.grad,
            "after": p.detach(),
        }
        for p, old, state in zip(params, before, saved["state"].values(), strict=True)
    ]
    return {
        "versions": versions(bitsandbytes),
        "options": {k: v for k, v in saved["param_groups"][0].items() if k != "params"},
        "parameters": parameters,
    }


def dequantized(state: dict[str, Any]) -> list[Tensor]:
    """The states of a parameter in float32; AdEMAMix stacks the first two of its three."""
    import bitsandbytes

    tensors = state["__bnb_optimizer_quant_state__"]
    result: list[Tensor] = []
    for i in "12":
        if f"state{i}" not in tensors:
            continue
        codes, scales = tensors[f"state{i}"], tensors.get(f"absmax{i}")
        stacked = i == "1" and codes.dim() > tensors.get("state2", codes).dim()
        for j in range(2) if stacked else [...]:
            if codes.dtype != torch.uint8:
                result.append(codes[j])
                continue
            result.append(
                bitsandbytes.functional.dequantize_blockwise(
                    codes[j].contiguous(),
                    absmax=scales[j].contiguous(),
                    code=tensors[f"qmap{i}"],
                    blocksize=256,
                )
            )
    return result


def make_torchao(shapes: Any = TORCHAO_SHAPES) -> dict[str, Any]:
    """8-bit state; the last parameter keeps 32 bits."""
    import torchao

    def make(params: list[Any]) -> torch.optim.Optimizer:
        return torchao.optim.AdamW8bit(params, lr=0.01)

    def plain(value: Any) -> Any:
        if type(value) is Tensor:
            return value
        parts = {name: getattr(value, name) for name in (*value.tensor_attrs, "signed")}
        return {"class": type(value).__name__, **parts}

    parameters = []
    for shape, state in zip(shapes, train(make, shapes)["state"].values(), strict=True):
        moments = {
            key: value if type(value) is Tensor else value.dequantize()
            for key, value in state.items()
            if key != "step"
        }
        saved = {key: plain(value) for key, value in state.items()}
        parameters.append({"shape": list(shape), "state": saved, "moments": moments})
    return {"versions": versions(torchao), "parameters": parameters}


def versions(package: Any) -> dict[str, str]:
    return {
        package.__name__: package.__version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


def main(arguments: list[str]) -> int:
    """Write the files, and print the versions that made them."""
    folder = Path(arguments[0]) if arguments else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    makers: dict[str, Callable[[], dict[str, Any]]] = {
        "bitsandbytes": make_bitsandbytes,
        "torchao": make_torchao,
    }
    for name in FAMILY:
        makers[f"bitsandbytes_{name.lower()}"] = functools.partial(make_bitsandbytes_of, name)
    for name, make in makers.items():
        made = make()
        torch.save(made, folder / f"{name}.pt")
        print(f"{name}.pt: {made['versions']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
