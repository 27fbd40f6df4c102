"""param_groups and StableEmbedding."""

from typing import Any

import pytest
import torch
from torch import nn

import torchao8
from torchao8.nn import StableEmbedding


def model() -> nn.Sequential:
    return nn.Sequential(
        StableEmbedding(100, 64), nn.Linear(64, 80), nn.LayerNorm(80), nn.Linear(80, 100)
    )


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def test_what_is_no_model_and_what_are_no_patterns() -> None:
    with pytest.raises(TypeError, match=r"model: expected an nn\.Module, .* got generator"):
        torchao8.param_groups(model().parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"patterns: expected a mapping .* got list"):
        torchao8.param_groups(model(), patterns=["head.*"])  # type: ignore[arg-type]


def test_groups_of_a_model() -> None:
    embedding, vectors, matrices = torchao8.param_groups(model())
    assert names(embedding) == ["0.weight"]
    assert embedding["optim_bits"] == 32
    assert names(vectors) == [
        "0.norm.weight",
        "0.norm.bias",
        "1.bias",
        "2.weight",
        "2.bias",
        "3.bias",
    ]
    assert {k: v for k, v in vectors.items() if k != "params"} == {"weight_decay": 0.0}
    assert names(matrices) == ["1.weight", "3.weight"]
    assert list(matrices) == ["params"]
    (one,) = torchao8.param_groups(model(), decay_vectors=True, embeddings_in_32bit=False)
    assert names(one) == [name for name, _ in model().named_parameters()]


def test_patterns() -> None:
    """The last one that matches holds, and before the rules."""
    net = model()
    net[3].bias.requires_grad_(False)
    groups = torchao8.param_groups(
        net, patterns={"3.*": {"lr": 0.5}, "*.weight": {"lr": 0.1}, "2.bias": {"weight_decay": 0.2}}
    )
    options = {
        name: {k: v for k, v in group.items() if k != "params"}
        for group in groups
        for name, _ in group["params"]
    }
    assert options == {
        "0.weight": {"optim_bits": 32, "lr": 0.1},
        "0.norm.weight": {"weight_decay": 0.0, "lr": 0.1},
        "0.norm.bias": {"weight_decay": 0.0},
        "1.weight": {"lr": 0.1},
        "1.bias": {"weight_decay": 0.0},
        "2.weight": {"weight_decay": 0.0, "lr": 0.1},
        "2.bias": {"weight_decay": 0.2},
        "3.weight": {"lr": 0.1},
    }
    with pytest.raises(ValueError, match=r"\['4.*'\] match the name of no parameter"):
        torchao8.param_groups(net, patterns={"4.*": {"lr": 0.5}})
    with pytest.raises(ValueError, match="'params'"):
        torchao8.param_groups(net, patterns={"3.*": {"params": []}})


def test_an_optimizer_takes_them() -> None:
    net = model()
    net[3].weight = net[0].weight  # tied: once, as an embedding
    net[3].weight.data = torch.zeros(100, 64)
    net[1] = nn.Linear(64, 64)
    net[2] = nn.LayerNorm(64)
    optimizer = torchao8.AdamW8bit(torchao8.param_groups(net), lr=0.1, min_8bit_size=0)
    net(torch.arange(10)).square().sum().backward()
    optimizer.step()
    state = {
        name: optimizer.state[p]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    assert "exp_avg" in state["0.weight"]
    assert "exp_avg_codes" in state["1.weight"]
    assert "3.weight" not in state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stable_embedding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module = StableEmbedding(1000, 256, padding_idx=3, dtype=dtype)
    bound = (6 / (1000 + 256)) ** 0.5  # Xavier's
    weight = module.weight.detach().float()
    assert 0.99 * bound < weight.abs().max() <= bound * (1 + 2.0**-8)
    assert (weight[3] == 0).all()
    out = module(torch.tensor([[1, 2], [5, 7]]))
    assert (out.dtype, out.shape) == (dtype, (2, 2, 256))
    values = out.detach().float()
    assert (values.mean(-1).abs() < 0.01).all()
    assert ((values.var(-1, unbiased=False) - 1).abs() < 0.02).all()
    assert set(module.state_dict()) == {"weight", "norm.weight", "norm.bias"}
