"""The oracle of the update rules: the rules of torchao8.portable.rules in float64, and how far
float32 arithmetic may lead away from them.

It shares nothing with the kernels. The rules themselves are compared with those of torch.optim, in
float64, where it has them (test_portable.py). Errors: each of the at most 8 operations on the way
to a sum adds half a unit in the last place, 2^-24, of the largest number that it handled. Capital
letters are those sums without cancellation.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchao8 import ops
from torchao8.portable.rules import RULES as LIBRARY_RULES
from torchao8.portable.rules import Old, Rate

UNIT = 8 * 2.0**-24
States = dict[str, Tensor]
Options = dict[str, Any]


@dataclass
class Result:
    """A parameter and its states after a step, in float64, and the errors that float32 may make."""

    param: Tensor
    states: States
    param_error: Tensor
    errors: States


def usable(g: Tensor) -> Tensor:
    """Where a gradient, and its square in float32, are finite."""
    return g.isfinite() & (g.float() ** 2).isfinite()


def gradient(p: Tensor, g: Tensor, o: Options, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient with its L2 penalty, 0 where it is not usable; G; and where it is usable."""
    g = (-g if o["maximize"] else g) + decay * p
    good = usable(g)
    g = torch.where(good, g, 0.0)
    return g, g.abs() + 2 * decay * p.abs(), good


def exact(
    rule: str,
    p: Tensor,
    g: Tensor,
    old: States,
    step: int,
    o: Options,
    in_8bit: bool,
    **others: Any,
) -> tuple[Tensor, States]:
    """What a rule makes of a parameter and its states, in float64; for `guarded` to choose from."""
    found = LIBRARY_RULES[rule]
    g = torch.where(usable(g), g, 0.0)
    o = {"decoupled_weight_decay": False, "rate_in_buffer": False, "momentum_decay": 0.0, **o}
    o = {**o, **others}
    o.update({f"beta{i}": beta for i, beta in enumerate(o.get("betas", ()), 1)})
    numbers = {
        name: torch.tensor(float(o[name]), dtype=torch.float64)
        for name in (*ops.NUMBERS[f"{rule}_step_"], "lr")
    }
    options: dict[str, Any] = {name: o.get(name) for name in ("nesterov", "rate_in_buffer")}
    options.update({k: Rate.of(v) if k in found.rates else v for k, v in numbers.items()})
    options["decoupled_weight_decay"] = o["decoupled_weight_decay"]
    options["gain"] = -1.0 if o["maximize"] else 1.0
    options["floor"] = 1e-300
    options["least_share"] = 1 / 64 if in_8bit else 0.0
    options.update({k: v for k, v in old.items() if k == "mu_product"})
    c = found.numbers(options, torch.tensor(float(step), dtype=torch.float64), False)
    move, new = found.update(p, g, {k: Old(v) for k, v in old.items()}, c)
    return p - move, {**new, **{k: v for k, v in c.items() if k == "mu_product"}}


def guarded(good: Tensor, old_p: Tensor, old: States, result: Result) -> Result:
    """What is not usable leaves its element as it was."""
    states = {
        k: v if k == "mu_product" else torch.where(good, v, old[k])  # of the step, not of elements
        for k, v in result.states.items()
    }
    param = torch.where(good, result.param, old_p)
    return Result(param, states, result.param_error, result.errors)


def adam(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """Adam, AdamW. The error of v reaches the parameter through the root, where it counts half."""
    decoupled, decay, (beta1, beta2) = o["decoupled_weight_decay"], o["weight_decay"], o["betas"]
    param, new = exact("adam", p, g, old, step, o, in_8bit)
    g, G, good = gradient(p, g, o, 0.0 if decoupled else decay)
    root = new.get("max_exp_avg_sq", new["exp_avg_sq"])
    step_size = o["lr"] / (1 - beta1**step)
    denominator = ((root / (1 - beta2**step)).sqrt() + o["eps"]).clamp_min(1e-300)
    M = beta1 * old["exp_avg"].abs() + (1 - beta1) * G
    V = torch.maximum(root, beta2 * old["exp_avg_sq"] + (1 - beta2) * G**2)
    through_v = torch.where(root > 0, new["exp_avg"].abs() * V / root.clamp_min(1e-300), 0.0)
    error = UNIT * (p.abs() + step_size * (M + through_v) / denominator)
    errors = {"exp_avg": UNIT * M, "exp_avg_sq": UNIT * V, "max_exp_avg_sq": UNIT * V}
    return guarded(good, p, old, Result(param, new, error, errors))


def lion(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """Where the interpolation is as small as its own error, its sign may be any."""
    beta1, beta2 = o["betas"]
    param, new = exact("lion", p, g, old, step, o, in_8bit)
    g, G, good = gradient(p, g, o, 0.0)
    m = old["exp_avg"]
    c, C = beta1 * m + (1 - beta1) * g, beta1 * m.abs() + (1 - beta1) * G
    M = beta2 * m.abs() + (1 - beta2) * G
    unsure = (c.abs() <= UNIT * C) & (C > 0)
    error = UNIT * (p.abs() + o["lr"]) + torch.where(unsure, 2 * o["lr"], 0.0)
    return guarded(good, p, old, Result(param, new, error, {"exp_avg": UNIT * M}))


def muon(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """A call with a buffer adds the direction; one without moves by an orthogonal matrix.

    With the options of a group of the optimizer, all of its step.
    """
    if "ns_steps" in o:
        return _muon_step(p, g, old, step, o, in_8bit)
    param, new = exact("muon", p, g, old, step, o, in_8bit)
    g, G, good = gradient(p, g, o, 0.0)
    if not old:
        error = UNIT * (p.abs() + o["lr"] * o["rate_scale"] * G)
        return guarded(good, p, old, Result(param, {}, error, {}))
    rest = 1 - o["momentum"]
    B = o["momentum"] * old["momentum_buffer"].abs() + rest * G
    error = UNIT * (p.abs() + B + rest * G)
    return guarded(good, p, old, Result(param, new, error, {"momentum_buffer": UNIT * B}))


def _muon_step(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """Of a matrix. The error of products in bfloat16 is not derived but measured, twice what it was
    at most; test_newton_schulz.py looks closer."""
    bad = not g.isfinite().all()
    direction = muon(
        torch.zeros_like(p),
        torch.full_like(g, torch.nan) if bad else g,
        old,
        step,
        {"lr": 0.0, "rate_scale": 1.0, **{k: o[k] for k in ("momentum", "weight_decay")}}
        | {k: o[k] for k in ("nesterov", "maximize")},
        in_8bit,
    )
    errors = direction.errors
    if bad:
        return Result(p, direction.states, torch.zeros_like(p), errors)
    given = o["ns_coefficients"]
    triples = given if isinstance(given[0], tuple) else [given] * o["ns_steps"]
    x = direction.param / direction.param.norm().clamp(min=o["eps"])
    for a, b, c in triples:
        x = a * x + (b * x @ x.T + c * x @ x.T @ x @ x.T) @ x
    rows, columns = p.shape
    matched = o["adjust_lr_fn"] == "match_rms_adamw"
    scale = 0.2 * max(rows, columns) ** 0.5 if matched else max(1, rows / columns) ** 0.5
    lr = float(o["lr"])
    error = UNIT * p.abs() + lr * scale * 0.2 * (x.abs() + x.square().mean().sqrt())
    return Result(
        p * (1 - lr * float(o["weight_decay"])) - lr * scale * x, direction.states, error, errors
    )


def sgd(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    return _sgd(p, g, old, step, {**o, "rate_in_buffer": False})


def _sgd(p: Tensor, g: Tensor, old: States, step: int, o: Options) -> Result:
    """With the learning rate outside, or inside of the buffer."""
    param, new = exact("sgd", p, g, old, step, o, False)
    g, G, good = gradient(p, g, o, o["weight_decay"])
    if not o["momentum"]:
        return guarded(good, p, old, Result(param, {}, UNIT * (p.abs() + o["lr"] * G), {}))
    inside, outside = (o["lr"], 1.0) if o["rate_in_buffer"] else (1.0, o["lr"])
    gain = inside * (1.0 if step == 1 else 1 - o["dampening"])
    B = o["momentum"] * old["momentum_buffer"].abs() + abs(gain) * G
    error = UNIT * (p.abs() + outside * B * (1 + o["momentum"]) + o["lr"] * G)
    return guarded(good, p, old, Result(param, new, error, {"momentum_buffer": UNIT * B}))


def lamb(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """AdamW, its learning rate multiplied by the norm of the parameter over that of the update."""
    adamw = {**o, "decoupled_weight_decay": True, "amsgrad": False}
    ratio = 1.0
    if o["adaptive"]:
        away = adam(p, g, old, step, {**adamw, "lr": 1.0}, in_8bit).param
        norms = float(p.norm()), float((p - away).norm())
        ratio = norms[0] / norms[1] if all(norms) else 1.0
    return adam(p, g, old, step, {**adamw, "lr": o["lr"] * ratio}, in_8bit)


def lars(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """SGD with the learning rate, times the ratio, inside of the buffer."""
    ratio = 1.0
    if o["adaptive"]:
        norm = float(p.norm())
        below = float(g[g.isfinite()].norm()) + o["weight_decay"] * norm
        ratio = o["trust_coefficient"] * norm / below if norm and below else 1.0
    return _sgd(p, g, old, step, {**o, "lr": o["lr"] * ratio, "rate_in_buffer": True})


def rmsprop(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """In 8 bits the variance is at least a 64th of the mean square."""
    alpha = o["alpha"]
    param, states = exact("rmsprop", p, g, old, step, o, in_8bit)
    g, G, good = gradient(p, g, o, o["weight_decay"])
    v = states["square_avg"]
    V = alpha * old["square_avg"] + (1 - alpha) * G**2
    errors = {"square_avg": UNIT * V}
    variance, spread = v, V
    if o["centered"]:
        a = states["grad_avg"]
        A = alpha * old["grad_avg"].abs() + (1 - alpha) * G
        variance, spread = v - a**2, V + 3 * A**2
        if in_8bit:
            variance = torch.maximum(variance, v / 64)
        errors["grad_avg"] = UNIT * A
    # The error of the variance; the smallest one that it may be in truth.
    low = (variance - UNIT * spread).clamp_min(1e-300)
    denominator = (variance.clamp_min(0).sqrt() + o["eps"]).clamp_min(1e-300)
    update, U = g / denominator, G / (low.sqrt() + o["eps"]).clamp_min(1e-300)
    through_v = torch.where(spread > 0, U * spread / low, 0.0)
    update_error = UNIT * (U + through_v)
    if o["momentum"]:
        update = states["momentum_buffer"]
        update_error = update_error + UNIT * (o["momentum"] * old["momentum_buffer"].abs() + U)
        errors["momentum_buffer"] = update_error
    error = UNIT * (p.abs() + o["lr"] * update.abs()) + o["lr"] * update_error
    return guarded(good, p, old, Result(param, states, error, errors))


def adagrad(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    param, new = exact("adagrad", p, g, old, step, o, in_8bit)
    g, G, good = gradient(p, g, o, o["weight_decay"])
    s, S = new["sum"], old["sum"] + G**2
    lr = o["lr"] / (1 + (step - 1) * o["lr_decay"])
    denominator = (s.sqrt() + o["eps"]).clamp_min(1e-300)
    through_s = torch.where(s > 0, g.abs() * S / s.clamp_min(1e-300), 0.0)
    error = UNIT * (p.abs() + lr * (G + through_s) / denominator)
    return guarded(good, p, old, Result(param, new, error, {"sum": UNIT * S}))


def nadam(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """Adam that looks a step ahead. The product of momenta is stored in float32."""

    def momentum(t: int) -> float:
        return float(beta1 * (1 - 0.5 * 0.96 ** (t * o["momentum_decay"])))

    decoupled, decay, (beta1, beta2) = o["decoupled_weight_decay"], o["weight_decay"], o["betas"]
    param, new = exact("nadam", p, g, old, step, o, in_8bit)
    g, G, good = gradient(p, g, o, 0.0 if decoupled else decay)
    m, v = new["exp_avg"], new["exp_avg_sq"]
    M = beta1 * old["exp_avg"].abs() + (1 - beta1) * G
    V = beta2 * old["exp_avg_sq"] + (1 - beta2) * G**2
    now, ahead = momentum(step), momentum(step + 1)
    product = old["mu_product"] * now
    of_g, of_m = (1 - now) / (1 - product), ahead / (1 - product * ahead)
    mixed, most = of_g * g + of_m * m, of_g * G + of_m * M
    denominator = ((v / (1 - beta2**step)).sqrt() + o["eps"]).clamp_min(1e-300)
    through_v = torch.where(v > 0, mixed.abs() * V / v.clamp_min(1e-300), 0.0)
    error = UNIT * (p.abs() + o["lr"] * (2 * most + through_v) / denominator)
    errors = {"exp_avg": UNIT * M, "exp_avg_sq": UNIT * V, "mu_product": UNIT * product}
    return guarded(good, p, old, Result(param, new, error, errors))


def ademamix(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """The half-life of beta3 grows linearly from that of beta1."""
    beta1, beta2, beta3 = o["betas"]
    alpha = o["alpha"] * (min(1.0, step / o["t_alpha"]) if o["t_alpha"] else 1.0)
    param, new = exact("ademamix", p, g, old, step, o, in_8bit)
    if step < o["t_beta3"]:
        share = step / o["t_beta3"]
        life1, life3 = (math.log(0.5) / math.log(beta) for beta in (beta1, beta3))
        beta3 = 0.5 ** (1 / ((1 - share) * life1 + share * life3))
    g, G, good = gradient(p, g, o, 0.0)
    betas = {"exp_avg_fast": beta1, "exp_avg_slow": beta3, "exp_avg_sq": beta2}
    most = {"exp_avg_fast": G, "exp_avg_slow": G, "exp_avg_sq": G**2}
    errors = {k: UNIT * (b * old[k].abs() + (1 - b) * most[k]) for k, b in betas.items()}
    fast, slow, v = (new[k] for k in betas)
    mixed = fast / (1 - beta1**step) + alpha * slow
    mixed_error = errors["exp_avg_fast"] / (1 - beta1**step) + alpha * errors["exp_avg_slow"]
    denominator = ((v / (1 - beta2**step)).sqrt() + o["eps"]).clamp_min(1e-300)
    through_v = torch.where(v > 0, mixed.abs() * errors["exp_avg_sq"] / v.clamp_min(1e-300), 0.0)
    error = UNIT * p.abs() + o["lr"] * (2 * mixed_error + through_v) / denominator
    error = error + o["lr"] * UNIT * mixed.abs() / denominator
    return guarded(good, p, old, Result(param, new, error, errors))


RULES = {
    "adagrad": adagrad,
    "adam": adam,
    "ademamix": ademamix,
    "lamb": lamb,
    "lars": lars,
    "lion": lion,
    "muon": muon,
    "nadam": nadam,
    "rmsprop": rmsprop,
    "sgd": sgd,
}
