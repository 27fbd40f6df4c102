"""Train with the torchao8 that this Python finds: `python -I tools/train_a_step.py`.

Needs an environment with torch and torchao8, and nothing else; -I hides the checkout. Trains a
small model with 8-bit AdamW and loads a checkpoint of it, then takes three steps with every class.
Prints the versions, where torchao8 lies, and a digest of what those steps made: their gradients are
written down, so the digest is the same on every machine, with every torch and every Python.
"""

from __future__ import annotations

import hashlib
import io
import platform
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import torchao8


def pattern(shape: tuple[int, ...], dtype: torch.dtype, period: int) -> Tensor:
    """Numbers from -1 to 1 that repeat after `period` elements, each one exact in float32."""
    count = torch.Size(shape).numel()
    ramp = torch.arange(count, dtype=torch.float32).remainder(period) - period // 2
    return (ramp / 64).reshape(shape).to(dtype)


def raw_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor, without numpy."""
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist())


def take_steps(name: str) -> list[Tensor]:
    """Parameters and states after three steps of the class of that name.

    Muon trains matrices only. Its parameters are left out: their bits depend on the matrix products
    of the machine.
    """
    shapes = (((20, 300), torch.float32), ((20, 300), torch.bfloat16), ((64,), torch.float32))
    params = [nn.Parameter(pattern(shape, dtype, 97)) for shape, dtype in shapes]
    matrices = [p for p in params if p.dim() == 2] if "Muon" in name else []
    rest = [p for p in params if not any(p is matrix for matrix in matrices)]
    groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    of_class = {"Muon": matrices, "Muon8bit": matrices}.get(name, groups if matrices else params)
    optimizer = getattr(torchao8, name)(of_class, lr=1e-3, weight_decay=0.1)
    for period in (101, 89, 113):
        for param in params:
            param.grad = pattern(tuple(param.shape), param.dtype, period)
        optimizer.step()
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state.get(p, {}))]
    return [*rest, *states]


def digest_of_classes() -> str:
    """One digest of the steps of every class that is not paged."""
    digest = hashlib.sha256()
    for name in torchao8.optim.__all__:
        if name != "CommonOptions" and not name.startswith("Paged"):
            for tensor in take_steps(name):
                digest.update(raw_bytes(tensor))
    return digest.hexdigest()


def train() -> str:
    """Fit a small model, stop halfway, go on from the checkpoint; the losses as text."""
    torch.manual_seed(0)
    inputs = torch.randn(64, 64)
    targets = inputs.roll(1, dims=1)
    losses: list[float] = []
    saved = b""
    for _ in range(2):
        first = nn.Linear(64, 128)
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(128, 64))
        optimizer = torchao8.AdamW8bit(model.parameters(), lr=3e-3)
        if saved:
            checkpoint = torch.load(io.BytesIO(saved), weights_only=True)
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
        for _ in range(20):
            loss = nn.functional.mse_loss(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        codes = optimizer.state[first.weight]["exp_avg_codes"]
        if codes.dtype != torch.uint8:
            raise SystemExit(f"the moments of a matrix must be uint8, they are {codes.dtype}")
        buffer = io.BytesIO()
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        saved = buffer.getvalue()
    start, halfway, end = losses[0], losses[20], losses[-1]
    if not end < halfway < start:
        raise SystemExit(f"the loss must fall, it was {start:.4f}, {halfway:.4f}, {end:.4f}")
    return f"{start:.3f} -> {halfway:.3f} -> {end:.3f}"


def main() -> int:
    """Print a line for each thing."""
    print(f"torchao8 {torchao8.__version__} in {Path(torchao8.__file__).parent}")
    print(f"torch {torch.__version__}, Python {platform.python_version()}")
    print(f"loss {train()}")
    print(f"digest {digest_of_classes()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
