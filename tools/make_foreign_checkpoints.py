"""Make test/data/foreign/*.pt with the real packages: `make_foreign_checkpoints.py [FOLDER]`.

Needs `pip install bitsandbytes torchao` and torchao8. Each file is a dict of plain tensors, numbers
and strings, so that the tests load it with weights_only=True and without the packages:

    versions    of the packages that made it
    parameters  for each parameter: shape, state (as the package saves it), and moments (float32, as
                the package itself dequantizes it)

A tensor subclass of torchao is a dict of its class, its tensors and `signed`.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent.parent / "test" / "data" / "foreign"
# Rows that blocks of 256 divide, rows that they do not, a vector, a convolution, a small one.
BNB_SHAPES = ((4, 256), (2, 512), (3, 300), (600,), (4, 4, 3, 3), (5,))
# torchao quantizes from 4096 elements on, where blocks divide the tensor.
TORCHAO_SHAPES = ((8, 512), (256, 17), (5, 30))
STEPS = 3


def train(make: Callable[[list[Any]], torch.optim.Optimizer], shapes: Any) -> dict[str, Any]:
    """The state dict after a few steps, with gradients of many magnitudes and a dead row."""
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

    def moment(quantized: dict[str, Tensor], i: int) -> Tensor:
        codes = quantized[f"state{i}"]
        if codes.dtype != torch.uint8:
            return codes
        return bitsandbytes.functional.dequantize_blockwise(
            codes, absmax=quantized[f"absmax{i}"], code=quantized[f"qmap{i}"], blocksize=256
        )

    parameters = []
    for shape, state in zip(shapes, train(make, shapes)["state"].values(), strict=True):
        quantized = state["__bnb_optimizer_quant_state__"]
        moments = {"exp_avg": moment(quantized, 1), "exp_avg_sq": moment(quantized, 2)}
        parameters.append({"shape": list(shape), "state": state, "moments": moments})
    return {"versions": versions(bitsandbytes), "parameters": parameters}


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
    """Write the files, and print what made them."""
    folder = Path(arguments[0]) if arguments else FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for name, make in (("bitsandbytes", make_bitsandbytes), ("torchao", make_torchao)):
        made = make()
        torch.save(made, folder / f"{name}.pt")
        print(f"{name}.pt: {made['versions']}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
