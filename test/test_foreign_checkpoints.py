"""State of bitsandbytes, torchao and torch.optim, read as ours: Adam's, which all of them have.

The other classes of bitsandbytes are in test_foreign_family.py.

test/data/foreign holds what the real packages saved: tools/make_foreign_checkpoints.py.
"""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, report, train
from optim_table import OptimizerCase, every_adam
from torch import Tensor

from torchao8 import Adam8bit, AdamW, AdamW8bit, ops
from torchao8.block_layout import scale_shape
from torchao8.interop.foreign import to_own, who_wrote

ROOT = Path(__file__).resolve().parent.parent
ADAM = {"exp_avg": True, "exp_avg_sq": False}  # whether they are signed
AMSGRAD = {**ADAM, "max_exp_avg_sq": False}
NESTED = "__bnb_optimizer_quant_state__"
LABEL = "parameter 3 (layer.weight)"
KEYS_8BIT = ["step", "exp_avg_codes", "exp_avg_scale", "exp_avg_sq_codes", "exp_avg_sq_scale"]
KEYS_32BIT = ["step", "exp_avg", "exp_avg_sq"]


class OptimState8bit:
    """The attributes of the class of torchao, which is known by this name."""

    def __init__(self, parts: dict[str, Any]) -> None:
        self.codes, self.scale, self.qmap = parts["codes"], parts["scale"], parts["qmap"]
        self.signed = parts["signed"]


class OptimState4bit:
    """A class of torchao that has no format here."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def dequantize(self) -> Tensor:
        return self.values


def load(name: str) -> list[dict[str, Any]]:
    """The parameters of a file, with torchao's tensors as objects again."""
    file = torch.load(ROOT / "test" / "data" / "foreign" / f"{name}.pt", weights_only=True)
    for parameter in file["parameters"]:
        state = parameter["state"]
        for key, value in state.items():
            if isinstance(value, dict) and value.get("class") == "OptimState8bit":
                state[key] = OptimState8bit(value)
    parameters: list[dict[str, Any]] = file["parameters"]
    return parameters


def saved(name: str, *shape: int) -> dict[str, Any]:
    """The state of the parameter of this shape."""
    (found,) = [p["state"] for p in load(name) if p["shape"] == list(shape)]
    state: dict[str, Any] = found
    return state


def bnb(*shape: int) -> dict[str, Any]:
    """The layout of older versions: nothing nested."""
    state = saved("bitsandbytes", *shape)
    return {"step": state["step"], **state[NESTED]}


def read(state: dict[str, Any], *shape: int, states: Any = ADAM, block_size: int = 256) -> Any:
    return to_own(LABEL, state, shape, states, block_size)


def assert_same_bits(got: Tensor, want: Tensor) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.is_contiguous()
    assert bits(got) == bits(want)


def check(parameter: dict[str, Any], raw: dict[str, tuple[Tensor, Tensor]] | None) -> None:
    """Reads a parameter: into the given codes and scales, or else into the saved float32."""
    shape, moments = parameter["shape"], parameter["moments"]
    own = read(parameter["state"], *shape)
    assert own["step"].dtype == torch.float32
    assert own["step"].shape == ()
    assert own["step"] == 3
    if raw is None:
        assert list(own) == KEYS_32BIT
        for key, want in moments.items():
            assert_same_bits(own[key], want)
        return
    assert list(own) == KEYS_8BIT
    for (name, signed), (codes, scale) in zip(ADAM.items(), raw.values(), strict=True):
        assert_same_bits(own[f"{name}_codes"], codes)
        assert_same_bits(own[f"{name}_scale"], scale.reshape(scale_shape(shape, 256)))
        got = ops.dequantize_blockwise(own[f"{name}_codes"], own[f"{name}_scale"], signed=signed)
        # The maps differ by 6e-7 of an entry, which is 10 times its half ulp: theirs were rounded
        # at each of several operations. The products are rounded once more, by 6e-8 each.
        torch.testing.assert_close(got, moments[name], rtol=8e-7, atol=0)


def in_8bit(shape: list[int]) -> bool:
    """Of the shapes in the files, those that blocks of 256 elements of the whole tensor fit."""
    return tuple(shape) in ((4, 256), (2, 512), (600,), (8, 512))


# -- what the packages saved -------------------------------------------------------------------


@pytest.mark.parametrize("nested", [True, False])
def test_bitsandbytes(nested: bool) -> None:
    parameters = load("bitsandbytes")
    assert sum(in_8bit(p["shape"]) for p in parameters) == 3
    assert len(parameters) == 6
    for parameter in parameters:
        quantized = parameter["state"][NESTED]
        if not nested:
            parameter["state"] = {"step": parameter["state"]["step"], **quantized}
        assert who_wrote(parameter["state"]) == "bitsandbytes"
        raw = None
        if in_8bit(parameter["shape"]):
            raw = {i: (quantized[f"state{i}"], quantized[f"absmax{i}"]) for i in "12"}
        check(parameter, raw)


def test_torchao() -> None:
    big, odd_rows, small = load("torchao")
    assert who_wrote(big["state"]) == who_wrote(odd_rows["state"]) == "torchao"
    moments = {name: big["state"][name] for name in ADAM}
    check(big, {name: (m.codes, m.scale) for name, m in moments.items()})
    check(odd_rows, None)
    assert read(small["state"], 5, 30) is None  # plain float32, as torch.optim's and ours
    # Of a vector, the blocks are the same as those of the flattened tensor.
    for moment in moments.values():
        moment.codes = moment.codes.reshape(-1)
    vector = read(big["state"], 4096)
    assert list(vector) == KEYS_8BIT
    assert_same_bits(vector["exp_avg_scale"], moments["exp_avg"].scale)


@pytest.mark.parametrize("columns", [(8,), (4,), (4, 2)], ids=str)
def test_matrices_of_few_columns_stay_code_for_code(columns: tuple[int, ...]) -> None:
    """The packages save of one what they save of any tensor of as many elements."""
    theirs = bnb(2, 512)
    theirs |= {key: theirs[key].reshape(-1, *columns) for key in ("state1", "state2")}
    moments = {name: load("torchao")[0]["state"][name] for name in ADAM}
    for moment in moments.values():
        moment.codes = moment.codes.reshape(-1, *columns)
    of_torchao = {"step": torch.tensor(3.0), **moments}
    for state, raw in (
        (theirs, [(theirs[f"state{i}"], theirs[f"absmax{i}"]) for i in "12"]),
        (of_torchao, [(m.codes, m.scale) for m in moments.values()]),
    ):
        own = read(state, *raw[0][0].shape)
        assert list(own) == KEYS_8BIT
        for name, (codes, scale) in zip(ADAM, raw, strict=True):
            assert_same_bits(own[f"{name}_codes"], codes)
            assert_same_bits(own[f"{name}_scale"], scale)


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
def test_real_packages(name: str) -> None:
    """As the files, with the installed version, another vector and, of torchao, its own classes."""
    pytest.importorskip(name, reason=f"no {name}: pip install {name}")
    tool = load_tool()
    if name == "bitsandbytes":
        made = tool.make_bitsandbytes([(4, 512), (5000,), (64, 4, 3, 3), (5, 300), (5,)])
    else:
        made = tool.make_torchao([(16, 256), (5120,), (64, 4, 4, 4), (512, 9)])
        for parameter in made["parameters"]:
            for key in ("exp_avg", "exp_avg_sq"):
                parameter["state"][key] = rebuilt(parameter["state"][key])
    fits = []
    for parameter in made["parameters"]:
        own = read(parameter["state"], *parameter["shape"])
        fits.append("exp_avg_codes" in own)
        for key, signed in ADAM.items():
            want = parameter["moments"][key]
            if not fits[-1]:
                assert_same_bits(own[key], want)
                continue
            codes, scale = own[f"{key}_codes"], own[f"{key}_scale"]
            got = ops.dequantize_blockwise(codes, scale, signed=signed)
            torch.testing.assert_close(got, want, rtol=8e-7, atol=0)
    assert (
        fits == ([True, True, False, False, False], [True, True, False, False])[name == "torchao"]
    )


@pytest.mark.parametrize("cls", ["AdamW4bit", "AdamWFp8"])
def test_other_formats_of_torchao(cls: str) -> None:
    torchao_optim = pytest.importorskip("torchao.optim", reason="no torchao: pip install torchao")
    p = torch.nn.Parameter(torch.randn(16, 256))
    p.grad = torch.randn(16, 256)
    optimizer = getattr(torchao_optim, cls)([p])
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    own = read(state, 16, 256)
    assert list(own) == KEYS_32BIT
    for key in ADAM:
        assert_same_bits(own[key], state[key].dequantize())


def load_tool() -> ModuleType:
    path = ROOT / "tools" / "make_foreign_checkpoints.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rebuilt(parts: dict[str, Any]) -> Any:
    subclass_8bit = importlib.import_module("torchao.optim.subclass_8bit")
    arguments = {k: v for k, v in parts.items() if k != "class"}
    return getattr(subclass_8bit, parts["class"])(**arguments)


# -- other maps, blocks and dtypes -------------------------------------------------------------


def test_another_map_is_read_through_it() -> None:
    """Codes of another map are other numbers: a linear one gives its own values, in float32."""
    state = bnb(4, 256)
    state["qmap1"] = torch.linspace(-1, 1, 256)
    own = read(state, 4, 256)
    assert list(own) == KEYS_32BIT
    codes, scale = state["state1"], state["absmax1"]
    assert_same_bits(own["exp_avg"], state["qmap1"][codes.int()] * scale[:, None])
    # The other moment comes along, with the map it has.
    assert_same_bits(
        own["exp_avg_sq"], state["qmap2"][state["state2"].int()] * state["absmax2"][:, None]
    )
    # 2e-6 off in one entry is another map; what rounding makes of ours is not.
    for error, key in ((2e-6, "exp_avg"), (2e-7, "exp_avg_codes")):
        state = bnb(4, 256)
        state["qmap1"][200] += error
        assert key in read(state, 4, 256)


def test_another_block_size_here() -> None:
    """The saved blocks are of 256 elements; an optimizer of other blocks gets the numbers."""
    want = {tuple(p["shape"]): p["moments"] for p in load("bitsandbytes")}
    for shape in ((4, 256), (600,)):
        for block_size in (64, 128, 512):
            own = read(bnb(*shape), *shape, block_size=block_size)
            assert list(own) == KEYS_32BIT
            assert_same_bits(own["exp_avg"], want[shape]["exp_avg"])


@pytest.mark.parametrize("size", [64, 256, 2048])
def test_block_size_follows_from_the_number_of_blocks(size: int) -> None:
    """Older versions of bitsandbytes had blocks of 2048 elements. 5000 leave a short last block."""
    state = bnb(600)
    for i in "12":
        state[f"state{i}"] = torch.arange(5000).remainder(256).to(torch.uint8)
        state[f"absmax{i}"] = torch.arange(1.0, 1 - (-5000 // size))
    own = read(state, 5000, block_size=size)
    assert_same_bits(own["exp_avg_codes"], state["state1"])
    assert_same_bits(own["exp_avg_scale"], state["absmax1"])
    own = read(state, 5000, block_size=128)
    scale = state["absmax2"][torch.arange(5000) // size]
    assert_same_bits(own["exp_avg_sq"], state["qmap2"][state["state2"].int()] * scale)


def test_one_short_block_is_a_block_of_any_size() -> None:
    state = bnb(600)
    for i in "12":
        state[f"state{i}"] = state[f"state{i}"][:200].clone()
        state[f"absmax{i}"] = state[f"absmax{i}"][:1].clone()
    for block_size in (256, 512, 2048):
        assert list(read(state, 200, block_size=block_size)) == KEYS_8BIT
    assert list(read(state, 200, block_size=64)) == KEYS_32BIT
    for i in "12":  # one row of two dimensions, though no block divides it
        state[f"state{i}"] = state[f"state{i}"].reshape(1, 200)
    assert read(state, 1, 200)["exp_avg_scale"].shape == (1, 1)


def test_one_block_a_tensor() -> None:
    """block_wise=False of older versions: max1 is current, new_max1 is left from before."""
    state = bnb(4, 256)
    for i in "12":
        del state[f"absmax{i}"]
        state |= {f"max{i}": torch.tensor([3.0]), f"new_max{i}": torch.tensor([7.0])}
    own = read(state, 4, 256)
    assert list(own) == KEYS_32BIT
    assert_same_bits(own["exp_avg"], state["qmap1"][state["state1"].int()] * 3.0)


def test_one_32bit_moment_makes_both_so() -> None:
    state = bnb(4, 256)
    state["state2"] = torch.rand(4, 256)
    own = read(state, 4, 256)
    assert list(own) == KEYS_32BIT
    assert_same_bits(own["exp_avg_sq"], state["state2"])


def test_4bit_is_read_by_its_own_class() -> None:
    values = torch.randn(4, 256)
    state = {"step": torch.tensor(3.0)}
    state |= {name: OptimState4bit(values) for name in ADAM}  # type: ignore[misc]
    own = read(state, 4, 256)
    assert_same_bits(own["exp_avg"], values)


def test_nothing_saved_is_changed() -> None:
    for name in ("bitsandbytes", "torchao"):
        for parameter in load(name):
            before = copy.deepcopy(parameter["state"])
            read(parameter["state"], *parameter["shape"])
            assert text(parameter["state"]) == text(before)


def text(state: Any) -> Any:
    """Something that == compares to the bit."""
    if isinstance(state, Tensor):
        return (state.dtype, state.shape, bits(state))
    if isinstance(state, OptimState8bit):
        return text(vars(state))
    if isinstance(state, dict):
        return {k: text(v) for k, v in state.items()}
    return state


def checkpoint_of(name: str, groups: dict[str, Any]) -> dict[str, Any]:
    """A whole state dict of the package, as its optimizer would give it."""
    states = [p["state"] for p in load(name)]
    group = {"lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1, **groups}
    return {
        "state": dict(enumerate(states)),
        "param_groups": [{**group, "params": list(range(len(states)))}],
    }


@pytest.mark.parametrize("name", ["bitsandbytes", "torchao"])
@pytest.mark.parametrize("cls", [AdamW8bit, AdamW])
def test_load_state_dict_knows_them(name: str, cls: Any, device: str) -> None:
    """Options and state; in 8 bits code for code where blocks allow it, or else rounded anew."""
    shapes = [p["shape"] for p in load(name)]
    params = make_params(torch.bfloat16, shapes=shapes, device=device)
    optimizer = cls(params, min_8bit_size=SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(checkpoint_of(name, {"t_alpha": None}))
    told = [str(w.message) for w in caught]
    assert len(told) == 1
    assert ("in 32 bits, and is rounded to 8" if cls is AdamW8bit else "in 8 bits") in told[0]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    for p, parameter in zip(params, load(name), strict=True):
        own = read(parameter["state"], *parameter["shape"]) or parameter["state"]
        state = optimizer.state[p]
        assert state["step"] == 3
        for moment, signed in ADAM.items():
            if cls is AdamW and moment in own:
                assert_same_bits(state[moment].cpu(), own[moment])
            elif cls is AdamW8bit and f"{moment}_codes" in own:
                assert_same_bits(state[f"{moment}_codes"].cpu(), own[f"{moment}_codes"])
                assert_same_bits(state[f"{moment}_scale"].cpu(), own[f"{moment}_scale"])
            elif f"{moment}_codes" in state:
                codes, _ = ops.quantize_blockwise(own[moment], signed=signed)
                assert_same_bits(state[f"{moment}_codes"].cpu(), codes)
    train(optimizer, params, [0])


def test_the_decay_of_bitsandbytes_is_told(device: str) -> None:
    """Its Adam decays as AdamW does."""
    params = make_params(shapes=[p["shape"] for p in load("bitsandbytes")], device=device)
    optimizer = Adam8bit(params, min_8bit_size=SMALL)
    with pytest.warns(UserWarning, match="decays weights decoupled"):
        optimizer.load_state_dict(checkpoint_of("bitsandbytes", {}))


def test_damage_changes_nothing(device: str) -> None:
    shapes = [p["shape"] for p in load("bitsandbytes")]
    params = make_params(shapes=shapes, device=device)
    optimizer = AdamW8bit(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    before, spoiled = all_bits(optimizer), checkpoint_of("bitsandbytes", {})
    spoiled["state"][3][NESTED]["absmax2"][0] = float("nan")
    with pytest.raises(ValueError, match=r"absmax2 of parameter 3"):
        optimizer.load_state_dict(spoiled)
    assert all_bits(optimizer) == before


# -- torch.optim and our own -------------------------------------------------------------------


@every_adam()
def test_our_own_state_is_none_of_it(case: OptimizerCase) -> None:
    params = make_params()
    optimizer = case.make(params, min_8bit_size=SMALL, amsgrad=True)
    train(optimizer, params, [0])
    for p, state in optimizer.state.items():
        assert who_wrote(state) is None
        assert read(state, *p.shape, states=AMSGRAD) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_torch_in_the_dtype_of_the_parameter(dtype: torch.dtype) -> None:
    (p,) = make_params(dtype, shapes=[(8, 256)])
    optimizer = torch.optim.AdamW([p], amsgrad=True)
    train(optimizer, [p], range(2))
    state = optimizer.state_dict()["state"][0]
    assert state["exp_avg"].dtype == dtype
    assert who_wrote(state) is None
    own = read(state, 8, 256, states=AMSGRAD)
    if dtype == torch.float32:
        assert own is None
        return
    assert list(own) == list(state)
    assert own["step"] == 2
    for name in AMSGRAD:
        assert_same_bits(own[name], state[name].float())


# -- damage ------------------------------------------------------------------------------------


def changed(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**state, **changes}


def without(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in state.items() if k not in keys}


def part(name: str, **changes: Any) -> dict[str, Any]:
    """torchao's state with one moment changed."""
    state = saved("torchao", 8, 512)
    vars(state[name]).update(changes)
    return state


def bad_states() -> list[tuple[dict[str, Any], tuple[int, ...], Any]]:
    good, ao = bnb(4, 256), saved("torchao", 8, 512)
    negative, infinite = good["absmax2"].clone(), good["absmax1"].clone()
    negative[1], infinite[2] = -0.5, float("inf")
    by_torch = [
        (without(good, "state2", "qmap2", "absmax2"), ADAM),  # Lion
        (good, AMSGRAD),
        (good, {"exp_avg": True}),
        (changed(good, extra=1), ADAM),
        (changed(good, step=None), ADAM),
        (changed(good, step=2.5), ADAM),
        (without(good, "qmap1"), ADAM),
        (without(good, "absmax2"), ADAM),
        (changed(good, qmap1=good["qmap2"], qmap2=good["qmap1"]), ADAM),
        (changed(good, qmap2=good["qmap1"]), ADAM),
        (changed(good, qmap1=good["qmap1"][:16]), ADAM),
        (changed(good, qmap1=good["qmap1"] * float("nan")), ADAM),
        (changed(good, absmax1=infinite), ADAM),
        (changed(good, absmax2=negative), ADAM),
        (changed(good, absmax1=torch.ones(3)), ADAM),
        (changed(good, absmax1=torch.ones(())), ADAM),
        (changed(good, absmax1=good["absmax1"].double()), ADAM),
        (changed(good, state1=good["state1"].reshape(-1)), ADAM),
        (changed(good, state1=good["state1"].bfloat16()), ADAM),
        (changed(good, state1=good["state1"].reshape(256, 4).t()), ADAM),
        ({"step": 3, NESTED: torch.ones(3)}, ADAM),
        ({"step": 3, NESTED: {"absmax1": torch.ones(3)}}, ADAM),
    ]
    wrong_scale = ao["exp_avg"].scale.clone()
    wrong_scale[0] = float("nan")
    by_torchao = [
        (without(ao, "exp_avg_sq"), ADAM),
        (ao, AMSGRAD),
        (without(ao, "step"), ADAM),
        (part("exp_avg", signed=False), ADAM),
        (part("exp_avg_sq", scale=wrong_scale), ADAM),
        (part("exp_avg", scale=torch.ones(15)), ADAM),
        (part("exp_avg", codes=torch.zeros(8, 256, dtype=torch.uint8)), ADAM),
        (part("exp_avg_sq", qmap=ao["exp_avg"].qmap), ADAM),
        (changed(ao, exp_avg_sq=torch.ones(8)), ADAM),
        (changed(ao, exp_avg=OptimState4bit(torch.full((8, 512), float("nan")))), ADAM),
        (changed(ao, exp_avg=OptimState4bit(torch.ones(3))), ADAM),
    ]
    return [(state, (4, 256), states) for state, states in by_torch] + [
        (state, (8, 512), states) for state, states in by_torchao
    ]


def test_damaged_state(assert_expected_inline: Callable[[str, str], None]) -> None:
    lines = []
    for state, shape, states in bad_states():
        with pytest.raises(ValueError) as info:
            read(state, *shape, states=states)
        assert LABEL in str(info.value)
        lines.append(str(info.value))
    assert_expected_inline(
        report(lines),
        """\
state of parameter 3 (layer.weight): expected state1 and state2 of bitsandbytes, for exp_avg
    and exp_avg_sq, got state1. Another optimizer than this one saved it.
state of parameter 3 (layer.weight): expected state1 and state2 and state3 of bitsandbytes,
    for exp_avg and exp_avg_sq and max_exp_avg_sq, got state1 and state2. bitsandbytes takes
    amsgrad=True and ignores it: load with amsgrad=False.
state of parameter 3 (layer.weight): expected state1 of bitsandbytes, for exp_avg, got state1
    and state2. Another optimizer than this one saved it.
state of parameter 3 (layer.weight): expected the keys of bitsandbytes, got ['extra'] too
step of parameter 3 (layer.weight): expected a number, got nothing
step of parameter 3 (layer.weight): expected a whole number from 0 to 2^24 - 1, got 2.5
qmap1 of parameter 3 (layer.weight): expected torch.float32 of shape [256], got nothing
absmax2 of parameter 3 (layer.weight): expected torch.float32 in one dimension, got nothing
qmap1 of parameter 3 (layer.weight): expected numbers of both signs, for a first moment, got
    numbers >= 0
qmap2 of parameter 3 (layer.weight): expected numbers >= 0, for a second moment, got numbers
    of both signs
qmap1 of parameter 3 (layer.weight): expected torch.float32 of shape [256], got torch.float32
    of shape [16]
qmap1 of parameter 3 (layer.weight): expected finite numbers, got some that are not
absmax1 of parameter 3 (layer.weight): expected finite numbers, got some that are not
absmax2 of parameter 3 (layer.weight): expected numbers >= 0, got -0.5
absmax1 of parameter 3 (layer.weight): expected 4 numbers for blocks of 256 elements, or 1 for
    2048, got 3
absmax1 of parameter 3 (layer.weight): expected torch.float32 in one dimension, got
    torch.float32 of shape []
absmax1 of parameter 3 (layer.weight): expected torch.float32 in one dimension, got
    torch.float64 of shape [4]
state1 of parameter 3 (layer.weight): expected torch.uint8 or torch.float32 of shape [4, 256],
    got torch.uint8 of shape [1024]
state1 of parameter 3 (layer.weight): expected torch.uint8 or torch.float32 of shape [4, 256],
    got torch.bfloat16 of shape [4, 256]
state1 of parameter 3 (layer.weight): expected a contiguous tensor, got strides [1, 4].
    bitsandbytes fills it in the order of memory on a GPU, but in that of the elements on the
    CPU, which does not show. Of a GPU: state1 = state1.as_strided(state1.shape,
    torch.empty(state1.shape).stride()); of the CPU: state1 = state1.contiguous().
__bnb_optimizer_quant_state__ of parameter 3 (layer.weight): expected a dict, got Tensor
state of parameter 3 (layer.weight): expected state1 and state2 of bitsandbytes, for exp_avg
    and exp_avg_sq, got none. Another optimizer than this one saved it.
state of parameter 3 (layer.weight): expected the keys ['step', 'exp_avg', 'exp_avg_sq'] of
    torchao, got ['step', 'exp_avg']
state of parameter 3 (layer.weight): expected the keys ['step', 'exp_avg', 'exp_avg_sq',
    'max_exp_avg_sq'] of torchao, got ['step', 'exp_avg', 'exp_avg_sq']
step of parameter 3 (layer.weight): expected a number, got nothing
exp_avg.signed of parameter 3 (layer.weight): expected True, got False
exp_avg_sq.scale of parameter 3 (layer.weight): expected finite numbers, got some that are not
exp_avg.scale of parameter 3 (layer.weight): expected a number of scales that divides the 4096
    elements, got 15
exp_avg.codes of parameter 3 (layer.weight): expected torch.uint8 of shape [8, 512], got
    torch.uint8 of shape [8, 256]
exp_avg_sq.qmap of parameter 3 (layer.weight): expected numbers >= 0, for a second moment, got
    numbers of both signs
exp_avg_sq of parameter 3 (layer.weight): expected torch.float32 or torch.bfloat16 or
    torch.float16 of shape [8, 512], got torch.float32 of shape [8]
exp_avg of parameter 3 (layer.weight): expected a OptimState4bit of finite numbers, got some
    not
exp_avg of parameter 3 (layer.weight): expected torch.float32 of shape [8, 512], got
    torch.float32 of shape [3]""",
    )
