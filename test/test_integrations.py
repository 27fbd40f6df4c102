"""The adapters for other packages, tried without those packages: test/clients has the real ones.

Where a test needs the package, a stand-in has the one thing that the adapter takes from it.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from test_imports import PACKAGE, graph_of, is_in
from torch import nn

import torchao8

ADAPTERS = {
    path.stem: f"torchao8.integrations.{path.stem}"
    for path in (PACKAGE / "integrations").glob("*.py")
    if path.stem != "__init__"
}
CLIENTS = [
    *("accelerate", "datasets", "diffusers", "fastai", "ignite", "lightning", "peft"),
    *("sentence_transformers", "timm", "torchtitan", "torchvision", "transformers", "trl"),
]


def in_new_python(code: str) -> str:
    path = str(Path(torchao8.__file__).parent.parent)
    code = f"import sys; sys.path.insert(0, {path!r})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_the_package_imports_no_client() -> None:
    code = f"import torchao8; print([name for name in {CLIENTS} if name in sys.modules])"
    assert in_new_python(code) == "[]"


def test_no_other_module_imports_an_adapter() -> None:
    graph = graph_of(PACKAGE)
    importers = [
        name
        for name, others in graph.items()
        if any(is_in(other, "torchao8.integrations") for other in others)
    ]
    assert importers == []


def test_missing_packages_are_named() -> None:
    code = "".join(
        f"sys.modules[{client!r}] = None\n"  # as if it were not installed
        f"try: import {adapter}\n"
        "except ImportError as error: print(error)\n"
        for client, adapter in ADAPTERS.items()
    )
    messages = in_new_python(code).splitlines()
    for message, (client, adapter) in zip(messages, ADAPTERS.items(), strict=True):
        assert message.startswith(f"{adapter} needs {client}")
        assert "pip install" in message


# -- transformers ---------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 8)
        self.layer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


class StandInTrainer:
    """Chooses the parameters that decay by a rule of its own, which no other rule would guess."""

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if name != "words.weight"]


@pytest.fixture
def adapter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torchao8.integrations.transformers, which takes one method from transformers."""
    package = ModuleType("transformers")
    package.Trainer = StandInTrainer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "transformers", package)
    monkeypatch.delitem(sys.modules, ADAPTERS["transformers"], raising=False)
    yield importlib.import_module(ADAPTERS["transformers"])
    sys.modules.pop(ADAPTERS["transformers"], None)


ARGUMENTS: Any = SimpleNamespace(
    learning_rate=3e-4, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-6
)


def test_the_trainer_makes_the_optimizer(adapter: Any) -> None:
    """In the two calls that transformers 5 makes."""
    factory, options = adapter.trainer_optimizer(ARGUMENTS, torchao8.NAdam8bit, seed=3)
    model = Model()
    optimizer = factory()(model, **options)
    assert type(optimizer) is torchao8.NAdam8bit
    numbers = {"lr": 3e-4, "betas": (0.8, 0.9), "eps": 1e-6, "seed": 3}
    assert numbers.items() <= optimizer.defaults.items()
    groups = {
        tuple(group["param_names"]): (group["weight_decay"], group["optim_bits"])
        for group in optimizer.param_groups
    }
    assert groups == {
        ("words.weight",): (0.0, 32),
        ("layer.weight", "layer.bias", "norm.weight", "norm.bias"): (0.1, 8),
    }


def test_a_trainer_that_gives_groups_is_refused(adapter: Any) -> None:
    """As transformers 4 does."""
    factory, options = adapter.trainer_optimizer(ARGUMENTS)
    groups = [{"params": list(Model().parameters()), "weight_decay": 0.1}]
    with pytest.raises(TypeError, match=r"expected transformers 5 .* optimizers=\("):
        factory(groups, **options)


def test_patterns_decide_before_the_trainer(adapter: Any) -> None:
    optimizer = adapter.create_optimizer(
        Model(),
        ARGUMENTS,
        embeddings_in_32bit=False,
        patterns={"words.*": {"weight_decay": 0.3}, "layer.bias": {"lr": 1.0}},
    )
    decays = {
        name: group["weight_decay"]
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert decays == {
        "words.weight": 0.3,
        "layer.weight": 0.1,
        "layer.bias": 0.1,
        "norm.weight": 0.1,
        "norm.bias": 0.1,
    }
    assert {group["optim_bits"] for group in optimizer.param_groups} == {8}


@pytest.mark.parametrize("name", sorted(set(torchao8.optim.__all__) - {"CommonOptions"}))
def test_every_class_takes_its_numbers(name: str, adapter: Any) -> None:
    cls = getattr(torchao8, name)
    model: nn.Module = Model()
    if issubclass(cls, torchao8.Muon):  # which refuses all but matrices
        model = nn.ModuleDict({"words": nn.Embedding(10, 8)})
    optimizer = adapter.create_optimizer(model, ARGUMENTS, cls)
    given = optimizer.defaults
    assert (given["lr"], given["weight_decay"]) == (3e-4, 0.1)
    if "betas" in given:
        assert given["betas"][:2] == (0.8, 0.9)
        assert given.get("adamw_eps", given.get("eps", 1e-6)) == 1e-6
        assert given.get("adamw_eps") is None or given["eps"] == 1e-7  # Muon's own
    else:
        assert given.get("eps") != 1e-6


def test_muon_trains_the_hidden_matrices(adapter: Any) -> None:
    model = Model()
    model.layer = nn.Linear(32, 32)
    optimizer = adapter.create_optimizer(model, ARGUMENTS, torchao8.MuonAdamW8bit)
    rules = {
        name: group["use_muon"] for group in optimizer.param_groups for name in group["param_names"]
    }
    assert rules.pop("layer.weight") is True
    assert rules == dict.fromkeys(("words.weight", "layer.bias", "norm.weight", "norm.bias"), False)
    with pytest.raises(ValueError, match=r"params\[\d\] .*: expected a matrix.* MuonAdamW8bit\("):
        adapter.create_optimizer(model, ARGUMENTS, torchao8.Muon8bit)


def test_options_hold_before_the_arguments(adapter: Any) -> None:
    optimizer = adapter.create_optimizer(Model(), ARGUMENTS, lr=1.0, weight_decay=0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {1.0}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.5}


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torchao8.estimate, "AdamW8bit"])
def test_what_is_no_class_of_ours_is_refused(cls: Any, adapter: Any) -> None:
    with pytest.raises(TypeError, match=r"cls: expected a class of torchao8"):
        adapter.create_optimizer(Model(), ARGUMENTS, cls)
