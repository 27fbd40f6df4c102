"""The optimizers that are timed: AdamW of several libraries, Muon, and every rule of torchao8."""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.step import torch_rules

BASELINE = "torch"
# Of lists of matrices, on which Muon is timed in place of AdamW.
MUON_BASELINES = {"gpt2-hidden": "torch-muon"}

# A weight decay of zero would let some skip work.
_DECAY = {"weight_decay": 1e-2}
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, **_DECAY}
MUON: dict[str, Any] = {"lr": 1e-3, "momentum": 0.95, "nesterov": True, **_DECAY}


@dataclass(frozen=True)
class Contender:
    """One optimizer, configured."""

    name: str  # on the command line and in files
    label: str  # in tables
    where: str = ""  # module and class, as "torch.optim.AdamW"; "" if it is no optimizer
    options: dict[str, Any] = field(default_factory=dict)
    lists: tuple[str, ...] | None = None  # that it runs on if no contender is named; None: all
    devices: tuple[str, ...] = ("cpu", "cuda")
    # Bytes an element, about, of state and of what is made on the way to it: by them it is decided
    # how many contenders fit into memory at a time.
    state_bytes: float = 8.0
    mode: str = "eager"  # "compiled" by torch.compile; "graph": replays of a CUDA graph
    cpu_path: str | None = None  # that torchao8 is told to take
    # The directory of the torchao8 that is timed; the bits of its steps are told, too.
    source: str | None = None
    # "whole"; on several ranks "DTensor" (sharded by rows) or "shard" (copies of its shards).
    tensors: str = "whole"

    @property
    def package(self) -> str:
        return self.where.partition(".")[0]

    def build(self, params: list[Tensor]) -> torch.optim.Optimizer:
        """The optimizer over these parameters."""
        module, _, name = self.where.rpartition(".")
        cls: Any = getattr(importlib.import_module(module), name)
        made: torch.optim.Optimizer = cls(params, **self.options)
        return made


# They take the same turns, to tell the machine's memory rate.
MEMORY = [Contender("copy", "copy of a buffer"), Contender("scale", "scaling a buffer in place")]


def _adamw(name: str, label: str, where: str, more: dict[str, Any], **about: Any) -> Contender:
    return Contender(name, label, where, {**ADAMW, **more}, **about)


def _ours(name: str, label: str, bits: str = "8bit", **about: Any) -> Contender:
    options = about.pop("options", {})
    about.setdefault("state_bytes", 3.0 if bits else 8.0)
    return _adamw(name, label, f"torchao8.AdamW{bits}", options, **about)


_NEAREST = {"state_rounding": "nearest"}
_MULAW = {"state_format": "mulaw"}
_FEW_SHAPES = ("gpt2", "block", "small", "huge", "one")
_GRAPHS = ("gpt2", "block", "small", "huge", "resnet101")
_ADAMW = [
    _adamw(BASELINE, "torch.optim.AdamW(fused=True)", "torch.optim.AdamW", {"fused": True}),
    _ours("8bit", "torchao8.AdamW8bit"),
    _ours("8bit-nearest", 'torchao8.AdamW8bit(state_rounding="nearest")', options=_NEAREST),
    _ours("8bit-one-scale", "torchao8.AdamW8bit(block_wise=False)",
          options={"block_wise": False}, lists=()),
    _ours("8bit-avx2", "torchao8.AdamW8bit, AVX2", devices=("cpu",), cpu_path="avx2"),
    _ours("8bit-mulaw", 'torchao8.AdamW8bit(state_format="mulaw")', options=_MULAW),
    _ours("8bit-mulaw-avx2", 'torchao8.AdamW8bit(state_format="mulaw"), AVX2',
          options=_MULAW, devices=("cpu",), cpu_path="avx2"),
    _ours("4bit", "torchao8.AdamW4bit", "4bit"),
    _ours("4bit-avx2", "torchao8.AdamW4bit, AVX2", "4bit", devices=("cpu",), cpu_path="avx2"),
    _ours("8bit-scalar", "torchao8.AdamW8bit, plain C++",
          lists=("block",), devices=("cpu",), cpu_path="scalar"),
    _ours("8bit-portable", "torchao8.AdamW8bit, PyTorch operators",
          lists=(), devices=("cpu",), cpu_path="portable"),
    _ours("8bit-all", "torchao8.AdamW8bit(min_8bit_size=0)",
          options={"min_8bit_size": 0}, lists=("small",)),
    _ours("8bit-stochastic", "torchao8.AdamW8bit(stochastic_rounding=True)",
          options={"stochastic_rounding": True}, lists=("huge",), devices=("cuda",)),
    _ours("8bit-compiled", "torch.compile of torchao8.AdamW8bit.step", lists=(), mode="compiled"),
    _ours("8bit-graph", "CUDA graph of torchao8.AdamW8bit.step",
          lists=_GRAPHS, devices=("cuda",), mode="graph"),
    _ours("32bit", "torchao8.AdamW", ""),
    _ours("32bit-compiled", "torch.compile of torchao8.AdamW.step", "", lists=(),
          mode="compiled"),
    # Not fused: the step that torch.compile is meant to turn into one kernel. The learning rate is
    # a float that never changes, since on the CPU foreach=True takes no tensor.
    _adamw("torch-compiled", "torch.compile of torch.optim.AdamW.step", "torch.optim.AdamW",
           {"foreach": True}, lists=(), mode="compiled"),
    _adamw("torch-graph", "CUDA graph of torch.optim.AdamW.step", "torch.optim.AdamW",
           {"fused": True, "capturable": True}, lists=_GRAPHS, devices=("cuda",), mode="graph"),
    # On a GPU DeepSpeed has another optimizer, which it compiles with nvcc at the first use.
    _adamw("deepspeed", "DeepSpeedCPUAdam", "deepspeed.ops.adam.DeepSpeedCPUAdam",
           {"adamw_mode": True}, devices=("cpu",)),
    _adamw("bitsandbytes", "bitsandbytes AdamW8bit", "bitsandbytes.optim.AdamW8bit", {},
           state_bytes=31.0),
    _adamw("bitsandbytes-32bit", "bitsandbytes AdamW", "bitsandbytes.optim.AdamW", {},
           devices=("cuda",)),
    # By default it keeps 8 more bits of each bfloat16 parameter. Nobody else here does, and on
    # float32 parameters it refuses to. It tunes a kernel for each size, for most of a minute.
    _adamw("flashoptim", "FlashOptim FlashAdamW", "flashoptim.FlashAdamW",
           {"master_weight_bits": None}, lists=(*_FEW_SHAPES, "llama"), devices=("cuda",),
           state_bytes=10.2),
    # It compiles a step for each shape, for seconds: the lists of many shapes only when named.
    _adamw("torchao", "torchao AdamW8bit", "torchao.optim.AdamW8bit", {},
           lists=_FEW_SHAPES, state_bytes=21.0),
]  # fmt: skip


def _muon(name: str, where: str, state_bytes: float, **more: Any) -> Contender:
    label = where + "".join(f"({k}={v!r})".replace("'", '"') for k, v in more.items())
    lists = tuple(MUON_BASELINES)
    return Contender(name, label, where, {**MUON, **more}, lists, state_bytes=state_bytes)


_MUON = [
    _muon("torch-muon", "torch.optim.Muon", 4.0),
    _muon("muon", "torchao8.Muon", 4.0),
    _muon("muon8bit", "torchao8.Muon8bit", 1.1),
    _muon("muon8bit-mulaw", "torchao8.Muon8bit", 1.1, **_MULAW),
]
CONTENDERS = {contender.name: contender for contender in (*_ADAMW, *_MUON)}

# The first figures, on a GPU within a minute: lists, and who runs on them beside torch's.
_COMMON = ("8bit", "32bit", "8bit-graph", "torch-graph")
QUICK = {
    "huge": (*_COMMON, "8bit-stochastic"),
    "gpt2": _COMMON,
    "small": (*_COMMON, "8bit-all"),
    "block": (*_COMMON, "8bit-compiled"),  # over gpt2's tensors it takes 15 s to compile
}


# --- every rule of the library against the forms in which torch has it ---------------------------

# What a form is called, and what it is asked for by.
FORMS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
# (rule, form, device, dtype) that give wrong results and so are not timed. torch 2.13 leaves
# bfloat16 parameters, but for the last few elements, unchanged in the fused CPU step of SGD with
# momentum.
BROKEN = {("SGD", "fused", "cpu", "bfloat16")}
# Where the library's default is zero, or leaves parameters in bfloat16 as they are.
_LARGER = {
    "Adagrad": {"lr": 1e-2},
    "LAMB": {"lr": 1e-2},
    "LARS": {"lr": 10.0, "momentum": 0.9},
    "Lion": {"lr": 1e-3},
    "SGD": {"lr": 1.0, "momentum": 0.9},
}
_HINTS = {"params", "foreach", "fused", "capturable", "differentiable"}


def rule_names() -> list[str]:
    """The rules that the library has for tensors of all shapes, by the names of their classes with
    32-bit state: all but Muon."""
    import torchao8

    def takes_all_shapes(name: str) -> bool:
        return "higher_dims" not in inspect.signature(getattr(torchao8, name)).parameters

    eight = [n.removesuffix("8bit") for n in torchao8.__all__ if n.endswith("8bit")]
    rules = [n for n in eight if not n.startswith("Paged") and takes_all_shapes(n)]
    return sorted(rules, key=str.lower)


STATE_FORMATS = ("dynamic", "mulaw")  # of 8-bit state
CPU_PATHS = ("avx512", "avx2", "scalar")


def rule(
    name: str, state_format: str = "dynamic", cpu_path: str | None = None
) -> tuple[Contender, dict[str, Contender]]:
    """A rule of the library with 8-bit state, and the forms in which torch has it.

    All get the same options: those that both sides know. `torch_rules` stands in for what
    torch.optim does not have. Only the rule of the library has a `state_format`, and a path that it
    is told to take.
    """
    import torchao8

    in_torch = hasattr(torch.optim, name)
    rival = getattr(torch.optim if in_torch else torch_rules, name)
    known = {*inspect.signature(rival).parameters} if in_torch else {*rival.names, "foreach"}
    of_32bit, of_8bit = (
        inspect.signature(getattr(torchao8, f"{name}{bits}")).parameters for bits in ("", "8bit")
    )
    shared = known & of_32bit.keys() & of_8bit.keys() - _HINTS
    options = {key: of_32bit[key].default for key in of_32bit if key in shared}
    options |= {**_DECAY, **_LARGER.get(name, {})}
    where = f"{rival.__module__}.{name}"
    shown = "torch.optim" if in_torch else "torch._foreach_*"
    forms = {
        form: Contender(f"{name.lower()}-{form}", f"{shown} {name}, {form}", where,
                        {**options, **hint}, state_bytes=20.0)
        for form, hint in FORMS.items() if hint.keys() <= known
    }  # fmt: skip
    where, ours = f"torchao8.{name}8bit", f"{name.lower()}-8bit"
    label = where
    if state_format != "dynamic":
        options = {**options, "state_format": state_format}
        ours, label = f"{ours}-{state_format}", f'{label}(state_format="{state_format}")'
    if cpu_path is not None:
        ours, label = f"{ours}-{cpu_path}", f"{label}, {cpu_path}"
    return Contender(ours, label, where, options, state_bytes=3.0, cpu_path=cpu_path), forms


def rivals(name: str, device: str, dtype: str) -> list[Contender]:
    """The forms of a rule to be faster than."""
    return [c for form, c in rule(name)[1].items() if (name, form, device, dtype) not in BROKEN]
