"""Optimizers as safetensors files: every byte comes back, and what is damaged is refused."""

import copy
import json
import os
import random
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    SHAPES,
    SMALL,
    all_bits,
    assert_same_training,
    bits,
    make_params,
    report,
    train,
)
from optim_table import OptimizerCase, every_optimizer
from ranks import run_ranks
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import AdamW, AdamW8bit
from torchao8.checkpoint import load_safetensors, save_safetensors

safetensors = pytest.importorskip("safetensors", reason="no safetensors: pip install safetensors")
from safetensors.torch import save_file  # noqa: E402

KEY = "torchao8_optimizer"


def make(
    case: OptimizerCase,
    params: list[Any],
    names: list[str] | None,
    **options: Any,
) -> Optimizer:
    """Two groups with different options, with names of the parameters or without."""
    entries = params if names is None else list(zip(names, params, strict=True))
    groups = [{"params": entries[:3], "weight_decay": 0.1}, {"params": entries[3:]}]
    return case.make(groups, **{"min_8bit_size": SMALL, **options})


def names_of_params() -> list[str]:
    """With dots, as modules have them, and one that looks like an option's entry."""
    return [f"layers.{i}.weight" for i in range(len(SHAPES) - 1)] + ["param_groups.0"]


# -- there and back ----------------------------------------------------------------------------


@every_optimizer()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("named", [True, False], ids=["names", "numbers"])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True, "state_rounding": "nearest"}], ids=str)
def test_training_goes_on_with_the_same_bits(
    case: OptimizerCase,
    dtype: torch.dtype,
    named: bool,
    options: dict[str, Any],
    tmp_path: Path,
    device: str,
) -> None:
    """lr and eps need all digits of a float to come back."""
    names = names_of_params() if named else None
    params = make_params(dtype, device=device)
    options = {"lr": 0.1 / 3, "eps": 1e-8 / 7, "betas": (0.9, 1 - 1e-3 / 3), "seed": -3, **options}
    optimizer = make(case, params, names, **case.known(options))
    train(optimizer, params, range(3))
    before = all_bits(optimizer)
    save_safetensors(optimizer, tmp_path / "state.safetensors")
    assert all_bits(optimizer) == before

    resumed_params = [p.detach().clone().requires_grad_() for p in params]
    resumed = make(case, resumed_params, names, lr=5.0, maximize=True)
    load_safetensors(resumed, tmp_path / "state.safetensors")
    assert all_bits(resumed)["states"] == before["states"]
    assert all_bits(resumed)["options"] == before["options"]
    for live, saved in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        assert {k: type(v) for k, v in live.items()} == {k: type(v) for k, v in saved.items()}
    train(optimizer, params, range(3, 6))
    train(resumed, resumed_params, range(3, 6))
    assert_same_training(optimizer, resumed)


@every_optimizer()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_tensor_lr(
    case: OptimizerCase, dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path, device: str
) -> None:
    """Its dtype, shape and bits; on the device of the one in whose place it comes."""
    lr = torch.full(shape, 0.1 / 3, dtype=dtype, device=device)
    params = make_params(device=device)
    optimizer = make(case, params, None, lr=lr)
    train(optimizer, params, [0])
    save_safetensors(optimizer, tmp_path / "state")
    other = make(case, make_params(device=device), None, lr=torch.tensor(1.0, device=device))
    load_safetensors(other, tmp_path / "state")
    for group in other.param_groups:
        got = group["lr"]
        assert (got.dtype, got.shape, got.device) == (dtype, shape, lr.device)
        assert bits(got) == bits(lr)
    fixed = make(case, make_params(device=device), None)
    load_safetensors(fixed, tmp_path / "state")
    assert isinstance(fixed.param_groups[0]["lr"], Tensor)


def test_entries_of_the_file(tmp_path: Path) -> None:
    """Plain to other programs: flat names, the dtypes of the state, JSON."""
    params = make_params(shapes=[(64, 64), (5,)])
    optimizer = AdamW8bit([("a.weight", params[0]), ("a.bias", params[1])], lr=torch.tensor(0.5))
    train(optimizer, params, [0])
    path = tmp_path / "state.safetensors"
    save_safetensors(optimizer, path)
    with safetensors.safe_open(path, framework="pt") as file:
        found = {key: file.get_slice(key).get_dtype() for key in file.keys()}
        content = json.loads(file.metadata()[KEY])
    assert found == {
        "a.bias.exp_avg": "F32",
        "a.bias.exp_avg_sq": "F32",
        "a.bias.step": "F32",
        "a.weight.exp_avg_codes": "U8",
        "a.weight.exp_avg_scale": "F32",
        "a.weight.exp_avg_sq_codes": "U8",
        "a.weight.exp_avg_sq_scale": "F32",
        "a.weight.step": "F32",
        "param_groups.0.lr": "F32",
    }
    assert content["format_version"] == 1
    assert content["state"]["a.bias"] == ["step", "exp_avg", "exp_avg_sq"]
    assert content["param_groups"][0]["params"] == ["a.weight", "a.bias"]
    options = content["param_groups"][0]["options"]
    assert options["betas"] == {"tuple": [0.9, 0.999]}
    assert options["lr"] == {"tensor": "param_groups.0.lr"}


def test_the_same_state_gives_the_same_file(tmp_path: Path) -> None:
    """And nothing stays beside it; a file that was there is replaced, through a link too."""
    optimizer = trained()
    for name in ("a", "b"):
        save_safetensors(optimizer, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "open").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "open").stat().st_mode
    train(optimizer, optimizer.param_groups[0]["params"], [1])
    save_safetensors(optimizer, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "b").read_bytes()


def test_state_that_is_partial_or_empty(tmp_path: Path) -> None:
    """Before the first step, and where a parameter is frozen."""
    params = make_params()
    params[1].requires_grad_(False)
    optimizer, path = AdamW8bit(params, min_8bit_size=SMALL), tmp_path / "state"
    save_safetensors(optimizer, path)
    other = trained()
    load_safetensors(other, path)
    assert all_bits(other)["states"] == [{}] * len(params)
    train(optimizer, [p for p in params if p.requires_grad], [0])
    save_safetensors(optimizer, path)
    load_safetensors(other, path)
    assert all_bits(other)["states"] == all_bits(optimizer)["states"]
    assert all_bits(other)["states"][1] == {}


def test_tensors_that_share_memory_or_are_not_contiguous(tmp_path: Path) -> None:
    """A step for all parameters, transposed moments, views of one long tensor."""
    optimizer = trained()
    saved = optimizer.state_dict()
    saved["state"] = {i: dict(state) for i, state in saved["state"].items()}
    step = torch.tensor(1.0)
    for state in saved["state"].values():
        state["step"] = step
    state = saved["state"][5]
    long = torch.cat([state["exp_avg"].flatten(), state["exp_avg_sq"].flatten()])
    state["exp_avg"], state["exp_avg_sq"] = long.chunk(2)
    codes = saved["state"][1]["exp_avg_codes"]
    saved["state"][1]["exp_avg_codes"] = codes.t().contiguous().t()
    save_safetensors(optimizer, tmp_path / "state", state_dict=saved)
    other = AdamW8bit(make_params(), min_8bit_size=SMALL)
    load_safetensors(other, tmp_path / "state")
    assert all_bits(other)["states"] == all_bits(optimizer)["states"]
    states = [t for state in other.state.values() for t in state.values()]
    assert len({t.untyped_storage().data_ptr() for t in states}) == len(states)


def test_names_that_stand_twice_give_way_to_numbers(tmp_path: Path) -> None:
    params = make_params(shapes=[(5,), (6,)])
    optimizer = AdamW([{"params": [("weight", p)]} for p in params])
    train(optimizer, params, [0])
    save_safetensors(optimizer, tmp_path / "state")
    other = AdamW([{"params": [("weight", p)]} for p in params])
    load_safetensors(other, tmp_path / "state")
    assert all_bits(other) == all_bits(optimizer)


def test_another_precision_is_converted(tmp_path: Path) -> None:
    """As by load_state_dict."""
    optimizer = trained()
    save_safetensors(optimizer, tmp_path / "state")
    other = AdamW(make_params(), min_8bit_size=SMALL)
    with pytest.warns(UserWarning, match="saved in 8 bits, and is kept in 32"):
        load_safetensors(other, tmp_path / "state")


# -- what is refused ---------------------------------------------------------------------------


def trained() -> AdamW8bit:
    params = make_params()
    optimizer = AdamW8bit(params, min_8bit_size=SMALL, lr=0.5)
    train(optimizer, params, [0])
    return optimizer


def named(order: str = "abcdefgh") -> AdamW8bit:
    """Parameters of one shape under these names."""
    params = make_params(shapes=[(3, 300)] * len(order))
    optimizer = AdamW8bit(list(zip(order, params, strict=True)), min_8bit_size=SMALL)
    train(optimizer, params, [0])
    return optimizer


def refused(optimizer: Optimizer, path: Path) -> str:
    """The message of a ValueError at which nothing has changed, without the folder of the file."""
    before = all_bits(optimizer)
    with pytest.raises(ValueError) as info:
        load_safetensors(optimizer, path)
    assert all_bits(optimizer) == before
    return str(info.value).replace(f"{path.parent}{os.sep}", "")


def rewrite(path: Path, spoil: Callable[[dict[str, Tensor], dict[str, Any]], Any]) -> None:
    """Changes entries and metadata of a file, whose checksums are right again."""
    with safetensors.safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
        content = json.loads(file.metadata()[KEY])
    spoil(tensors, content)
    content["crc32"] = {
        key: zlib.crc32(t.flatten().view(torch.uint8).numpy().tobytes())
        for key, t in tensors.items()
    }
    content.pop("own_crc32", None)
    content["own_crc32"] = zlib.crc32(json.dumps(content).encode())
    save_file(tensors, path, metadata={KEY: json.dumps(content)})


def spoiled() -> dict[str, Callable[[dict[str, Tensor], dict[str, Any]], Any]]:
    def group(content: dict[str, Any]) -> dict[str, Any]:
        first: dict[str, Any] = content["param_groups"][0]
        return first

    def swap(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        for key in content["state"]["0"]:
            a, b = f"0.{key}", f"1.{key}"
            tensors[a], tensors[b] = tensors[b], tensors[a]

    def pop_last(tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
        group(content)["params"].remove("7")
        for key in content["state"].pop("7"):
            del tensors[f"7.{key}"]

    return {
        "tensor missing": lambda t, c: t.pop("3.exp_avg_scale"),
        "state missing": lambda t, c: [t.pop(k) for k in list(t) if k[0] == "3"],
        "tensor too many": lambda t, c: t.update({"3.extra": torch.ones(2)}),
        "version": lambda t, c: c.update(format_version=2),
        "version missing": lambda t, c: c.pop("format_version"),
        "groups missing": lambda t, c: c.pop("param_groups"),
        "options no dict": lambda t, c: group(c).update(options=7),
        "option of no kind": lambda t, c: group(c)["options"].update(lr={"complex": [1, 2]}),
        "option's tensor missing": lambda t, c: group(c)["options"].update(lr={"tensor": "lr"}),
        "parameter twice": lambda t, c: group(c)["params"].append("3"),
        "stray state": lambda t, c: c["state"].update({"9": []}),
        "codes cast": lambda t, c: t.update({"3.exp_avg_codes": t["3.exp_avg_codes"].float()}),
        "other shape": lambda t, c: t.update({"5.exp_avg": t["5.exp_avg"][:4].clone()}),
        "scale NaN": lambda t, c: t["2.exp_avg_scale"].fill_(float("nan")),
        "scale negative": lambda t, c: t["2.exp_avg_sq_scale"].neg_(),
        "states swapped": swap,
        "option out of range": lambda t, c: group(c)["options"].update(eps=-1.0),
        "parameter too few": pop_last,
    }


def test_messages(tmp_path: Path, assert_expected_inline: Callable[[str, str], None]) -> None:
    optimizer, path = trained(), tmp_path / "state"
    lines = []
    for name, spoil in spoiled().items():
        save_safetensors(optimizer, path)
        rewrite(path, spoil)
        lines.append(f"{name}: {refused(optimizer, path)}")
    save_file({"weight": torch.ones(3)}, path, metadata={"format": "pt"})
    lines.append(f"foreign: {refused(optimizer, path)}")
    save_safetensors(named(), path)
    lines.append(f"other order: {refused(named('bacdefgh'), path)}")
    assert_expected_inline(
        report(lines),
        """\
tensor missing: state: the tensor '3.exp_avg_scale' is missing, which the metadata of the file
    name. Load an older checkpoint.
state missing: state: the tensor '3.exp_avg_codes' (and 4 more) is missing, which the metadata
    of the file name. Load an older checkpoint.
tensor too many: state: the tensor '3.extra' is too many: the metadata of the file do not name
    it
version: state: format_version: this version of torchao8 reads 1, got 2. A newer one may have
    saved the file.
version missing: state: the metadata 'torchao8_optimizer' are damaged
    (KeyError('format_version')). Load an older checkpoint.
groups missing: state: the metadata 'torchao8_optimizer' are damaged
    (KeyError('param_groups')). Load an older checkpoint.
options no dict: state: the metadata 'torchao8_optimizer' are damaged (TypeError("'int' object
    is not iterable")). Load an older checkpoint.
option of no kind: state: the metadata 'torchao8_optimizer' are damaged (ValueError("an option
    of the kind 'complex'")). Load an older checkpoint.
option's tensor missing: state: the tensor 'lr' is missing, which the metadata of the file
    name. Load an older checkpoint.
parameter twice: state: expected parameters in one group each, but the state of one is in two
    of them
stray state: state: expected parameters in one group each, but the state of '9' is in none of
    them
codes cast: exp_avg_codes of parameter 3: expected torch.uint8 of shape [4, 6, 9, 5], got
    torch.float32 of shape [4, 6, 9, 5]
other shape: exp_avg of parameter 5: expected torch.float32 of shape [5], got torch.float32 of
    shape [4]
scale NaN: exp_avg_scale of parameter 2: expected finite numbers, got some that are not
scale negative: exp_avg_sq_scale of parameter 2: expected numbers >= 0, got
    -0.005366619676351547
states swapped: exp_avg_codes of parameter 0: expected torch.uint8 of shape [3, 300], got
    torch.uint8 of shape [40, 70]
option out of range: eps: expected a finite number >= 0, got -1.0
parameter too few: loaded state dict contains a parameter group that doesn't match the size of
    optimizer's group: expected groups of [8] parameters, got [7]
foreign: state: a safetensors file, but none of save_safetensors: its metadata lack
    'torchao8_optimizer'
other order: param_names: the checkpoint has the parameters in another order: 'a' where the
    optimizer has 'b'""",
    )


def test_a_truncated_file(tmp_path: Path) -> None:
    """At 200 places, and at all in the lengths and at the ends of header and data; and grown."""
    optimizer, path = trained(), tmp_path / "state"
    save_safetensors(optimizer, path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    lengths = {*range(10), header - 1, header, header + 1, len(whole) - 1, len(whole) + 1}
    lengths.update(random.Random(0).sample(range(len(whole)), 200))
    for length in lengths:
        path.write_bytes(whole.ljust(length, b"\0")[:length])
        assert refused(optimizer, path).startswith("state: damaged, or no safetensors file (")
    path.write_bytes(whole)
    load_safetensors(optimizer, path)


def test_files_of_other_kinds(tmp_path: Path) -> None:
    optimizer, path = trained(), tmp_path / "state"
    torch.save(optimizer.state_dict(), path)
    assert "damaged, or no safetensors file" in refused(optimizer, path)
    with pytest.raises(FileNotFoundError):
        load_safetensors(optimizer, tmp_path / "nothing")


def test_a_header_of_which_bytes_have_changed(tmp_path: Path) -> None:
    """Any error is a ValueError that says what, whatever the bytes; and nothing has changed.

    What loads all the same had no meaning, as the room between the items of the header.
    """
    optimizer, path = trained(), tmp_path / "state"
    save_safetensors(optimizer, path)
    whole = path.read_bytes()
    header, rng, refusals = int.from_bytes(whole[:8], "little"), random.Random(0), 0
    before = all_bits(optimizer)
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[8 + rng.randrange(header)] = rng.choice(b'x0 "{}[],:.e\\9')
        path.write_bytes(damaged)
        try:
            load_safetensors(optimizer, path)
        except ValueError:
            refusals += 1
        assert all_bits(optimizer) == before
    assert refusals > 200


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda s: s["state"][0].update(step=1), r"0\.step: expected a dense tensor, got int"),
        (
            lambda s: s["state"][5].update(exp_avg=torch.eye(3).to_sparse()),
            r"5\.exp_avg: expected a dense tensor, got torch\.sparse_coo",
        ),
        (
            lambda s: s["param_groups"][0].update(schedule=print),
            r"param_groups\.0\.schedule: expected a number, string, .* got builtin_function",
        ),
        (
            lambda s: s["state"].update({9: s["state"][0]}),
            "state of 9: no parameter group of the state dict has it",
        ),
        (
            lambda s: s.clear(),
            r"state_dict: expected the keys .* got \[\]\. Where a full",
        ),
    ],
)
def test_what_cannot_be_saved(spoil: Callable[[Any], None], match: str, tmp_path: Path) -> None:
    """The file that is there stays, and no other appears."""
    optimizer, path = trained(), tmp_path / "state"
    save_safetensors(optimizer, path)
    whole = path.read_bytes()
    saved = copy.deepcopy(optimizer.state_dict())
    spoil(saved)
    with pytest.raises(ValueError, match=match):
        save_safetensors(optimizer, path, state_dict=saved)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["state"]


def test_a_write_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, path = trained(), tmp_path / "state"
    save_safetensors(optimizer, path)
    whole = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    train(optimizer, optimizer.param_groups[0]["params"], [1])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        save_safetensors(optimizer, path)
    assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["state"]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, path = trained(), tmp_path / "state"
    for name in ("safetensors", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (save_safetensors, load_safetensors):
        with pytest.raises(ImportError, match="pip install safetensors numpy"):
            call(optimizer, path)
    assert os.listdir(tmp_path) == []


# -- sharded -----------------------------------------------------------------------------------


def save_and_load_sharded(rank: int, world_size: int, path: str) -> list[str]:
    """As the docstring of save_safetensors says; True where the bytes of the shards come back."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def make() -> tuple[torch.nn.Module, AdamW8bit]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(70, 40), torch.nn.Linear(40, 30))
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        return model, AdamW8bit(model.named_parameters(), min_8bit_size=SMALL)

    def local_bits(optimizer: Optimizer) -> list[bytes]:
        return [
            bits(t.to_local() if hasattr(t, "to_local") else t)
            for state in optimizer.state.values()
            for t in state.values()
        ]

    model, optimizer = make()
    model(torch.ones(4, 70)).sum().backward()
    optimizer.step()
    try:
        save_safetensors(optimizer, path)
    except ValueError as error:
        refusal = str(error)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = get_optimizer_state_dict(model, optimizer, options=options)
    if rank == 0:
        save_safetensors(optimizer, path, state_dict=full)
    torch.distributed.barrier()
    _, other = make()
    load_safetensors(other, path)
    return [refusal, str(local_bits(other) == local_bits(optimizer))]


def test_sharded_state(tmp_path: Path) -> None:
    """Gathered, saved by one rank, loaded by all, and by an optimizer that is not sharded."""
    path = tmp_path / "state"
    for refusal, same in run_ranks(2, save_and_load_sharded, str(path)):
        assert refusal.startswith("0.weight.exp_avg_codes: expected a plain tensor, got a DTensor.")
        assert same == "True"
    model = torch.nn.Sequential(torch.nn.Linear(70, 40), torch.nn.Linear(40, 30))
    load_safetensors(AdamW8bit(model.named_parameters(), min_8bit_size=SMALL), path)


# -- names -------------------------------------------------------------------------------------


class TwoWeights(torch.nn.Module):
    """Parameters of one shape, registered in the order of their names."""

    def __init__(self, names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(
                name, torch.nn.Parameter(torch.full((40, 70), float(ord(name))))
            )


def test_gathered_state_goes_by_the_names_of_the_model(tmp_path: Path) -> None:
    """A model that registers the same parameters in another order gets each one's own state."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    model = TwoWeights("ab")
    optimizer = AdamW8bit(model.parameters(), min_8bit_size=0)
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    options = StateDictOptions(full_state_dict=True)
    full = get_optimizer_state_dict(model, optimizer, options=options)
    save_safetensors(optimizer, tmp_path / "state", state_dict=full)
    other = TwoWeights("ba")
    second = AdamW8bit(other.parameters(), min_8bit_size=0)
    with pytest.raises(ValueError, match=r"which this optimizer does not know\. Pass model=model"):
        load_safetensors(second, tmp_path / "state")
    assert not second.state
    load_safetensors(second, tmp_path / "state", model=torch.compile(other))
    for name in "ab":
        mine = optimizer.state[getattr(model, name)]
        theirs = second.state[getattr(other, name)]
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    third = AdamW8bit([{"params": [other.a]}, {"params": [other.b]}], min_8bit_size=0)
    with pytest.raises(ValueError, match=r"expected groups of the parameters \[\['a'\], \['b'\]\]"):
        load_safetensors(third, tmp_path / "state", model=other)


def test_no_changed_bit_of_an_entry_goes_unseen(tmp_path: Path) -> None:
    optimizer, path = trained(), tmp_path / "state"
    save_safetensors(optimizer, path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for place in rng.sample(range(8 + int.from_bytes(whole[:8], "little"), len(whole)), 150):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        assert "is damaged: its bytes are not those" in refused(optimizer, path)
