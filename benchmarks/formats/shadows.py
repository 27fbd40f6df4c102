"""The optimizers that see the same gradients as the training: their updates are compared.

A shadow has parameters of its own, which nobody trains on. Its learning rate is 1 and its weight
decay 0, so that the change of a parameter is the update alone.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.reporting import installed

BETA1, EPS = 0.9, 1e-8
BLOCK, BLOCK_OF_4BIT = 256, 64


class Shadow(Protocol):
    """An optimizer at a distance."""

    def step(self, grads: list[Tensor], wanted: bool) -> list[Tensor]:
        """Takes a step. Returns the update, to be subtracted, at lr 1; nothing if not wanted."""


class Exact:
    """Adam with float32 moments: what the others are compared with."""

    def __init__(self, grads: list[Tensor], beta2: float) -> None:
        self._beta2, self._step = beta2, 0
        self._moments = [(torch.zeros_like(g), torch.zeros_like(g)) for g in grads]

    def step(self, grads: list[Tensor], wanted: bool) -> list[Tensor]:
        self._step += 1
        for (m, v), g in zip(self._moments, grads, strict=True):
            m.mul_(BETA1).add_(g, alpha=1 - BETA1)
            v.mul_(self._beta2).addcmul_(g, g, value=1 - self._beta2)
        if not wanted:
            return []
        of_m, of_v = (1 - beta**self._step for beta in (BETA1, self._beta2))
        return [m / of_m / ((v / of_v).sqrt() + EPS) for m, v in self._moments]


class OfLibrary:
    """An optimizer class, of torchao8 or of another library."""

    def __init__(
        self, module: str, name: str, grads: list[Tensor], beta2: float, **options: Any
    ) -> None:
        cls = getattr(importlib.import_module(module), name)
        self._params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
        options |= {"lr": 1.0, "betas": (BETA1, beta2), "eps": EPS, "weight_decay": 0.0}
        self._optimizer: torch.optim.Optimizer = cls(self._params, **options)

    @torch.no_grad()
    def step(self, grads: list[Tensor], wanted: bool) -> list[Tensor]:
        for p, g in zip(self._params, grads, strict=True):
            p.grad = g
            if wanted:
                p.zero_()
        self._optimizer.step()
        return [-p.detach() for p in self._params] if wanted else []


# --- formats of chosen constants, in C++ ----------------------------------------------------------


class _Step(ctypes.Structure):
    """`Step` of shadows.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "row_length", "block", "t", "seed")),
        *((name, ctypes.c_double) for name in ("beta1", "beta2", "eps")),
        *((name, ctypes.c_void_p) for name in ("grad", "update")),
    )


@functools.cache
def compiled() -> ctypes.CDLL:
    """shadows.cpp, compiled with the checkout's csrc/ for this machine."""
    source = Path(__file__).with_name("shadows.cpp")
    csrc = source.parents[2] / "csrc"
    headers = sorted(csrc.rglob("*.h"))
    flags = ["-std=c++20", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno"]
    content = b"".join(path.read_bytes() for path in (source, *headers))
    library = Path("runs/formats") / f"shadows-{hashlib.sha256(content).hexdigest()[:12]}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, *flags, f"-I{csrc}", "-shared", "-fPIC", source, "-o", new]
        subprocess.run(command, check=True)
        new.replace(library)
    loaded = ctypes.CDLL(str(library.resolve()))
    loaded.mulaw_step.restype = ctypes.c_bool
    return loaded


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


class _InCpp:
    """What the two below share: a step of each tensor in turn."""

    def __init__(self, grads: list[Tensor], beta2: float, block: int) -> None:
        self._beta2, self._block, self._count = beta2, block, 0
        self._states = [self._state(g) for g in grads]

    def _state(self, grad: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _call(self, step: _Step, state: tuple[Tensor, ...]) -> None:
        raise NotImplementedError

    def step(self, grads: list[Tensor], wanted: bool) -> list[Tensor]:
        self._count += 1
        updates = [torch.empty_like(g) for g in grads] if wanted else []
        for i, (g, state) in enumerate(zip(grads, self._states, strict=True)):
            g = g.contiguous()
            step = _Step(
                *g.shape, self._block, self._count, 0, BETA1, self._beta2, EPS, _at(g),
                _at(updates[i]) if wanted else None,
            )  # fmt: skip
            self._call(step, state)
        return updates


class Mulaw(_InCpp):
    """Mu-law codes with so many mantissa bits, and scales from bounds as in the library."""

    def __init__(self, signed: int, unsigned: int, grads: list[Tensor], beta2: float) -> None:
        self._bits = signed, unsigned
        super().__init__(grads, beta2, BLOCK)

    def _state(self, grad: Tensor) -> tuple[Tensor, ...]:
        rows, length = grad.shape
        scales = rows, -(-length // BLOCK)
        codes = [torch.zeros(grad.shape, dtype=torch.uint8) for _ in range(2)]
        return (*codes, *(torch.zeros(scales) for _ in range(2)))

    def _call(self, step: _Step, state: tuple[Tensor, ...]) -> None:
        if not compiled().mulaw_step(ctypes.byref(step), *self._bits, *map(_at, state)):
            raise ValueError(f"no mu-law format has {self._bits} mantissa bits")


class FourBit(_InCpp):
    """Second moments without a zero; first moments as levels, of roots or of the extreme itself."""

    def __init__(
        self,
        levels: Sequence[float],
        grads: list[Tensor],
        beta2: float,
        *,
        of_roots: bool = True,
        fits: bool = False,
        block: int = BLOCK_OF_4BIT,
    ) -> None:
        """fits: whether the scale is large enough for numbers in both directions; else those of
        the direction with fewer levels are cut to the last of them."""
        self._levels, self._of_roots, self._fits = torch.tensor(sorted(levels)), of_roots, fits
        super().__init__(grads, beta2, block)

    def _state(self, grad: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(grad), torch.zeros_like(grad)

    def _call(self, step: _Step, state: tuple[Tensor, ...]) -> None:
        # Levels that are not symmetric have the extreme element's sign in their scale.
        with_sign = -float(self._levels[0]) != float(self._levels[-1])
        kind = map(ctypes.c_bool, (with_sign, self._fits, self._of_roots))
        compiled().four_bit_step(
            ctypes.byref(step), _at(self._levels), len(self._levels), *kind, *map(_at, state)
        )


# --- which there are -----------------------------------------------------------------------------

EIGHTHS = [k / 8 for k in range(-7, 9)]
SEVENTHS = [k / 7 for k in range(-7, 8)]
# Closer together near zero: the seventh roots of unity would be too close.
DENSE = [sign * (k / 7) ** 1.5 for k in range(8) for sign in (1, -1)]

Make = Callable[[list[Tensor], float], Shadow]


def _of(module: str, name: str, **options: Any) -> Make:
    return lambda grads, beta2: OfLibrary(module, name, grads, beta2, **options)


def _mulaw(signed: int, unsigned: int) -> Make:
    return functools.partial(Mulaw, signed, unsigned)


def _four(levels: Sequence[float], **options: Any) -> Make:
    return functools.partial(FourBit, levels, **options)


DYNAMIC = "dynamic"
_ALL: dict[str, Make] = {
    DYNAMIC: _of("torchao8", "AdamW8bit"),
    "dynamic, to nearest": _of("torchao8", "AdamW8bit", state_rounding="nearest"),
    "mulaw L34/L44": _mulaw(4, 4),
    "mulaw L25/L35": _mulaw(5, 5),
    "mulaw L25/L44": _mulaw(5, 4),
    "mulaw L34/L35": _mulaw(4, 5),
    "torchao AdamW8bit": _of("torchao.optim", "AdamW8bit"),
    "AdamW4bit": _of("torchao8", "AdamW4bit"),
    "4 bits, eighths": _four(EIGHTHS),
    "4 bits, eighths that fit": _four(EIGHTHS, fits=True),
    "4 bits, sevenths": _four(SEVENTHS),
    "4 bits, dense near 0": _four(DENSE),
    "4 bits, m without roots": _four(EIGHTHS, of_roots=False),
    "4 bits, blocks of 128": _four(EIGHTHS, block=128),
    "torchao AdamW4bit": _of("torchao.optim", "AdamW4bit"),
}


def available() -> dict[str, Make]:
    """Those that this installation has."""
    import torchao8

    missing = {"torchao": not installed("torchao"), "AdamW4bit": "AdamW4bit" not in dir(torchao8)}
    return {
        name: make
        for name, make in _ALL.items()
        if not (missing["torchao"] and name.startswith("torchao"))
        and not (missing["AdamW4bit"] and name == "AdamW4bit")
    }
