"""The op calls of a step, with what has to be known before them."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.optim._muon import step as matrices
from torchao8.optim._step.bucket import Bucket, Work
from torchao8.optim._step.extremes import extremes_of
from torchao8.optim._step.factors import factors_of
from torchao8.optim._step.pages import pages_ahead
from torchao8.optim.contract import OptimizerContract

_Scalar = TypeVar("_Scalar", Tensor, Tensor | None)


def call_ops(
    optimizer: OptimizerContract,
    works: Sequence[Work],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Steps the tensors of all buckets, and counts the step."""
    if not torch.compiler.is_compiling():
        _check_numbers(optimizer, works, grad_scale)
    factors = factors_of(optimizer, works, grad_scale, found_inf)

    def arguments(i: int, bucket: Bucket) -> ops.Arguments:
        work, device = works[i], bucket.params[0].device
        rule = optimizer._rule(work.group)
        if device not in work.rule_numbers:
            work.rule_numbers[device] = optimizer._op_numbers(work.group, device)
        return ops.Arguments(
            rule._op,
            bucket.params,
            bucket.grads,
            [bucket.values.get(name, []) for name in rule._op_states],
            [bucket.scales.get(name, []) for name in rule._op_scaled_states],
            bucket.steps,
            work.lr if work.lr.is_cpu else _to_device(work.lr, device),  # the CPU's go anywhere
            work.rule_numbers[device],
            _to_device(grad_scale, device),
            [factors[i][k] for k in bucket.numbers] if factors[i] else [],
        )

    def find(i: int, bucket: Bucket) -> Tensor:
        return ops.extremes(
            *arguments(i, bucket),
            state_format=bucket.state_format,
            **optimizer._op_flags(works[i].group),
        )

    extremes = extremes_of(find, works, optimizer._shard_groups)
    calls = []
    for i, work in enumerate(works):
        if matrices.is_exchanged(work):
            optimizer._exchange(work, functools.partial(arguments, i), extremes[i], found_inf)
        else:
            calls += [(i, work, bucket) for bucket in work.buckets]
    ahead = pages_ahead([(work, bucket) for _, work, bucket in calls])
    for (i, work, bucket), pages in zip(calls, ahead, strict=True):
        group = work.group
        ops.prefetch_pages_(pages, bucket.params[0])
        found = _to_device(found_inf, bucket.params[0].device)
        own_extremes = [extremes[i][k] for k in bucket.numbers if k in extremes[i]]
        if work.matrices is not None:
            matrices.step_(work, bucket, arguments(i, bucket), own_extremes, found)
            continue
        ops.step_(
            *arguments(i, bucket),
            own_extremes,
            found,
            block_size=group["block_size"],
            stochastic_rounding=group["state_rounding"] == "stochastic",
            stochastic_params=group["stochastic_rounding"],
            count_steps=bucket.counts,
            state_format=bucket.state_format,
            seed=group["seed"],
            shard_offsets=bucket.shard_offsets,
            shard_row_strides=bucket.shard_row_strides,
            **optimizer._op_flags(group),
        )
    for device, steps in _steps_of(works).items():  # one kernel on a GPU, for all buckets
        ops.count_step_(steps, _to_device(found_inf, device))


def _steps_of(works: Sequence[Work]) -> dict[torch.device, list[Tensor]]:
    """The counts of steps on each device."""
    steps: dict[torch.device, list[Tensor]] = {}
    for work in works:
        for device, counts in work.counts:
            steps.setdefault(device, []).extend(counts)
    return steps


def _check_numbers(
    optimizer: OptimizerContract, works: Sequence[Work], grad_scale: Tensor | None
) -> None:
    """Raises RuntimeError for a number on the CPU that an op would refuse, after other calls had
    gone through and norms had been taken into histories."""
    name = type(optimizer).__name__
    if not any(work.params for work in works):
        return
    for work in works:
        if work.params and work.lr.is_cpu and not math.isfinite(work.lr):
            raise RuntimeError(f"{name}: lr must be finite, got {float(work.lr)}")
    if grad_scale is not None and grad_scale.is_cpu and not 0 < float(grad_scale) < math.inf:
        raise RuntimeError(
            f"{name}: grad_scale must be positive and finite, got {float(grad_scale)}"
        )


def _to_device(value: _Scalar, device: torch.device) -> _Scalar:
    """GradScaler keeps its tensors on one device; a model may lie on several."""
    return value if value is None else value.to(device)
