"""State of bitsandbytes' Adagrad, AdEMAMix, LAMB, LARS, Lion, RMSprop and SGD, read as ours.

test/data/foreign holds what the real package saved, and a step that it made from there:
tools/make_foreign_checkpoints.py.
"""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, report, train
from optim_table import OPTIMIZERS
from test_foreign_checkpoints import NESTED, load_tool
from test_optim import oracle_step

import torchao8

FOLDER = Path(__file__).resolve().parent / "data" / "foreign"
FAMILY = ("Adagrad", "AdEMAMix", "LAMB", "LARS", "Lion", "RMSprop", "SGD")
READABLE = tuple(name for name in FAMILY if name != "LARS")
CASES = {case.cls.__name__: case for case in OPTIMIZERS}


def load(name: str) -> dict[str, Any]:
    file: dict[str, Any] = torch.load(FOLDER / f"bitsandbytes_{name.lower()}.pt", weights_only=True)
    return file


def checkpoint(file: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The whole state dict, as the optimizer of bitsandbytes gave it."""
    states = [copy.deepcopy(p["state"]) for p in file["parameters"]]
    numbers = list(range(len(states)))
    return {
        "state": dict(enumerate(states)),
        "param_groups": [{**file["options"], **options, "params": numbers}],
    }


def make(file: dict[str, Any], name: str, **options: Any) -> Any:
    """Our optimizer of the parameters as they were before the next step."""
    params = [torch.nn.Parameter(p["before"].clone()) for p in file["parameters"]]
    return getattr(torchao8, name)(params, **options)


def quiet(load: Callable[[dict[str, Any]], None], state_dict: dict[str, Any]) -> list[str]:
    """Loads, and returns what was told."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(state_dict)
    return [str(w.message) for w in caught]


def check_next_step(file: dict[str, Any], name: str) -> None:
    """The state means here what it means there: the next step is the same.

    In 32 bits, so that nothing is rounded on the way. Their 8-bit LAMB is AdamW, without a ratio.
    """
    options = {"adaptive": False} if name == "LAMB" else {}
    optimizer = make(file, name, **options)
    quiet(optimizer.load_state_dict, checkpoint(file))
    params = optimizer.param_groups[0]["params"]
    for p, saved in zip(params, file["parameters"], strict=True):
        state = optimizer.state[p]
        assert state["step"] == 3
        for key, want in saved["moments"].items():
            # The maps differ by 6e-7 of an entry, see test_foreign_checkpoints.
            torch.testing.assert_close(state[key], want, rtol=8e-7, atol=0)
        p.grad = saved["grad"].clone()
    if (
        name == "LAMB"
    ):  # unless the parameter has 32 bits: then their ratio is on, which is not ours
        params = params[:2]
    exact = [oracle_step(CASES[name], optimizer, p) for p in params]
    optimizer.step()
    for p, saved, want in zip(params, file["parameters"], exact, strict=False):
        # Each is within the oracle's count of roundings.
        assert ((p - saved["after"]).abs() <= 2 * want.param_error).all()
        assert not torch.equal(p, saved["before"])


@pytest.mark.parametrize("name", READABLE)
def test_the_next_step_is_theirs(name: str) -> None:
    check_next_step(load(name), name)


@pytest.mark.parametrize("name", READABLE)
def test_real_package(name: str) -> None:
    """As the files, with the installed version."""
    pytest.importorskip("bitsandbytes", reason="no bitsandbytes: pip install bitsandbytes")
    check_next_step(load_tool().make_bitsandbytes_of(name), name)


@pytest.mark.parametrize("name", READABLE)
def test_codes_stay_where_map_and_blocks_are_ours(name: str) -> None:
    """But for squares of classes with one state, which have the other map."""
    file = load(name)
    optimizer = make(file, f"{name}8bit", min_8bit_size=SMALL)
    quiet(optimizer.load_state_dict, checkpoint(file))
    rows, odd, small = (optimizer.state[p] for p in optimizer.param_groups[0]["params"])
    tensors = file["parameters"][0]["state"][NESTED]
    names = list(file["parameters"][0]["moments"])
    if name == "AdEMAMix":
        codes = [*tensors["state1"], tensors["state2"]]
        scales = [*tensors["absmax1"], tensors["absmax2"]]
    else:
        codes = [tensors[f"state{i}"] for i in range(1, len(names) + 1)]
        scales = [tensors[f"absmax{i}"] for i in range(1, len(names) + 1)]
    for key, code, scale in zip(names, codes, scales, strict=True):
        kept = torch.equal(rows[f"{key}_codes"], code)
        assert kept == (name not in ("Adagrad", "RMSprop"))
        assert torch.equal(rows[f"{key}_scale"], scale[None])
        assert f"{key}_codes" in odd
        assert f"{key}_codes" not in small
        # Nearest codes; a gap of the map is 0.9 / 128 of the scale at most, and twice that between
        # those of 64 values that a decade of the signed map has.
        case = CASES[f"{name}8bit"]
        for state, saved in zip((rows, odd), file["parameters"], strict=False):
            got = torchao8.dequantize_blockwise(
                state[f"{key}_codes"], state[f"{key}_scale"], signed=case.is_signed(key)
            )
            error = (got - saved["moments"][key]).abs().amax()
            assert error <= saved["moments"][key].abs().amax() * 0.9 / 128
    if name == "AdEMAMix":  # none keeps the memory of the stack
        assert rows["exp_avg_fast_codes"].untyped_storage().nbytes() == 256


def test_options_come_under_our_names() -> None:
    """The second of betas, where it is no beta, has no effect there and gets none here."""
    got = {}
    for name in READABLE:
        file = load(name)
        optimizer = make(file, name, **({"momentum": 0.25} if name in ("SGD", "RMSprop") else {}))
        told = quiet(optimizer.load_state_dict, checkpoint(file, initial_lr=0.5))
        got[name] = [t.split(": ", 1)[1].split(",")[0] for t in told if "ignores" in t]
        group = optimizer.param_groups[0]
        assert group["lr"] == 0.01
        assert group["weight_decay"] == file["options"]["weight_decay"]
        assert set(group) == {*optimizer.defaults, "params", "initial_lr"}
        for key in ("betas", "eps", "alpha"):
            if key in group and name != "RMSprop":
                assert group[key] == file["options"][key]
        if name == "SGD":
            assert (group["momentum"], group["dampening"]) == (0.9, 0)
        if name == "RMSprop":
            assert (group["alpha"], group["momentum"], group["eps"]) == (0.99, 0, 1e-8)
        if name == "AdEMAMix":
            assert (group["t_alpha"], group["t_beta3"]) == (9, 0)
    assert got == {
        **{name: [] for name in READABLE},
        "RMSprop": ["the checkpoint has momentum=0.5"],
        "SGD": ["the checkpoint has dampening=0.5"],
    }


@pytest.mark.parametrize("name", ["SGD", "SGD8bit"])
def test_the_buffer_of_their_lars_is_one_of_sgd(name: str) -> None:
    """It holds gradients, without their rates: SGD takes it, and ``test_refusals`` that LARS does
    not."""
    file = load("LARS")
    optimizer = make(file, name, min_8bit_size=SMALL)
    quiet(optimizer.load_state_dict, checkpoint(file))
    state = optimizer.state[optimizer.param_groups[0]["params"][2]]
    assert bits(state["momentum_buffer"]) == bits(
        file["parameters"][2]["moments"]["momentum_buffer"]
    )


def on_a_gpu(file: dict[str, Any]) -> dict[str, Any]:
    """Scales of AdEMAMix as the GPU has them: the slow ones start n // 256 after the fast ones."""
    saved = checkpoint(file)
    for number, parameter in enumerate(file["parameters"][:2]):
        n = parameter["before"].numel()
        scales = saved["state"][number][NESTED]["absmax1"]
        fast, slow = scales.clone()
        flat = scales.zero_().view(-1)
        flat[: len(fast)] = fast
        flat[n // 256 :][: len(slow)] = slow
    return saved


def test_scales_of_ademamix_that_overwrote_each_other_are_refused() -> None:
    file = load("AdEMAMix")
    optimizer = make(file, "AdEMAMix8bit", min_8bit_size=SMALL)
    saved = on_a_gpu(file)
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match=r"absmax1 of parameter 1: .*the numbers are lost.*anew"):
        optimizer.load_state_dict(saved)
    assert all_bits(optimizer) == before
    del saved["state"][1]  # as the message says; parameter 0 has 256 elements, and no such scales
    quiet(optimizer.load_state_dict, saved)
    params = optimizer.param_groups[0]["params"]
    assert params[1] not in optimizer.state
    assert optimizer.state[params[0]]["step"] == 3
    train(optimizer, params, [0])
    # Nothing was written yet: there is nothing to lose.
    fresh = on_a_gpu(file)
    for number in (0, 1):
        fresh["state"][number][NESTED]["absmax1"].zero_()
    quiet(optimizer.load_state_dict, fresh)


# -- what is refused -----------------------------------------------------------------------------


def swapped(name: str, other: str, **options: Any) -> str:
    """What the load of a checkpoint of another class says; nothing may change."""
    file = load(other)
    if other == "SGD":
        file["options"]["betas"] = (0.9, 0)  # no dampening, as it has no effect
    optimizer = make(file, name, min_8bit_size=SMALL, **options)
    train(optimizer, optimizer.param_groups[0]["params"], [0])
    before = all_bits(optimizer)
    try:
        told = quiet(optimizer.load_state_dict, checkpoint(file))
    except ValueError as error:
        assert all_bits(optimizer) == before
        return str(error)
    return "loads, and says: " + " ".join(t for t in told if "bitsandbytes" in t)


def test_checkpoints_of_other_classes() -> None:
    """Each into each. What is not told apart is what means the same, or a warning says so."""
    loads = set()
    for name in ("Adam", *FAMILY):
        for other in FAMILY:
            options = {"momentum": 0.9} if name in ("SGD", "LARS") else {}
            message = swapped(f"{name}8bit", other, **options)
            if message.startswith("loads"):
                loads.add((name, other))
                assert ("Lion has two numbers" in message) == ((name, other) == ("SGD", "Lion"))
    same = {(name, name) for name in READABLE}
    assert loads == same | {("Adam", "LAMB"), ("SGD", "LARS"), ("SGD", "Lion")}


def test_refusals(assert_expected_inline: Callable[[str, str], None]) -> None:
    file = load("AdEMAMix")
    narrow = checkpoint(file)
    for number in range(3):
        tensors = narrow["state"][number][NESTED]
        tensors["state1"] = tensors["state1"][0].clone()
    flat_scales = checkpoint(file)
    flat_scales["state"][0][NESTED]["absmax1"] = torch.ones(2)
    negative = checkpoint(load("Adagrad"))
    negative["state"][2][NESTED]["state1"][1] = -0.25
    lines = [
        swapped("LARS8bit", "LARS", momentum=0.9),
        swapped("SGD8bit", "RMSprop", momentum=0.9),
        swapped("Lion8bit", "SGD"),
        swapped("Adagrad8bit", "RMSprop"),
        swapped("RMSprop8bit", "Adagrad"),
        swapped("RMSprop8bit", "Lion"),
        swapped("Adagrad8bit", "LAMB"),
        swapped("LAMB8bit", "AdEMAMix"),
        swapped("RMSprop8bit", "RMSprop", centered=True),
    ]
    for name, saved in (("AdEMAMix", narrow), ("AdEMAMix", flat_scales), ("Adagrad", negative)):
        optimizer = make(load(name), f"{name}8bit", min_8bit_size=SMALL)
        with pytest.raises(ValueError) as info:
            optimizer.load_state_dict(saved)
        lines.append(str(info.value))
    assert_expected_inline(
        report(lines),
        """\
LARS8bit: expected a momentum_buffer of gradients times the learning rates and trust ratios of
    their steps, got a checkpoint that has no trust_coefficient: the buffers of SGD, of
    torch.optim and of the LARS of bitsandbytes hold gradients alone. SGD takes them; or take
    the state out of the state dict, and the buffer starts anew
eps: expected 0.0, as the SGD of bitsandbytes saves, got 1e-08. RMSprop, Adagrad or one with
    two states saved this checkpoint, and its state means something else
betas: expected two numbers above 0, as the Lion of bitsandbytes saves, got (0.9, 0). SGD,
    LARS or Adagrad saved this checkpoint, and its state means something else
betas: expected (0.0, 0.0), as the Adagrad of bitsandbytes saves, got (0.99, 0.5). Another
    class saved this checkpoint, and its state means something else
betas: expected a first one above 0, as the RMSprop of bitsandbytes saves, got (0.0, 0.0).
    Adagrad saved this checkpoint, and its state means something else
state1 of parameter 1: expected numbers >= 0, for square_avg, got -0.006374703254550695.
    Another optimizer than this one saved it.
betas: expected (0.0, 0.0), as the Adagrad of bitsandbytes saves, got (0.9, 0.999). Another
    class saved this checkpoint, and its state means something else
betas: expected two numbers, got (0.9, 0.999, 0.9999)
state of parameter 0: expected state1 and state2 of bitsandbytes, for square_avg and grad_avg,
    got state1. bitsandbytes has no centered RMSprop: load with centered=False.
state1 of parameter 0: expected [2, 1, 256], a fast and a slow average, got [1, 256].
    AdEMAMix32bit of bitsandbytes has room for one only, which is not AdEMAMix; another class
    than AdEMAMix may have saved it, too.
absmax1 of parameter 0: expected torch.float32 of shape [2, 1], got torch.float32 of shape [2]
state1 of parameter 2: expected numbers >= 0, for sum, got -0.25. Another optimizer than this
    one saved it.""",
    )


# -- between SGD and LARS, which call their buffers the same -------------------------------------


@pytest.mark.parametrize("to", ["LARS", "LARS8bit", "SGD", "SGD8bit"])
@pytest.mark.parametrize("of", ["LARS", "LARS8bit", "SGD", "SGD8bit", "torch"])
def test_buffers_with_and_without_the_rate(of: str, to: str) -> None:
    params = make_params(shapes=[(3, 300), (5,)])
    source: Any
    if of == "torch":
        source = torch.optim.SGD(params, momentum=0.9)
    else:
        source = CASES[of].make(params, min_8bit_size=SMALL)
    target = CASES[to].make(make_params(shapes=[(3, 300), (5,)]), min_8bit_size=SMALL)
    target.load_state_dict(copy.deepcopy(source.state_dict()))  # no state, nothing to mistake
    train(source, params, [0])
    saved = copy.deepcopy(source.state_dict())
    if ("LARS" in of) == ("LARS" in to):
        quiet(target.load_state_dict, saved)
        return
    before = all_bits(target)
    with pytest.raises(ValueError, match=f"^{to}: expected a momentum_buffer of gradients"):
        target.load_state_dict(saved)
    assert all_bits(target) == before
