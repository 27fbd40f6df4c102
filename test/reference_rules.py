"""The oracle of the update rules: each in float64 plain PyTorch, as its publication has it.

Slow and obvious; it shares no code and no shortcut with the library. Every rule tells how far
float32 arithmetic may lead away from it: each of the at most 8 operations on the way to a sum adds
half a unit in the last place, 2^-24, of the largest number that it handled. Capital letters are
those sums without cancellation.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


def guarded(good: Tensor, old_p: Tensor, old: States, result: Result) -> Result:
    """What is not usable leaves its element as it was."""
    states = {k: torch.where(good, v, old[k]) for k, v in result.states.items()}
    param = torch.where(good, result.param, old_p)
    return Result(param, states, result.param_error, result.errors)


def adam(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """Adam, AdamW. The error of v reaches the parameter through the root, where it counts half."""
    decoupled, decay, (beta1, beta2) = o["decoupled_weight_decay"], o["weight_decay"], o["betas"]
    g, G, good = gradient(p, g, o, 0.0 if decoupled else decay)
    new = {
        "exp_avg": beta1 * old["exp_avg"] + (1 - beta1) * g,
        "exp_avg_sq": beta2 * old["exp_avg_sq"] + (1 - beta2) * g**2,
    }
    root = new["exp_avg_sq"]
    if o["amsgrad"]:
        root = new["max_exp_avg_sq"] = torch.maximum(old["max_exp_avg_sq"], root)
    step_size = o["lr"] / (1 - beta1**step)
    denominator = ((root / (1 - beta2**step)).sqrt() + o["eps"]).clamp_min(1e-300)
    decayed = p * (1 - o["lr"] * decay) if decoupled else p
    param = decayed - step_size * new["exp_avg"] / denominator
    M = beta1 * old["exp_avg"].abs() + (1 - beta1) * G
    V = torch.maximum(root, beta2 * old["exp_avg_sq"] + (1 - beta2) * G**2)
    through_v = torch.where(root > 0, new["exp_avg"].abs() * V / root.clamp_min(1e-300), 0.0)
    error = UNIT * (p.abs() + step_size * (M + through_v) / denominator)
    errors = {"exp_avg": UNIT * M, "exp_avg_sq": UNIT * V, "max_exp_avg_sq": UNIT * V}
    return guarded(good, p, old, Result(param, new, error, errors))


def lion(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """Where the interpolation is as small as its own error, its sign may be any."""
    beta1, beta2 = o["betas"]
    g, G, good = gradient(p, g, o, 0.0)
    m = old["exp_avg"]
    c, C = beta1 * m + (1 - beta1) * g, beta1 * m.abs() + (1 - beta1) * G
    new, M = beta2 * m + (1 - beta2) * g, beta2 * m.abs() + (1 - beta2) * G
    param = p * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * c.sign()
    unsure = (c.abs() <= UNIT * C) & (C > 0)
    error = UNIT * (p.abs() + o["lr"]) + torch.where(unsure, 2 * o["lr"], 0.0)
    return guarded(good, p, old, Result(param, {"exp_avg": new}, error, {"exp_avg": UNIT * M}))


def sgd(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    g, G, good = gradient(p, g, o, o["weight_decay"])
    if not o["momentum"]:
        error = UNIT * (p.abs() + o["lr"] * G)
        return guarded(good, p, old, Result(p - o["lr"] * g, {}, error, {}))
    gain = 1.0 if step == 1 else 1 - o["dampening"]
    b = o["momentum"] * old["momentum_buffer"] + gain * g
    B = o["momentum"] * old["momentum_buffer"].abs() + abs(gain) * G
    param = p - o["lr"] * (g + o["momentum"] * b if o["nesterov"] else b)
    error = UNIT * (p.abs() + o["lr"] * (B * (1 + o["momentum"]) + G))
    states, errors = {"momentum_buffer": b}, {"momentum_buffer": UNIT * B}
    return guarded(good, p, old, Result(param, states, error, errors))


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
    g, G, good = gradient(p, g, o, o["weight_decay"])
    rate = o["lr"] * ratio
    if not o["momentum"]:
        return guarded(good, p, old, Result(p - rate * g, {}, UNIT * (p.abs() + rate * G), {}))
    gain = rate * (1.0 if step == 1 else 1 - o["dampening"])
    b = o["momentum"] * old["momentum_buffer"] + gain * g
    B = o["momentum"] * old["momentum_buffer"].abs() + abs(gain) * G
    param = p - (rate * g + o["momentum"] * b if o["nesterov"] else b)
    error = UNIT * (p.abs() + B * (1 + o["momentum"]) + rate * G)
    states, errors = {"momentum_buffer": b}, {"momentum_buffer": UNIT * B}
    return guarded(good, p, old, Result(param, states, error, errors))


def rmsprop(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """In 8 bits the variance is at least a 64th of the mean square."""
    alpha = o["alpha"]
    g, G, good = gradient(p, g, o, o["weight_decay"])
    v = alpha * old["square_avg"] + (1 - alpha) * g**2
    V = alpha * old["square_avg"] + (1 - alpha) * G**2
    states, errors = {"square_avg": v}, {"square_avg": UNIT * V}
    variance, spread = v, V
    if o["centered"]:
        a = alpha * old["grad_avg"] + (1 - alpha) * g
        A = alpha * old["grad_avg"].abs() + (1 - alpha) * G
        variance, spread = v - a**2, V + 3 * A**2
        if in_8bit:
            variance = torch.maximum(variance, v / 64)
        states["grad_avg"], errors["grad_avg"] = a, UNIT * A
    # The error of the variance; the smallest one that it may be in truth.
    low = (variance - UNIT * spread).clamp_min(1e-300)
    denominator = (variance.clamp_min(0).sqrt() + o["eps"]).clamp_min(1e-300)
    update, U = g / denominator, G / (low.sqrt() + o["eps"]).clamp_min(1e-300)
    through_v = torch.where(spread > 0, U * spread / low, 0.0)
    update_error = UNIT * (U + through_v)
    if o["momentum"]:
        update = o["momentum"] * old["momentum_buffer"] + update
        update_error = update_error + UNIT * (o["momentum"] * old["momentum_buffer"].abs() + U)
        states["momentum_buffer"], errors["momentum_buffer"] = update, update_error
    error = UNIT * (p.abs() + o["lr"] * update.abs()) + o["lr"] * update_error
    return guarded(good, p, old, Result(p - o["lr"] * update, states, error, errors))


def adagrad(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    g, G, good = gradient(p, g, o, o["weight_decay"])
    s, S = old["sum"] + g**2, old["sum"] + G**2
    lr = o["lr"] / (1 + (step - 1) * o["lr_decay"])
    denominator = (s.sqrt() + o["eps"]).clamp_min(1e-300)
    through_s = torch.where(s > 0, g.abs() * S / s.clamp_min(1e-300), 0.0)
    error = UNIT * (p.abs() + lr * (G + through_s) / denominator)
    result = Result(p - lr * g / denominator, {"sum": s}, error, {"sum": UNIT * S})
    return guarded(good, p, old, result)


def nadam(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """Adam that looks a step ahead. The product of momenta is stored in float32."""

    def momentum(t: int) -> float:
        return float(beta1 * (1 - 0.5 * 0.96 ** (t * o["momentum_decay"])))

    decoupled, decay, (beta1, beta2) = o["decoupled_weight_decay"], o["weight_decay"], o["betas"]
    g, G, good = gradient(p, g, o, 0.0 if decoupled else decay)
    m = beta1 * old["exp_avg"] + (1 - beta1) * g
    v = beta2 * old["exp_avg_sq"] + (1 - beta2) * g**2
    M = beta1 * old["exp_avg"].abs() + (1 - beta1) * G
    V = beta2 * old["exp_avg_sq"] + (1 - beta2) * G**2
    now, ahead = momentum(step), momentum(step + 1)
    product = old["mu_product"] * now
    of_g, of_m = (1 - now) / (1 - product), ahead / (1 - product * ahead)
    mixed, most = of_g * g + of_m * m, of_g * G + of_m * M
    denominator = ((v / (1 - beta2**step)).sqrt() + o["eps"]).clamp_min(1e-300)
    decayed = p * (1 - o["lr"] * decay) if decoupled else p
    through_v = torch.where(v > 0, mixed.abs() * V / v.clamp_min(1e-300), 0.0)
    error = UNIT * (p.abs() + o["lr"] * (2 * most + through_v) / denominator)
    param = decayed - o["lr"] * mixed / denominator
    errors = {"exp_avg": UNIT * M, "exp_avg_sq": UNIT * V, "mu_product": UNIT * product}
    result = guarded(good, p, old, Result(param, {"exp_avg": m, "exp_avg_sq": v}, error, errors))
    result.states["mu_product"] = product  # of the step, not of its elements
    return result


def ademamix(p: Tensor, g: Tensor, old: States, step: int, o: Options, in_8bit: bool) -> Result:
    """The half-life of beta3 grows linearly from that of beta1, by its definition."""
    beta1, beta2, beta3 = o["betas"]
    if step < o["t_beta3"]:
        share = step / o["t_beta3"]
        life1, life3 = (math.log(0.5) / math.log(beta) for beta in (beta1, beta3))
        beta3 = 0.5 ** (1 / ((1 - share) * life1 + share * life3))
    alpha = o["alpha"] * (min(1.0, step / o["t_alpha"]) if o["t_alpha"] else 1.0)
    g, G, good = gradient(p, g, o, 0.0)
    betas = {"exp_avg_fast": beta1, "exp_avg_slow": beta3, "exp_avg_sq": beta2}
    added = {"exp_avg_fast": g, "exp_avg_slow": g, "exp_avg_sq": g**2}
    most = {"exp_avg_fast": G, "exp_avg_slow": G, "exp_avg_sq": G**2}
    new = {k: b * old[k] + (1 - b) * added[k] for k, b in betas.items()}
    errors = {k: UNIT * (b * old[k].abs() + (1 - b) * most[k]) for k, b in betas.items()}
    fast, slow, v = new.values()
    mixed = fast / (1 - beta1**step) + alpha * slow
    mixed_error = errors["exp_avg_fast"] / (1 - beta1**step) + alpha * errors["exp_avg_slow"]
    denominator = ((v / (1 - beta2**step)).sqrt() + o["eps"]).clamp_min(1e-300)
    through_v = torch.where(v > 0, mixed.abs() * errors["exp_avg_sq"] / v.clamp_min(1e-300), 0.0)
    param = p * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * mixed / denominator
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
    "nadam": nadam,
    "rmsprop": rmsprop,
    "sgd": sgd,
}
