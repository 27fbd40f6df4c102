"""The option ``state_format``: what it accepts, and state on its way from one format to another."""

import copy
import itertools
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import format_reference as formats
import pytest
import torch
from format_table import FORMAT_CASES, LAW, every_pair
from format_table import moment as decoded
from helpers import (
    SHAPES,
    SMALL,
    all_bits,
    assert_same_training,
    bits,
    make_params,
    set_grads,
    train,
)
from optim_table import OF_4_BITS, OF_8_BITS, OptimizerCase, Options
from ranks import run_ranks
from sharded import (
    assert_shards_of,
    distributed_param,
    ends_of,
    gathered,
    groups_of,
    step_with,
)
from sharded import fsdp_weights as weights
from test_foreign_checkpoints import load
from test_fsdp1 import _model, _step
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict as set_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Shard

import torchao8
from torchao8 import AdamW, AdamW8bit, _implementation, ops
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors, to_torch
from torchao8.optim._state.formats import FORMATS
from torchao8.state_bits import CUT_ROWS

MULAW_KEYS = [
    "step",
    "exp_avg_mulaw",
    "exp_avg_mulaw_scale",
    "exp_avg_sq_mulaw",
    "exp_avg_sq_mulaw_scale",
]
# The options that give 8-bit parameters each format.
KINDS: dict[str, Options] = {
    "float32": {"optim_bits": 32},
    "dynamic": {"state_format": "dynamic"},
    "mulaw": {"state_format": "mulaw"},
    "4bit": {"optim_bits": 4},
}


def adamw(params: Any, **options: Any) -> AdamW8bit:
    return AdamW8bit(params, **{"lr": 0.01, "min_8bit_size": SMALL, "seed": 3, **options})


def trained(steps: int = 3, shapes: Any = SHAPES, **options: Any) -> AdamW8bit:
    params = make_params(shapes=shapes)
    optimizer = adamw(params, **options)
    train(optimizer, params, range(steps))
    return optimizer


def params_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def loaded(optimizer: Any, saved: dict[str, Any]) -> list[str]:
    """Loads a copy, and returns the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        optimizer.load_state_dict(copy.deepcopy(saved))
    return [str(w.message) for w in told]


# -- the option ----------------------------------------------------------------------------------


def test_the_tables_know_every_format() -> None:
    assert list(FORMATS) == ["float32", *(each.name for each in ops.FORMATS)] == list(KINDS)
    assert {"dynamic", *(form.name for form in FORMAT_CASES)} == {each.name for each in ops.FORMATS}
    for form in FORMAT_CASES:
        assert FORMATS[form.name].keys_of("x") == form.keys("x")


def test_keys_shapes_and_the_parameters_that_keep_32_bits() -> None:
    optimizer = trained(state_format="mulaw")
    for p in params_of(optimizer):
        state = optimizer.state[p]
        if p.numel() < SMALL:
            assert list(state) == ["step", "exp_avg", "exp_avg_sq"]
            continue
        assert list(state) == MULAW_KEYS
        for name in ("exp_avg", "exp_avg_sq"):
            codes, scale = state[f"{name}_mulaw"], state[f"{name}_mulaw_scale"]
            assert (codes.dtype, codes.shape) == (torch.uint8, p.shape)
            assert scale.shape == torchao8.block_layout.scale_shape(p.shape, 256)


def test_groups_have_formats_of_their_own() -> None:
    params = make_params(shapes=[(40, 70), (40, 70), (40, 70)])
    groups = [
        {"params": [params[0]]},
        {"params": [params[1]], "state_format": "dynamic"},
        {"params": [params[2]], "optim_bits": 32},
    ]
    optimizer = adamw(groups, state_format="mulaw")
    train(optimizer, params, range(2))
    firsts = [list(optimizer.state[p])[1] for p in params]
    assert firsts == ["exp_avg_mulaw", "exp_avg_codes", "exp_avg"]
    alone = [adamw([q], **o) for q, o in zip(
        make_params(shapes=[(40, 70)] * 3), (KINDS["mulaw"], {}, KINDS["float32"]), strict=True
    )]  # fmt: skip
    others = [p for each in alone for p in params_of(each)]
    for seed in range(2):
        set_grads(others, seed)
        for each in alone:
            each.step()
    assert [bits(p) for p in params] == [bits(p) for p in others]


def test_32_bit_state_has_no_format() -> None:
    """As with block_size: a parameter that keeps 32 bits has no codes."""
    optimizer = trained(state_format="mulaw", optim_bits=32)
    assert_same_training(optimizer, trained(optim_bits=32))
    for group in optimizer.param_groups:
        group["state_format"] = "mulaw"
    set_grads(params_of(optimizer), 5)
    optimizer.step()


@pytest.mark.parametrize("value", ["log", "4bit", "float32", None, 1, ["mulaw"]], ids=str)
@pytest.mark.parametrize("case", OF_8_BITS, ids=lambda case: case.cls.__name__)
def test_an_unknown_format_is_refused(case: OptimizerCase, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        case.make(make_params(), state_format=value)
    assert str(error.value) == f"state_format: expected 'dynamic' or 'mulaw', got {value!r}"


@pytest.mark.parametrize("case", OF_8_BITS, ids=lambda case: case.cls.__name__)
def test_4_bits_are_an_option_of_some_rules(case: OptimizerCase) -> None:
    """The message names them."""
    bare = {each.cls.__name__.removesuffix("4bit") for each in OF_4_BITS}
    name = case.cls.__name__.removesuffix("8bit")
    if name in bare:
        params = make_params()
        optimizer = case.make(params, optim_bits=4, min_8bit_size=SMALL)
        train(optimizer, params, [0])
        assert list(optimizer.state[params[0]]) == case.state_keys(4)
        return
    with pytest.raises(ValueError) as error:
        case.make(make_params(), optim_bits=4)
    assert str(error.value) == (
        f"optim_bits: expected 8 or 32, got 4: {name} has no state of 4 bits. "
        "Adam, AdamW, Lion and SGD have"
    )
    assert set(re.findall(r"[A-Z]\w+", str(error.value).split(". ")[1])) == bare


def test_4_bits_changed_after_the_first_step_are_refused() -> None:
    """Also the block size, which codes of 4 bits follow where a row of another dimension starts."""
    params = make_params(shapes=[(4, 6, 80)])
    optimizer = torchao8.AdamW4bit(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    assert optimizer.state[params[0]]["exp_avg_4bit"].shape == (4, 6, 40)
    for option, value in {"block_size": 128, "optim_bits": 8}.items():
        before = optimizer.param_groups[0][option]
        optimizer.param_groups[0][option] = value
        with pytest.raises(RuntimeError, match=f"already has 4-bit state, .*{option}={value}"):
            optimizer.step()
        optimizer.param_groups[0][option] = before
    optimizer.step()


@pytest.mark.parametrize(("was", "now"), [("mulaw", "dynamic"), ("dynamic", "mulaw")])
def test_a_format_changed_after_the_first_step_is_refused(was: str, now: str) -> None:
    optimizer = trained(state_format=was)
    optimizer.param_groups[0]["state_format"] = now
    set_grads(params_of(optimizer), 3)
    before = all_bits(optimizer)
    has = "8-bit state (mulaw)" if was == "mulaw" else "8-bit state"
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert str(error.value) == (
        f"AdamW8bit: parameter 0 (of shape [3, 300]) already has {has}, scales [3, 2], but its "
        f"group now says state_format={now!r} (it was {was!r}). Set that back. To change it, make "
        "a new optimizer and load the state dict of this one, which converts the state"
    )
    assert all_bits(optimizer) == before
    optimizer.param_groups[0]["state_format"] = was
    optimizer.step()


CHANGED: list[tuple[Options, Options, str]] = [
    ({}, {"optim_bits": 32}, "optim_bits=32 (it was 8)"),
    ({}, {"optim_bits": 4}, "optim_bits=4 (it was 8)"),
    (
        {"optim_bits": 4},
        {"optim_bits": 8, "block_size": 512},
        "optim_bits=8 (it was 4), block_size=512 (it was 256)",
    ),
    (
        {"optim_bits": 32},
        {"optim_bits": 8},
        "optim_bits=8, min_8bit_size=100, block_size=256, by which it would have 8 bits",
    ),
    (
        {"min_8bit_size": 5000},
        {"min_8bit_size": 900},
        "optim_bits=8, min_8bit_size=900, block_size=256, by which it would have 8 bits",
    ),
    ({}, {"min_8bit_size": 901}, "min_8bit_size=901 (it was 900 or less)"),
    ({}, {"block_size": 64}, "block_size=64 (it was 256)"),
    ({"block_size": 64}, {"block_size": 256}, "block_size=256 (it was 64)"),
    ({"block_size": 1024}, {}, "block_size=256 (it was 512 or 1024 or 2048)"),
    ({}, {"block_wise": False}, "block_wise=False (it was True)"),
    ({"block_wise": False}, {"block_wise": True}, "block_wise=True (it was False)"),
    (
        {"state_format": "mulaw"},
        {"state_format": "dynamic", "block_size": 64},
        "state_format='dynamic' (it was 'mulaw'), block_size=64 (it was 256)",
    ),
]


@pytest.mark.parametrize(("was", "now", "said"), CHANGED)
def test_the_option_that_was_changed_is_named(was: Options, now: Options, said: str) -> None:
    options = {"optim_bits": 8, "min_8bit_size": 100, "block_size": 256}
    params = make_params(shapes=[(3, 300)])
    optimizer = AdamW8bit(params, **{**options, **was})
    train(optimizer, params, [0])
    optimizer.param_groups[0].update({**options, **now})
    set_grads(params, 1)
    with pytest.raises(RuntimeError) as error:
        optimizer.step()
    assert f" but its group now says {said}. Set that back. " in str(error.value)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own
def test_a_compiled_step_refuses_it_too() -> None:
    optimizer = trained(state_format="mulaw")
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    set_grads(params_of(optimizer), 3)
    step()
    optimizer.param_groups[0]["state_format"] = "dynamic"
    before = all_bits(optimizer)
    with pytest.raises(Exception, match=r"already has 8-bit state \(mulaw\).*Set that back"):
        step()
    assert all_bits(optimizer) == before


def test_a_pickle_without_the_option_is_dynamic() -> None:
    optimizer = trained()
    for group in (*optimizer.param_groups, optimizer.defaults):
        del group["state_format"]
    again = copy.deepcopy(optimizer)
    assert again.param_groups[0]["state_format"] == again.defaults["state_format"] == "dynamic"
    train(again, params_of(again), [3])


# -- devices that lack a format ------------------------------------------------------------------


@contextmanager
def lacks_mulaw() -> Iterator[None]:
    """A device whose steps are portable, and made by an older library, say."""
    _implementation.choose_portable("cpu")
    asked, ops._takes_format = ops._takes_format, lambda *arguments: False
    try:
        yield
    finally:
        ops._takes_format = asked
        _implementation.choose_portable("cpu", False)


NOT_THERE = (
    "AdamW8bit: parameter 0: state_format='mulaw' is not there on cpu, where the PyTorch operators "
    "of a step take 'dynamic'"
)


@pytest.mark.parametrize("portable", [False, True])
def test_ops_are_asked_for_the_format(portable: bool) -> None:
    cpu = torch.device("cpu")
    try:
        _implementation.choose_portable("cpu", portable)
        for op in ops.STEP_OPS:
            assert ops.takes_format(op, "dynamic", cpu)
            assert ops.takes_format(op, "mulaw", cpu)
    finally:
        _implementation.choose_portable("cpu", False)
    with lacks_mulaw():
        assert not ops.takes_format(op, "mulaw", cpu)


def test_a_refusal_of_something_else_is_none_of_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """An op that refuses every call, whatever its words: nobody knows then, and it is told."""

    def broken(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no memory is left for a state_format or anything")

    ops._takes_format.cache_clear()
    monkeypatch.setattr(ops, "_STEP_OPS", dict.fromkeys(ops.STEP_OPS, broken))
    with pytest.raises(RuntimeError, match="no memory is left"):
        ops.takes_format("adam_step_", "mulaw", torch.device("cpu"))


def test_a_refusal_is_known_in_any_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer does not hang on the words of the op's error."""

    def reworded(*arguments: Any, state_format: int, **options: Any) -> None:
        if state_format:
            raise RuntimeError("only one kind of codes here")

    ops._takes_format.cache_clear()
    monkeypatch.setattr(ops, "_STEP_OPS", dict.fromkeys(ops.STEP_OPS, reworded))
    assert not ops.takes_format("adam_step_", "mulaw", torch.device("cpu"))
    ops._takes_format.cache_clear()


def test_a_device_without_the_format_makes_no_state() -> None:
    params = make_params()
    optimizer = adamw(params, state_format="mulaw")
    set_grads(params, 0)
    before = all_bits(optimizer)
    with lacks_mulaw(), pytest.raises(NotImplementedError) as error:
        optimizer.step()
    assert str(error.value) == NOT_THERE
    assert all_bits(optimizer) == before


def test_a_device_without_the_format_steps_none_of_it() -> None:
    """State that has moved there; nor the groups before it."""
    params = make_params(shapes=[(40, 70), (40, 70)])
    optimizer = adamw([{"params": params[:1], "state_format": "dynamic"}, {"params": params[1:]}])
    optimizer.param_groups[1]["state_format"] = "mulaw"
    train(optimizer, params, range(2))
    again = adamw([{"params": params[:1]}, {"params": params[1:], "state_format": "mulaw"}])
    again.load_state_dict(optimizer.state_dict())
    set_grads(params, 2)
    before = all_bits(again)
    message = "parameter 1: state_format='mulaw' is not"
    with lacks_mulaw(), pytest.raises(NotImplementedError, match=message):
        again.step()
    assert all_bits(again) == before
    again.step()


def test_a_device_without_the_format_loads_none_of_it() -> None:
    saved = trained(state_format="mulaw").state_dict()
    optimizer = adamw(make_params(), state_format="mulaw")
    before = all_bits(optimizer)
    with lacks_mulaw(), pytest.raises(NotImplementedError) as error:
        optimizer.load_state_dict(saved)
    assert str(error.value) == NOT_THERE
    assert all_bits(optimizer) == before


# -- from one format to another ------------------------------------------------------------------

HOW = {
    ("float32", "dynamic"): "in 32 bits, and is rounded to 8",
    ("float32", "mulaw"): "in 32 bits, and is rounded to 8 (mulaw)",
    ("dynamic", "float32"): "in 8 bits, and is kept in 32 from here on",
    ("mulaw", "float32"): "in 8 bits (mulaw), and is kept in 32 from here on",
    ("dynamic", "mulaw"): "with state_format='dynamic', and is rounded to 'mulaw'",
    ("mulaw", "dynamic"): "with state_format='mulaw', and is rounded to 'dynamic'",
    ("float32", "4bit"): "in 32 bits, and is rounded to 4",
    ("dynamic", "4bit"): "in 8 bits, and is rounded to 4",
    ("mulaw", "4bit"): "in 8 bits (mulaw), and is rounded to 4",
    ("4bit", "float32"): "in 4 bits, and is kept in 32 from here on",
    ("4bit", "dynamic"): "in 4 bits, and is rounded to 8",
    ("4bit", "mulaw"): "in 4 bits, and is rounded to 8 (mulaw)",
}


def rounded(value: Tensor, kind: str, signed: bool, squares: Tensor | None = None) -> Tensor:
    """What a tensor becomes in a format, in blocks.

    Args:
        squares: the second moments of a first one, which 4 bits of it are relative to.
    """
    if kind == "float32":
        return value
    options: Any = {"signed": signed, "state_format": kind}
    if kind == "4bit" and squares is not None:
        stored = rounded(squares, kind, False)
        roots = torch.where(stored > 0, stored.sqrt(), 1.0)
        return rounded(value * (1 / roots), kind, True) * roots
    codes, scale = ops.quantize_blockwise(value, **options)
    return ops.dequantize_blockwise(codes, scale, **options, shape=value.shape)


def conversions() -> list[Any]:
    """Each format to each other, for the optimizers and the kinds of scales that both have."""
    return [
        pytest.param(
            case, was, now, each, id=f"{case.cls.__name__}-{was}-{now}-{'one-scale' * (not each)}"
        )
        for was, now in itertools.permutations(KINDS, 2)
        for case in OF_8_BITS
        for each in (True, False)
        if "4bit" not in (was, now) or (each and case.cls._has_4bit)
    ]


@pytest.mark.parametrize(("case", "was", "now", "block_wise"), conversions())
def test_every_format_becomes_every_other(
    case: OptimizerCase, was: str, now: str, block_wise: bool
) -> None:
    """With one warning, to the numbers that the codes stand for, rounded to nearest."""
    options = {"min_8bit_size": SMALL, **case.full, "block_wise": block_wise}
    params = make_params()
    source = case.make(params, **options, **KINDS[was])
    train(source, params, range(3))
    target = case.make(make_params(), **options, **KINDS[now])
    told = loaded(target, source.state_dict())
    assert told == [
        f"{case.cls.__name__}: the state of parameter 0 (of shape [3, 300]) and 5 more was saved "
        f"{HOW[was, now]}. The options of this optimizer (optim_bits, min_8bit_size, block_size, "
        "state_format, block_wise) or the sharding of its parameters decide that"
    ]
    assert target.param_groups[0]["optim_bits"] == KINDS[now].get("optim_bits", 8)
    assert target.param_groups[0]["state_format"] == KINDS[now].get("state_format", "dynamic")
    mends = case.rule == "rmsprop"  # v >= a^2 of what is rounded
    for p, q in zip(params_of(source), params_of(target), strict=True):
        theirs, ours = source.moments(p), target.moments(q)
        assert theirs.keys() == ours.keys()
        for name, value in theirs.items():
            if p.numel() < SMALL or (now == "float32" and not mends):
                assert bits(ours[name]) == bits(value)
            elif block_wise and not mends:
                squares = theirs.get("exp_avg_sq") if name == "exp_avg" else None
                assert bits(ours[name]) == bits(rounded(value, now, case.is_signed(name), squares))
            elif not mends:
                largest = float(value.abs().max())
                assert ((ours[name] - value).abs() <= 0.07 * value.abs() + 0.01 * largest).all()
    again = case.make(make_params(), **options, **KINDS[now])
    assert loaded(again, target.state_dict()) == []
    train(again, params_of(again), [3])
    train(target, params_of(target), [3])
    assert [target.state[p].keys() for p in params_of(target)] == [
        again.state[p].keys() for p in params_of(again)
    ]
    for p, q in zip(params_of(target), params_of(again), strict=True):
        assert all(bits(v) == bits(again.state[q][k]) for k, v in target.state[p].items())


@pytest.mark.parametrize("kind", ["mulaw", "4bit"])
@pytest.mark.parametrize("writer", ["bitsandbytes", "torchao"])
def test_other_libraries(writer: str, kind: str) -> None:
    """What they saved in 8 bits is read as dynamic state, then rounded to the format here."""
    parameters = load(writer)
    saved = {
        "state": {i: each["state"] for i, each in enumerate(parameters)},
        "param_groups": [{"params": list(range(len(parameters))), "betas": (0.9, 0.999)}],
    }
    shapes = [each["shape"] for each in parameters]
    wide, there = (
        AdamW8bit(make_params(shapes=shapes), min_8bit_size=SMALL, **options)
        for options in (KINDS["float32"], KINDS[kind])
    )
    loaded(wide, saved)
    told = loaded(there, saved)
    # One warning for what was read in 8 bits, and one for what was read in 32.
    assert sum(HOW["dynamic", kind] in text for text in told) == 1
    assert sum(HOW["float32", kind] in text for text in told) <= 1
    for p, q in zip(params_of(wide), params_of(there), strict=True):
        moments = wide.moments(p)
        for name, value in moments.items():
            squares = moments["exp_avg_sq"] if name == "exp_avg" else None
            small = p.numel() < SMALL
            want = value if small else rounded(value, kind, name == "exp_avg", squares)
            assert bits(there.moments(q)[name]) == bits(want)


@pytest.mark.parametrize("kind", ["mulaw", "4bit"])
def test_torch_goes_on_from_it(kind: str) -> None:
    ours = trained(**KINDS[kind])
    theirs = torch.optim.AdamW(make_params())
    theirs.load_state_dict(to_torch(ours))
    for p, q in zip(params_of(ours), params_of(theirs), strict=True):
        for name, value in ours.moments(p).items():
            assert bits(theirs.state[q][name]) == bits(value)
    back = adamw(make_params(), **KINDS[kind])
    assert len(loaded(back, theirs.state_dict())) == 1


@every_pair()
def test_moments_are_the_numbers_of_the_oracle(case: OptimizerCase, form: Any) -> None:
    params = make_params()
    optimizer = case.make(params, min_8bit_size=SMALL, **case.full, **form.options)
    train(optimizer, params, range(2))
    for p in params:
        for name, value in optimizer.moments(p).items():
            want, _ = decoded(case, form, optimizer.state[p], name, tuple(p.shape))
            assert bits(value) == bits(want.float())


def test_an_accumulator_begins_with_its_initial_value() -> None:
    """Which need not be a power of two, as the scales that steps leave."""
    params = make_params(shapes=[(40, 70), (40, 70)])
    options: Any = {"min_8bit_size": SMALL, "initial_accumulator_value": 0.1}
    optimizer = torchao8.Adagrad8bit(params, state_format="mulaw", **options)
    set_grads(params[:1], 0)
    optimizer.step()
    assert (optimizer.moments(params[1])["sum"] == torch.tensor(0.1)).all()
    again = torchao8.Adagrad8bit(params, state_format="mulaw", **options)
    assert loaded(again, optimizer.state_dict()) == []
    assert_same_training(again, optimizer)


def test_a_resting_momentum_wakes_in_its_format() -> None:
    params = make_params(shapes=[(40, 70)])
    optimizer = torchao8.SGD8bit(params, lr=0.1, min_8bit_size=SMALL, state_format="mulaw")
    train(optimizer, params, [0])
    assert list(optimizer.state[params[0]]) == ["step"]
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer, params, [1])
    keys = ["momentum_buffer_mulaw", "momentum_buffer_mulaw_scale"]
    assert list(optimizer.state[params[0]]) == ["step", *keys]


# -- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mulaw", "4bit"])
def test_safetensors(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("numpy")
    optimizer = trained(**KINDS[kind])
    save_safetensors(optimizer, tmp_path / "state")
    same, other = adamw(make_params(), **KINDS[kind]), adamw(make_params())
    load_safetensors(same, tmp_path / "state")
    assert all_bits(same)["states"] == all_bits(optimizer)["states"]
    with pytest.warns(UserWarning, match=re.escape(HOW[kind, "dynamic"])):
        load_safetensors(other, tmp_path / "state")


def _through_dcp(rank: int, world_size: int, written: str, folder: Path) -> None:
    """Saved in one format, by load_dcp read as each of them; and torch's own way mixes nothing."""
    import torch.distributed.checkpoint as dcp

    model = weights(init_device_mesh("cpu", (world_size,)))
    source = adamw(groups_of(model.parameters(), True), **KINDS[written])
    step_with(source, range(2))
    saved = get_optimizer_state_dict(model, source)
    dcp.save({"optimizer": saved}, checkpoint_id=folder)
    for kind, options in KINDS.items():
        target = adamw(groups_of(model.parameters(), True), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if kind == written else "ignore")
            load_dcp(model, target, folder)
        if kind == written:
            assert gathered(target) == gathered(source)
        for p in params_of(target):
            assert list(target.state[p])[1] in FORMATS[kind].keys_of("exp_avg") or (
                list(target.state[p]) == ["step", "exp_avg", "exp_avg_sq"]
            )
    other = adamw(groups_of(model.parameters(), True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_state(model, other, saved)
    assert "exp_avg_codes" in other.state[params_of(other)[0]]


@pytest.mark.parametrize("kind", ["mulaw", "4bit"])
def test_folders_of_distributed_checkpoint(kind: str, tmp_path: Path) -> None:
    run_ranks(2, _through_dcp, kind, tmp_path)


def _fsdp1(rank: int, world_size: int) -> None:
    """In every format that it rounds anew."""
    for kind, gap in (("mulaw", 2.0**-4), ("4bit", 2.0**-18)):
        _through_fsdp1(kind, gap)


def _through_fsdp1(kind: str, gap: float) -> None:
    fsdp = FullyShardedDataParallel
    model = _model()
    optimizer = adamw(model.parameters(), **KINDS[kind])
    _step(model, optimizer, 0)
    saved = fsdp.optim_state_dict(model, optimizer)
    assert set(saved["state"]["0.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    again = adamw(model.parameters(), **KINDS[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again.load_state_dict(fsdp.optim_state_dict_to_load(model, again, saved))
    for p in model.parameters():
        if not p.numel():
            continue
        assert again.state[p].keys() == optimizer.state[p].keys()
        for name, value in optimizer.moments(p).items():
            off = (again.moments(p)[name] - value).abs()
            largest = value.abs().max()
            assert (off <= gap * (value.abs() + largest / 128)).all()


def test_fsdp1() -> None:
    run_ranks(2, _fsdp1)


# -- 4 bits: rows that shards split --------------------------------------------------------------

# Two ranks have 512 and 511 columns of the first, whole blocks and bytes. Of the second they have
# 64 and 32 elements of a row of 96, whole blocks too, but torch gives each half of the 48 bytes.
SPLIT = ((40, 1023), (40, 3, 32))


def split(params: Any, world_size: int) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (world_size,))
    return [distributed_param(p, mesh, [Shard(1)]) for p in params]


def _split_along_rows(rank: int, world_size: int, ends: bytes) -> None:
    params = split(make_params(shapes=SPLIT), world_size)
    optimizer = torchao8.AdamW4bit(params, lr=0.01, seed=3, min_8bit_size=SMALL)
    expected = {CUT_ROWS: ("parameter 1",)}
    assert optimizer.memory().kept_32bit == expected
    with pytest.warns(UserWarning, match="cuts its 4-bit codes, two elements to a byte.* or over"):
        step_with(optimizer, range(1))
    step_with(optimizer, range(1, 3))
    assert_shards_of(optimizer, ends, "4 bits")
    assert list(optimizer.state[params[1]]) == ["step", "exp_avg", "exp_avg_sq"]
    in_8_bits = AdamW8bit(params, block_size=64, min_8bit_size=SMALL)
    assert in_8_bits.memory().kept_32bit == {}
    # State of 4 bits of all of it is kept in 32 where it is cut.
    whole = torchao8.AdamW4bit(make_params(shapes=SPLIT), lr=0.01, seed=3, min_8bit_size=SMALL)
    step_with(whole, range(3))
    told = loaded(optimizer, whole.state_dict())
    assert len(told) == 1
    assert "parameter 1 (of shape [40, 3, 32]) was saved in 4 bits, and is kept in 32" in told[0]
    for name, value in optimizer.moments(params[1]).items():
        assert bits(value.full_tensor()) == bits(whole.moments(params_of(whole)[1])[name])


def test_splits_along_rows_keep_whole_bytes() -> None:
    params = make_params(shapes=SPLIT)
    groups = [{"params": params[:1]}, {"params": params[1:], "optim_bits": 32}]
    optimizer = torchao8.AdamW4bit(groups, lr=0.01, seed=3, min_8bit_size=SMALL)
    step_with(optimizer, range(3))
    run_ranks(2, _split_along_rows, ends_of(optimizer))


# -- damaged checkpoints -------------------------------------------------------------------------


def damaged(key: str, change: Any) -> dict[str, Any]:
    kind = "4bit" if "4bit" in key else "mulaw"
    saved = copy.deepcopy(trained(shapes=DAMAGED, **KINDS[kind]).state_dict())
    change(saved["state"][2 if kind == "4bit" else 1][key])
    return saved


def fill(place: Any, value: float) -> Any:
    def change(t: Tensor) -> None:
        t[place] = value

    return change


# The third one has rows of odd length.
DAMAGED = ((3, 300), (40, 70), (4, 131))
POWERS = "expected powers of two, as steps leave them, got"
DAMAGE = {
    "nan": ("exp_avg_mulaw_scale", fill((3, 0), float("nan")), "expected finite numbers"),
    "negative": ("exp_avg_mulaw_scale", fill((3, 0), -1.0), "expected numbers >= 0, got -1.0"),
    "minus zero": ("exp_avg_sq_mulaw_scale", fill((3, 0), -0.0), "expected numbers >= 0, got -0.0"),
    "no power": ("exp_avg_sq_mulaw_scale", fill((3, 0), 0.75), f"{POWERS} 0.75"),
    "too fine": (
        "exp_avg_mulaw_scale",
        fill((3, 0), 1 + 2.0**-8),
        "expected numbers of 7 mantissa bits, as steps leave them, got 1.00390625",
    ),
    "zero code": (
        "exp_avg_sq_mulaw",
        fill((3, 0), 0),
        "expected codes of 0 in all blocks of scale 0 and in no others, got some that are not so",
    ),
    "zero scale": (
        "exp_avg_sq_mulaw_scale",
        fill((3, 0), 0.0),
        "expected codes of 0 in all blocks of scale 0 and in no others, got some that are not so",
    ),
    "4 bits, no power": ("exp_avg_sq_4bit_scale", fill((3, 0), 0.75), f"{POWERS} 0.75"),
    "4 bits, negative": (
        "exp_avg_sq_4bit_scale",
        fill((3, 0), -1.0),
        "expected numbers >= 0, got -1.0",
    ),
    "4 bits, infinite": (
        "exp_avg_4bit_scale",
        fill((3, 0), float("inf")),
        "expected finite numbers",
    ),
    "large": (
        "exp_avg_sq_mulaw_scale",
        fill((3, 0), 2.0**126),
        "expected scales below 2^126, as steps leave them, got 8.507059173023462e+37",
    ),
    "4 bits, large": (
        "exp_avg_4bit_scale",
        fill((3, 0), -(2.0**127)),
        "expected scales below 2^126, as steps leave them, got -1.7014118346046923e+38",
    ),
    "4 bits, no scale of squares": (
        "exp_avg_sq_4bit_scale",
        fill((3, 0), 0.0),
        "expected codes of 0 in all blocks of scale 0, got some that are not so",
    ),
    "4 bits, no scale": (
        "exp_avg_4bit_scale",
        fill((0, 0), 0.0),
        "expected codes of 7 in all blocks of scale 0, got some that are not so",
    ),
    "4 bits, behind a row": (
        "exp_avg_4bit",
        fill((2, -1), 0x87),
        "expected the half byte 7 behind each row, which is of no element, got another one",
    ),
    "4 bits, behind a row of squares": (
        "exp_avg_sq_4bit",
        fill((2, -1), 0x13),
        "expected the half byte 0 behind each row, which is of no element, got another one",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_refused(name: str, kind: str) -> None:
    """As it is, and where it would be converted."""
    key, change, message = DAMAGE[name]
    optimizer = trained(shapes=DAMAGED, **KINDS[kind])
    before = all_bits(optimizer)
    with pytest.raises(ValueError) as error:
        loaded(optimizer, damaged(key, change))
    told = key.removesuffix("_scale") if "scale 0" in message else key
    which = 2 if "4bit" in key else 1
    assert str(error.value).startswith(f"{told} of parameter {which}: {message}")
    assert all_bits(optimizer) == before


@pytest.mark.parametrize("kind", ["dynamic", "mulaw", "4bit"])
@pytest.mark.parametrize("number", [2.0**126, -3.4e38])
def test_numbers_that_no_step_keeps_are_not_rounded(number: float, kind: str) -> None:
    """Float32 state has them. In fewer bits the next step would take them for no numbers."""
    optimizer = trained(**KINDS[kind])
    before = all_bits(optimizer)
    saved = copy.deepcopy(trained(optim_bits=32).state_dict())
    saved["state"][1]["exp_avg"][0, 5] = number
    with pytest.raises(ValueError) as error:
        loaded(optimizer, saved)
    assert str(error.value) == (
        f"exp_avg of parameter 1: expected numbers below 2^126, as it is rounded to "
        f"{KINDS[kind].get('optim_bits', 8)} bits, got {saved['state'][1]['exp_avg'][0, 5].item()};"
        " optim_bits=32 keeps it"
    )
    assert all_bits(optimizer) == before


def test_keys_of_two_formats_are_refused() -> None:
    optimizer = trained(state_format="mulaw")
    saved = optimizer.state_dict()
    mixed = copy.deepcopy(saved)
    mixed["state"][1].update(trained().state_dict()["state"][1])
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match=r"keys of 8-bit \(mulaw\) and of 8-bit state: torch's"):
        optimizer.load_state_dict(mixed)
    assert all_bits(optimizer) == before


# -- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_wise", [True, False])
def test_it_takes_what_was_estimated(block_wise: bool) -> None:
    shapes = [(300, 333), (64, 70), (100_001,), (5,)]
    params = make_params(shapes=shapes)
    optimizer = AdamW8bit(params, state_format="mulaw", block_wise=block_wise)
    options: Any = {"block_wise": block_wise, "optimizer": "AdamW8bit"}
    estimated = torchao8.estimate(shapes, state_format="mulaw", **options)
    assert optimizer.memory().total == estimated.state_8bit
    train(optimizer, params, [0])
    memory = optimizer.memory()
    assert memory.total == estimated.state_8bit
    assert (memory.tensors_8bit, memory.pending) == (3, 0)
    assert memory.moments_8bit == 2 * sum(p.numel() for p in params[:3])
    with pytest.raises(ValueError, match="state_format: expected 'dynamic' or 'mulaw', got 'log'"):
        torchao8.estimate(shapes, state_format="log")


def test_4_bits_take_what_was_estimated() -> None:
    """Rows of even and of odd length, a flat tensor; at most 1.13 bytes a parameter for Adam."""
    shapes = [(300, 333), (512, 1024), (64, 3, 7, 7), (100_001,), (5,)]
    params = make_params(shapes=shapes)
    optimizer = torchao8.AdamW4bit(params)
    estimated = torchao8.estimate(shapes)
    assert optimizer.memory().total == estimated.state_4bit == estimated.checkpoint_4bit
    train(optimizer, params, [0])
    memory = optimizer.memory()
    assert memory.total == estimated.state_4bit
    assert (memory.tensors_4bit, memory.tensors_8bit, memory.pending) == (4, 0, 0)
    assert memory.moments_4bit == 2 * (300 * 167 + 512 * 512 + 64 * 74 + 50_001)
    assert "4-bit moments" in str(memory)
    assert torchao8.estimate([(4096, 4096)]).state_4bit <= 1.13 * 4096**2
    assert torchao8.estimate(shapes, optimizer="RMSprop").state_4bit is None
    assert torchao8.estimate(shapes, block_wise=False).state_4bit is None


def test_the_constants_are_those_of_the_kernels() -> None:
    """The tables here are the oracle's, which the op must agree with."""
    codes = torch.arange(256, dtype=torch.uint8)
    for signed in (True, False):
        got = ops.dequantize_blockwise(
            codes, torch.ones(1), signed=signed, state_format="mulaw"
        ).double()
        assert torch.equal(got, formats.codebook(LAW, signed))


def test_torch_classes_of_32_bits_take_the_option() -> None:
    """For a group that turns 8 bits on."""
    params = make_params(shapes=[(40, 70)])
    optimizer = AdamW([{"params": params, "optim_bits": 8}], state_format="mulaw", min_8bit_size=0)
    train(optimizer, params, [0])
    assert list(optimizer.state[params[0]]) == MULAW_KEYS


@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit"])
def test_a_format_changed_behind_a_compiled_step_is_refused(name: str) -> None:
    p = torch.nn.Parameter(torch.zeros(64, 128))
    p.grad = torch.ones_like(p)
    optimizer = getattr(torchao8, name)([p], min_8bit_size=0)
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    optimizer.step()
    step()
    optimizer.param_groups[0]["state_format"] = "mulaw"
    with pytest.raises(Exception, match="state_format"):
        step()
