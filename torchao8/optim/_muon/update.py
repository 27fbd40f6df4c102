"""A step of Muon on plain tensors: momentum, orthogonal factor, update, in one op.

A chunk of the parameters goes through three stages. ``muon_step_`` takes the gradients into the
momentum buffers and writes the directions, as bfloat16. These are orthogonalized. ``muon_step_``
without buffers decays the parameters and moves them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.matrix_shape import MatrixShape
from torchao8.optim._muon.newton_schulz import Triple, orthogonalize_, stack_room, stack_size

# Elements of the stacks that exist at a time (32 MiB), unless those of one parameter have more.
CHUNK = 1 << 24
# Of ops.NUMBERS of muon_step_: momentum, weight_decay, rate_scale.
_RATE_SCALE = ops.NUMBERS["muon_step_"].index("rate_scale")

_Value = TypeVar("_Value")

_step_ = torch.ops.torchao8.muon_step_.default
_check_step_ = torch.ops.torchao8.check_muon_step_.default


def rate_scale(matrix: MatrixShape, match_rms: bool) -> float:
    """What the learning rate is multiplied by for the step of a matrix, and not for its decay.

    sqrt(max(1, rows / columns)), as in Jordan et al.; with ``match_rms`` 0.2 * sqrt(max(rows,
    columns)), with which an update is about as large as AdamW's ("Muon is Scalable for LLM
    Training", section 2.2).
    """
    _, rows, columns = matrix
    if match_rms:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / max(columns, 1)))


def with_rate(numbers: Tensor, rate: float) -> Tensor:
    """The numbers of the rule, with rate_scale multiplied by what :func:`rate_scale` gives."""
    scaled = numbers.clone()
    scaled[_RATE_SCALE].mul_(rate)
    return scaled


def kept_factors(pair: Tensor) -> Tensor:
    """The factors of an update by the orthogonal matrix of a gradient that had these factors.

    What clips a gradient is not to scale the matrix: 1 in its place, and NaN where it was NaN.
    """
    return torch.stack((pair[0] * 0 + 1, pair[1]))


def update_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    momentum_buffer_scales: list[Tensor],
    steps: list[Tensor],
    factors: list[Tensor],
    extremes: list[Tensor],
    lr: Tensor,
    numbers: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    /,
    *,
    nesterov: bool,
    maximize: bool,
    matrices: Sequence[MatrixShape],
    coefficients: Sequence[Triple],
    eps: float,
    match_rms: bool,
    block_size: int,
    stochastic_params: bool,
    count_steps: bool,
    state_format: int,
    seed: int,
) -> None:
    """One step of Muon, in place, on plain tensors of one device and one state format.

    Args:
        params, grads, momentum_buffers, momentum_buffer_scales, steps, extremes, lr, numbers,
            grad_scale, found_inf, nesterov, maximize, block_size, stochastic_params, count_steps,
            state_format, seed: as in ``ops.step_`` of "muon_step_". The number rate_scale
            multiplies the one that follows from the shape of a matrix.
        factors: the same. A matrix with a gradient element that is not finite needs a first factor
            of NaN, see :func:`torchao8.optim._muon.factors.matrix_factors`.
        matrices: what each parameter holds.
        coefficients: of the Newton-Schulz iterations.
        eps: what a direction is divided by at least, in place of its norm.
        match_rms: which learning rate a matrix has, see :func:`rate_scale`.

    Raises:
        RuntimeError: an argument does not fit the others; nothing has changed then.
    """
    if not params:  # an op chooses its device by its tensors
        return
    OP(
        params,
        grads,
        momentum_buffers,
        momentum_buffer_scales,
        steps,
        factors,
        extremes,
        lr,
        numbers,
        grad_scale,
        found_inf,
        nesterov=nesterov,
        maximize=maximize,
        matrices=[number for matrix in matrices for number in matrix],
        coefficients=[number for triple in coefficients for number in triple],
        eps=eps,
        match_rms=match_rms,
        block_size=block_size,
        stochastic_params=stochastic_params,
        count_steps=count_steps,
        state_format=state_format,
        seed=seed,
    )
    ops.mark_modified(params)


def muon_update_(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    momentum_buffer_scales: list[Tensor],
    steps: list[Tensor],
    factors: list[Tensor],
    extremes: list[Tensor],
    lr: Tensor,
    numbers: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    *,
    nesterov: bool,
    maximize: bool,
    matrices: Sequence[int],
    coefficients: Sequence[float],
    eps: float,
    match_rms: bool,
    block_size: int,
    stochastic_params: bool,
    count_steps: bool,
    state_format: int,
    seed: int,
) -> None:
    """The op of :func:`update_`, which makes plain numbers of matrices and coefficients."""
    state_options = {"block_size": block_size, "state_format": state_format}
    param_options = {"stochastic_params": stochastic_params, "count_steps": count_steps}
    # Each call below sees a part of the lists, so all of them are checked before the first one.
    _check_step_(
        params,
        grads,
        momentum_buffers,
        momentum_buffer_scales,
        steps,
        factors,
        extremes,
        lr,
        numbers,
        grad_scale,
        found_inf,
        nesterov=nesterov,
        maximize=maximize,
        seed=seed,
        **state_options,
        **param_options,
    )
    shapes = _matrices(params, momentum_buffers, matrices)
    triples = _triples(coefficients)
    rates = [rate_scale(shape, match_rms) for shape in shapes]
    none = lr.new_zeros(())
    kept = [kept_factors(pair) for pair in factors]
    for members in _chunks(shapes, params[0].device.type):
        sizes = [params[i].shape for i in members]
        directions, stacks = make_stacks(sizes, _pick(shapes, members), params[0].device)
        _step_(
            directions,
            _pick(grads, members),
            _pick(momentum_buffers, members),
            _pick(momentum_buffer_scales, members),
            _pick(steps, members),
            _pick(factors, members),
            _pick(extremes, members),
            none,
            numbers,
            grad_scale,
            found_inf,
            nesterov=nesterov,
            maximize=maximize,
            **state_options,
        )
        for stack in stacks:
            orthogonalize_(stack, triples, eps)
        for rate in dict.fromkeys(rates[i] for i in members):
            own = [(i, d) for i, d in zip(members, directions, strict=True) if rates[i] == rate]
            moved = [i for i, _ in own]
            _step_(
                _pick(params, moved),
                [d for _, d in own],
                [],
                [],
                _pick(steps, moved),
                _pick(kept, moved),
                [],
                lr,
                with_rate(numbers, rate),
                None,
                found_inf,
                nesterov=False,
                maximize=False,
                seed=seed,
                **param_options,
            )


torch.library.impl("torchao8::muon_update_", "CompositeExplicitAutograd", muon_update_)
OP = torch.ops.torchao8.muon_update_.default


@torch.library.register_fake("torchao8::muon_update_")
def _(params: list[Tensor], *others: list[Tensor] | Tensor | None, **options: object) -> None:
    ops.check_devices("muon_update_", "params", params, *others)


def _matrices(
    params: list[Tensor], momentum_buffers: list[Tensor], numbers: Sequence[int]
) -> list[MatrixShape]:
    """Raises RuntimeError unless they are those of the parameters."""
    if len(momentum_buffers) != len(params):
        raise RuntimeError(
            f"muon_update_: momentum_buffers must have {len(params)} elements (one per parameter), "
            f"got {len(momentum_buffers)}"
        )
    if len(numbers) != 3 * len(params):
        raise RuntimeError(
            f"muon_update_: matrices must have {3 * len(params)} numbers (how many matrices, their "
            f"rows and their columns, per parameter), got {len(numbers)}"
        )
    shapes = [MatrixShape(*numbers[i : i + 3]) for i in range(0, len(numbers), 3)]
    for i, (p, shape) in enumerate(zip(params, shapes, strict=True)):
        if min(shape) < 0 or math.prod(shape) != p.numel():
            raise RuntimeError(
                f"muon_update_: matrices of params[{i}] must have its {p.numel()} elements, got "
                f"{shape.matrices} of {shape.rows} x {shape.columns}"
            )
    return shapes


def _triples(numbers: Sequence[float]) -> list[Triple]:
    if not numbers or len(numbers) % 3:
        raise RuntimeError(
            "muon_update_: coefficients must have three numbers for each iteration, got "
            f"{len(numbers)}"
        )
    return [(numbers[i], numbers[i + 1], numbers[i + 2]) for i in range(0, len(numbers), 3)]


def _pick(values: list[_Value], members: Sequence[int]) -> list[_Value]:
    """Those of the members; none if no parameter has one."""
    return [values[i] for i in members] if values else []


def _chunks(shapes: Sequence[MatrixShape], device_type: str) -> Iterator[list[int]]:
    """The numbers of the parameters of each chunk, those of one shape of matrices together."""
    order = sorted(range(len(shapes)), key=lambda i: (shapes[i][1:], i))
    chunk: list[int] = []
    counts: dict[tuple[int, int], int] = {}
    elements = 0
    for i in order:
        count, rows, columns = shapes[i]
        before = counts.get((rows, columns), 0)
        together = MatrixShape(before + count, rows, columns)
        held = stack_room(MatrixShape(before, rows, columns), device_type)
        more = stack_room(together, device_type) - held
        if chunk and elements + more * rows * columns > CHUNK:
            yield chunk
            chunk, counts, elements, before = [], {}, 0, 0
            more = stack_room(shapes[i], device_type)
        chunk.append(i)
        counts[rows, columns] = before + count
        elements += more * rows * columns
    if chunk:
        yield chunk


def make_stacks(
    sizes: Sequence[Sequence[int]], shapes: Sequence[MatrixShape], device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Zeros for the directions of some parameters.

    Args:
        sizes: the shape of each of them.
        shapes: what each of them holds. Those of one shape of matrices are neighbours.

    Returns:
        The directions, and the same memory as stacks of matrices. The last stack of a shape goes on
        behind its last direction.
    """
    members_of: dict[tuple[int, int], list[int]] = {}
    for i, (_, rows, columns) in enumerate(shapes):
        members_of.setdefault((rows, columns), []).append(i)
    directions: list[Tensor] = []
    stacks: list[Tensor] = []
    for (rows, columns), members in members_of.items():
        counts = [shapes[i].matrices for i in members]
        room = stack_room(MatrixShape(sum(counts), rows, columns), device.type)
        made = torch.zeros((room, rows, columns), dtype=torch.bfloat16, device=device)
        stacks += made.split(stack_size(rows, columns, device.type))
        parts = made[: sum(counts)].split(counts)
        directions += [part.view(sizes[i]) for i, part in zip(members, parts, strict=True)]
    return directions, stacks
