"""Checkpoints of Muon: to and from torch.optim.Muon and Keller Jordan's classes, and those of
optimizers whose momentum buffer is something else."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    SMALL,
    all_bits,
    assert_same_training,
    bits,
    make_params,
    set_grads,
    through_file,
    train,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import torchao8
from torchao8 import LARS, SGD, Muon, Muon8bit
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors, to_torch

SHAPES = ((40, 70), (3, 300), (1, 5))
POLAR_EXPRESS = ((8.2, -22.9, 16.5), (4.0, -2.8, 0.5))


def copied(params: list[Any]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def refused(make: Any) -> str:
    with pytest.raises(ValueError) as error:
        make()
    return str(error.value)


@pytest.mark.parametrize("adjust", [None, "match_rms_adamw"])
def test_there_and_back(adjust: str | None) -> None:
    """The options and the buffers of torch.optim.Muon, and its next step, are those of Muon."""
    params = make_params(shapes=SHAPES)
    options: dict[str, Any] = {"lr": 0.02, "momentum": 0.8, "eps": 1e-5, "ns_steps": 3}
    theirs = torch.optim.Muon(params, adjust_lr_fn=adjust, **options)
    train(theirs, params, range(3))
    ours = Muon(copied(params), min_8bit_size=SMALL)
    ours.load_state_dict(through_file(theirs.state_dict()))
    group = ours.param_groups[0]
    assert {k: group[k] for k in options} == options
    assert group["adjust_lr_fn"] == (adjust or "original")
    again = torch.optim.Muon(copied(params))
    again.load_state_dict(through_file(to_torch(ours)))
    assert again.param_groups[0]["adjust_lr_fn"] == group["adjust_lr_fn"]
    for p, q, r in zip(params, group["params"], again.param_groups[0]["params"], strict=True):
        assert list(again.state[r]) == ["momentum_buffer"]
        buffers = theirs.state[p], ours.state[q], again.state[r]
        assert len({bits(state["momentum_buffer"]) for state in buffers}) == 1
    train(theirs, params, [3])
    train(again, again.param_groups[0]["params"], [3])
    for p, q in zip(params, again.param_groups[0]["params"], strict=True):
        assert bits(p) == bits(q)


def test_what_torch_does_not_have() -> None:
    params = make_params(shapes=SHAPES)
    message = refused(lambda: to_torch(Muon(params, maximize=True)))
    assert message == (
        "to_torch: expected maximize=False, got True: torch.optim.Muon always steps against the "
        "gradient"
    )
    optimizer = Muon(params, ns_coefficients=POLAR_EXPRESS, ns_steps=2)
    assert refused(lambda: to_torch(optimizer)) == (
        "to_torch: expected ns_coefficients to be one triple (a, b, c), got a sequence of length 2:"
        " torch.optim.Muon takes one triple for all iterations"
    )
    experts = [("experts", make_params(shapes=[(2, 8, 9)])[0])]
    assert refused(lambda: to_torch(Muon(experts, higher_dims="batch"))) == (
        "to_torch: parameter 0 (experts): expected a matrix, got the shape [2, 8, 9]: "
        "torch.optim.Muon takes no more dimensions"
    )


def test_what_keller_jordans_class_saved() -> None:
    """Its buffer is the same average. It counts no steps, and has no option for its iterations."""
    params = make_params(shapes=SHAPES)
    source = torch.optim.Muon(params, lr=0.02)
    train(source, params, range(2))
    saved = source.state_dict()
    group = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0, "use_muon": True}
    saved["param_groups"] = [{**group, "params": saved["param_groups"][0]["params"]}]
    ours = Muon8bit(copied(params), min_8bit_size=SMALL, optim_bits=32)
    ours.load_state_dict(copy.deepcopy(saved))
    ours.param_groups[0]["adjust_lr_fn"] = "match_rms_adamw"
    with pytest.warns(UserWarning, match="and is 'original' from here on"):
        ours.load_state_dict(copy.deepcopy(saved))
    assert ours.param_groups[0]["adjust_lr_fn"] == "original"
    for p, q in zip(params, ours.param_groups[0]["params"], strict=True):
        assert bits(source.state[p]["momentum_buffer"]) == bits(ours.state[q]["momentum_buffer"])
    group = ours.param_groups[0]
    assert (group["lr"], group["momentum"], group["ns_steps"]) == (0.02, 0.9, 5)


@pytest.mark.parametrize(
    "cls", [torch.optim.SGD, torchao8.SGD8bit, torchao8.LARS], ids=lambda cls: cls.__module__
)
def test_buffers_that_are_sums(cls: Any) -> None:
    """Loaded either way, a buffer of another size would make the steps of the next 20 wrong."""
    params = make_params(shapes=SHAPES)
    of_sums = cls(params, momentum=0.9)
    train(of_sums, params, [0])
    others = copied(params)
    muon = Muon(others)
    train(muon, others, [0])
    before = all_bits(muon)
    assert refused(lambda: muon.load_state_dict(of_sums.state_dict())) == (
        "Muon: expected a momentum_buffer that is an average of gradients, got a checkpoint that "
        "has neither ns_steps nor use_muon: the buffers of SGD and LARS are sums. SGD and LARS "
        "take them"
    )
    assert all_bits(muon) == before
    for saver in (muon, torch.optim.Muon(others)):
        train(saver, others, [1])
        for loader in (SGD(params, momentum=0.9), LARS(params)):
            before = all_bits(loader)
            message = refused(lambda saver=saver, loader=loader: loader.load_state_dict(
                saver.state_dict()
            ))  # fmt: skip
            assert message == (
                f"{type(loader).__name__}: expected a momentum_buffer that is a sum of gradients, "
                "got a checkpoint of Muon, whose buffer is an average of them. Muon takes it"
            )
            assert all_bits(loader) == before


@pytest.mark.parametrize("options", [{}, {"ns_coefficients": POLAR_EXPRESS, "ns_steps": 2}])
def test_options_survive(options: dict[str, Any], tmp_path: Path) -> None:
    """torch.save, safetensors and a copy: the same options, and the same next steps."""
    params = [("a", make_params(shapes=[(40, 70)])[0]), ("b", make_params(shapes=[(4, 6, 9)])[0])]
    source = Muon8bit(params, lr=0.02, higher_dims="batch", min_8bit_size=SMALL, **options)
    train(source, [p for _, p in params], range(2))
    save_safetensors(source, tmp_path / "a.safetensors")
    loaded: list[Muon8bit] = [copy.deepcopy(source)]
    for load in (
        lambda other: other.load_state_dict(through_file(source.state_dict())),
        lambda other: load_safetensors(other, tmp_path / "a.safetensors"),
    ):
        same = [(name, torch.nn.Parameter(p.detach().clone())) for name, p in params]
        other = Muon8bit(same, higher_dims="batch", min_8bit_size=SMALL)
        load(other)
        loaded.append(other)
    for optimizer in (source, *loaded):
        group = optimizer.param_groups[0]
        assert group["ns_coefficients"] == source.param_groups[0]["ns_coefficients"]
        train(optimizer, group["params"], range(2, 5))
        assert_same_training(source, optimizer) if optimizer is not source else None


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("is_flat", [False, True])
def test_triples_in_distributed_checkpoints(is_flat: bool, tmp_path: Path) -> None:
    """A sequence of triples is no tensor and no dict, so that a flat checkpoint keeps it whole."""
    matrix, experts = make_params(shapes=[(40, 70), (4, 6, 9)])
    model = torch.nn.ParameterDict({"matrix": matrix, "experts": experts})
    options: dict[str, Any] = {"higher_dims": "batch", "min_8bit_size": SMALL}
    source = Muon8bit(model.parameters(), ns_coefficients=POLAR_EXPRESS, ns_steps=2, **options)
    train(source, model.parameters(), range(2))
    how = StateDictOptions(flatten_optimizer_state_dict=is_flat)
    saved = {"optimizer": get_optimizer_state_dict(model, source, options=how)}
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    same = copy.deepcopy(model)
    other = Muon8bit(same.parameters(), **options)
    load_dcp(same, other, tmp_path, no_dist=True)
    assert other.param_groups[0]["ns_coefficients"] == POLAR_EXPRESS
    train(source, model.parameters(), [2])
    train(other, same.parameters(), [2])
    assert_same_training(source, other)


def test_a_checkpoint_does_not_say_what_a_tensor_is() -> None:
    """higher_dims belongs to the model: that of the optimizer holds."""
    (p,) = make_params(shapes=[(4, 6, 9)])
    batch = Muon([p], higher_dims="batch")
    train(batch, [p], [0])
    (q,) = copied([p])
    flat = Muon([q], higher_dims="flatten")
    flat.load_state_dict(batch.state_dict())
    assert flat.param_groups[0]["higher_dims"] == "flatten"
    set_grads([q], 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat.step()
