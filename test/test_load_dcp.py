"""``load_dcp``: by names, of any format, beside the live state."""

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL
from optim_table import ADAMS, OPTIMIZERS, OptimizerCase
from sharded import Weights, gathered, step_with
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import torchao8
from torchao8.checkpoint import load_dcp

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
OPTIONS = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1, "seed": 3}
SHAPES = ((40, 70), (7, 300), (13, 300))


def new_run(cls: Any = torchao8.AdamW8bit, **options: Any) -> tuple[Weights, Any]:
    model = Weights(shapes=SHAPES)
    return model, cls(model.parameters(), **{**OPTIONS, **options})


FLAT = StateDictOptions(flatten_optimizer_state_dict=True)  # as torchtitan saves


def save(
    folder: Path,
    model: nn.Module,
    optimizer: Any,
    change: Callable[[Any], None] = lambda s: None,
    options: StateDictOptions | None = None,
) -> None:
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    change(state)
    dcp.save({"optimizer": state}, checkpoint_id=folder, no_dist=True)


def load(model: nn.Module, optimizer: Any, folder: Path) -> list[str]:
    """The warnings of a load."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_dcp(model, optimizer, folder, no_dist=True)
    ours = [w for w in caught if "was saved" in str(w.message)]
    assert all(w.filename == __file__ for w in ours)
    return [str(w.message) for w in ours]


def expected(saver: Any, cls: Any) -> list[dict[str, Any]]:
    """The end of a plain load of the same state."""
    _, optimizer = new_run(cls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer.load_state_dict(copy.deepcopy(saver.state_dict()))
    return states(optimizer)


def states(optimizer: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in end.items() if k != "param"} for end in gathered(optimizer)]


@pytest.mark.parametrize("with_grads", [False, True])
@pytest.mark.parametrize("to", ["AdamW8bit", "AdamW"])
@pytest.mark.parametrize("of", ["AdamW8bit", "AdamW"])
def test_into_a_new_optimizer(tmp_path: Path, of: str, to: str, with_grads: bool) -> None:
    """With gradients too, which keep torch from making the state that it would read into."""
    model, saver = new_run(getattr(torchao8, of))
    step_with(saver, range(2))
    save(tmp_path, model, saver)
    model, optimizer = new_run(getattr(torchao8, to), lr=0.5)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if with_grads else None
    told = load(model, optimizer, tmp_path)
    assert len(told) == (of != to)
    assert states(optimizer) == expected(saver, getattr(torchao8, to))
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]


OTHERS = OPTIMIZERS[len(ADAMS) :]


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.cls.__name__)
def test_the_other_classes(tmp_path: Path, case: OptimizerCase) -> None:
    """With all states that they can have, into 8 and 32 bits; and of those that torch has."""
    options = {**case.base, **case.full}
    model, saver = new_run(case.cls, **options)
    step_with(saver, range(2))
    save(tmp_path / "ours", model, saver)
    sources = [("ours", saver)]
    if case.torch_cls is not None:
        params = Weights(shapes=SHAPES)
        theirs = case.torch_cls(params.parameters(), lr=OPTIONS["lr"], **options)
        step_with(theirs, range(2))
        save(tmp_path / "torch", params, theirs)
        sources.append(("torch", theirs))
    for folder, source in sources:
        for bits in (8, 32):
            model, optimizer = new_run(case.cls, optim_bits=bits, **case.base)
            told = load(model, optimizer, tmp_path / folder)
            assert len(told) == (bits != (case.optim_bits if folder == "ours" else 32))
            _, plain = new_run(case.cls, optim_bits=bits, **case.base)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plain.load_state_dict(copy.deepcopy(source.state_dict()))
            assert states(optimizer) == states(plain)
            assert {k: optimizer.param_groups[0][k] for k in options} == options
            step_with(optimizer, [2])


@pytest.mark.parametrize("source", [torchao8.SGD, torch.optim.SGD])
def test_without_a_state(tmp_path: Path, source: Any) -> None:
    """SGD without momentum: torch keeps nothing of a parameter, not even its number of steps."""
    model = Weights(shapes=SHAPES)
    saver = source(model.parameters(), lr=0.25)
    step_with(saver, range(2))
    save(tmp_path, model, saver)
    model, optimizer = new_run(torchao8.SGD8bit)
    load(model, optimizer, tmp_path)
    assert optimizer.param_groups[0]["lr"] == 0.25
    steps = [state["step"] for state in optimizer.state.values()]
    assert steps == ([2, 2, 2] if source is torchao8.SGD else [])
    step_with(optimizer, [2])


@pytest.mark.parametrize(("of", "to"), [("SGD", "LARS8bit"), ("LARS8bit", "SGD8bit")])
def test_buffers_that_mean_something_else(tmp_path: Path, of: str, to: str) -> None:
    model, saver = new_run(getattr(torchao8, of), momentum=0.9)
    step_with(saver, range(2))
    save(tmp_path, model, saver)
    model, optimizer = new_run(getattr(torchao8, to), momentum=0.9)
    with pytest.raises(ValueError, match="expected a momentum_buffer of gradients"):
        load_dcp(model, optimizer, tmp_path, no_dist=True)
    assert not optimizer.state


@pytest.mark.parametrize("wrap", [torch.compile, checkpoint_wrapper])
@pytest.mark.parametrize("cls", [torchao8.AdamW8bit, torchao8.AdamW])
def test_wrapped_models(tmp_path: Path, wrap: Any, cls: Any) -> None:
    model, saver = new_run()
    step_with(saver, range(2))
    save(tmp_path, model, saver)
    wrapped = wrap(Weights(shapes=SHAPES))
    optimizer = cls(wrapped.parameters(), **OPTIONS)
    load(wrapped, optimizer, tmp_path)
    assert states(optimizer) == expected(saver, cls)


def test_other_orders_and_groups(tmp_path: Path) -> None:
    model, saver = new_run()
    step_with(saver, range(2))
    save(tmp_path, model, saver)
    other = Weights(shapes=SHAPES)
    a, b, c = other.parameters()
    optimizer = torchao8.AdamW8bit([{"params": [c]}, {"params": [b, a]}], **OPTIONS)
    load(other, optimizer, tmp_path)
    ends = states(optimizer)
    assert [ends[2], ends[1], ends[0]] == expected(saver, torchao8.AdamW8bit)


@pytest.mark.parametrize("cls", [torchao8.AdamW8bit, torchao8.AdamW])
def test_steps_and_rates_of_other_types(tmp_path: Path, cls: Any) -> None:
    """Steps as numbers, as other libraries keep them; a tensor lr where a number is, and back."""
    saved_model, saver = new_run(torchao8.AdamW, lr=torch.tensor(0.125))
    step_with(saver, range(2))

    def as_numbers(state: Any) -> None:
        for values in state["state"].values():
            values["step"] = int(values["step"])

    save(tmp_path / "a", saved_model, saver, as_numbers)
    model, optimizer = new_run(cls)
    load(model, optimizer, tmp_path / "a")
    assert states(optimizer) == expected(saver, cls)
    assert optimizer.param_groups[0]["lr"] == torch.tensor(0.125)
    saver.param_groups[0]["lr"] = 0.25
    save(tmp_path / "b", saved_model, saver)
    model, optimizer = new_run(cls, lr=torch.tensor(0.5))
    load(model, optimizer, tmp_path / "b")
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("key", ["optimizer", "", "a.state"])
@pytest.mark.parametrize("options", [None, FLAT], ids=["groups", "flat"])
def test_options_that_are_dicts_and_lists(
    tmp_path: Path, options: StateDictOptions | None, key: str
) -> None:
    """Torch saves them item by item; they are those of a program's own, or numbers as tensors."""
    model, saver = new_run()
    own = {"at": 1, "more": {"x": torch.tensor([2.0, 3.0])}, "list": [torch.tensor(4.0), 5]}
    saver.param_groups[0].update(own=own, betas=[torch.tensor(0.5), 0.6])
    step_with(saver, [0])
    state: Any = get_optimizer_state_dict(model, saver, options=options)
    for name in reversed(key.split(".") if key else []):
        state = {name: state}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    model, optimizer = new_run()
    load_dcp(model, optimizer, tmp_path, key=key, no_dist=True)
    (group,) = optimizer.param_groups
    assert set(group) == set(saver.param_groups[0])
    assert group["own"]["at"] == 1
    assert group["own"]["more"]["x"].tolist() == [2.0, 3.0]
    assert group["own"]["list"] == [torch.tensor(4.0), 5]
    assert group["betas"] == [torch.tensor(0.5), 0.6]


# -- flat ones ---------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["AdamW8bit", "AdamW", "PagedAdamW8bit"])
@pytest.mark.parametrize("of", [torchao8.AdamW8bit, torchao8.AdamW, torch.optim.AdamW])
def test_flat_folders(tmp_path: Path, of: Any, to: str) -> None:
    """Into an optimizer with other options, which has made steps of its own."""
    saved_model = Weights(shapes=SHAPES)
    options = {"lr": 0.03} if of is torch.optim.AdamW else OPTIONS
    saver = of(saved_model.parameters(), **options)
    step_with(saver, range(2))
    save(tmp_path, saved_model, saver, options=FLAT)
    cls = getattr(torchao8, to)
    model, optimizer = new_run(cls, lr=0.5)
    step_with(optimizer, range(5, 9))
    told = load(model, optimizer, tmp_path)
    assert len(told) == ((of is torchao8.AdamW8bit) != (cls is not torchao8.AdamW))
    assert states(optimizer) == expected(saver, cls)
    assert optimizer.param_groups[0]["lr"] == options["lr"]
    step_with(optimizer, [2])


def test_flat_folders_of_two_models(tmp_path: Path) -> None:
    """As of pipeline stages; without a key; groups that differ, and an lr that is a tensor."""
    stages = [nn.Module(), nn.Module()]
    saved, ends = {}, []
    for name, stage, lr in zip("ab", stages, (0.1, torch.tensor(0.2)), strict=True):
        setattr(stage, name, Weights(shapes=SHAPES))
        first, *others = stage.parameters()
        groups = [{"params": first, "lr": lr}, {"params": others}]
        saver = torchao8.AdamW8bit(groups, **OPTIONS)
        step_with(saver, range(3))
        ends.append(states(saver))
        saved.update(copy.deepcopy(get_optimizer_state_dict(stage, saver, options=FLAT)))
    dcp.save(saved, checkpoint_id=tmp_path, no_dist=True)
    for stage, lr, end in zip(stages, (0.1, 0.2), ends, strict=True):
        first, *others = stage.parameters()
        optimizer = torchao8.AdamW8bit(
            [{"params": others}, {"params": first}], **{**OPTIONS, "lr": 0.5}
        )
        load_dcp(stage, optimizer, tmp_path, key="", no_dist=True)
        assert states(optimizer) == [*end[1:], end[0]]
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        assert rates == pytest.approx([OPTIONS["lr"], lr])


def test_flat_names_with_dots_and_numbers(tmp_path: Path) -> None:
    """Names such as those that stand in the keys of a nested checkpoint."""

    def new_model() -> nn.Module:
        model = nn.Module()
        model.params = nn.ParameterList(Weights(shapes=SHAPES).parameters())
        model.add_module("0", nn.Module())
        model.get_submodule("0").params = nn.Parameter(torch.ones(40, 70))
        frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        model.get_submodule("0").register_parameter("frozen", frozen)
        return model

    model = new_model()
    saver = torchao8.AdamW8bit(model.parameters(), **OPTIONS)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    saver.step()
    save(tmp_path, model, saver, options=FLAT)
    model = new_model()
    optimizer = torchao8.AdamW8bit(model.named_parameters(), **{**OPTIONS, "lr": 0.5})
    load_dcp(model, optimizer, tmp_path, no_dist=True)
    assert states(optimizer) == states(saver)
    assert optimizer.param_groups[0]["lr"] == OPTIONS["lr"]


def flat_nan(state: Any) -> None:
    state["state.w2.exp_avg_scale"].fill_(float("nan"))


def flat_state_missing(state: Any) -> None:
    for key in [k for k in state if k.startswith("state.w1.")]:
        del state[key]


def flat_key_missing(state: Any) -> None:
    del state["state.w1.exp_avg_scale"]


def flat_no_options(state: Any) -> None:
    for key in [k for k in state if k.startswith("param_groups.")]:
        del state[key]


def flat_other_names(state: Any) -> None:
    for key in list(state):
        state[key.replace(".w", ".v")] = state.pop(key)


def flat_other_groups(state: Any) -> None:
    state["param_groups.w1.lr"] = 0.125


FLAT_REFUSED: dict[Callable[[Any], None], str] = {
    flat_nan: "exp_avg_scale of parameter 2: expected finite numbers",
    flat_state_missing: "no state of w1, expected keys optimizer.state.w1.*",
    flat_key_missing: "state of parameter 1: expected the keys",
    flat_no_options: "no options, expected keys optimizer.param_groups.0.*",
    flat_other_names: "no options of w0, expected keys optimizer.param_groups.w0.*",
    flat_other_groups: "expected the same options for all parameters of group 0 of the optimizer, "
    "got lr=0.01 for w0 and lr=0.125 for w1. Give the optimizer the parameter groups",
}


@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("change", list(FLAT_REFUSED))
def test_nothing_changes_where_a_flat_one_is_refused(
    tmp_path: Path, change: Callable[[Any], None], is_new: bool
) -> None:
    model, saver = new_run()
    step_with(saver, range(2))
    save(tmp_path, model, saver, change, FLAT)
    model, optimizer = new_run(lr=0.5)
    if not is_new:
        step_with(optimizer, range(5, 9))
    before = gathered(optimizer)
    with pytest.raises(ValueError, match=re.escape(FLAT_REFUSED[change])):
        load_dcp(model, optimizer, tmp_path, no_dist=True)
    assert gathered(optimizer) == before
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_dcp_load_into_a_flat_state_dict(tmp_path: Path) -> None:
    """It reads what the same class saved; torch refuses another format, and nothing changes."""
    for name, cls in (("ours", torchao8.AdamW8bit), ("torch", torch.optim.AdamW)):
        model = Weights(shapes=SHAPES)
        saver = cls(model.parameters(), **(OPTIONS if name == "ours" else {}))
        step_with(saver, range(2))
        save(tmp_path / name, model, saver, options=FLAT)
        if name == "ours":
            wanted = states(saver)
    model, optimizer = new_run()
    state = get_optimizer_state_dict(model, optimizer, options=FLAT)
    dcp.load({"optimizer": state}, checkpoint_id=tmp_path / "ours", no_dist=True)
    set_optimizer_state_dict(model, optimizer, state, options=FLAT)
    assert states(optimizer) == wanted
    with pytest.raises(CheckpointException, match="Missing key"):
        dcp.load({"optimizer": state}, checkpoint_id=tmp_path / "torch", no_dist=True)
    assert states(optimizer) == wanted


def test_a_flat_state_dict_is_not_for_load_state_dict() -> None:
    model, saver = new_run()
    step_with(saver, range(2))
    flat = copy.deepcopy(get_optimizer_state_dict(model, saver, options=FLAT))
    _, optimizer = new_run()
    with pytest.raises(ValueError, match=r"got a flat one .*set_optimizer_state_dict.*load_dcp"):
        optimizer.load_state_dict(flat)
    assert not optimizer.state


def test_set_optimizer_state_dict_of_another_precision() -> None:
    model, saver = new_run(torchao8.AdamW)
    step_with(saver, range(2))
    flat = copy.deepcopy(get_optimizer_state_dict(model, saver, options=FLAT))
    model, optimizer = new_run()
    step_with(optimizer, [5])
    before = states(optimizer)
    with pytest.raises(ValueError, match=r"is of another precision.*load_dcp"):
        set_optimizer_state_dict(model, optimizer, flat, options=FLAT)
    assert states(optimizer) == before


# -- what is refused ---------------------------------------------------------------------------


def nan_scale(state: Any) -> None:
    state["state"]["w2"]["exp_avg_scale"].fill_(float("nan"))


def later_version(state: Any) -> None:
    state["param_groups"][0]["state_version"] = 2


def other_model(state: Any) -> None:
    state["state"]["w1"]["exp_avg_codes"] = torch.zeros(7, 299, dtype=torch.uint8)


def state_missing(state: Any) -> None:
    del state["state"]["w1"]


def key_missing(state: Any) -> None:
    del state["state"]["w1"]["exp_avg_scale"]


def no_options(state: Any) -> None:
    state["param_groups"] = []


def other_names(state: Any) -> None:
    state["param_groups"][0]["params"] = ["a", "b", "c"]


REFUSED: dict[Callable[[Any], None], str] = {
    nan_scale: "exp_avg_scale of parameter 2: expected finite numbers",
    later_version: "state_version: this version of torchao8 reads and writes 1, got 2",
    other_model: "exp_avg_codes of parameter 1: expected torch.uint8 of shape [7, 300]",
    state_missing: "no state of w1, expected keys optimizer.state.w1.*",
    key_missing: "state of parameter 1: expected the keys",
    no_options: "no options, expected keys optimizer.param_groups.0.*",
    other_names: "got them in 0. Names differ",
}


@pytest.mark.parametrize("cls", [torchao8.AdamW8bit, torchao8.AdamW])
@pytest.mark.parametrize("is_new", [False, True])
@pytest.mark.parametrize("change", list(REFUSED))
def test_nothing_changes_where_it_refuses(
    tmp_path: Path, change: Callable[[Any], None], is_new: bool, cls: Any
) -> None:
    model, saver = new_run()
    step_with(saver, range(2))
    save(tmp_path, model, saver, change)
    model, optimizer = new_run(cls, lr=0.5)
    if not is_new:
        step_with(optimizer, range(5, 9))
    before = gathered(optimizer)
    with pytest.raises(ValueError, match=re.escape(REFUSED[change])):
        load_dcp(model, optimizer, tmp_path, no_dist=True)
    assert gathered(optimizer) == before
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_a_damaged_file(tmp_path: Path) -> None:
    model, saver = new_run()
    step_with(saver, range(2))
    save(tmp_path, model, saver)
    (file,) = tmp_path.glob("*.distcp")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    model, optimizer = new_run()
    step_with(optimizer, range(5, 9))
    before = gathered(optimizer)
    with pytest.raises(CheckpointException):
        load_dcp(model, optimizer, tmp_path, no_dist=True)
    assert gathered(optimizer) == before


def test_groups_of_the_checkpoint_that_are_one_here(tmp_path: Path) -> None:
    """Their options may differ, and only one of them can hold."""
    model = Weights(shapes=SHAPES)
    a, b, c = model.parameters()
    saver = torchao8.AdamW8bit([{"params": [a], "lr": 0.5}, {"params": [b, c]}], **OPTIONS)
    step_with(saver, range(2))
    save(tmp_path, model, saver)
    model, optimizer = new_run()
    with pytest.raises(ValueError, match=r"got them in 2\. The options of which should hold"):
        load_dcp(model, optimizer, tmp_path, no_dist=True)


def test_torch_mixes_formats(tmp_path: Path) -> None:
    """Full state dicts of another precision: torch mixes the keys, and we say what to do."""
    model, saver = new_run(torchao8.AdamW)
    step_with(saver, range(2))
    options = StateDictOptions(full_state_dict=True)
    full = get_optimizer_state_dict(model, saver, options=options)
    model, optimizer = new_run()
    step_with(optimizer, [5])
    before = states(optimizer)
    with pytest.raises(ValueError, match=r"set_optimizer_state_dict mixes .*load_state_dict"):
        set_optimizer_state_dict(model, optimizer, copy.deepcopy(full), options=options)
    assert states(optimizer) == before
    with pytest.warns(UserWarning, match="saved in 32 bits"):
        optimizer.load_state_dict(full)
    assert states(optimizer) == expected(saver, torchao8.AdamW8bit)
