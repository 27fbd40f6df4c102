"""The update rules in Python, each once: float64 in the tests' oracle, float32 in a portable step.

A rule is two functions. The first makes the numbers of a step from the options, for all of its
parameters at once; the second takes a parameter, its gradient and its old states, and gives what
the parameter moves down by, and the new states:

    numbers(o, t, scaled)       o: the options of the rule as tensors, decay rates as `Rate`, and
                                lr; gain, what gradients are multiplied by; floor, the least number
                                under a root. t: the steps with this one. scaled: whether averages
                                are kept in units of 1 - beta, in which what a gradient adds needs
                                no factor
    update(p, g, old, c)        c: those numbers. "<state>.rests", where it is there, says that the
                                state stays as it is

Written like this, plain operators are all that a rule needs, on tensors of any shape and dtype.
csrc/rules has the same rules for the kernels, with the papers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Numbers = dict[str, Any]
LOG_OF_096 = -0.040821994520255166


class Rate(NamedTuple):
    """A decay rate, with what float32 could not tell of it: 1 - beta, beta / (1 - beta), log."""

    value: Tensor
    complement: Tensor
    ratio: Tensor
    log: Tensor

    @staticmethod
    def of(value: Tensor) -> Rate:
        """Of a float64 tensor."""
        complement = 1 - value
        return Rate(value, complement, value / complement, torch.log(value))

    def correction(self, t: Tensor) -> Tensor:
        """1 - beta^t."""
        return -torch.expm1(t * self.log)


class Old(NamedTuple):
    """A stored state: values and, where they are those of codes, the scales of their blocks."""

    value: Tensor
    scale: Tensor | None = None

    def times(self, factor: Tensor) -> Tensor:
        return self.value * (factor if self.scale is None else factor * self.scale)

    def kept(self, unit: Tensor, most: float) -> Tensor:
        """In units, by a step that leaves it: of this magnitude at most."""
        if self.scale is None:
            return self.value
        if most == math.inf:
            return self.value * (self.scale / unit)
        return (self.value * (self.scale / unit).clamp(-most, most)).clamp(-most, most)


Olds = dict[str, Old]
Step = tuple[Tensor, dict[str, Tensor]]


def _average(c: Numbers, state: str, rate: Rate, scaled: bool) -> Any:
    """Sets the numbers of a moving average; returns its unit."""
    c[f"{state}.decay"] = rate.ratio if scaled else rate.value
    c[f"{state}.gain"] = 1.0 if scaled else rate.complement
    unit = c[f"{state}.unit"] = rate.complement if scaled else 1.0
    return unit


def _sum(c: Numbers, state: str, decay: Any, gain: Any) -> None:
    """The same of a sum, whose unit is 1."""
    c.update({f"{state}.decay": decay, f"{state}.gain": gain, f"{state}.unit": 1.0})


def _buffer(c: Numbers, o: Numbers, gain: Any, of_buffer: Any, of_new: Any) -> None:
    """The same of a momentum buffer, with what a step takes of the buffer and of what goes into it.
    With a momentum of 0 the buffer stays as it is."""
    rests = c["momentum_buffer.rests"] = o["momentum"] == 0
    _sum(c, "momentum_buffer", o["momentum"], gain)
    c["of_buffer"] = torch.where(rests, 0.0, of_buffer)
    c["of_new"] = torch.where(rests, o["lr"], of_new)


def _mix(c: Numbers, state: str, old: Olds, new: Tensor) -> Tensor:
    """beta * old + (1 - beta) * new, in the unit of the state."""
    return old[state].times(c[f"{state}.decay"]) + new * c[f"{state}.gain"]


def _mix_square(c: Numbers, state: str, old: Olds, g: Tensor) -> Tensor:
    return old[state].times(c[f"{state}.decay"]) + g * c[f"{state}.gain"] * g


def _coupled(o: Numbers) -> Numbers:
    """The L2 penalty, and what gradients are multiplied by."""
    return {"gain": o["gain"], "penalty": o["weight_decay"]}


def _decay(o: Numbers, decoupled: bool) -> Numbers:
    if not decoupled:
        return _coupled(o)
    return {"gain": o["gain"], "shrinkage": o["lr"] * o["weight_decay"]}


def _gradient(p: Tensor, g: Tensor, c: Numbers) -> Tensor:
    g = g * c["gain"]
    return g + p * c["penalty"] if "penalty" in c else g


def _with_decay(p: Tensor, step: Tensor, c: Numbers) -> Tensor:
    return step + p * c["shrinkage"] if "shrinkage" in c else step


def _denominator(v: Tensor, c: Numbers) -> Tensor:
    """sqrt(v) + eps, of a v in its unit."""
    return v.clamp_min(c["floor"]).sqrt() * c["of_root"] + c["eps"]


def _root_numbers(o: Numbers, of_root: Any) -> Numbers:
    return {"floor": o["floor"], "of_root": of_root, "eps": o["eps"]}


# -- Adam, AdamW, and what LAMB measures ---------------------------------------------------------


def adam_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    c = _decay(o, o["decoupled_weight_decay"])
    unit1 = _average(c, "exp_avg", o["beta1"], scaled)
    unit2 = _average(c, "exp_avg_sq", o["beta2"], scaled)
    c["max_exp_avg_sq.decay"] = 1.0 / unit2
    c["max_exp_avg_sq.unit"] = unit2
    c["of_average"] = o["lr"] * unit1 / o["beta1"].correction(t)
    return {**c, **_root_numbers(o, (unit2 / o["beta2"].correction(t)).sqrt())}


def adam(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    """lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)"""
    g = _gradient(p, g, c)
    m = _mix(c, "exp_avg", old, g)
    v = _mix_square(c, "exp_avg_sq", old, g)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in old:
        before = old["max_exp_avg_sq"].times(c["max_exp_avg_sq.decay"])
        v = new["max_exp_avg_sq"] = torch.maximum(v, before)
    step = m * c["of_average"] / _denominator(v, c)
    return _with_decay(p, step, c), new


# -- NAdam ---------------------------------------------------------------------------------------


def nadam_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    """The product of momenta is a state that is one number: o has the old one, c the new one."""

    def momentum(t: Tensor) -> Tensor:
        return o["beta1"].value * (1 - 0.5 * torch.exp(t * o["momentum_decay"] * LOG_OF_096))

    c = _decay(o, o["decoupled_weight_decay"])
    unit1 = _average(c, "exp_avg", o["beta1"], scaled)
    unit2 = _average(c, "exp_avg_sq", o["beta2"], scaled)
    now, ahead = momentum(t), momentum(t + 1)
    product = c["mu_product"] = o["mu_product"] * now
    c["of_average"] = o["lr"] * unit1 * ahead / (1 - product * ahead)
    c["of_gradient"] = o["lr"] * (1 - now) / (1 - product)
    return {**c, **_root_numbers(o, (unit2 / o["beta2"].correction(t)).sqrt())}


def nadam(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    g = _gradient(p, g, c)
    m = _mix(c, "exp_avg", old, g)
    v = _mix_square(c, "exp_avg_sq", old, g)
    step = (m * c["of_average"] + g * c["of_gradient"]) / _denominator(v, c)
    return _with_decay(p, step, c), {"exp_avg": m, "exp_avg_sq": v}


# -- AdEMAMix ------------------------------------------------------------------------------------


def _warm(beta1: Rate, beta3: Rate, t: Tensor, t_beta3: Tensor) -> Rate:
    """beta3 at step t: its half-life grows linearly from that of beta1."""
    share = t / t_beta3
    log = beta3.log / (share + (1 - share) * (beta3.log / beta1.log))
    complement = -torch.expm1(log)
    warm = Rate(torch.exp(log), complement, torch.exp(log) / complement, log)
    is_warm = (t_beta3 > t) & (beta3.value > 0) & (log < beta3.log)
    parts = [torch.where(is_warm, x, y) for x, y in zip(warm, beta3, strict=True)]
    return Rate(*parts)


def ademamix_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    c = _decay(o, True)
    beta3 = _warm(o["beta1"], o["beta3"], t, o["t_beta3"])
    unit1 = _average(c, "exp_avg_fast", o["beta1"], scaled)
    unit3 = _average(c, "exp_avg_slow", beta3, scaled)
    unit2 = _average(c, "exp_avg_sq", o["beta2"], scaled)
    alpha = o["alpha"] * torch.where(o["t_alpha"] > t, t / o["t_alpha"], 1.0)
    c["of_fast"] = o["lr"] * unit1 / o["beta1"].correction(t)
    c["of_slow"] = o["lr"] * unit3 * alpha
    return {**c, **_root_numbers(o, (unit2 / o["beta2"].correction(t)).sqrt())}


def ademamix(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    g = _gradient(p, g, c)
    fast = _mix(c, "exp_avg_fast", old, g)
    slow = _mix(c, "exp_avg_slow", old, g)
    v = _mix_square(c, "exp_avg_sq", old, g)
    step = (fast * c["of_fast"] + slow * c["of_slow"]) / _denominator(v, c)
    return _with_decay(p, step, c), {"exp_avg_fast": fast, "exp_avg_slow": slow, "exp_avg_sq": v}


# -- Lion ----------------------------------------------------------------------------------------


def lion_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    c = {**_decay(o, True), "lr": o["lr"], "interpolation": o["beta1"].ratio}
    _average(c, "exp_avg", o["beta2"], scaled)
    return c


def lion(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    """lr * sign(beta1 * m + (1 - beta1) * g): divided by 1 - beta1, it has the same sign."""
    g = _gradient(p, g, c)
    interpolated = old["exp_avg"].times(c["interpolation"]) + g
    step = interpolated.sign() * c["lr"]
    return _with_decay(p, step, c), {"exp_avg": _mix(c, "exp_avg", old, g)}


# -- Muon ----------------------------------------------------------------------------------------


def muon_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    """Of both calls: of a direction, which is added, and of the update by an orthogonal matrix."""
    momentum = o["momentum"]
    c = {**_decay(o, True), "of_matrix": o["lr"] * o["rate_scale"]}
    unit = _average(c, "momentum_buffer", momentum, scaled)
    c["of_buffer"] = (momentum.value if o["nesterov"] else 1.0) * unit
    c["of_new"] = momentum.complement if o["nesterov"] else 0.0
    return c


def muon(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    """With a buffer p moves up, by it or by momentum * buffer + (1 - momentum) * g."""
    g = g * c["gain"]
    if "momentum_buffer" not in old:
        return _with_decay(p, g * c["of_matrix"], c), {}
    b = _mix(c, "momentum_buffer", old, g)
    return -(b * c["of_buffer"] + g * c["of_new"]), {"momentum_buffer": b}


# -- SGD, LARS -----------------------------------------------------------------------------------


def sgd_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    """The first gradient is not dampened. LARS has the learning rate inside of the buffer."""
    inside, outside = (o["lr"], 1.0) if o["rate_in_buffer"] else (1.0, o["lr"])
    c = {**_coupled(o), "lr": o["lr"]}
    gain = torch.where(t == 1, 1.0, 1 - o["dampening"]) * inside
    if o["nesterov"]:
        _buffer(c, o, gain, outside * o["momentum"], o["lr"])
    else:
        _buffer(c, o, gain, outside, 0.0)
    return c


def sgd(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    g = _gradient(p, g, c)
    if "momentum_buffer" not in old:
        return g * c["lr"], {}
    b = _mix(c, "momentum_buffer", old, g)
    return b * c["of_buffer"] + g * c["of_new"], {"momentum_buffer": b}


# -- RMSprop -------------------------------------------------------------------------------------


def rmsprop_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    c = {**_coupled(o), "least_share": o["least_share"], "lr": o["lr"]}
    unit = c["mean_unit"] = _average(c, "square_avg", o["alpha"], scaled)
    _average(c, "grad_avg", o["alpha"], scaled)
    _buffer(c, o, 1.0, o["lr"], 0.0)
    return {**c, **_root_numbers(o, unit.sqrt() if scaled else 1.0)}


def rmsprop(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    """Centered, the variance in 8 bits is at least a 64th of the mean square: what rounding adds or
    takes must not be a denominator."""
    g = _gradient(p, g, c)
    v = _mix_square(c, "square_avg", old, g)
    new, variance = {"square_avg": v}, v
    if "grad_avg" in old:
        a = new["grad_avg"] = _mix(c, "grad_avg", old, g)
        variance = torch.maximum(v - a * c["mean_unit"] * a, v * c["least_share"])
    update = g / _denominator(variance, c)
    if "momentum_buffer" not in old:
        return update * c["lr"], new
    b = new["momentum_buffer"] = _mix(c, "momentum_buffer", old, update)
    return b * c["of_buffer"] + update * c["of_new"], new


# -- Adagrad -------------------------------------------------------------------------------------


def adagrad_numbers(o: Numbers, t: Tensor, scaled: bool) -> Numbers:
    c = {**_coupled(o), "lr": o["lr"] / (1 + (t - 1) * o["lr_decay"])}
    _sum(c, "sum", 1.0, 1.0)
    return {**c, **_root_numbers(o, 1.0)}


def adagrad(p: Tensor, g: Tensor, old: Olds, c: Numbers) -> Step:
    g = _gradient(p, g, c)
    s = _mix_square(c, "sum", old, g)
    return g * c["lr"] / _denominator(s, c), {"sum": s}


class Rule(NamedTuple):
    """A rule: its two functions, and which of its numbers are decay rates.

    Attributes:
        quotients: the state, if there is one, that adds up quotients: update() at the largest
            magnitudes does not bound its new values.
        roots: of averages, the state that is the average of the same numbers' squares.
    """

    numbers: Callable[[Numbers, Tensor, bool], Numbers]
    update: Callable[[Tensor, Tensor, Olds, Numbers], Step]
    rates: tuple[str, ...] = ()
    quotients: str | None = None
    roots: Mapping[str, str] = MappingProxyType({})


RULES = {
    "adagrad": Rule(adagrad_numbers, adagrad),
    "adam": Rule(adam_numbers, adam, ("beta1", "beta2"), roots={"exp_avg": "exp_avg_sq"}),
    "ademamix": Rule(ademamix_numbers, ademamix, ("beta1", "beta2", "beta3")),
    "lion": Rule(lion_numbers, lion, ("beta1", "beta2")),
    "muon": Rule(muon_numbers, muon, ("momentum",)),
    "nadam": Rule(nadam_numbers, nadam, ("beta1", "beta2")),
    "rmsprop": Rule(rmsprop_numbers, rmsprop, ("alpha",), "momentum_buffer"),
    "sgd": Rule(sgd_numbers, sgd),
}
