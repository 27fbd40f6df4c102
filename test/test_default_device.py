"""No tensor that the library makes follows torch's default device or default dtype."""

import ast
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SMALL, all_bits, bits, make_params, set_grads, train
from optim_table import OptimizerCase, every_optimizer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import torchao8
from torchao8 import ops
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors, to_torch

PACKAGE = Path(torchao8.__file__).parent
# What takes the default device or dtype unless it is told another one.
CREATIONS = {
    *("arange", "as_tensor", "asarray", "empty", "empty_permuted", "empty_strided", "eye", "full"),
    *("linspace", "logspace", "ones", "rand", "randint", "randn", "randperm", "scalar_tensor"),
    *("tensor", "tril_indices", "triu_indices", "zeros", "range", "normal", "hann_window"),
    *("Tensor", "FloatTensor", "sparse_coo_tensor"),
}


def creations(source: str) -> Iterator[tuple[int, set[str]]]:
    """The line of each call of torch that makes a tensor, and which of its arguments are given."""
    for node in ast.walk(ast.parse(source)):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
            and node.func.value.id == "torch"
            and node.func.attr in CREATIONS
        ):
            yield node.lineno, {k.arg for k in node.keywords if k.arg is not None}


def test_every_creation_says_its_device_and_dtype() -> None:
    bare, found = [], 0
    for file in sorted(PACKAGE.rglob("*.py")):
        for line, given in creations(file.read_text()):
            found += 1
            if not {"device", "dtype"} <= given:
                bare.append(f"{file.relative_to(PACKAGE)}:{line}")
    assert found > 20
    assert bare == []


def test_the_scan_finds_what_it_should() -> None:
    text = "torch.zeros(3)\ntorch.ones(2, device=d)\ntorch.stack(x)\nx.new_zeros(2)\n"
    assert list(creations(text)) == [(1, set()), (2, {"device"})]


class Strange:
    """A default device or dtype for a while."""

    def __init__(self, device: str | None, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype

    def __enter__(self) -> None:
        self.before = torch.get_default_dtype()
        if self.dtype is not None:
            torch.set_default_dtype(self.dtype)
        self.mode = torch.device(self.device or "cpu")
        self.mode.__enter__()

    def __exit__(self, *error: object) -> None:
        self.mode.__exit__(*error)
        torch.set_default_dtype(self.before)


# A device that no number comes out of, and dtypes that are narrower and wider.
STRANGE = {
    "meta": lambda: Strange("meta", None),
    "bfloat16": lambda: Strange(None, torch.bfloat16),
    "float64": lambda: Strange(None, torch.float64),
}
every_strange = pytest.mark.parametrize("strange", list(STRANGE))
# Wider numbers come of the same calls as narrower ones.
every_strange_fast = pytest.mark.parametrize(
    "strange", ["meta", "bfloat16", pytest.param("float64", marks=pytest.mark.thorough)]
)

OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"percentile_clipping": 50, "stochastic_rounding": True},
    {"optim_bits": 8, "block_wise": False},
)


@every_optimizer()
@every_strange_fast
@pytest.mark.parametrize("options", OPTIONS, ids=["defaults", "clipping", "one scale"])
def test_steps(case: OptimizerCase, strange: str, options: dict[str, Any], device: str) -> None:
    """Construction, the first step and later ones, a scheduler's number: with the same bits."""
    params, twins = (make_params(torch.bfloat16, device=device) for _ in range(2))
    options = {"min_8bit_size": SMALL, **options}
    plain = case.make(twins, **options)
    with STRANGE[strange]():
        optimizer = case.make(params, **options)
    for seed in range(3):
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.01 / (seed + 1)
        set_grads(params, seed)
        with STRANGE[strange]():
            optimizer.step()
        train(plain, twins, [seed])
    assert all_bits(optimizer)["params"] == all_bits(plain)["params"]
    assert all_bits(optimizer)["states"] == all_bits(plain)["states"]


def by_state_dict(model: torch.nn.Module, old: Any, new: Any, folder: Path) -> None:
    new.load_state_dict(old.state_dict())


def by_safetensors(model: torch.nn.Module, old: Any, new: Any, folder: Path) -> None:
    save_safetensors(old, folder / "file")
    load_safetensors(new, folder / "file", model=model)


def by_dcp(model: torch.nn.Module, old: Any, new: Any, folder: Path) -> None:
    load_dcp(model, new, folder / "dcp", no_dist=True)


@every_optimizer()
@every_strange_fast
@pytest.mark.parametrize("road", [by_state_dict, by_safetensors, by_dcp])
def test_checkpoints(
    case: OptimizerCase, strange: str, road: Callable[..., None], tmp_path: Path
) -> None:
    """Saved and loaded, as it is and with a conversion to 32 bits, to blocks and to one scale."""
    model = torch.nn.Linear(300, 3, bias=not case.matrices)
    options: dict[str, Any] = {"min_8bit_size": SMALL, "percentile_clipping": 50}
    old = case.make(model.named_parameters(), **options)
    train(old, model.parameters(), [0])
    saved = {"optimizer": get_optimizer_state_dict(model, old)}
    dcp.save(saved, checkpoint_id=tmp_path / "dcp", no_dist=True)
    changes: tuple[dict[str, Any], ...] = (
        {},
        {"optim_bits": 40 - case.optim_bits},
        {"optim_bits": 8, "block_wise": False},
    )
    for change in changes:
        wanted, new = (
            case.make(model.named_parameters(), **{**options, **change}) for _ in range(2)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # converted
            road(model, old, wanted, tmp_path)
            with STRANGE[strange]():
                road(model, old, new, tmp_path)
        assert all_bits(new)["states"] == all_bits(wanted)["states"]


@every_optimizer()
@every_strange
def test_to_and_from_torch(case: OptimizerCase, strange: str) -> None:
    """torch.optim's SGD counts no steps, and its state has no history of norms."""
    if case.torch_cls is None:
        pytest.skip("torch.optim has no such class")
    params = make_params(shapes=[(3, 300), (5,)])
    optimizer = case.make(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    theirs = to_torch(optimizer)
    fresh = case.make(params)
    with STRANGE[strange]():
        strange_theirs, unstepped = to_torch(optimizer), to_torch(fresh)
    assert states(strange_theirs) == states(theirs)
    assert states(unstepped) == states(to_torch(fresh))
    ours, strange_ours = (
        case.make(params, optim_bits=32, percentile_clipping=50) for _ in range(2)
    )
    ours.load_state_dict(theirs)
    with STRANGE[strange]():
        strange_ours.load_state_dict(theirs)
    assert all_bits(strange_ours)["states"] == all_bits(ours)["states"]


def states(saved: dict[str, Any]) -> dict[Any, Any]:
    return {
        index: {k: (v.dtype, v.device, bits(v)) for k, v in state.items()}
        for index, state in saved["state"].items()
    }


@every_strange
def test_functions(strange: str) -> None:
    def run() -> list[Any]:
        x = values
        codes, scale = torchao8.quantize_blockwise(x)
        results: list[Any] = [
            codes,
            scale,
            torchao8.dequantize_blockwise(codes, scale),
            torchao8.dynamic_map(),
            torchao8.dynamic_map(signed=False),
            ops.sum_squares([]),
            ops.norms(ops.sum_squares([x])),
            repr(torchao8.estimate(model)),
        ]
        return [(r.dtype, r.device, bits(r)) if isinstance(r, Tensor) else r for r in results]

    (values,) = make_params(shapes=[(3, 300)])
    model = torch.nn.Linear(300, 40)
    expected = run()
    with STRANGE[strange]():
        assert run() == expected


@pytest.mark.parametrize(
    "strange",
    ["meta", *(pytest.param(name, marks=pytest.mark.thorough) for name in ("bfloat16", "float64"))],
)
def test_a_compiled_step(strange: str, fresh_compiler: None) -> None:
    """Traced under it, and called without it afterwards."""
    params, twins = make_params(), make_params()
    options: dict[str, Any] = {"min_8bit_size": SMALL, "percentile_clipping": 50}
    optimizer, plain = torchao8.AdamW8bit(params, **options), torchao8.AdamW8bit(twins, **options)
    step = torch.compile(optimizer.step, fullgraph=True)
    for seed in range(3):
        set_grads(params, seed)
        if seed < 2:
            with STRANGE[strange]():
                step()
        else:
            step()
        train(plain, twins, [seed])
    assert all_bits(optimizer)["params"] == all_bits(plain)["params"]
