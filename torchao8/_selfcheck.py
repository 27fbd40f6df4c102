"""Whether the installed ops compute what they should: a part of ``python -m torchao8``."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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


class Stored(NamedTuple):
    """AdamW with its state in one of the formats.

    Attributes:
        name: in the report.
        optimizer: the class.
        state_format: as :func:`torchao8.dequantize_blockwise` takes it.
        keys: what the keys of codes and of scales end in.
    """

    name: str
    optimizer: str
    state_format: str
    keys: tuple[str, str]

    def make(self, params: list[Tensor]) -> Any:
        import torchao8

        options = {} if self.state_format == "4bit" else {"state_format": self.state_format}
        return getattr(torchao8, self.optimizer)(params, LR, BETAS, EPS, WEIGHT_DECAY, **options)


STORED = (
    Stored("8-bit AdamW", "AdamW8bit", "dynamic", ("_codes", "_scale")),
    Stored("8-bit AdamW (mulaw)", "AdamW8bit", "mulaw", ("_mulaw", "_mulaw_scale")),
    Stored("4-bit AdamW", "AdamW4bit", "4bit", ("_4bit", "_4bit_scale")),
)


def run() -> list[Result]:
    """Runs every check. One that raises has failed, with what it raised as the detail."""
    checks: dict[str, Callable[[], tuple[bool, str]]] = {
        "32-bit AdamW against float64": _check_32bit
    }
    for stored in STORED:
        checks[f"{stored.name} against float64"] = partial(_check_stored, stored)
    from torchao8 import ops

    for device in _accelerators():
        # Bits are compared where both devices have kernels.
        portable = ops.is_portable(device) or ops.is_portable(torch.device("cpu"))
        check, other = (_check_stored, "float64") if portable else (_check_cuda, "the CPU")
        for stored in STORED:
            checks[f"{stored.name} on {device} against {other}"] = partial(
                check, stored, str(device)
            )
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
    exact = [(p.detach().double(), *_nothing(p)) for p in params]
    optimizer = AdamW(params, LR, BETAS, EPS, WEIGHT_DECAY)
    for step in range(1, STEPS + 1):
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32)
            old, m, v = exact[i]
            exact[i] = _adamw(old, p.grad.double(), m, v, step)
        optimizer.step()
    worst = _largest([p.detach() - new for p, (new, _, _) in zip(params, exact, strict=True)])
    return worst < 2e-6, f"largest difference of a parameter {worst:.1e}"


def _check_stored(stored: Stored, device: str = "cpu") -> tuple[bool, str]:
    """Each step is repeated in float64 from the state before it.

    Parameters are updated before the moments are stored, so they may differ by float32 rounding
    only. A stored moment may differ by as much as its format rounds.
    """
    generator = torch.Generator().manual_seed(1)
    params = [p.detach().to(device).requires_grad_() for p in _params(generator)]
    optimizer = stored.make(params)
    param_errors, state_errors = [], []
    for step in range(1, STEPS + 1):
        for p in params:
            grad = torch.randn(p.shape, generator=generator, device="cpu", dtype=torch.float32)
            p.grad = grad.to(device)
        before = [
            (p.detach().cpu().double(), *_moments(stored, optimizer.state[p], p)) for p in params
        ]
        optimizer.step()
        for p, (old, m, v) in zip(params, before, strict=True):
            assert p.grad is not None
            new, m, v = _adamw(old, p.grad.cpu().double(), m, v, step)
            param_errors.append((p.cpu() - new).detach())
            got = _moments(stored, optimizer.state[p], p)
            limits = _limits(stored, optimizer.state[p], m, v, got[1])
            for moment, want, limit in zip(got, (m, v), limits, strict=True):
                state_errors.append((moment - want) / (limit * (1 + 1e-4)))
    worst_param, worst_state = _largest(param_errors), _largest(state_errors)
    passed = worst_param < 2e-6 and worst_state <= 1
    return passed, (
        f"largest difference of a parameter {worst_param:.1e}, "
        f"of stored state {worst_state:.2f} of its largest rounding error (up to 1 is right)"
    )


def _check_cuda(stored: Stored, device: str) -> tuple[bool, str]:
    """The same steps on both devices leave the same bits."""
    generator = torch.Generator().manual_seed(2)
    here = _params(generator)
    there = [p.detach().to(device).requires_grad_() for p in here]
    optimizers = [stored.make(params) for params in (here, there)]
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


def _nothing(p: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments before the first step."""
    zeros = torch.zeros(p.shape, dtype=torch.float64, device="cpu")
    return zeros, zeros


def _moments(stored: Stored, state: dict[str, Tensor], p: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments in float64."""
    if not state:
        return _nothing(p)
    if "exp_avg" in state:
        return state["exp_avg"].cpu().double(), state["exp_avg_sq"].cpu().double()
    from torchao8 import dequantize_blockwise

    m, v = (
        dequantize_blockwise(
            *(state[name + key].cpu() for key in stored.keys),
            block_size=_block_size(stored),
            signed=name == "exp_avg",
            state_format=stored.state_format,
            shape=p.shape,
        ).double()
        for name in ("exp_avg", "exp_avg_sq")
    )
    return (m * _roots(v) if stored.state_format == "4bit" else m), v


def _limits(
    stored: Stored, state: dict[str, Tensor], m: Tensor, v: Tensor, stored_v: Tensor
) -> tuple[Tensor, Tensor]:
    """By how much the stored moments may differ from the exact ones. First moments are rounded to
    nearest, half a gap away at most, and second ones up or down, a gap away.

    A gap of the dynamic map is at most 0.9 / 64 of the scale for first moments, and 0.9 / 128 for
    second ones. One of mu-law is a sixteenth of a power of two, which is at most 1 + x / scale,
    times the scale. Of 4 bits, the first moment divided by the root of the second one has gaps of
    an eighth of the scale; of the opposite sign to it, the last one is missing. The second one is
    half of a power of two from the next, and at least 2^-7 of the scale.
    """
    if "exp_avg" in state:
        return m.abs() * 1e-5, v * 1e-5
    scale_m, scale_v = (
        _of_elements(state[name + stored.keys[1]].cpu().double().abs(), m, _block_size(stored))
        for name in ("exp_avg", "exp_avg_sq")
    )
    if stored.state_format == "dynamic":
        return 0.9 / 64 / 2 * scale_m, 0.9 / 128 * scale_v
    if stored.state_format == "mulaw":
        return (m.abs() + scale_m) / 16 / 2, (v + scale_v) / 16
    return scale_m / 8 * _roots(stored_v), torch.maximum(v / 2, scale_v / 128)


def _of_elements(scale: Tensor, moment: Tensor, block_size: int) -> Tensor:
    """The scale of each element, of blocks in rows of the last dimension."""
    return scale.repeat_interleave(block_size, -1)[..., : moment.shape[-1]]


def _block_size(stored: Stored) -> int:
    return 64 if stored.state_format == "4bit" else 256


def _roots(squares: Tensor) -> Tensor:
    return torch.where(squares > 0, squares.sqrt(), 1.0)


def _largest(errors: list[Tensor]) -> float:
    """The largest magnitude; NaN, which passes no check, where there is one."""
    return float(torch.stack([e.abs().max() for e in errors]).max())
