"""State dicts, saved and loaded to the bit by every road that torch has, and copies."""

import copy
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, all_bits, assert_same_training, make_params, through_file, train
from optim_table import OptimizerCase, every_optimizer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import torchao8
from torchao8 import AdamW

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def by_pickle(optimizer: Optimizer) -> Optimizer:
    copied: Optimizer = pickle.loads(pickle.dumps(optimizer))
    return copied


@every_optimizer()
@every_dtype
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "weight_decay": 0.1}])
def test_resumed_training_has_the_same_bits(
    case: OptimizerCase, dtype: torch.dtype, options: dict[str, Any], device: str
) -> None:
    """Through a file into a new optimizer with other options, which the checkpoint replaces.

    In bfloat16 torch would cast the float32 moments to the dtype of the parameter, and codes too.
    """
    params = make_params(dtype, device=device)
    options = case.known(options)
    optimizer = case.make(params, min_8bit_size=SMALL, lr=0.01, seed=3, **options)
    train(optimizer, params, range(3))
    saved = through_file(optimizer.state_dict())
    resumed_params = [p.detach().clone().requires_grad_() for p in params]
    resumed = case.make(resumed_params, min_8bit_size=SMALL, lr=5.0, maximize=True)
    resumed.load_state_dict(saved)
    assert all_bits(resumed)["states"] == all_bits(optimizer)["states"]
    train(optimizer, params, range(3, 6))
    train(resumed, resumed_params, range(3, 6))
    assert_same_training(optimizer, resumed)
    assert all_bits(optimizer)["options"] == all_bits(resumed)["options"]


@every_optimizer()
def test_state_dict_is_plain(case: OptimizerCase, device: str) -> None:
    """No subclass of a tensor, no container in the state of a parameter, keys as documented."""
    params = make_params(shapes=[(64, 64), (7,)], device=device)
    optimizer = case.make(params, optim_bits=8)
    train(optimizer, params, [0])
    state = optimizer.state_dict()["state"]
    assert [list(s) for s in state.values()] == [case.state_keys(8), case.state_keys(32)]
    assert all(type(value) is Tensor for s in state.values() for value in s.values())


@every_optimizer()
@pytest.mark.parametrize("copied_by", [copy.deepcopy, by_pickle])
def test_copies_go_on_with_the_same_bits(
    case: OptimizerCase, copied_by: Callable[[Optimizer], Optimizer], device: str
) -> None:
    """A copy has parameters of its own, steps like the original, and still loads checkpoints."""
    params = make_params(torch.bfloat16, device=device)
    optimizer = case.make(params, min_8bit_size=SMALL, fused=True)
    train(optimizer, params, range(2))
    other = copied_by(optimizer)
    assert other._step_supports_amp_scaling
    other_params = other.param_groups[0]["params"]
    train(optimizer, params, [2])
    train(other, other_params, [2])
    assert_same_training(optimizer, other)
    assert other_params[0] is not params[0]
    saved = through_file(optimizer.state_dict())
    train(other, other_params, [3])
    other.load_state_dict(saved)
    assert all_bits(other)["states"] == all_bits(optimizer)["states"]


@every_optimizer()
def test_hooks_of_the_user_see_plain_state(case: OptimizerCase, device: str) -> None:
    """A pre-hook may change what is loaded: it runs before the check. None of ours stays behind."""
    params = make_params(device=device)
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    saved = through_file(optimizer.state_dict())
    for state in saved["state"].values():
        state["old_step"] = state.pop("step")
    other = case.make(make_params(device=device), min_8bit_size=SMALL)
    seen = []

    def rename(o: Optimizer, state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            assert all(isinstance(value, Tensor) for value in state.values())
            state["step"] = state.pop("old_step")

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_post_hook(lambda o: seen.append(all_bits(o)["states"]))
    other.load_state_dict(saved)
    assert seen == [all_bits(optimizer)["states"]]
    assert len(other._optimizer_load_state_dict_pre_hooks) == 1


@every_optimizer()
def test_loaded_tensors_of_other_strides(case: OptimizerCase, device: str) -> None:
    """A checkpoint may hold views, steps as numbers or in other dtypes, and no state for some."""
    params = make_params(device=device)
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    want = all_bits(optimizer)["states"]
    saved = copy.deepcopy(optimizer.state_dict())
    steps: list[Any] = [1, 1.0, torch.tensor([1.0]), torch.tensor(1, dtype=torch.int64)]
    for index, state in saved["state"].items():
        for key, value in state.items():
            if value.dim() > 1:
                state[key] = value.transpose(0, -1).contiguous().transpose(0, -1)
        state["step"] = steps[index % len(steps)]
    del saved["state"][7]
    other_params = make_params(device=device)
    other = case.make(other_params, min_8bit_size=SMALL)
    other.load_state_dict(saved)
    got = all_bits(other)["states"]
    assert got[:7] == want[:7]
    assert got[7] == {}
    for p, state in other.state.items():
        assert all(v.is_contiguous() and v.device == p.device for v in state.values())
    train(other, other_params, [1])


@every_optimizer()
def test_layout_stays_the_optimizers_own(case: OptimizerCase) -> None:
    """The checkpoint brings lr and the like; how the state is laid out stays, and the kind of decay
    where it is what the class is for."""
    saved = case.make(make_params(), lr=0.5, min_8bit_size=7, block_size=64).state_dict()
    other = case.make(make_params())
    decoupled = None
    if "decoupled_weight_decay" in case.cls._own_options:
        decoupled = other.param_groups[0]["decoupled_weight_decay"]
        saved["param_groups"][0]["decoupled_weight_decay"] = not decoupled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the decay, and of the blocks
        other.load_state_dict(saved)
    group = other.param_groups[0]
    assert group["lr"] == 0.5
    assert (group["min_8bit_size"], group["block_size"]) == (4096, 256)
    assert decoupled is None or group["decoupled_weight_decay"] == decoupled


def test_checkpoint_of_torch_optim(device: str) -> None:
    """The 32-bit classes go on from a float32 checkpoint of torch.optim, without our options."""
    params, ours = make_params(device=device), make_params(device=device)
    theirs = torch.optim.AdamW(params, lr=0.01)
    train(theirs, params, range(3))
    optimizer = AdamW(ours)
    with torch.no_grad():
        for p, q in zip(ours, params, strict=True):
            p.copy_(q)
    optimizer.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert optimizer.param_groups[0]["lr"] == 0.01
    assert optimizer.param_groups[0]["foreach"] is False
    train(theirs, params, range(3, 6))
    train(optimizer, ours, range(3, 6))
    for p, q in zip(ours, params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


# -- torch.distributed.checkpoint, on one process ----------------------------------------------


def make_model(dtype: torch.dtype, device: str, matrices: bool) -> torch.nn.Module:
    """Of matrices alone, but for a frozen vector, where the optimizer takes nothing else."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(50, 70),
        torch.nn.Linear(70, 300, bias=not matrices),
        torch.nn.LayerNorm(300, bias=not matrices),
        torch.nn.Linear(300, 5, bias=not matrices),
    ).to(device, dtype)
    model[2].weight.requires_grad_(False)  # type: ignore[union-attr]
    return model


def train_model(model: torch.nn.Module, optimizer: Optimizer, steps: range) -> None:
    device = next(model.parameters()).device
    for step in steps:
        tokens = torch.randint(50, (4, 6), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(tokens.to(device)).square().mean().backward()
        optimizer.step()


@every_optimizer()
@every_dtype
@pytest.mark.parametrize(
    "options", [{}, {"flatten_optimizer_state_dict": True}, {"full_state_dict": True}]
)
@pytest.mark.parametrize("lr", ["number", "tensor"])
def test_distributed_state_dict(
    case: OptimizerCase, dtype: torch.dtype, options: dict[str, bool], lr: str, device: str
) -> None:
    """From a trained optimizer into a new one, by parameter names; the new one's state is made by a
    step with zero gradients, of which nothing may remain."""

    def make() -> tuple[torch.nn.Module, Optimizer]:
        model = make_model(dtype, device, case.matrices)
        value = torch.tensor(0.01, device=device) if lr == "tensor" else 0.01
        return model, case.make(model.parameters(), lr=value, min_8bit_size=SMALL)

    how = StateDictOptions(**options)
    model, optimizer = make()
    train_model(model, optimizer, range(3))
    saved = through_file(copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=how)))
    weights = copy.deepcopy(model.state_dict())

    other_model, other = make()
    other_model.load_state_dict(weights)
    set_optimizer_state_dict(other_model, other, saved, options=how)
    assert all_bits(other)["states"] == all_bits(optimizer)["states"]
    train_model(model, optimizer, range(3, 5))
    train_model(other_model, other, range(3, 5))
    assert_same_training(optimizer, other)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@every_optimizer()
@every_dtype
def test_distributed_checkpoint_files(
    case: OptimizerCase, dtype: torch.dtype, tmp_path: Path, device: str
) -> None:
    """dcp.save and dcp.load, which write into the live tensors of the new optimizer."""
    model = make_model(dtype, device, case.matrices)
    optimizer = case.make(model.parameters(), min_8bit_size=SMALL)
    train_model(model, optimizer, range(3))
    dcp.save(
        {"optimizer": get_optimizer_state_dict(model, optimizer)},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    other_model = make_model(dtype, device, case.matrices)
    other = case.make(other_model.parameters(), min_8bit_size=SMALL)
    state = {"optimizer": get_optimizer_state_dict(other_model, other)}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_optimizer_state_dict(other_model, other, state["optimizer"])
    assert all_bits(other)["states"] == all_bits(optimizer)["states"]
    other_model.load_state_dict(model.state_dict())
    train_model(model, optimizer, range(3, 5))
    train_model(other_model, other, range(3, 5))
    assert_same_training(optimizer, other)


def test_options_keep_the_form_that_they_have_here() -> None:
    """A learning rate stays the tensor that a compiled step was made for."""
    saved = torchao8.AdamW8bit(make_params(), lr=0.25).state_dict()
    optimizer = torchao8.AdamW8bit(make_params(), lr=torch.tensor(0.5, dtype=torch.float64))
    optimizer.load_state_dict(saved)
    lr = optimizer.param_groups[0]["lr"]
    assert isinstance(lr, torch.Tensor)
    assert (lr.dtype, lr.item()) == (torch.float64, 0.25)


def test_another_kind_of_decay_is_told() -> None:
    saved = torchao8.AdamW8bit(make_params(), weight_decay=0.1).state_dict()
    optimizer = torchao8.Adam8bit(make_params())
    with pytest.warns(UserWarning, match=r"weight_decay=0.1 and decoupled_weight_decay=True; here"):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["weight_decay"] == 0.1
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is False
