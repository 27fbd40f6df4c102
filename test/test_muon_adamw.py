"""MuonAdamW: each group steps by its own rule, to the bit, in one object that saves and loads."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, all_bits, bits, reset_compiler
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import torchao8
from torchao8 import MuonAdamW, MuonAdamW8bit


def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Embedding(40, 48), nn.Linear(48, 64), nn.LayerNorm(64), nn.Linear(64, 40))
    return nn.Sequential(*layers)


MUON = ["1.weight"]


def set_grads(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def train(net: nn.Module, optimizers: Any, steps: Any) -> None:
    for step in steps:
        set_grads(net, step)
        for optimizer in optimizers:
            optimizer.step()


def groups_of(net: nn.Module, **how: Any) -> list[dict[str, Any]]:
    return torchao8.param_groups(net, muon=True, **how)


def states_of(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    return {
        name: optimizer.state[p]
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }


# -- the step --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True, "state_format": "mulaw", "percentile_clipping": 50},
        {"optim_bits": 32, "block_size": 64, "stochastic_rounding": True},
        {"block_wise": False, "is_paged": True},
    ],
    ids=str,
)
def test_each_group_steps_as_a_class_of_its_rule(options: dict[str, Any]) -> None:
    """The same bits as those of a Muon and an AdamW, each over its part."""
    one, two = model(), model()
    dtype = torch.bfloat16 if "stochastic_rounding" in options else torch.float32
    one.to(dtype), two.to(dtype)
    shared = {"lr": 0.02, "weight_decay": 0.3, "min_8bit_size": SMALL, **options}
    mixed = MuonAdamW8bit(groups_of(one), betas=(0.8, 0.9), adamw_eps=1e-3, momentum=0.9, **shared)
    groups = groups_of(two)
    muon = torchao8.Muon8bit(
        [g for g in groups if g["use_muon"]],
        momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
        **shared,
    )
    adamw = torchao8.AdamW8bit(
        [g for g in groups if not g["use_muon"]], betas=(0.8, 0.9), eps=1e-3, **shared
    )
    before = [bits(p) for p in one.parameters()]
    train(one, [mixed], range(4))
    train(two, [muon, adamw], range(4))
    assert all(bits(p) != old for p, old in zip(one.parameters(), before, strict=True))
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert bits(p) == bits(q)
    theirs = {**states_of(muon), **states_of(adamw)}
    ours = states_of(mixed)
    assert ours.keys() == theirs.keys()
    for name, state in ours.items():
        assert list(state) == list(theirs[name])
        assert [bits(t) for t in state.values()] == [bits(t) for t in theirs[name].values()]
    kept = set(MUON) if options.get("optim_bits") != 32 else set()
    codes = "momentum_buffer_mulaw" if "state_format" in options else "momentum_buffer_codes"
    assert {name for name, state in ours.items() if codes in state} == kept


def test_defaults() -> None:
    """Those of Muon but for one, and AdamW's with the betas of language models."""
    ours = MuonAdamW(groups_of(model())).defaults
    muon = torchao8.Muon([nn.Parameter(torch.ones(1, 1))]).defaults
    others = {name: value for name, value in ours.items() if muon.get(name) != value}
    assert others == {
        "adjust_lr_fn": "match_rms_adamw", "betas": (0.9, 0.95), "adamw_eps": 1e-8
    }  # fmt: skip
    assert muon.keys() <= ours.keys()
    for cls in (MuonAdamW, MuonAdamW8bit, torchao8.PagedMuonAdamW, torchao8.PagedMuonAdamW8bit):
        optimizer = cls(groups_of(model()))
        name = cls.__name__
        assert optimizer.defaults["optim_bits"] == (8 if name.endswith("8bit") else 32)
        assert optimizer.defaults["is_paged"] == name.startswith("Paged")


def test_a_bad_gradient() -> None:
    """Holds the whole matrix of Muon, and one element of AdamW."""
    net = model()
    optimizer = MuonAdamW8bit(groups_of(net), lr=0.1, min_8bit_size=SMALL)
    train(net, [optimizer], range(2))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    set_grads(net, 2)
    net[1].weight.grad[3, 4] = math.nan
    net[3].weight.grad[5, 6] = math.inf
    optimizer.step()
    stayed = {name: int((p == before[name]).sum()) for name, p in net.named_parameters()}
    assert stayed["1.weight"] == net[1].weight.numel()
    assert stayed["3.weight"] == 1
    assert net[3].weight[5, 6] == before["3.weight"][5, 6]
    assert all(stayed[name] == 0 for name in ("0.weight", "1.bias", "2.weight", "2.bias"))


def test_compiled(fresh_compiler: None) -> None:
    """One graph, in which both rules are, under a schedule; the bits of the eager step."""
    runs = []
    for compiles in (False, True):
        reset_compiler()
        net = model()
        optimizer = MuonAdamW8bit(groups_of(net), lr=torch.tensor(0.1), min_8bit_size=SMALL)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
        for i in range(4):
            set_grads(net, i)
            for group in optimizer.param_groups:
                group["lr"].fill_(0.1 / (i + 1))
            (step if compiles else optimizer.step)()
        runs.append(all_bits(optimizer))
    assert runs[0] == runs[1]


# -- what is refused -------------------------------------------------------------------------------


def test_groups_that_do_not_say_their_rule() -> None:
    net = model()
    remedy = r"MuonAdamW8bit\(torchao8.param_groups\(model, muon=True\)\)"
    with pytest.raises(ValueError, match=f"use_muon: expected .* got a group without it. {remedy}"):
        MuonAdamW8bit(net.parameters())
    with pytest.raises(ValueError, match="use_muon: expected True or False in each group, got 1"):
        MuonAdamW([{"params": net.parameters(), "use_muon": 1}])
    optimizer = MuonAdamW(groups_of(net))
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="got a group without it"):
        optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))]})
    assert len(optimizer.param_groups) == count
    added = {"params": [("new", nn.Parameter(torch.ones(3)))], "use_muon": False}
    optimizer.add_param_group(added)
    assert optimizer.param_groups[-1]["use_muon"] is False


def test_a_vector_in_a_group_of_muon() -> None:
    vector = nn.Parameter(torch.ones(700))
    with pytest.raises(ValueError) as error:
        MuonAdamW([{"params": [("norm.weight", vector)], "use_muon": True}])
    assert str(error.value) == (
        "MuonAdamW: params[0] (norm.weight): expected a matrix, as its group has use_muon=True, "
        "got the shape [700]. AdamW trains the rest: use_muon=False, as in "
        "torchao8.param_groups(model, muon=True)"
    )
    cube = nn.Parameter(torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="higher_dims='batch' takes the last two"):
        MuonAdamW([{"params": [cube], "use_muon": True}])
    optimizer = MuonAdamW([{"params": [cube], "use_muon": True, "higher_dims": "batch"}])
    cube.grad = torch.randn(2, 3, 4)
    optimizer.step()
    MuonAdamW([{"params": [nn.Parameter(torch.ones(2, 3, 4))], "use_muon": False}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"betas": (0.9, 1.0)}, r"betas\[1\]: expected a number in \[0, 1\), got 1.0"),
        ({"adamw_eps": -1}, "adamw_eps: expected a finite number >= 0, got -1"),
        ({"eps": -1}, "eps: expected a finite number >= 0, got -1"),
        ({"momentum": 1}, r"momentum: expected a number in \[0, 1\), got 1"),
        ({"ns_steps": 0}, "ns_steps: expected an int from 1 to 99, got 0"),
        ({"optim_bits": 4}, "got 4: MuonAdamW has no state of 4 bits"),
    ],
    ids=str,
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MuonAdamW8bit(groups_of(model()), **options)
    groups = groups_of(model())
    groups[-1].update(options)
    with pytest.raises(ValueError, match=message):
        MuonAdamW8bit(groups)


def test_the_rule_of_a_group_does_not_change_after_the_first_step() -> None:
    net = model()
    optimizer = MuonAdamW8bit(groups_of(net))
    train(net, [optimizer], [0])
    (group,) = (g for g in optimizer.param_groups if g["use_muon"])
    before = [bits(p) for p in net.parameters()]
    group["use_muon"] = False
    set_grads(net, 1)
    with pytest.raises(RuntimeError, match="momentum_buffer"):
        optimizer.step()
    assert [bits(p) for p in net.parameters()] == before


# -- copies and checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "way", ["state_dict", "file", "pickle", "deepcopy", "safetensors", "dcp", "flat dcp"]
)
def test_goes_on_to_the_bit(way: str, tmp_path: Any) -> None:
    net = model()
    optimizer: Any = MuonAdamW8bit(groups_of(net), lr=0.05, min_8bit_size=SMALL)
    train(net, [optimizer], range(3))
    other = copy.deepcopy(net)
    again: Any = MuonAdamW8bit(groups_of(other), min_8bit_size=SMALL)
    if way == "state_dict":
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    elif way == "file":
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        again.load_state_dict(torch.load(file, weights_only=True))
    elif way == "safetensors":
        pytest.importorskip("safetensors")
        torchao8.checkpoint.save_safetensors(optimizer, tmp_path / "o.safetensors")
        torchao8.checkpoint.load_safetensors(again, tmp_path / "o.safetensors")
    elif way.endswith("dcp"):
        how = StateDictOptions(flatten_optimizer_state_dict=way.startswith("flat"))
        saved = {"optimizer": get_optimizer_state_dict(net, optimizer, options=how)}
        dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
        torchao8.checkpoint.load_dcp(other, again, tmp_path, no_dist=True)
    else:
        both = (other, again) if way == "pickle" else (net, optimizer)
        if way == "pickle":
            again.load_state_dict(optimizer.state_dict())
        other, again = pickle.loads(pickle.dumps(both)) if way == "pickle" else copy.deepcopy(both)
    train(net, [optimizer], range(3, 6))
    train(other, [again], range(3, 6))
    assert all_bits(again) == all_bits(optimizer)
    assert [g["lr"] for g in again.param_groups] == [0.05] * len(again.param_groups)


def test_one_scheduler_drives_both_rules() -> None:
    net = model()
    optimizer = MuonAdamW8bit(groups_of(net), lr=0.05)
    before = [p.detach().clone() for p in net.parameters()]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch != 1))
    train(net, [optimizer], [0])
    scheduler.step()  # to 0
    between = [p.detach().clone() for p in net.parameters()]
    train(net, [optimizer], [1])
    for p, first, then in zip(net.parameters(), before, between, strict=True):
        assert not torch.equal(first, then)
        assert bits(p) == bits(then)
    scheduler.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.05] * len(optimizer.param_groups)


def test_from_32_bits_to_8() -> None:
    net = model()
    exact = MuonAdamW(groups_of(net), lr=0.05)
    train(net, [exact], range(3))
    optimizer = MuonAdamW8bit(groups_of(net), min_8bit_size=SMALL)
    with pytest.warns(UserWarning, match="was saved in 32 bits, and is rounded to 8"):
        optimizer.load_state_dict(exact.state_dict())
    states = states_of(optimizer)
    assert "momentum_buffer_codes" in states["1.weight"]
    assert "exp_avg_codes" in states["3.weight"]
    train(net, [optimizer], [3])


def test_a_checkpoint_does_not_flip_the_rule_of_a_group() -> None:
    net = model()
    optimizer = MuonAdamW(groups_of(net))
    train(net, [optimizer], [0])
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["use_muon"] = not group["use_muon"]
    before = all_bits(optimizer)
    kinds = [group["use_muon"] for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    assert [group["use_muon"] for group in optimizer.param_groups] == kinds
    assert all_bits(optimizer) == before
    flipped = MuonAdamW([{**g, "use_muon": not g["use_muon"]} for g in groups_of(model())[-1:]])
    with pytest.raises(ValueError, match="groups"):
        flipped.load_state_dict(saved)


def with_aux_adam(net: nn.Module) -> dict[str, Any]:
    """A checkpoint of Keller Jordan's MuonWithAuxAdam after one step."""
    state, groups, number = {}, [], 0
    for group in groups_of(net, embeddings_in_32bit=False, decay_vectors=True):
        params = []
        for _, p in group["params"]:
            average = torch.full_like(p, 0.25)
            if group["use_muon"]:
                state[number] = {"momentum_buffer": average}
            else:
                state[number] = {"exp_avg": average, "exp_avg_sq": average.square(), "step": 7}
            params.append(number)
            number += 1
        own = {"momentum": 0.9} if group["use_muon"] else {"betas": (0.8, 0.9), "eps": 1e-10}
        shared = {"lr": 0.02, "weight_decay": 0.0, "use_muon": group["use_muon"]}
        groups.append({"params": params, **shared, **own})
    return {"state": state, "param_groups": groups}


def test_from_muon_with_aux_adam() -> None:
    net = model()
    groups = groups_of(net, embeddings_in_32bit=False, decay_vectors=True)
    optimizer = MuonAdamW(groups)
    saved = with_aux_adam(net)
    told = "'match_rms_adamw', and is 'original' from here on, .* of the checkpoint, 0.02, was"
    with pytest.warns(UserWarning, match=told):
        optimizer.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    for group in optimizer.param_groups:
        if group["use_muon"]:
            assert (group["momentum"], group["eps"]) == (0.9, 1e-7)
            assert group["adjust_lr_fn"] == "original"  # to go on with steps of the same size
        else:
            assert (group["betas"], group["adamw_eps"], group["eps"]) == ((0.8, 0.9), 1e-10, 1e-7)
    states = states_of(optimizer)
    assert float(states["3.weight"]["step"]) == 7
    assert (states["1.weight"]["momentum_buffer"] == 0.25).all()
    train(net, [optimizer], [0])


def adamw_group(**options: Any) -> dict[str, Any]:
    return {"params": [nn.Parameter(torch.ones(3))], "use_muon": False, **options}


def test_eps_of_a_group_of_adamw() -> None:
    """As the groups of other libraries have it. One that would have no effect is refused."""
    optimizer = MuonAdamW([adamw_group(eps=1e-3)], eps=1e-5)
    (own,) = optimizer.param_groups
    assert (own["eps"], own["adamw_eps"]) == (1e-7, 1e-3)
    refusal = "eps: expected 1e-07, which has no effect in a group with use_muon=False, got 0.05"
    with pytest.raises(ValueError, match=f"{refusal}. Its eps is adamw_eps=0.0001"):
        MuonAdamW([adamw_group(eps=0.05, adamw_eps=1e-4)])
    (p,) = own["params"]
    p.grad = torch.ones(3)
    optimizer.step()
    before = bits(p)
    own["eps"] = 0.05
    with pytest.raises(ValueError, match=f"{refusal}. Its eps is adamw_eps=0.001: change that one"):
        optimizer.step()
    assert bits(p) == before
    own["eps"], own["adamw_eps"] = 1e-7, 0.05
    optimizer.step()
    again = MuonAdamW([{**own, "params": [nn.Parameter(torch.ones(3))]}], eps=1e-4)
    assert again.param_groups[0]["adamw_eps"] == 0.05
    again.load_state_dict(optimizer.state_dict())


def test_amsgrad_is_refused() -> None:
    MuonAdamW([adamw_group(amsgrad=False)])
    with pytest.raises(ValueError, match=r"amsgrad: expected False, got True: .* no such state"):
        MuonAdamW([adamw_group(amsgrad=True)])


@pytest.mark.parametrize("cls", [torchao8.AdamW, torchao8.Adam8bit])
def test_adamw_takes_its_eps(cls: Any) -> None:
    """From what MuonAdamW saved for it; after that, eps is its own."""
    params = [nn.Parameter(torch.ones(3))]
    source = MuonAdamW([adamw_group(adamw_eps=1e-3)])
    source.param_groups[0]["params"][0].grad = torch.ones(3)
    source.step()
    optimizer = cls(params)
    optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["eps"] == 1e-3
    optimizer.param_groups[0]["eps"] = 1e-4
    again = cls([nn.Parameter(torch.ones(3))])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["eps"] == 1e-4


def test_use_muon_in_a_class_without_muon() -> None:
    groups = groups_of(model())
    with pytest.warns(UserWarning, match="AdamW8bit: a group has use_muon=True, which has no eff"):
        torchao8.AdamW8bit(groups)


def test_checkpoints_of_one_rule_are_refused() -> None:
    net = model()
    groups = groups_of(net)
    optimizer = MuonAdamW(groups_of(net))
    sgd = torch.optim.SGD(
        [{"params": [p for _, p in g["params"]]} for g in groups], lr=0.1, momentum=0.9
    )
    train(net, [sgd], [0])
    with pytest.raises(ValueError, match="MuonAdamW: expected groups that say use_muon"):
        optimizer.load_state_dict(sgd.state_dict())
    with pytest.raises(NotImplementedError, match=r"torch\.optim has no MuonAdamW"):
        torchao8.checkpoint.to_torch(optimizer)


# -- what can be asked -----------------------------------------------------------------------------


def test_memory_and_moments() -> None:
    net = model()
    optimizer = MuonAdamW8bit(groups_of(net), min_8bit_size=SMALL)
    before = optimizer.memory()
    train(net, [optimizer], [0])
    memory = optimizer.memory()
    assert memory.total == before.total
    assert memory.total == sum(
        t.nbytes for state in optimizer.state.values() for t in state.values()
    )
    assert list(optimizer.moments(net[1].weight)) == ["momentum_buffer"]
    assert list(optimizer.moments(net[3].weight)) == ["exp_avg", "exp_avg_sq"]


def test_docstring() -> None:
    text = MuonAdamW8bit.__doc__ or ""
    assert "with use_muon=True: ``step``, one float32 number; ``momentum_buffer``, as" in " ".join(
        text.split()
    )
    assert "with use_muon=False: ``step``, one float32 number; ``exp_avg`` and ``exp_avg_sq``" in (
        " ".join(text.split())
    )


# -- sharded ---------------------------------------------------------------------------------------


def stepped(net: nn.Module, steps: int = 3) -> list[str]:
    """The whole parameters and states, as bits, after steps on gradients of the whole model."""
    optimizer = MuonAdamW8bit(groups_of(net), lr=0.05, min_8bit_size=SMALL)
    whole = model()
    for step in range(steps):
        set_grads(whole, step)
        for p, q in zip(net.parameters(), whole.parameters(), strict=True):
            grad = q.grad
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements)
            p.grad = grad
        optimizer.step()
    names = ("0.weight", "1.weight", "3.weight")  # vectors keep 32 bits where they are sharded
    states = states_of(optimizer)
    tensors = [dict(net.named_parameters())[name].detach() for name in names]
    tensors += [t for name in names for t in states[name].values()]
    return [bits(t.full_tensor() if isinstance(t, DTensor) else t) for t in tensors]


def step_sharded(rank: int, world_size: int) -> list[str]:
    net = model()
    fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    return stepped(net)


def test_sharding_changes_no_bit_of_either_rule() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as on the ranks
    try:
        whole = stepped(model())
    finally:
        torch.set_num_threads(threads)
    for of_rank in run_ranks(2, step_sharded):
        assert of_rank == whole
