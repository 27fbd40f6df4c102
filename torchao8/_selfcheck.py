"""Whether the installed ops compute what they should: a part of ``python -m torchao8``."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

LR, BETAS, EPS, WEIGHT_DECAY = 1e-2, (0.9, 0.999), 1e-8, 0.1
# Rows of 300 end in a short block; a vector and a scalar are laid out in their own ways.
SHAPES = ((70, 300), (5000,), ())
STEPS = 3


class Result(NamedTuple):
    name: str
    passed: bool
    detail: str


def run() -> list[Result]:
    """Runs every check. One that raises has failed, with what it raised as the detail."""
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "32-bit AdamW against float64": _check_32bit,
        "8-bit AdamW against float64": _check_8bit,
    }
    from torchao8 import ops

    for device in _accelerators():
        # Bits are compared where both devices have kernels.
        if ops.is_portable(device) or ops.is_portable(torch.device("cpu")):
            checks[f"8-bit AdamW on {device} against float64"] = partial(_check_8bit, str(device))
        else:
            checks[f"8-bit AdamW on {device} against the CPU"] = partial(_check_cuda, str(device))
    return [_run_one(name, check) for name, check in checks.items()]


def _accelerators() -> list[torch.device]:
    """All GPUs of the kind that torch finds."""
    found = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if found is None else torch.accelerator.device_count()
    return [torch.device(found.type, i) for i in range(count) if found is not None]


def _run_one(name: str, check: Callable[[], tuple[bool, str]]) -> Result:
    try:
        return Result(name, *check())
    except Exception as error:
        return Result(name, False, f"{type(error).__name__}: {error}")


def _params(generator: torch.Generator) -> list[Tensor]:
    return [
        torch.randn(s, generator=generator, device="cpu", dtype=torch.float32).requires_grad_()
        for s in SHAPES
    ]


def _check_32bit() -> tuple[bool, str]:
    """Float32 rounding is all that may differ: a few units in the last place of numbers near 1."""
    from torchao8 import AdamW

    generator = torch.Generator().manual_seed(0)
    params = _params(generator)
    exact = [(p.detach().double(), *_moments({}, p)) for p in params]
    optimizer = AdamW(params, LR, BETAS, EPS, WEIGHT_DECAY)
    for step in range(1, STEPS + 1):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32)
            old, m, v = exact[i]
            exact[i] = _adamw(old, p.grad.double(), m, v, step)
        optimizer.step()
    worst = _largest([p.detach() - new for p, (new, _, _) in zip(params, exact, strict=True)])
    return worst < 2e-6, f"largest difference of a parameter {worst:.1e}"


def _check_8bit(device: str = "cpu") -> tuple[bool, str]:
    """Each step is repeated in float64 from the state before it.

    Parameters are updated before the moments are quantized, so they may differ by float32 rounding
    only. A stored moment may be one gap of the map away: 0.9 / 128 of its scale, where the map is
    coarsest, for second moments, which are rounded up or down, and half of 0.9 / 64 for first ones.
    """
    from torchao8 import AdamW8bit

    generator = torch.Generator().manual_seed(1)
    params = [p.detach().to(device).requires_grad_() for p in _params(generator)]
    optimizer = AdamW8bit(params, LR, BETAS, EPS, WEIGHT_DECAY)
    param_errors, state_errors = [], []
    for step in range(1, STEPS + 1):
        for p in params:
            grad = torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32)
            p.grad = grad.to(device)
        before = [(p.detach().cpu().double(), *_moments(optimizer.state[p], p)) for p in params]
        optimizer.step()
        for p, (old, m, v) in zip(params, before, strict=True):
            assert p.grad is not None
            new, m, v = _adamw(old, p.grad.cpu().double(), m, v, step)
            param_errors.append((p.cpu() - new).detach())
            for got, want in zip(_moments(optimizer.state[p], p), (m, v), strict=True):
                limit = 0.9 / 128 * _scales(want) * (1 + 1e-4)
                state_errors.append((got - want) / limit)
    worst_param, worst_state = _largest(param_errors), _largest(state_errors)
    passed = worst_param < 2e-6 and worst_state <= 1
    return passed, (
        f"largest difference of a parameter {worst_param:.1e}, "
        f"of 8-bit state {worst_state:.2f} of its largest rounding error (up to 1 is right)"
    )


def _check_cuda(device: str) -> tuple[bool, str]:
    """The same steps on both devices leave the same bits."""
    from torchao8 import AdamW8bit

    generator = torch.Generator().manual_seed(2)
    here = _params(generator)
    there = [p.detach().to(device).requires_grad_() for p in here]
    optimizers = [AdamW8bit(params, LR, BETAS, EPS, WEIGHT_DECAY) for params in (here, there)]
    for _ in range(STEPS):
        for p, q in zip(here, there, strict=True):
            p.grad = torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32)
            q.grad = p.grad.to(device)
        for optimizer in optimizers:
            optimizer.step()
    compared = different = 0
    for p, q in zip(here, there, strict=True):
        states = [optimizer.state[x] for optimizer, x in zip(optimizers, (p, q), strict=True)]
        pairs = [(p, q), *((states[0][key], states[1][key]) for key in states[0])]
        compared += len(pairs)
        different += sum(not torch.equal(a, b.cpu()) for a, b in pairs)
    return different == 0, f"{different} of {compared} tensors differ"


def _adamw(p: Tensor, g: Tensor, m: Tensor, v: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    m = BETAS[0] * m + (1 - BETAS[0]) * g
    v = BETAS[1] * v + (1 - BETAS[1]) * g * g
    denominator = (v / (1 - BETAS[1] ** step)).sqrt() + EPS
    p = p * (1 - LR * WEIGHT_DECAY) - LR * (m / (1 - BETAS[0] ** step)) / denominator
    return p, m, v


def _moments(state: dict[str, Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments in float64, zeros before the first step."""
    from torchao8 import dequantize_blockwise

    def moment(name: str, signed: bool) -> Tensor:
        if not state:
            return torch.zeros(p.shape, dtype=torch.float64, device="cpu")
        if name in state:
            return state[name].cpu().double()
        codes, scale = state[f"{name}_codes"].cpu(), state[f"{name}_scale"].cpu()
        return dequantize_blockwise(codes, scale, signed=signed).double()

    return moment("exp_avg", True), moment("exp_avg_sq", False)


def _largest(errors: list[Tensor]) -> float:
    """The largest magnitude; NaN, which passes no check, where there is one."""
    return float(torch.stack([e.abs().max() for e in errors]).max())


def _scales(moment: Tensor) -> Tensor:
    """The magnitude of the largest element of its block, for each element; a scalar is its own."""
    if moment.dim() == 0:
        return moment.abs()
    blocks = moment.abs().split(256, dim=-1)
    return torch.cat([b.amax(-1, keepdim=True).expand_as(b) for b in blocks], dim=-1)
