"""Random damage to a state dict: refused by a message that says where, with nothing changed."""

import copy
import functools
import math
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, make_params, train
from optim_table import ADAMS, OPTIMIZERS, OptimizerCase, every_adam
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import AdamW, AdamW8bit

StateDict = dict[str, Any]

# What a damage returns: a pattern that the message of the refusal must have.
Damage = Callable[[random.Random, StateDict], str]

SEEDS = range(6)


def trained(case: OptimizerCase, **options: Any) -> Optimizer:
    """State in both formats where the class has both; two groups; a step counted differently."""
    params = make_params()
    groups = [{"params": params[:4]}, {"params": params[4:], "weight_decay": 0.1}]
    optimizer = case.make(groups, min_8bit_size=SMALL, **options)
    train(optimizer, params, [0, 1])
    return optimizer


def pick(rng: random.Random, saved: StateDict, *endings: str) -> tuple[int, str]:
    """A parameter and one of its keys, which ends in one of the endings if any are given."""
    places = [
        (index, key)
        for index, state in saved["state"].items()
        for key in state
        if not endings or key.endswith(endings)
    ]
    return rng.choice(places)


def change(to: Callable[[Tensor], Any], *endings: str) -> Damage:
    """Another value for a key that ends so."""

    def damage(rng: random.Random, saved: StateDict) -> str:
        index, key = pick(rng, saved, *endings)
        saved["state"][index][key] = to(saved["state"][index][key])
        return rf"^{key} of parameter {index}: expected "

    return damage


def element(value: float, *endings: str) -> Damage:
    """Another value for one element of such a tensor."""

    def damage(rng: random.Random, saved: StateDict) -> str:
        index, key = pick(rng, saved, *endings)
        tensor = saved["state"][index][key]
        tensor.view(-1)[rng.randrange(tensor.numel())] = value
        return rf"^{key} of parameter {index}: expected "

    return damage


def drop_key(rng: random.Random, saved: StateDict) -> str:
    index, key = pick(rng, saved)
    del saved["state"][index][key]
    return rf"^state of parameter {index}: expected the keys .*'{key}'.*, got "


def rename_key(rng: random.Random, saved: StateDict) -> str:
    index, key = pick(rng, saved)
    new = rng.choice(["state1", key + "_", key.upper(), "", "absmax1"])
    saved["state"][index][new] = saved["state"][index].pop(key)
    return rf"^state of parameter {index}: expected the keys .*'{key}'.*, got .*'{new}'"


def extra_key(rng: random.Random, saved: StateDict) -> str:
    """One that this library has, but not this class; others' keys do no harm."""
    index, key = pick(rng, saved)
    new = "exp_avg_slow" if "sum" in saved["state"][index] else "sum"
    saved["state"][index][new] = saved["state"][index][key]
    return rf"^state of parameter {index}: expected the keys .*, got .*'{new}'"


def swap_states(rng: random.Random, saved: StateDict) -> str:
    a, b = rng.sample(sorted(saved["state"]), 2)
    state = saved["state"]
    state[a], state[b] = state[b], state[a]
    return rf"of parameter ({a}|{b}): expected"


def stray_state(rng: random.Random, saved: StateDict) -> str:
    index, _ = pick(rng, saved)
    new = rng.choice([99, "layer.weight", -1, None])
    saved["state"][new] = saved["state"][index]
    return re.escape(f"state of {new!r}: no parameter group of the checkpoint has it")


def states_under_strings(rng: random.Random, saved: StateDict) -> str:
    """As JSON would have it."""
    saved["state"] = {str(index): state for index, state in saved["state"].items()}
    return "no parameter group of the checkpoint has it"


def group(rng: random.Random, saved: StateDict) -> dict[str, Any]:
    chosen: dict[str, Any] = rng.choice(saved["param_groups"])
    return chosen


def params_too_few(rng: random.Random, saved: StateDict) -> str:
    group(rng, saved)["params"].pop()
    return "doesn't match the size"


def params_too_many(rng: random.Random, saved: StateDict) -> str:
    params = group(rng, saved)["params"]
    params.append(rng.choice([8, 99, params[0]]))
    return "doesn't match the size"


def params_twice(rng: random.Random, saved: StateDict) -> str:
    params = group(rng, saved)["params"]
    i, j = rng.sample(range(len(params)), 2)
    params[i] = params[j]
    return "of parameter |no parameter group of the checkpoint has it"


def params_permuted(rng: random.Random, saved: StateDict) -> str:
    params = group(rng, saved)["params"]
    i, j = rng.sample(range(len(params)), 2)
    params[i], params[j] = params[j], params[i]
    return "of parameter "


def groups_swapped(rng: random.Random, saved: StateDict) -> str:
    saved["param_groups"].reverse()
    return "of parameter "


def group_missing(rng: random.Random, saved: StateDict) -> str:
    del saved["param_groups"][rng.randrange(2)]
    return "different number of parameter groups"


def option(name: str, *values: Any) -> Damage:
    def damage(rng: random.Random, saved: StateDict) -> str:
        group(rng, saved)[name] = rng.choice(values)
        return rf"^{name}\b"

    return damage


NAN, INF = float("nan"), float("inf")

# What the keys of 32-bit state end with, of all optimizers; of the scales of squares.
MOMENTS = ("avg", "_sq", "_fast", "_slow", "sum", "buffer")
SQUARES = ("sq_scale", "square_avg_scale", "sum_scale")

DAMAGES: dict[str, Damage] = {
    "key dropped": drop_key,
    "key renamed": rename_key,
    "key too many": extra_key,
    "states swapped": swap_states,
    "stray state": stray_state,
    "states under strings": states_under_strings,
    "params too few": params_too_few,
    "params too many": params_too_many,
    "params twice": params_twice,
    "params permuted": params_permuted,
    "groups swapped": groups_swapped,
    "group missing": group_missing,
    "value None": change(lambda t: None),
    "value a string": change(lambda t: "1.0"),
    "value a list": change(lambda t: t.reshape(-1).tolist() * 2),
    "value of numpy": change(lambda t: t.reshape(-1).numpy()),
    "value sparse": change(lambda t: t.reshape(1, -1).to_sparse(), *MOMENTS, "_codes"),
    "value stacked": change(lambda t: torch.stack([t, t])),
    "value empty": change(lambda t: t.reshape(-1)[:0]),
    "value flattened": change(lambda t: t.reshape(1, -1, 1), *MOMENTS, "_codes", "_scale"),
    "moment complex": change(lambda t: t + 1j, *MOMENTS),
    "moment in bfloat16": change(lambda t: t.bfloat16(), *MOMENTS),
    "moment in float64": change(lambda t: t.double(), *MOMENTS),
    "moment in integers": change(lambda t: t.int(), *MOMENTS),
    "step negative": change(lambda t: t - 5, "step"),
    "step a fraction": change(lambda t: t + 0.5, "step"),
    "step huge": change(lambda t: t + 1e20, "step"),
    "step just too large": change(lambda t: torch.tensor(2**24 + 1), "step"),
    "step NaN": change(lambda t: t * NAN, "step"),
    "step infinite": change(lambda t: INF, "step"),
    "step a negative number": change(lambda t: -1, "step"),
    "lr": option("lr", NAN, INF, None, "fast", [1e-3], torch.ones(2), True),
    "lr a bad tensor": option("lr", torch.tensor(NAN), torch.tensor(-INF), torch.ones(0)),
    "betas": option("betas", (0.9,), (0.9, 1.0), None, "ab", 0.9, (None, None), torch.ones(2)),
    "eps": option("eps", -1.0, NAN, None, "x", torch.tensor(-1e-8)),
    "weight_decay": option("weight_decay", -1.0, NAN, None, "x"),
    "amsgrad": option("amsgrad", None, 1, "yes", torch.tensor(True)),
    "maximize": option("maximize", None, 1, "yes"),
    "state_rounding": option("state_rounding", None, 1, "up", ["nearest"]),
    "stochastic_rounding": option("stochastic_rounding", None, 1, "yes", torch.tensor(True)),
    "seed": option("seed", None, 0.5, 2**63, "x", True),
    "state_version": option("state_version", 0, 2, None, "1", 1.5),
    "block_size": option("block_size", 0, -1, 100, None, "x", 256.0, torch.ones(2)),
}

# Of state in 8 bits.
CODE_DAMAGES: dict[str, Damage] = {
    "codes as float32": change(lambda t: t.float(), "_codes"),
    "codes as bfloat16": change(lambda t: t.bfloat16(), "_codes"),
    "codes as int8": change(lambda t: t.to(torch.int8), "_codes"),
    "codes as int64": change(lambda t: t.long(), "_codes"),
    "codes as bool": change(lambda t: t.bool(), "_codes"),
    "codes too few": change(lambda t: t[:-1], "_codes"),
    "scale in bfloat16": change(lambda t: t.bfloat16(), "_scale"),
    "scale in float64": change(lambda t: t.double(), "_scale"),
    "scale in bytes": change(lambda t: t.byte(), "_scale"),
    "scales too few": change(lambda t: t[..., :-1], "_scale"),
    "scale NaN": element(NAN, "_scale"),
    "scale infinite": element(INF, "_scale"),
    "scale infinite and negative": element(-INF, "_scale"),
    "scale of a second moment negative": element(-1.0, *SQUARES),
    "scale of a second moment -0": element(-0.0, *SQUARES),
}


def without_state(rng: random.Random, saved: StateDict) -> None:
    del saved["state"][pick(rng, saved)[0]]


def state_empty(rng: random.Random, saved: StateDict) -> None:
    saved["state"][pick(rng, saved)[0]] = {}


def params_a_tuple(rng: random.Random, saved: StateDict) -> None:
    chosen = group(rng, saved)
    chosen["params"] = tuple(chosen["params"])


def params_of_other_numbers(rng: random.Random, saved: StateDict) -> None:
    """They need only be the same in both parts."""
    saved["state"] = {f"p{index}": state for index, state in saved["state"].items()}
    for each in saved["param_groups"]:
        each["params"] = [f"p{index}" for index in each["params"]]


def option_missing(rng: random.Random, saved: StateDict) -> None:
    """As in a checkpoint of an older version: the optimizer's own stands."""
    chosen = group(rng, saved)
    del chosen[rng.choice([name for name in chosen if name not in ("params", "amsgrad")])]


# Options that not every class has, and of which there need be no state.
OPTIONAL = ("betas", "eps", "amsgrad")
# Of the other classes, with all states. The checks know no rule, so that one seed and the keys that
# there can be will do; and with none, of what there is to spoil then.
OTHERS = [case for case in OPTIMIZERS if case not in ADAMS and case.optim_bits == 8]
WITHOUT_STATES = [
    "key too many", "key renamed", "stray state", "states under strings", "params too few",
    "params too many", "group missing", "value None", "value a string", "value stacked",
    "step negative", "step a fraction", "step NaN", "lr", "weight_decay", "maximize",
]  # fmt: skip
every_other = pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.cls.__name__)

# What no harm comes of: it loads, and a step works.
HARMLESS: dict[str, Callable[[random.Random, StateDict], Any]] = {
    "no state of a parameter": without_state,
    "empty state of a parameter": state_empty,
    "params a tuple": params_a_tuple,
    "params of other numbers": params_of_other_numbers,
    "option missing": option_missing,
    "step zero": change(lambda t: t * 0, "step"),
    "step an int": change(lambda t: int(t), "step"),
    "step in one dimension": change(lambda t: t.reshape(1).long(), "step"),
    "largest step": change(lambda t: torch.tensor(2.0**24 - 1), "step"),
    "memory in another order": change(
        lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t
    ),
    "value a parameter": change(lambda t: torch.nn.Parameter(t, requires_grad=False)),
    "betas a list": option("betas", [0.9, 0.95]),
    "key of others": lambda rng, saved: saved["state"][0].update(exp_avg_2=torch.ones(3)),
    "option of another library": option("initial_lr", 0.1, None, "x"),
    "hints": option("foreach", None, True),
}


@functools.cache
def unchanging(cls_number: int, amsgrad: bool) -> Optimizer:
    """One for all damages that are refused, as nothing may change it."""
    return trained(ADAMS[cls_number], amsgrad=amsgrad)


def has_place(optimizer: Optimizer, name: str) -> bool:
    """Whether a damage of DAMAGES or CODE_DAMAGES has something to spoil."""
    if name in OPTIONAL:
        return name in optimizer.defaults
    keys = {key for state in optimizer.state.values() for key in state}
    return "of a second moment" not in name or any(key.endswith(SQUARES) for key in keys)


def assert_refused(optimizer: Optimizer, damage: Damage, seed: int) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.5  # would tell of options that are taken over too early
    message = damage(random.Random(seed), saved)
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match=message) as info:
        optimizer.load_state_dict(saved)
    assert type(info.value) is ValueError
    assert all_bits(optimizer) == before


@every_adam()
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("name", list(DAMAGES))
def test_damage_is_refused(case: OptimizerCase, name: str, amsgrad: bool) -> None:
    optimizer = unchanging(ADAMS.index(case), amsgrad)
    for seed in SEEDS:
        assert_refused(optimizer, DAMAGES[name], seed)


@pytest.mark.parametrize(
    "case", [case for case in ADAMS if case.optim_bits == 8], ids=lambda c: c.cls.__name__
)
@pytest.mark.parametrize("amsgrad", [False, True], ids=["", "amsgrad"])
@pytest.mark.parametrize("name", list(CODE_DAMAGES))
def test_damage_to_codes_and_scales_is_refused(
    case: OptimizerCase, name: str, amsgrad: bool
) -> None:
    optimizer = unchanging(ADAMS.index(case), amsgrad)
    for seed in SEEDS:
        assert_refused(optimizer, CODE_DAMAGES[name], seed)


@every_other
def test_damage_to_other_optimizers_is_refused(case: OptimizerCase) -> None:
    optimizer = trained(case, **case.full)
    tried = 0
    for seed, (name, damage) in enumerate({**DAMAGES, **CODE_DAMAGES}.items()):
        if has_place(optimizer, name):
            assert_refused(optimizer, damage, seed)
            tried += 1
    assert tried >= len({**DAMAGES, **CODE_DAMAGES}) - len(OPTIONAL) - 2


@pytest.mark.parametrize("case", OTHERS[-1:], ids=lambda case: case.cls.__name__)
def test_damage_where_there_is_no_state_is_refused(case: OptimizerCase) -> None:
    optimizer = trained(case, momentum=0.0)
    for seed, name in enumerate(WITHOUT_STATES):
        assert_refused(optimizer, DAMAGES[name], seed)


@pytest.mark.parametrize("name", list(CODE_DAMAGES))
def test_damage_is_refused_before_a_conversion(name: str) -> None:
    """State in 8 bits for an optimizer that keeps 32."""
    source, target = unchanging(3, False), unchanging(1, False)
    for seed in SEEDS:
        saved = copy.deepcopy(source.state_dict())
        message = CODE_DAMAGES[name](random.Random(seed), saved)
        before = all_bits(target)
        with pytest.raises(ValueError, match=message):
            target.load_state_dict(saved)
        assert all_bits(target) == before


@every_adam()
@pytest.mark.parametrize("name", list(HARMLESS))
def test_what_does_no_harm_is_loaded(case: OptimizerCase, name: str) -> None:
    for seed in SEEDS:
        optimizer = trained(case)
        saved = copy.deepcopy(optimizer.state_dict())
        HARMLESS[name](random.Random(seed), saved)
        optimizer.load_state_dict(saved)
        train(optimizer, [p for each in optimizer.param_groups for p in each["params"]], [2])
        for params in (each["params"] for each in optimizer.param_groups):
            assert all(bool(p.isfinite().all()) for p in params)


@every_other
def test_what_does_no_harm_is_loaded_by_others(case: OptimizerCase) -> None:
    for seed, name in enumerate(HARMLESS):
        if name == "betas a list" and len(case.cls([torch.ones(1)]).defaults.get("betas", ())) != 2:
            continue
        optimizer = trained(case, **case.full)
        saved = copy.deepcopy(optimizer.state_dict())
        HARMLESS[name](random.Random(seed), saved)
        optimizer.load_state_dict(saved)
        params = [p for each in optimizer.param_groups for p in each["params"]]
        train(optimizer, params, [2])
        assert all(bool(p.isfinite().all()) for p in params), name


# -- the form of a state dict ----------------------------------------------------------------------

FORMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no dict": (lambda s: None, "state_dict: expected a dict, got NoneType"),
    "no state": (lambda s: drop(s, "state"), "expected the key 'state'"),
    "no groups": (lambda s: drop(s, "param_groups"), "expected the key 'param_groups'"),
    "state a list": (lambda s: s | {"state": []}, "state: expected a dict, got list"),
    "groups a number": (lambda s: s | {"param_groups": 3}, "param_groups: expected a list"),
    "group a string": (lambda s: s | {"param_groups": ["a"]}, r"\[0\]: expected a dict"),
    "group without params": (lambda s: s | {"param_groups": [{}]}, "expected the key 'params'"),
    "params a set": (lambda s: in_group(s, params={0, 1}), "expected a list or tuple, got set"),
    "params of lists": (lambda s: in_group(s, params=[[0]]), "expected a int or str, got list"),
    "names too few": (lambda s: in_group(s, param_names=["x"]), "expected a name for each of"),
    "names are numbers": (lambda s: in_group(s, param_names=[3] * 8), "expected a name for"),
    "names None": (lambda s: in_group(s, param_names=None), "expected a list or tuple, got None"),
    "state None": (lambda s: in_state(s, None), "state of parameter 0: expected a dict, got None"),
    "state a tensor": (lambda s: in_state(s, torch.ones(3)), "expected a dict, got Tensor"),
    "a huge step": (lambda s: in_value(s, "step", 10**400), "step of .* 0: expected a whole"),
    "a step of True": (lambda s: in_value(s, "step", True), "step of .* 0: expected torch"),
    "a complex step": (lambda s: in_value(s, "step", torch.tensor(1j)), "got torch.complex64"),
    "meta": (lambda s: in_value(s, "exp_avg_codes", None), "on the device meta: no values"),
    "a complex lr": (lambda s: in_group(s, lr=torch.tensor(1j)), "lr: expected .* torch.complex64"),
    "two versions": (lambda s: in_group(s, state_version=torch.ones(2)), "state_version: this"),
}  # fmt: skip


def drop(saved: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in saved.items() if k != key}


def in_group(saved: dict[str, Any], **options: Any) -> dict[str, Any]:
    saved["param_groups"][0].update(options)
    return saved


def in_state(saved: dict[str, Any], value: Any) -> dict[str, Any]:
    saved["state"][0] = value
    return saved


def in_value(saved: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    state = saved["state"][0]
    state[key] = state[key].to("meta") if value is None else value
    return saved


@pytest.mark.parametrize("name", list(FORMS))
def test_another_form_is_told(name: str) -> None:
    params = make_params()
    optimizer = AdamW8bit(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    before = all_bits(optimizer)
    spoil, match = FORMS[name]
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(spoil(copy.deepcopy(optimizer.state_dict())))
    assert all_bits(optimizer) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [("exp_avg", math.nan), ("exp_avg_sq", math.inf), ("exp_avg_sq", -1.0)],
)
@pytest.mark.parametrize("cls", [AdamW, AdamW8bit])
def test_moments_that_no_step_leaves(key: str, value: float, cls: Any) -> None:
    """In 32 bits, which a checkpoint of torch.optim has, loaded as it is or rounded to 8."""
    params = make_params()
    source = AdamW(params)
    train(source, params, [0])
    saved = copy.deepcopy(source.state_dict())
    saved["state"][1][key][2, 3] = value
    optimizer = cls(make_params(), min_8bit_size=SMALL)
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match=f"{key} of parameter 1: expected"):
        optimizer.load_state_dict(saved)
    assert all_bits(optimizer) == before


def test_one_tensor_at_two_places() -> None:
    """Is copied: no step could write to both."""
    params = make_params(shapes=[(4, 300), (4, 300)])
    optimizer = AdamW8bit(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][1] = saved["state"][0]
    optimizer.load_state_dict(saved)
    train(optimizer, params, [1])
