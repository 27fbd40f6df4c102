"""A step of a rule, and what looks at one before it is made, on tensors of any device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchao8._families import Family
from torchao8.portable import codec, compiled
from torchao8.portable.pieces import Entry, Piece, block_pieces, element_pieces, shards, slices
from torchao8.portable.rules import RULES, Numbers, Old, Rate

ROOT_FLOOR_8BIT = 2.0**-101  # under a root, in units of about the squared gradient
ROOT_FLOOR_32BIT = 2.0**-126
LEAST_SHARE = 2.0**-6  # of a variance in 8 bits, in the mean square


class FormState(NamedTuple):
    name: str
    signed: bool
    stochastic: bool


class Form(NamedTuple):
    """All that pieces which are stepped by the same code have in common.

    Attributes:
        rule: of RULES.
        states: those that there are.
        numbers: the names of the rule's numbers.
        in_8bit: their format.
        has_extremes: whether a whole tensor shares a scale, whose extremes are known.
        rounds: whether the parameter is rounded stochastically.
        may_skip: whether there is a found_inf.
    """

    rule: str
    states: tuple[FormState, ...]
    numbers: tuple[str, ...]
    in_8bit: bool
    has_extremes: bool = False
    rounds: bool = False
    may_skip: bool = False


class Tensors(NamedTuple):
    """A piece with the numbers of its step, as the code of a form takes it.

    Attributes:
        numbers: those that the form names.
        draws: of each state that is rounded stochastically, what its random numbers are made of.
        hashes: of the parameter, where it is.
        extremes: of each state, where a whole tensor shares a scale.
        skip: whether nothing is to change, where there is a found_inf.
    """

    param: Tensor
    grad: Tensor
    values: list[Tensor]
    scales: list[Tensor]
    numbers: Tensor
    draws: list[tuple[Tensor, Tensor]]
    hashes: Tensor | None
    extremes: list[Tensor]
    skip: Tensor | None


# -- the numbers of a step -----------------------------------------------------------------------


class Call(NamedTuple):
    """The arguments that all ops of a rule share, see :func:`torchao8.ops.step_`."""

    family: Family
    params: list[Tensor]
    grads: list[Tensor]
    values: Sequence[list[Tensor]]
    scales: Sequence[list[Tensor]]
    steps: list[Tensor]
    lr: Tensor | None
    numbers: Tensor
    grad_scale: Tensor | None
    factors: Sequence[Tensor]
    flags: Mapping[str, bool]

    @property
    def in_8bit(self) -> bool:
        return any(self.scales)

    def states(self, stochastic: bool) -> tuple[FormState, ...]:
        return tuple(
            FormState(s.name, s.signed, s.stochastic and stochastic)
            for s, tensors in zip(self.family.states, self.values, strict=True)
            if tensors and not s.scalar
        )

    def state_lists(self) -> list[list[Tensor]]:
        pairs = zip(self.family.states, self.values, strict=True)
        return [tensors for s, tensors in pairs if tensors and not s.scalar]

    def entries(self, places: Sequence[tuple[int, int]], one_scale: bool) -> list[Entry]:
        lists, scales = self.state_lists(), [tensors for tensors in self.scales if tensors]
        return [
            Entry(
                p.detach(),
                self.grads[i].detach(),
                [tensors[i] for tensors in lists],
                [tensors[i] for tensors in scales],
                *places[i],
                one_scale,
            )
            for i, p in enumerate(self.params)
        ]

    def t(self) -> Tensor:
        """The steps with this one."""
        return torch.stack([s.reshape(()) for s in self.steps]) + 1

    def scalar_lists(self) -> dict[str, list[Tensor]]:
        pairs = zip(self.family.states, self.values, strict=True)
        return {s.name: tensors for s, tensors in pairs if s.scalar}

    def rule_numbers(self, t: Tensor) -> Numbers:
        """The rule's numbers for all parameters, float32 on their device, of shape (n,) or ()."""
        rule, device = RULES[self.family.name], t.device
        # In the precision that they come in: float32 could not tell 1 - beta.
        exact = torch.stack(list(Rate.of(self.numbers)))
        columns = to_device(exact, device).unbind(1)
        o: Numbers = dict(self.flags)
        for name, column in zip(self.family.numbers, columns, strict=True):
            o[name] = Rate(*column.unbind()) if name in rule.rates else column[0]
        o["lr"] = t.new_ones(()) if self.lr is None else to_device(self.lr.reshape(()), device)
        o["gain"] = t.new_full((), -1.0 if self.flags["maximize"] else 1.0)
        if self.grad_scale is not None:
            o["gain"] = o["gain"] / to_device(self.grad_scale.reshape(()), device)
        if self.factors:
            factors = to_device(torch.stack(list(self.factors)), device)
            o["gain"] = o["gain"] * factors[:, 0]
            if self.lr is not None:
                o["lr"] = o["lr"] * factors[:, 1]
        o["floor"] = ROOT_FLOOR_8BIT if self.in_8bit else ROOT_FLOOR_32BIT
        o["least_share"] = LEAST_SHARE if self.in_8bit else 0.0
        for name, tensors in self.scalar_lists().items():
            o[name] = torch.stack([s.reshape(()) for s in tensors])
        return rule.numbers(o, t, self.in_8bit)


# Devices whose copies from the host take the bytes before they return. MPS does not: it reads them
# later, when the temporary tensor may be gone (pytorch/pytorch#139550).
_COPIES_AT_ONCE = {"cuda", "xpu"}


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """As float32. The host waits for it only where it has to, see above."""
    t = t.to(torch.float32)
    if t.device == device:
        return t
    return t.to(device, non_blocking=device.type in _COPIES_AT_ONCE)


def refuse_capture(device: torch.device) -> None:
    """Raises RuntimeError while a CUDA graph is recorded."""
    if torch.compiler.is_compiling() or device.type != "cuda":
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step: expected no CUDA graph being recorded, as there are no CUDA kernels of torchao8 "
            "here, and a step in PyTorch operators reads lr and other numbers on the host. Build "
            "the kernels, or step outside of the graph"
        )


def as_rows(c: Numbers, t: Tensor) -> Tensor:
    """The numbers, a row for each parameter."""
    columns = [v if isinstance(v, Tensor) else t.new_full((), v) for v in c.values()]
    return torch.stack([v.to(t.dtype).expand_as(t) for v in columns], 1)


# -- one piece -----------------------------------------------------------------------------------


class Made(NamedTuple):
    """What a step would make of a piece: how far it moves parameters down, and the new states in
    their units; where an element is usable."""

    step: Tensor
    new: list[Tensor]
    good: Tensor


def make_step(form: Form, x: Tensors, c: Numbers) -> Made:
    p, g = x.param.to(torch.float32), x.grad.to(torch.float32)
    old, kept = {}, []
    for i, (name, signed, _) in enumerate(form.states):
        if form.in_8bit:
            value = codec.decode(x.values[i], codec.Tables.of(signed, p.device))
            old[name] = Old(value, x.scales[i])
            kept.append(value * (x.scales[i] / c[f"{name}.unit"]))
        else:
            old[name] = Old(x.values[i])
            kept.append(x.values[i])
    step, new = RULES[form.rule].update(p, g, old, c)
    judged = [codec.in_range(new[s.name], s.signed) for s in form.states]
    good = judged[0] if judged else codec.in_range(step, True)
    for other in judged[1:]:
        good = good & other
    states = [torch.where(good, new[s.name], k) for s, k in zip(form.states, kept, strict=True)]
    return Made(step, states, good)


def step_piece_(form: Form, x: Tensors) -> None:
    """Steps a piece, in place. Scales of whole tensors are left to the caller."""
    c = dict(zip(form.numbers, x.numbers.unbind(), strict=True))
    made = make_step(form, x, c)
    moved = x.param.to(torch.float32) - made.step
    if x.hashes is not None:
        rounded = codec.round_stochastically(moved, x.hashes)
    else:
        rounded = moved.to(x.param.dtype)
    # An infinite parameter stays, too: its decay by a factor of 0 would be NaN.
    moves = made.good & x.param.isfinite()
    changes = [(x.param, torch.where(moves, rounded, x.param), x.skip)]
    draws = iter(x.draws)
    for i, state in enumerate(form.states):
        new, stays = made.new[i], x.skip
        if (rests := c.get(f"{state.name}.rests")) is not None:
            stays = rests != 0 if stays is None else stays | (rests != 0)
        if not form.in_8bit:
            changes.append((x.values[i], new, stays))
            continue
        signed, unit = state.signed, c[f"{state.name}.unit"]
        t = codec.Tables.of(signed, new.device)
        extreme = x.extremes[i] if form.has_extremes else codec.extreme_of(new, signed)
        inverse = codec.inverse_of(extreme, signed)
        if state.stochastic:
            between = codec.one_to_two(*next(draws), new.shape[-1])
            codes = codec.encode_stochastic(new, inverse, between, signed, t)
        else:
            codes = codec.encode_nearest(new, inverse, signed, t)
        valid = codec.has_scale(extreme, unit, signed)
        codes = codec.with_extremes(codes, new, extreme, valid, signed)
        changes.append((x.values[i], codes, stays))
        if not form.has_extremes:
            changes.append((x.scales[i], codec.scale_of(extreme, unit, signed), stays))
    for tensor, value, stays in changes:
        tensor.copy_(value if stays is None else torch.where(stays, tensor, value))


# -- the ops -------------------------------------------------------------------------------------


def _pieces(entry: Entry, in_8bit: bool, block_size: int) -> Iterator[Piece]:
    block = block_size if in_8bit else None
    for part in slices(entry, block):
        yield from block_pieces(part, block) if block else element_pieces(part)


def step_(
    call: Call,
    extremes: Sequence[Tensor],
    found_inf: Tensor | None,
    *,
    block_size: int,
    stochastic_rounding: bool,
    stochastic_params: bool,
    count_steps: bool,
    seed: int,
    shard_offsets: Sequence[int],
    shard_row_strides: Sequence[int],
) -> None:
    """As :func:`torchao8.ops.step_`."""
    refuse_capture(call.params[0].device)
    t = call.t()
    c = call.rule_numbers(t)
    rows = as_rows(c, t)
    form = Form(
        call.family.name,
        call.states(stochastic_rounding),
        tuple(c),
        call.in_8bit,
        has_extremes=bool(extremes),
        may_skip=found_inf is not None,
    )
    skip = None if found_inf is None else to_device(found_inf.reshape(()), t.device) != 0
    keys = codec.random_keys(seed, t, len(form.states))
    block = block_size if call.in_8bit else None
    places = shards(call.params, shard_offsets, shard_row_strides, block)
    for i, entry in enumerate(call.entries(places, bool(extremes))):
        rounds = stochastic_params and entry.param.dtype == torch.bfloat16
        own = form._replace(rounds=rounds)
        known = [
            codec.extreme_of_key(key, s.signed)
            for key, s in zip(extremes[i].unbind() if extremes else (), form.states, strict=False)
        ]
        for piece in _pieces(entry, call.in_8bit, block_size):
            x = _tensors(own, piece, rows[i], [key[i] for key in keys], known, skip)
            compiled.run(step_piece_, own, x)
    if extremes:
        _write_scales(call, form, c, rows, extremes, skip)
    for name, tensors in call.scalar_lists().items():
        news = c[name].unbind()
        for tensor, new in zip(tensors, news, strict=True):
            tensor.copy_(new if skip is None else torch.where(skip, tensor, new))
    if count_steps:
        count_step_(call.steps, found_inf)


def _tensors(
    form: Form,
    piece: Piece,
    numbers: Tensor,
    keys: Sequence[Tensor],
    extremes: list[Tensor],
    skip: Tensor | None,
) -> Tensors:
    draws = [
        codec.state_draws(keys[i], piece.first)
        for i, state in enumerate(form.states)
        if form.in_8bit and state.stochastic
    ]
    hashes = None
    if form.rounds and form.in_8bit:
        hashes = codec.param_hashes(keys[-1], piece.first, piece.param.shape[-1])
    elif form.rounds:
        hashes = codec.element_hashes(keys[-1], piece.first)
    return Tensors(*piece[:4], numbers, draws, hashes, extremes, skip)


def _write_scales(
    call: Call,
    form: Form,
    c: Numbers,
    rows: Tensor,
    extremes: Sequence[Tensor],
    skip: Tensor | None,
) -> None:
    """Of tensors with one scale, when all of their blocks have been stepped with the old one."""
    names = list(c)
    for s, (state, tensors) in enumerate(
        zip(form.states, [x for x in call.scales if x], strict=True)
    ):
        unit = rows[:, names.index(f"{state.name}.unit")]
        extreme = codec.extreme_of_key(torch.stack([row[s] for row in extremes]), state.signed)
        new = codec.scale_of(extreme, unit, state.signed)
        stays = c.get(f"{state.name}.rests", torch.zeros_like(unit)).expand_as(unit) != 0
        if skip is not None:
            stays = stays | skip
        for i, scale in enumerate(tensors):
            scale.copy_(torch.where(stays[i], scale, new[i]))


def extremes(call: Call) -> Tensor:
    """As :func:`torchao8.ops.extremes`."""
    t = call.t()
    c = call.rule_numbers(t)
    rows = as_rows(c, t)
    form = Form(call.family.name, call.states(False), tuple(c), True)
    keys = t.new_zeros((len(call.params), len(form.states)), dtype=torch.int64)
    for i, entry in enumerate(call.entries(shards(call.params, (), (), None), True)):
        own = dict(zip(form.numbers, rows[i].unbind(), strict=True))
        for part in slices(entry, None):
            for piece in element_pieces(part):
                x = Tensors(*piece[:3], entry.scales, rows[i], [], None, [], None)
                made = make_step(form, x, own)
                found = [
                    codec.key_of(codec.extreme_of(new, s.signed).reshape(()), s.signed)
                    for new, s in zip(made.new, form.states, strict=True)
                ]
                if found:
                    keys[i].copy_(torch.maximum(keys[i], torch.stack(found)))
    return keys


def updates(call: Call, block_size: int, one_scale: bool) -> Iterator[tuple[int, Tensor]]:
    """What LAMB measures, in pieces: the number of a parameter, and updates of it, 0 where an
    element is not usable."""
    t = call.t()
    c = call.rule_numbers(t)
    rows = as_rows(c, t)
    form = Form(call.family.name, call.states(False), tuple(c), call.in_8bit)
    for i, entry in enumerate(call.entries(shards(call.params, (), (), block_size), one_scale)):
        own = dict(zip(form.numbers, rows[i].unbind(), strict=True))
        for piece in _pieces(entry, call.in_8bit, block_size):
            x = Tensors(*piece[:4], rows[i], [], None, [], None)
            made = make_step(form, x, own)
            yield i, torch.where(made.good, made.step, 0.0)


def count_step_(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """As :func:`torchao8.ops.count_step_`."""
    if found_inf is None:
        torch._foreach_add_(steps, 1)
        return
    one = (to_device(found_inf.reshape(()), steps[0].device) == 0).to(torch.float32)
    for step in steps:
        step.add_(one)
