"""The runs of the studies: which there are, in which order, and how one is made."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

import torchao8
from benchmarks.quality.moments import MAPS, SCOPES, EmulatedAdamW8bit, UpdateError
from benchmarks.quality.tasks import DigitsSize, GptSize, Size, Task, open_task
from benchmarks.reporting import installed
from benchmarks.step.contenders import rule_names
from benchmarks.step.job import state_bytes

Options = dict[str, Any]

CLIP_NORM = 1.0
WARMUP_SHARE = 0.1
LAST_LR = 0.1  # of the highest


@dataclass(frozen=True)
class Rule:
    """An update rule in the study of the family, and the learning rate for each task.

    It is run under its name with 32-bit and, with "8bit" behind it, with 8-bit state; by
    torch.optim and bitsandbytes where they have a class of that name.
    """

    name: str
    gpt_lr: float = 1e-3
    digits_lr: float = 2e-3
    options: Options = field(default_factory=dict)

    @property
    def lr(self) -> dict[str, float]:
        """By task."""
        return {"gpt": self.gpt_lr, "digits": self.digits_lr}


_DECAY = {"weight_decay": 0.1}
# The learning rates were chosen by a few runs with 32-bit state.
_CHOSEN = [
    Rule("Adam", 1e-3, 2e-3, {"betas": (0.9, 0.999)}),
    Rule("AdamW", 2e-3, 2e-3, {"betas": (0.9, 0.95), **_DECAY}),
    Rule("AdEMAMix", 1e-3, 2e-3,
         {"betas": (0.9, 0.999, 0.9999), "alpha": 2.0, "t_alpha": 600, "t_beta3": 600}),
    Rule("Adagrad", 1e-2, 2e-2),
    Rule("LAMB", 1e-2, 2e-2, {"betas": (0.9, 0.999), **_DECAY}),
    Rule("LARS", 0.3, 1.0, {"momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 0.02}),
    Rule("Lion", 5e-4, 2e-4, {"betas": (0.9, 0.99), **_DECAY}),
    Rule("RMSprop", 1e-3, 2e-3, {"alpha": 0.99}),
    Rule("SGD", 1e-1, 1e-1, {"momentum": 0.9}),
]  # fmt: skip
# Every rule of the library; one that nobody has chosen numbers for has its defaults.
FAMILY = [
    *_CHOSEN,
    *(Rule(name) for name in rule_names() if name not in {rule.name for rule in _CHOSEN}),
]
OURS_32BIT = "32-bit"
OURS_8BIT = "8-bit"
TORCH = "torch.optim"
BITSANDBYTES = "bitsandbytes"
SOURCES = (OURS_32BIT, OURS_8BIT, TORCH, BITSANDBYTES)

ROUNDINGS = ("nearest", "stochastic")
BETA2S = (0.999, 0.95)


@dataclass(frozen=True)
class Settings:
    """How large the studies are."""

    sizes: dict[str, Size] = field(
        default_factory=lambda: {"gpt": GptSize(), "digits": DigitsSize()}
    )
    steps: dict[str, int] = field(
        default_factory=lambda: {"gpt": 600, "digits": 600, "ablation": 300, "rounding": 5000}
    )
    seeds: int = 5
    ablation_lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    error_every: int = 200


FULL = Settings()
QUICK = Settings(
    sizes={"gpt": GptSize(1, 64, 2, 32, 2, 2), "digits": DigitsSize(16, 32, 16)},
    steps={"gpt": 4, "digits": 4, "ablation": 3, "rounding": 6},
    seeds=2,
    ablation_lrs=(1e-3,),
    error_every=2,
)


@dataclass(frozen=True)
class Run:
    """One training. What it gives follows from these fields, the library and the machine.

    `row` and `column` are its place in the study's table.
    """

    study: str
    task: str
    size: Size
    row: str
    column: str
    seed: int
    steps: int
    lr: float
    options: Options
    error_every: int = 0

    @property
    def label(self) -> str:
        """What people call it, and what --only matches."""
        return f"{self.study}/{self.task}/{self.row}/{self.column}/seed {self.seed}"

    def identity(self) -> dict[str, Any]:
        """All fields as JSON has them: two runs with equal ones are the same run."""
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in self.options.items()}
        return {**asdict(self), "options": plain}


# --- which runs ---------------------------------------------------------------------------------


def _class_of(source: str, name: str) -> Callable[..., torch.optim.Optimizer] | None:
    """The class that a source has for a rule, if it has one and is installed."""
    if source == TORCH:
        return getattr(torch.optim, name, None)
    if source == BITSANDBYTES:
        if not installed("bitsandbytes"):
            return None
        return getattr(importlib.import_module("bitsandbytes.optim"), f"{name}8bit", None)
    return getattr(torchao8, name if source == OURS_32BIT else f"{name}8bit")


def family(settings: Settings, seed: int) -> Iterator[Run]:
    """Every rule on every task: 32-bit and 8-bit state, torch's own and bitsandbytes' own."""
    for task, size in settings.sizes.items():
        for rule in FAMILY:
            for source in SOURCES:
                if _class_of(source, rule.name) is not None:
                    how = settings.steps[task], rule.lr[task], rule.options
                    yield Run("family", task, size, rule.name, source, seed, *how)


def codec_name(map_name: str, scope: str) -> str:
    """The row of an emulated codec."""
    return f"emulated: {map_name}, {scope}"


CODECS = {codec_name(m, s): (m, s) for m in MAPS for s in SCOPES}
REFERENCE = "torchao8.AdamW"
LIBRARY = "torchao8.AdamW8bit"
EMBEDDINGS = {"embeddings in 8 bits": 8, "embeddings in 32 bits": 32}


def ablation(settings: Settings, seed: int) -> Iterator[Run]:
    """The GPT with each codec, with and without 32-bit embeddings, at several learning rates."""
    options = {"betas": (0.9, 0.999), **_DECAY}
    for lr in settings.ablation_lrs:
        for row in (REFERENCE, LIBRARY, *CODECS):
            for column in list(EMBEDDINGS)[: 1 if row == REFERENCE else None]:
                how = settings.steps["ablation"], lr, options
                yield Run("ablation", "gpt", settings.sizes["gpt"], row, column, seed, *how)


def rounding(settings: Settings, seed: int) -> Iterator[Run]:
    """The GPT for long, with second moments rounded either way, at two decay rates."""
    for beta2 in BETA2S:
        for way in (*ROUNDINGS, OURS_32BIT):
            options: Options = {"betas": (0.9, beta2), **_DECAY}
            every = 0
            if way != OURS_32BIT:
                options["state_rounding"] = way
                every = settings.error_every
            how = settings.steps["rounding"], 2e-3, options, every
            yield Run("rounding", "gpt", settings.sizes["gpt"], f"beta2 {beta2}", way, seed, *how)


STUDIES = {"family": family, "ablation": ablation, "rounding": rounding}


def plan(settings: Settings) -> list[Run]:
    """All runs in the order in which they are made, so that wherever it ends there is a result.

    Seed by seed within a study; the longest runs come last.
    """
    seeds = range(settings.seeds)
    return [run for study in STUDIES.values() for seed in seeds for run in study(settings, seed)]


# --- a run --------------------------------------------------------------------------------------


def learning_rate(step: int, steps: int, highest: float) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return highest * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return highest * (LAST_LR + (1 - LAST_LR) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run over the parameters of a model."""
    options = {"lr": run.lr, **run.options}
    if run.study == "family":
        cls = _class_of(run.column, run.row)
        assert cls is not None, run
        return cls(model.parameters(), **options)
    if run.study == "rounding":
        cls = torchao8.AdamW if run.column == OURS_32BIT else torchao8.AdamW8bit
        return cls(model.parameters(), **options)
    in_32bit = EMBEDDINGS[run.column] == 32
    groups = torchao8.param_groups(model, decay_vectors=True, embeddings_in_32bit=in_32bit)
    if run.row in CODECS:
        return EmulatedAdamW8bit(groups, *CODECS[run.row], **options)
    return (torchao8.AdamW if run.row == REFERENCE else torchao8.AdamW8bit)(groups, **options)


def train(run: Run, task: Task) -> dict[str, Any]:
    """Trains; the result of the record.

    `held_out` is the loss at the end, None if it is not finite; `diverged`, whether it is that or
    above the loss of one who guesses.
    """
    start = time.monotonic()
    model = task.model(run.seed)
    optimizer = make_optimizer(run, model)
    watch = UpdateError(optimizer, run.error_every) if run.error_every else None
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, run.steps, run.lr)
        loss = task.loss(model, step, run.seed)
        if not loss.isfinite():
            break
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        if watch:
            watch.before_step()
        optimizer.step()
        if watch:
            watch.after_step()
        optimizer.zero_grad()
    held_out = task.held_out(model)
    elements = sum(p.numel() for p in model.parameters())
    result = {
        "held_out": held_out if math.isfinite(held_out) else None,
        "diverged": not held_out <= task.guess,
        "steps_done": step + 1,
        "state_bytes_per_parameter": state_bytes(optimizer) / elements,
        "seconds": time.monotonic() - start,
    }
    if watch:
        result["update_error"] = watch.errors
        result["stored_over_exact"] = watch.stored_over_exact()
    return result


def attempt(run: Run) -> dict[str, Any]:
    """`train`, or {"error": message} of whatever another library raises."""
    try:
        return train(run, open_task(run.size))
    except Exception as error:  # not every rule of theirs has a kernel for every device
        if run.column != BITSANDBYTES:
            raise
        first_line = (str(error).strip() or "no message").splitlines()[0]
        return {"error": f"{type(error).__name__}: {first_line}"}
