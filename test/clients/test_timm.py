"""timm: its registry of optimizers, its groups by layer, its checkpoints."""

import logging
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from torch import nn

import torchao8

pytest.importorskip("timm", reason="no timm: make test-clients")

import timm
import timm.optim
import timm.utils
from timm.models import resume_checkpoint

from torchao8.integrations.timm import register


def vit() -> nn.Module:
    torch.manual_seed(1)
    options = {"img_size": 16, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, **options)


def data(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(4, 3, 16, 16, generator=generator),
            torch.randint(4, (4,), generator=generator),
        )
        for _ in range(n)
    ]


def make(name: str) -> tuple[nn.Module, Any]:
    model = vit()
    options = {"lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75, "betas": (0.9, 0.95)}
    return model, timm.optim.create_optimizer_v2(model, name, **options)


@pytest.mark.parametrize("name", ["adamw", "torchao8.AdamW8bit"])
def test_resumes_to_the_bit(name: str, tmp_path: Path) -> None:
    register()
    model, optimizer = make(name)
    runs.loop(model, optimizer, data(6)[:3])
    saver = timm.utils.CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=0)
    runs.loop(model, optimizer, data(6)[3:])

    halved, resumed = make(name)
    assert resume_checkpoint(halved, str(tmp_path / "last.pth.tar"), resumed, log_info=False) == 1
    runs.loop(halved, resumed, data(6)[3:])
    runs.assert_same(runs.ended(model, optimizer), runs.ended(halved, resumed))


def test_every_class_is_in_the_registry() -> None:
    names = register()
    classes = set(torchao8.optim.__all__) - {"CommonOptions"}
    assert sorted(names) == sorted(f"torchao8.{name}" for name in classes)
    model = runs.Net()
    for name in names:
        params: Any = model
        options: dict[str, Any] = {}
        if "MuonAdamW" in name:  # its groups say what Muon trains
            options["param_group_fn"] = lambda m: torchao8.param_groups(m, muon=True)
        elif "Muon" in name:
            params = [p for p in model.parameters() if p.ndim == 2]
        optimizer = timm.optim.create_optimizer_v2(
            params, name, lr=1e-3, weight_decay=0.1, **options
        )
        assert f"torchao8.{type(optimizer).__name__}" == name
        runs.loop(model, optimizer, runs.batches(1))


def test_options_are_those_of_timm_for_the_same_rule() -> None:
    register()
    model = runs.Net()
    for theirs, ours in {
        "sgd": "torchao8.SGD8bit",
        "rmsprop": "torchao8.PagedRMSprop8bit",
        "adagrad": "torchao8.Adagrad",
        "adamw": "torchao8.AdamW8bit",
        "lion": "torchao8.Lion8bit",
        "nadam": "torchao8.NAdam8bit",
    }.items():
        a, b = (
            timm.optim.create_optimizer_v2(model, name, lr=1e-3, weight_decay=0.1)
            for name in (theirs, ours)
        )
        hints = ("foreach", "fused", "capturable", "differentiable")
        shared = (a.defaults.keys() & b.defaults.keys()) - set(hints)
        assert {k: a.defaults[k] for k in shared} == {k: b.defaults[k] for k in shared}
        decays = [[group["weight_decay"] for group in o.param_groups] for o in (a, b)]
        assert decays[0] == decays[1]
        assert sorted(decays[0]) == [0.0, 0.1]


def test_registering_twice_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    register()
    with caplog.at_level(logging.WARNING):
        register()
    assert caplog.text == ""
