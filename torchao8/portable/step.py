"""A step of a rule, and what looks at one before it is made, on tensors of any device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchao8._families import Family
from torchao8.portable import codec, compiled
from torchao8.portable.form import Form, FormState, Made, Tensors, declared
from torchao8.portable.formats import FORMATS, name_of
from torchao8.portable.pieces import Entry, Piece, block_pieces, element_pieces, shards, slices
from torchao8.portable.rules import RULES, Numbers, Old, Rate
from torchao8.portable.sums import sum_rows

ROOT_FLOOR_SCALED = 2.0**-101  # under a root, in units of about the squared gradient
ROOT_FLOOR_32BIT = 2.0**-126
LEAST_SHARE = 2.0**-6  # of a variance in 8 bits, in the mean square

# Those of an op, by their names in its schema, see torchao8.ops.step_.
Arguments = Mapping[str, Any]


# -- one piece -----------------------------------------------------------------------------------


def make_step(form: Form, x: Tensors, c: Numbers) -> Made:
    p, g = x.param.to(torch.float32), x.grad.to(torch.float32)
    if form.format is None:
        old, most = [Old(value) for value in x.values], math.inf
    else:
        old, most = FORMATS[form.format].decode(form, x), FORMATS[form.format].most_kept
    olds = {state.name: o for state, o in zip(form.states, old, strict=True)}
    step, new = RULES[form.rule].update(p, g, olds, c)
    judged = [codec.in_range(new[s.name], s.signed) for s in form.states]
    good = judged[0] if judged else codec.in_range(step, True)
    for other in judged[1:]:
        good = good & other
    kept = [olds[s.name].kept(c[f"{s.name}.unit"], most) for s in form.states]
    states = [torch.where(good, new[s.name], k) for s, k in zip(form.states, kept, strict=True)]
    return Made(step, states, good, old)


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
    if form.format is None:
        stored = [[pair] for pair in zip(x.values, made.new, strict=True)]
    else:
        stored = FORMATS[form.format].encode(form, x, c, made)
    for state, pairs in zip(form.states, stored, strict=True):
        stays = x.skip
        if (rests := c.get(f"{state.name}.rests")) is not None:
            stays = rests != 0 if stays is None else stays | (rests != 0)
        changes += [(tensor, value, stays) for tensor, value in pairs]
    for tensor, value, stays in changes:
        tensor.copy_(value if stays is None else torch.where(stays, tensor, value))


# -- the ops -------------------------------------------------------------------------------------

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
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "step: expected no CUDA graph being recorded, as there are no CUDA kernels of torchao8 "
            "here, and a step in PyTorch operators reads lr and other numbers on the host. Build "
            "the kernels, or step outside of the graph"
        )


class Call:
    """What all pieces of a call have in common."""

    def __init__(self, family: Family, arguments: Arguments, block_size: int | None) -> None:
        self.family, self.arguments = family, arguments
        self.params: list[Tensor] = arguments["params"]
        refuse_capture(self.params[0].device)
        present = [s for s in family.states if arguments.get(f"{s.name}s")]
        rounds = arguments.get("stochastic_rounding", False)
        stored = [s for s in present if not s.scalar]
        self.values = [arguments[f"{s.name}s"] for s in stored]
        self.scales = [lists for s in stored if (lists := arguments[f"{s.name}_scales"])]
        self.scalars = {s.name: arguments[f"{s.name}s"] for s in present if s.scalar}
        scaled = bool(self.scales)
        self.block_size = block_size if scaled else None
        self.t = torch.stack([s.reshape(()) for s in arguments["steps"]]) + 1  # with this step
        self.numbers = self._numbers(scaled)
        columns = [v if isinstance(v, Tensor) else self._full(v) for v in self.numbers.values()]
        self.rows = torch.stack([v.to(torch.float32).expand_as(self.t) for v in columns], 1)
        name = name_of(arguments["state_format"]) if self.scales else None
        self.format = None if name is None else FORMATS[name]
        draws = declared if self.format is None else self.format.stochastic
        states = tuple(
            FormState(s.name, s.signed, s.stochastic, rounds and draws(family.name, s))
            for s in stored
        )
        self.form = Form(family.name, states, tuple(self.numbers), name)
        self.tables = [self.format.tables(s.signed, self.t.device) for s in stored if self.format]

    def _full(self, value: float) -> Tensor:
        return self.t.new_full((), value)

    def _numbers(self, scaled: bool) -> Numbers:
        """The rule's numbers for all parameters, float32 on their device, of shape (n,) or ()."""
        a, device, rule = self.arguments, self.t.device, RULES[self.family.name]
        # In the precision that they come in: float32 could not tell 1 - beta.
        exact = torch.stack(list(Rate.of(a["numbers"])))
        o: Numbers = {name: a[name] for name in self.family.flags}
        columns = to_device(exact, device).unbind(1)
        for name, column in zip(self.family.numbers, columns, strict=True):
            o[name] = Rate(*column.unbind()) if name in rule.rates else column[0]
        o["lr"] = to_device(a["lr"].reshape(()), device) if "lr" in a else self._full(1.0)
        o["gain"] = self._full(-1.0 if a["maximize"] else 1.0)
        if a["grad_scale"] is not None:
            o["gain"] = o["gain"] / to_device(a["grad_scale"].reshape(()), device)
        if a["factors"]:
            of_gradient, of_lr = to_device(torch.stack(list(a["factors"])), device).unbind(1)
            o["gain"] = o["gain"] * of_gradient
            o["lr"] = o["lr"] * of_lr if "lr" in a else o["lr"]
        o["floor"] = ROOT_FLOOR_SCALED if scaled else ROOT_FLOOR_32BIT
        o["least_share"] = LEAST_SHARE if scaled else 0.0
        for name, tensors in self.scalars.items():
            o[name] = torch.stack([s.reshape(()) for s in tensors])
        return rule.numbers(o, self.t, scaled)

    def column(self, name: str) -> Tensor:
        return self.rows[:, list(self.numbers).index(name)]

    def pieces(self, one_scale: bool) -> Iterator[tuple[int, Piece, Tensors]]:
        """Each with the number of its parameter, and as the code of a form takes it."""
        a, block = self.arguments, self.block_size
        offsets, strides = a.get("shard_offsets", ()), a.get("shard_row_strides", ())
        places = shards(self.params, offsets, strides, block)
        for i, (p, place) in enumerate(zip(self.params, places, strict=True)):
            values, scales = ([list_[i] for list_ in lists] for lists in (self.values, self.scales))
            entry = Entry(p.detach(), a["grads"][i].detach(), values, scales, *place, one_scale)
            for part in slices(entry, block):
                for piece in block_pieces(part, block) if block else element_pieces(part):
                    own_scales = scales if one_scale else piece.scales
                    yield i, piece, Tensors(*piece[:3], own_scales, self.rows[i], self.tables)

    def made(self, i: int, x: Tensors) -> Made:
        return make_step(self.form, x, dict(zip(self.numbers, self.rows[i].unbind(), strict=True)))


def step_(family: Family, **arguments: Any) -> None:
    """As :func:`torchao8.ops.step_`."""
    call = Call(family, arguments, arguments["block_size"])
    form, found_inf, extremes = call.form, arguments["found_inf"], arguments["extremes"]
    skip = None if found_inf is None else to_device(found_inf.reshape(()), call.t.device) != 0
    keys = codec.random_keys(arguments["seed"], call.t, len(form.states))
    known = [
        [codec.extreme_of_key(k, s.signed) for k, s in zip(row.unbind(), form.states, strict=True)]
        for row in extremes
    ]
    for i, piece, x in call.pieces(bool(extremes)):
        rounds = arguments["stochastic_params"] and x.param.dtype == torch.bfloat16
        draws, hashes = _random(call, piece, [key[i] for key in keys], rounds)
        x = x._replace(draws=draws, hashes=hashes, extremes=known[i] if known else (), skip=skip)
        compiled.run(step_piece_, form, x)
    if extremes:
        _write_scales(call, extremes, skip)
    for name, tensors in call.scalars.items():
        for tensor, new in zip(tensors, call.numbers[name].unbind(), strict=True):
            tensor.copy_(new if skip is None else torch.where(skip, tensor, new))
    if arguments["count_steps"]:
        count_step_(arguments["steps"], found_inf)


def _random(
    call: Call, piece: Piece, keys: list[Tensor], rounds: bool
) -> tuple[list[tuple[Tensor, ...]], Tensor | None]:
    """What the random numbers of a piece are made of: its states', and those of its parameter."""
    draws = [
        call.format.draws(keys[i], piece.first)
        for i, state in enumerate(call.form.states)
        if call.format and state.stochastic
    ]
    if not rounds:
        return draws, None
    if call.format:
        return draws, codec.param_hashes(keys[-1], piece.first, piece.param.shape[-1])
    return draws, codec.element_hashes(keys[-1], piece.first)


def _write_scales(call: Call, extremes: Sequence[Tensor], skip: Tensor | None) -> None:
    """Of tensors with one scale, when all of their blocks have been stepped with the old one."""
    assert call.format is not None  # there are no extremes without
    for s, (state, tensors) in enumerate(zip(call.form.states, call.scales, strict=True)):
        unit = call.column(f"{state.name}.unit")
        extreme = codec.extreme_of_key(torch.stack([row[s] for row in extremes]), state.signed)
        new = call.format.scale_of(extreme, unit, state)
        rests = f"{state.name}.rests"
        stays = call.column(rests) != 0 if rests in call.numbers else torch.zeros_like(new).bool()
        stays = stays if skip is None else stays | skip
        for i, scale in enumerate(tensors):
            scale.copy_(torch.where(stays[i], scale, new[i]))


def extremes(family: Family, **arguments: Any) -> Tensor:
    """As :func:`torchao8.ops.extremes`."""
    call = Call(family, arguments, None)
    states = call.form.states
    keys = call.t.new_zeros((len(call.params), len(states)), dtype=torch.int64)
    for i, _, x in call.pieces(one_scale=True):
        for s, (state, new) in enumerate(zip(states, call.made(i, x).new, strict=True)):
            key = codec.key_of(codec.extreme_of(new, state.signed).reshape(()), state.signed)
            keys[i, s].copy_(torch.maximum(keys[i, s], key))
    return keys


def lamb_update_sums(family: Family, **arguments: Any) -> Tensor:
    """As :func:`torchao8.ops.lamb_update_sums`: of steps of Adam whose learning rate is 1."""
    arguments["decoupled_weight_decay"] = True
    call = Call(family, arguments, arguments["block_size"])

    def updates() -> Iterator[tuple[int, Tensor]]:
        for i, _, x in call.pieces(not arguments["block_wise"]):
            made = call.made(i, x)
            yield i, torch.where(made.good, made.step, 0.0)

    return sum_rows(len(call.params), call.t.device, updates())


def count_step_(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """As :func:`torchao8.ops.count_step_`."""
    if found_inf is None:
        torch._foreach_add_(steps, 1)
        return
    one = (to_device(found_inf.reshape(()), steps[0].device) == 0).to(torch.float32)
    for step in steps:
        step.add_(one)
