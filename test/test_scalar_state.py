"""A state that is one number of its parameter, as the product of momenta of NAdam.

The class here declares one that its op does not get, so that tests may set it by hand.
"""

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, make_params, set_grads, through_file, train
from ranks import run_ranks
from sharded import Weights, fsdp_weights, step_with
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from torchao8 import AdamW8bit, estimate
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors, to_torch
from torchao8.optim import classes
from torchao8.optim._state import paging
from torchao8.optim._state.spec import State, add_own_keys
from torchao8.optim._step.bucket import Bucket
from torchao8.optim._step.place import Calls, Kind
from torchao8.optim._step.plan import plan_step
from torchao8.shard_layout import Run, ShardRows

KEY = "product"
BITS = pytest.mark.parametrize("bits", [8, 32])


class WithNumber(AdamW8bit):
    """AdamW with a number in front of its moments, which tell the format."""

    @classmethod
    def _states(cls, group: dict[str, Any]) -> tuple[State, ...]:
        number = State(KEY, signed=False, initial=1.0, is_scalar=True)
        return (number, *super()._states(group))


add_own_keys([KEY])


def make(params: Any = None, bits: int = 8, **options: Any) -> WithNumber:
    params = make_params() if params is None else params
    return WithNumber(params, lr=0.01, optim_bits=bits, min_8bit_size=SMALL, **options)


def params_of(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained(optimizer: Any) -> Any:
    """After two steps, with another number in each parameter."""
    train(optimizer, params_of(optimizer), range(2))
    for i, p in enumerate(params_of(optimizer), 1):
        optimizer.state[p][KEY].fill_(1 / i)
    return optimizer


def numbers(optimizer: Any) -> list[float]:
    """Those of the parameters, each of the kind that it is to be."""
    for p in params_of(optimizer):
        number = optimizer.state[p][KEY]
        assert type(number) is Tensor
        assert (number.dtype, number.shape, number.device) == (torch.float32, (), p.device)
    return [float(optimizer.state[p][KEY]) for p in params_of(optimizer)]


def expected(count: int) -> list[float]:
    return [float(torch.tensor(1 / i)) for i in range(1, count + 1)]


@BITS
def test_it_is_there_from_the_first_step(bits: int, device: str) -> None:
    params = make_params(device=device)
    optimizer, plain = (
        make(params, bits),
        AdamW8bit(make_params(device=device), lr=0.01, optim_bits=bits, min_8bit_size=SMALL),
    )
    for each in (optimizer, plain):
        train(each, params_of(each), range(3))
    assert numbers(optimizer) == [1.0] * len(params)
    for p, q in zip(params, params_of(plain), strict=True):
        assert torch.equal(p, q)
        assert list(optimizer.state[p]) == ["step", KEY, *list(plain.state[q])[1:]]
    optimizer.param_groups[0]["optim_bits"] = 40 - bits
    with pytest.raises(RuntimeError, match=f"already has {bits}-bit state"):
        optimizer.step()


def test_one_that_is_missing_is_told() -> None:
    optimizer = trained(make())
    del optimizer.state[params_of(optimizer)[1]][KEY]
    with pytest.raises(RuntimeError, match=f"parameter 1: expected the keys .*'{KEY}'"):
        optimizer.step()


# -- checkpoints -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("saved_bits", "bits"), [(8, 8), (32, 32), (8, 32), (32, 8)])
@pytest.mark.parametrize("block_wise", [True, False])
def test_state_dict(saved_bits: int, bits: int, block_wise: bool) -> None:
    """Kept where it is, and through a conversion of the moments."""
    saver = trained(make(bits=saved_bits))
    loaded = make(bits=bits, block_wise=block_wise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded.load_state_dict(through_file(saver.state_dict()))
    assert numbers(loaded) == numbers(saver) == expected(8)
    train(loaded, params_of(loaded), [5])


def test_copies() -> None:
    optimizer = trained(make(is_paged=True))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert numbers(other) == expected(8)


@pytest.mark.parametrize(
    "form",
    [
        lambda t: t.item(),
        lambda t: t.double(),
        lambda t: t.bfloat16(),  # torch.optim casts it to the dtype of the parameter
        lambda t: t.reshape(1),
        lambda t: int(t > 0.9),
    ],
)
@pytest.mark.parametrize("of_torch", [True, False])
def test_any_number_loads(form: Any, of_torch: bool) -> None:
    saver = trained(make(bits=32))
    saved = copy.deepcopy(saver.state_dict())
    for state in saved["state"].values():
        state[KEY] = form(state[KEY])
    if of_torch:
        del saved["param_groups"][0]["state_version"]
    loaded = make(bits=32)
    loaded.load_state_dict(saved)
    assert numbers(loaded) == [float(s[KEY]) for s in saved["state"].values()]
    assert loaded.state_dict()["state"][0][KEY].dtype == torch.float32


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), r"expected torch.float32 of shape \[\], got torch.float32 of shape \[2\]"),
        (torch.tensor(True), "expected torch.float32 of shape"),
        ("1", "expected torch.float32 of shape .* got str"),
        (True, "expected torch.float32 of shape .* got bool"),
        (-0.5, "expected numbers >= 0, got -0.5"),
        (math.nan, "expected finite numbers"),
        (10**400, "expected finite numbers"),
    ],
)
def test_what_no_step_could_have_left(value: Any, message: str) -> None:
    saver, loaded = trained(make()), trained(make())
    saved = copy.deepcopy(saver.state_dict())
    saved["state"][2][KEY] = value
    loaded.state[params_of(loaded)[0]][KEY].fill_(7)
    with pytest.raises(ValueError, match=f"{KEY} of parameter 2: {message}"):
        loaded.load_state_dict(saved)
    assert numbers(loaded)[0] == 7
    del saved["state"][2][KEY]
    with pytest.raises(ValueError, match=f"state of parameter 2: expected the keys .*'{KEY}'"):
        loaded.load_state_dict(saved)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_files(tmp_path: Path) -> None:
    """Folders of torch.distributed.checkpoint, safetensors files; and 8 bits into 32."""
    model = Weights()
    saver = trained(make(model.named_parameters()))
    saved = {"optimizer": get_optimizer_state_dict(model, saver)}
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    save_safetensors(saver, tmp_path / "file")
    for bits in (8, 32):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            by_folder, by_file = (make(model.named_parameters(), bits) for _ in range(2))
            load_dcp(model, by_folder, tmp_path / "dcp", no_dist=True)
            load_safetensors(by_file, tmp_path / "file")
        assert numbers(by_folder) == numbers(by_file) == expected(8)


@BITS
def test_to_torch(bits: int, device: str) -> None:
    optimizer = trained(make(make_params(device=device), bits))
    states = to_torch(optimizer)["state"]
    for i, state in states.items():
        assert (state[KEY].dtype, state[KEY].shape, state[KEY].device.type) == (
            torch.float32, (), "cpu",
        )  # fmt: skip
        assert float(state[KEY]) == numbers(optimizer)[i]
        state[KEY].fill_(9)
    assert numbers(optimizer) == expected(8)


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_wise", [True, False])
def test_it_is_never_paged(block_wise: bool, tmp_path: Path) -> None:
    """Nor is another state of one number, the only scale of a parameter."""
    model = torch.nn.Linear(400, 300)
    optimizer = make(model.named_parameters(), is_paged=True, block_wise=block_wise)
    trained(optimizer)
    loaded, from_folder = (
        make(model.named_parameters(), is_paged=True, block_wise=block_wise) for _ in range(2)
    )
    loaded.load_state_dict(through_file(optimizer.state_dict()))
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
        load_dcp(model, from_folder, tmp_path / "dcp", no_dist=True)
    for each in (optimizer, loaded, from_folder, copy.deepcopy(optimizer)):
        state = each.state[params_of(each)[0]]
        paged = {key for key, value in state.items() if paging.found_in(value) is not None}
        kinds = ("codes", "scale") if block_wise else ("codes",)
        assert paged == {f"{name}_{kind}" for name in ("exp_avg", "exp_avg_sq") for kind in kinds}


def test_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = ((64, 300), (5,))
    monkeypatch.setattr(classes, "WithNumber", WithNumber, raising=False)
    plain, with_number = (estimate(shapes, 3, optimizer=n) for n in ("AdamW", "WithNumber"))
    for name in ("state_32bit", "state_8bit", "checkpoint_8bit"):
        assert getattr(with_number, name) == getattr(plain, name) + 2 * 4
    assert with_number.total.state_8bit == plain.total.state_8bit + 3 * 2 * 4
    assert with_number.kept_32bit == plain.kept_32bit


# -- sharded ---------------------------------------------------------------------------------------


def train_sharded(rank: int, world_size: int, bits: int, folder: str) -> Any:
    """Steps, every way of saving and loading; which parameters are in an op call of this rank."""
    mesh = init_device_mesh("cpu", (world_size,))
    model = fsdp_weights(mesh)
    optimizer = make(model.named_parameters(), bits, stochastic_rounding=True)
    step_with(optimizer, range(2))
    params = params_of(optimizer)
    assert all(isinstance(optimizer.state[p]["exp_avg" + "_codes" * (bits == 8)], DTensor)
               for p in params[:1])  # fmt: skip
    for i, p in enumerate(params, 1):
        optimizer.state[p][KEY].fill_(1 / i)
    _, (work,) = plan_step(optimizer, None)
    stepped = {k for bucket in work.buckets for k in bucket.numbers}
    full = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder)
    found = []
    for how in ("own", "full", "dcp"):
        other = fsdp_weights(mesh)
        loaded = make(other.named_parameters(), bits)
        if how == "own":
            loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        elif how == "full":
            options = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(other, loaded, full, options=options)
        else:
            load_dcp(other, loaded, folder)
        step_with(loaded, [3])
        found.append(numbers(loaded))
    return found, stepped, sum(not p.to_local().numel() for p in params)


@pytest.mark.parametrize("bits", [8, 32])
def test_every_rank_has_and_steps_it(bits: int, tmp_path: Path) -> None:
    """Also of a parameter of which nothing lies on a rank."""
    empty = 0
    for found, stepped, empties in run_ranks(3, train_sharded, bits, str(tmp_path)):
        assert found == [expected(8)] * 3
        assert stepped == set(range(8))
        empty += empties
    assert empty > 0


def test_pieces_of_a_parameter_share_it() -> None:
    """Runs of rows far from each other: the first changes the number, the others what it was."""
    states = (State(KEY, False, 1.0, is_scalar=True), State("exp_avg", True))
    device = torch.device("cpu")
    kind = Kind("dynamic", device, torch.float32, torch.float32, False, True, False)
    calls = Calls(kind, states, block_wise=True)
    rows = (Run(0, 1, 0, 100), Run(1, 2, 900, 100))
    calls.add(0, ShardRows(rows, False, 100, 1, (2, 100), (2, 1)))
    calls.add(1, ShardRows((), True, 0, 0, (0, 100), (0, 1)))
    p, empty = torch.ones(2, 100), torch.ones(0, 100)
    calls.finish()
    set_grads([p, empty], 0)
    product = torch.tensor(0.5)
    columns = {
        "step": [torch.tensor(1.0)] * 2,
        KEY: [product, torch.tensor(0.25)],
        "exp_avg_codes": [p.to(torch.uint8), empty.to(torch.uint8)],
        "exp_avg_scale": [torch.ones(2, 1), torch.ones(0, 1)],
    }
    bucket: Bucket = calls.bucket([p, empty], [p.grad, empty.grad], columns)
    shapes = [tuple(t.shape) for t in bucket.params]
    assert shapes == [tuple(t.shape) for t in bucket.values["exp_avg"]] == [(1, 100)] * 2 + [(0,)]
    assert [tuple(t.shape) for t in bucket.scales["exp_avg"]] == [(1, 1)] * 2 + [(0,)]
    first, second, third = bucket.values[KEY]
    assert first is product
    assert second is not product
    assert [float(t) for t in (first, second, third)] == [0.5, 0.5, 0.25]
    assert bucket.scales[KEY] == []
