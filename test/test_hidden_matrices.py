"""Which parameters Muon trains: by class, by what is tied, by size and by name."""

from typing import Any

import pytest
import torch
from torch import nn

import torchao8
from torchao8.hidden_matrices import is_hidden, of_model


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("h.0.attn.c_attn.weight", True),
        ("layers.3.attention.in_proj_weight", True),
        ("encoder.layer.0.output.dense.weight", True),  # BERT's hidden layers; no head is in one
        ("blocks.0.mlp.fc.weight", True),
        ("weight", True),
        ("lm_head.weight", False),
        ("model.score.weight", False),
        ("classifier.1.weight", False),
        ("heads.head.weight", False),
        ("_orig_mod.module.embed_out.weight", False),
        ("transformer.wte.weight", False),
        ("model.embed_tokens.weight", False),
        ("text.token_embedding.weight", False),
        ("rnn.weight_ih_l0", False),
        ("blocks.0.scale", False),
    ],
)
def test_names(name: str, expected: bool) -> None:
    assert is_hidden(name, (64, 48)) == expected
    assert not is_hidden(name, (64, 15))
    assert not is_hidden(name, (64,))
    assert not is_hidden(name, (3, 64, 64))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)


class Model(nn.Module):
    """Its inner layers are as wide as its table of positions is long, as in GPT-2 medium."""

    def __init__(self, tied: bool = False, head: str = "to_logits") -> None:
        super().__init__()
        self.words = nn.Embedding(200, 32)
        self.places = nn.Embedding(128, 32)
        self.bag = nn.EmbeddingBag(50, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(2))
        last = nn.Linear(32, 200, bias=False)
        setattr(self, head, last)
        if tied:
            last.weight = self.words.weight
        self.experts = nn.Parameter(torch.zeros(4, 32, 32))


HIDDEN = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")}


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_and_heads(tied: bool) -> None:
    assert of_model(Model(tied)) == HIDDEN
    assert of_model(nn.ModuleDict({"module": Model(tied)})) == {f"module.{name}" for name in HIDDEN}


def test_layers_of_a_sequential_are_in_no_block() -> None:
    layers = (nn.Embedding(100, 32), nn.Linear(32, 100), nn.Linear(100, 32), nn.Linear(32, 64))
    assert of_model(nn.Sequential(*layers)) == {"2.weight", "3.weight"}
    nested = nn.Sequential(layers[0], nn.Sequential(layers[3], layers[1]))
    assert of_model(nested) == {"1.0.weight"}


def test_a_model_that_says_what_its_head_is() -> None:
    class Speaking(Model):
        def get_output_embeddings(self) -> Any:
            return self.blocks[1].down

    assert of_model(Speaking()) == HIDDEN - {"blocks.1.down.weight"}

    class Silent(Model):
        def get_output_embeddings(self) -> Any:
            return None

    assert of_model(Silent()) == HIDDEN


def options_of(model: nn.Module, **how: Any) -> dict[str, dict[str, Any]]:
    groups = torchao8.param_groups(model, **how)
    return {
        name: {k: v for k, v in group.items() if k != "params"}
        for group in groups
        for name, _ in group["params"]
    }


def test_groups() -> None:
    """Each says which rule it gets; the options of vectors and embeddings stay what they were."""
    model = Model()
    model.blocks[0].up.weight.requires_grad_(False)
    groups = torchao8.param_groups(model, muon=True)
    assert len(groups) == 4
    with pytest.raises(ValueError, match="muon: expected True or False, got 'yes'"):
        torchao8.param_groups(model, muon="yes")  # type: ignore[arg-type]
    options, before = options_of(model, muon=True), options_of(model)
    assert options.keys() == before.keys()
    for name, of_one in options.items():
        assert of_one == {**before[name], "use_muon": name in HIDDEN}
    assert options["words.weight"] == {"optim_bits": 32, "use_muon": False}
    assert options["blocks.0.norm.weight"] == {"weight_decay": 0.0, "use_muon": False}
    assert options["experts"] == {"use_muon": False}


def test_patterns_decide() -> None:
    experts = {"use_muon": True, "higher_dims": "batch"}
    patterns = {"experts": experts, "blocks.0.*": {"use_muon": False}, "to_logits.*": {"lr": 0.1}}
    options = options_of(Model(), muon=True, patterns=patterns)
    assert options["experts"] == experts
    assert options["blocks.0.up.weight"] == {"use_muon": False}
    assert options["blocks.1.up.weight"] == {"use_muon": True}
    assert options["to_logits.weight"] == {"use_muon": False, "lr": 0.1}
