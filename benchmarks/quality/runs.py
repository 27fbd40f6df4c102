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
from benchmarks.process import error_line
from benchmarks.quality.moments import MAPS, SCOPES, EmulatedAdamW8bit, UpdateError
from benchmarks.quality.tasks import Digits, Gpt, Task
from benchmarks.quality.torch_muon import MuonAdamW as TorchMuonAdamW
from benchmarks.reporting import installed
from benchmarks.step.contenders import rule_names
from benchmarks.step.job import state_bytes

Options = dict[str, Any]

CLIP_NORM = 1.0
WARMUP_SHARE = 0.1
LAST_LR = 0.1  # of the highest

_DECAY = {"weight_decay": 0.1}
# Learning rates on the GPT and on the digits, chosen by a few runs with 32-bit state, and options.
# A rule for which nobody has chosen any gets the learning rates of Adam, and its own defaults.
_CHOSEN: dict[str, tuple[float, float, Options]] = {
    "Adam": (1e-3, 2e-3, {"betas": (0.9, 0.999)}),
    "AdamW": (2e-3, 2e-3, {"betas": (0.9, 0.95), **_DECAY}),
    "AdEMAMix": (1e-3, 2e-3,
                 {"betas": (0.9, 0.999, 0.9999), "alpha": 2.0, "t_alpha": 600, "t_beta3": 600}),
    "Adagrad": (1e-2, 2e-2, {}),
    "LAMB": (1e-2, 2e-2, {"betas": (0.9, 0.999), **_DECAY}),
    "LARS": (0.3, 1.0, {"momentum": 0.9, "weight_decay": 1e-4, "trust_coefficient": 0.02}),
    "Lion": (5e-4, 2e-4, {"betas": (0.9, 0.99), **_DECAY}),
    # Hidden matrices by Muon, the rest by AdamW.
    "MuonAdamW": (8e-3, 4e-3, {"betas": (0.9, 0.95), **_DECAY}),
    "RMSprop": (1e-3, 2e-3, {"alpha": 0.99}),
    "SGD": (1e-1, 1e-1, {"momentum": 0.9}),
}  # fmt: skip
RULES = dict.fromkeys([*_CHOSEN, *rule_names()], (1e-3, 2e-3, {})) | _CHOSEN
OURS_32BIT, OURS_8BIT, OURS_MULAW, OURS_4BIT = "32-bit", "8-bit", "8-bit mulaw", "4-bit"
BITSANDBYTES, TORCHAO_4BIT = "bitsandbytes", "torchao 4-bit"


@dataclass(frozen=True)
class Source:
    """Who has an optimizer of a rule: the module, what follows the name of the rule, and options
    beside those of the rule."""

    module: str
    suffix: str = ""
    options: Options = field(default_factory=dict)

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]


SOURCES = {
    OURS_32BIT: Source("torchao8"),
    OURS_8BIT: Source("torchao8", "8bit"),
    OURS_MULAW: Source("torchao8", "8bit", {"state_format": "mulaw"}),
    OURS_4BIT: Source("torchao8", "4bit"),
    "torch.optim": Source("torch.optim"),
    BITSANDBYTES: Source("bitsandbytes.optim", "8bit"),
    TORCHAO_4BIT: Source("torchao.optim", "4bit"),
}


@dataclass(frozen=True)
class Settings:
    """How large the studies are."""

    sizes: dict[str, Task]
    steps: dict[str, int]
    seeds: int
    ablation_lrs: tuple[float, ...]
    error_every: int


FULL = Settings(
    sizes={"gpt": Gpt(), "digits": Digits()},
    steps={"gpt": 600, "digits": 600, "ablation": 300, "rounding": 5000},
    seeds=5,
    ablation_lrs=(1e-3, 3e-3, 1e-2),
    error_every=200,
)
QUICK = Settings(
    sizes={"gpt": Gpt(1, 64, 2, 32, 2, 2), "digits": Digits(16, 32, 16)},
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
    size: Task
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
    if (source, name) == ("torch.optim", "MuonAdamW"):
        return TorchMuonAdamW
    of = SOURCES[source]
    if not installed(of.package):
        return None
    return getattr(importlib.import_module(of.module), f"{name}{of.suffix}", None)


def family(settings: Settings, seed: int) -> Iterator[Run]:
    """Every rule on every task: each format of state, and the optimizers of other libraries."""
    for task, size in settings.sizes.items():
        for name, (gpt_lr, digits_lr, options) in RULES.items():
            lr = gpt_lr if task == "gpt" else digits_lr
            for source in SOURCES:
                if _class_of(source, name) is not None:
                    steps = settings.steps[task]
                    yield Run("family", task, size, name, source, seed, steps, lr, options)


CODECS = {f"emulated: {m}, {s}": (m, s) for m in MAPS for s in SCOPES}
REFERENCE = "torchao8.AdamW"
LIBRARY = "torchao8.AdamW8bit"
EMBEDDINGS = {"embeddings in 8 bits": 8, "embeddings in 32 bits": 32}


def ablation(settings: Settings, seed: int) -> Iterator[Run]:
    """The GPT with each codec, with and without 32-bit embeddings, at several learning rates."""
    options = {"betas": (0.9, 0.999), **_DECAY}
    steps, size = settings.steps["ablation"], settings.sizes["gpt"]
    for lr in settings.ablation_lrs:
        for row in (REFERENCE, LIBRARY, *CODECS):
            for column in list(EMBEDDINGS)[: 1 if row == REFERENCE else None]:
                yield Run("ablation", "gpt", size, row, column, seed, steps, lr, options)


def rounding(settings: Settings, seed: int) -> Iterator[Run]:
    """The GPT for long, with second moments rounded either way, at two decay rates."""
    steps, size = settings.steps["rounding"], settings.sizes["gpt"]
    for beta2 in (0.999, 0.95):
        shared = {"betas": (0.9, beta2), **_DECAY}
        for way in (OURS_32BIT, "nearest", "stochastic"):
            options = shared if way == OURS_32BIT else {**shared, "state_rounding": way}
            every = 0 if way == OURS_32BIT else settings.error_every
            row = f"beta2 {beta2}"
            yield Run("rounding", "gpt", size, row, way, seed, steps, 2e-3, options, every)


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


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all groups; torchao's optimizers have it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of a run over the parameters of a model."""
    options = {"lr": run.lr, **run.options}
    if run.study == "family":
        cls = _class_of(run.column, run.row)
        assert cls is not None, run
        params: Any = model.parameters()
        if run.row == "MuonAdamW":  # decay and formats of state are the same for all, as elsewhere
            params = torchao8.param_groups(
                model, muon=True, decay_vectors=True, embeddings_in_32bit=False
            )
        return cls(params, **options, **SOURCES[run.column].options)
    in_32bit = OURS_32BIT if run.study == "rounding" else REFERENCE
    ours = torchao8.AdamW if in_32bit in (run.column, run.row) else torchao8.AdamW8bit
    if run.study == "rounding":
        return ours(model.parameters(), **options)
    embeddings = EMBEDDINGS[run.column] == 32
    groups = torchao8.param_groups(model, decay_vectors=True, embeddings_in_32bit=embeddings)
    if run.row in CODECS:
        return EmulatedAdamW8bit(groups, *CODECS[run.row], **options)
    return ours(groups, **options)


def train(run: Run) -> dict[str, Any]:
    """Trains; the result of the record.

    `held_out` is the loss at the end, None if it is not finite; `diverged`, whether it is that or
    above the loss of one who guesses.
    """
    start, task = time.monotonic(), run.size
    model = task.model(run.seed)
    optimizer = make_optimizer(run, model)
    watch = UpdateError(optimizer, run.error_every) if run.error_every else None
    for step in range(run.steps):
        set_lr(optimizer, learning_rate(step, run.steps, run.lr))
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
        return train(run)
    except Exception as error:  # not every rule of theirs has a kernel for every device
        if run.column not in (BITSANDBYTES, TORCHAO_4BIT):
            raise
        return {"error": error_line(error)}
