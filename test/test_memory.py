"""``memory``: to the byte what the state takes, before and after the first step; and its log."""

import logging
import math
import tempfile
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import SHAPES, SMALL, make_params, reset_compiler, train
from optim_table import OPTIMIZERS, OptimizerCase, every_option_set
from ranks import run_ranks
from sharded import Weights, distributed_param, fsdp_weights, step_with
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import torchao8
from torchao8 import _tables
from torchao8._messages import describe
from torchao8.checkpoint import load_dcp
from torchao8.optim._state import memory, paging
from torchao8.sharding import local
from torchao8.state_bits import CUT_ROWS, OPTION, SHARDED_VECTOR, SHORT_ROWS, TOO_SMALL

# Of AdamW8bit: 8 bits for the first three.
MODEL = ((64, 300), (5000,), (9, 16, 40), (30,), ())


def bytes_of(optimizer: Any, *endings: str) -> int:
    """Of the tensors of state whose keys end so, what of them lies on this rank."""
    return sum(
        local(value).nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if key.endswith(endings)
    )


# -- bytes ---------------------------------------------------------------------------------------


@every_option_set()
def test_every_class(case: OptimizerCase, options: dict[str, Any]) -> None:
    """Before the first step and after it: what there is, and what the estimate says."""
    options = {**case.base, **options, "min_8bit_size": SMALL}
    params = make_params(shapes=SHAPES)
    shapes = [tuple(p.shape) for p in params]
    optimizer = case.make(params, **options)
    planned = optimizer.memory()
    assert not optimizer.state
    train(optimizer, params, range(1))
    found = optimizer.memory()
    assert planned == replace(found, pending=found.total)
    assert found.pending == found.paged == 0
    assert found.total == bytes_of(optimizer, "")
    assert found.places == {"cpu": found.total}
    known = torchao8.estimate(shapes, optimizer=case.cls.__name__, **options)
    assert found.state_32bit == known.state_32bit
    assert found.total == (known.state_8bit if case.optim_bits == 8 else known.state_32bit)


@pytest.mark.parametrize("cls", [torchao8.AdamW8bit, torchao8.NAdam8bit])
@pytest.mark.parametrize("block_wise", [True, False])
def test_kinds(cls: Any, block_wise: bool) -> None:
    params = make_params(shapes=MODEL)
    optimizer = cls(params, percentile_clipping=5, block_wise=block_wise)
    train(optimizer, params, range(1))
    found = optimizer.memory()
    assert found.optimizer == cls.__name__
    assert found.moments_8bit == bytes_of(optimizer, "_codes") > 0
    assert found.scales == bytes_of(optimizer, "_scale") > 0
    assert found.moments_32bit == bytes_of(optimizer, "exp_avg", "exp_avg_sq") > 0
    assert found.numbers == bytes_of(optimizer, "step", "mu_product") > 0
    assert found.norms == bytes_of(optimizer, "grad_norms") == 400 * len(MODEL)
    elements = sum(map(math.prod, MODEL))
    assert (found.tensors, found.tensors_8bit, found.elements) == (5, 3, elements)
    assert found.state_32bit == found.numbers + found.norms + 8 * elements
    assert not found.is_sharded


def test_reasons_by_name() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(100, 64), "layer": nn.Linear(64, 100), "norm": nn.LayerNorm(7)}
    )
    optimizer = torchao8.AdamW8bit(torchao8.param_groups(model))
    small = ("layer.bias", "norm.weight", "norm.bias")
    assert optimizer.memory().kept_32bit == {OPTION: ("embedding.weight",), TOO_SMALL: small}
    # A parameter that was appended to the list of a group has no name.
    (*_, last) = optimizer.param_groups
    last["params"].append(nn.Parameter(torch.ones(3)))
    assert optimizer.memory().kept_32bit[TOO_SMALL] == (*small, "parameter 5")
    assert describe(optimizer, last["params"][-1]) == "parameter 5"
    unnamed = torchao8.AdamW8bit(model.parameters())
    assert unnamed.memory().kept_32bit == {TOO_SMALL: ("parameter 2", "parameter 3", "parameter 4")}


def test_what_is_not_counted() -> None:
    """Frozen parameters, and what others keep; SGD without momentum keeps no 32 bits."""
    p, frozen = make_params(shapes=[(64, 300), (64, 300)])
    optimizer = torchao8.SGD8bit([p, frozen.requires_grad_(False)], min_8bit_size=10**6)
    train(optimizer, [p], range(1))
    optimizer.state[p]["slow"] = torch.ones(64, 300)
    found = optimizer.memory()
    assert (found.tensors, found.total, found.kept_32bit) == (1, 4, {})
    # A parameter that is not frozen any more, and momentum: both come with the next step.
    frozen.requires_grad_(True)
    optimizer.param_groups[0]["momentum"] = 0.9
    found = optimizer.memory()
    assert found.tensors == 2
    assert found.pending > 0
    train(optimizer, [p, frozen], range(1))
    assert optimizer.memory().kept_32bit == {TOO_SMALL: ("parameter 0", "parameter 1")}


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = nn.Linear(64, 300)
    found = torchao8.AdamW8bit(model.parameters()).memory()
    assert found.places == {"meta": found.total}
    assert found.pending == found.total == torchao8.estimate(model).state_8bit


@pytest.mark.parametrize("in_folder", [False, True])
def test_paged(in_folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paging, "LEAST", 1000)
    params = make_params(shapes=MODEL)
    folder = str(tmp_path) if in_folder else ""
    optimizer = torchao8.PagedAdamW8bit(params, page_dir=folder)
    planned = optimizer.memory()
    train(optimizer, params, range(1))
    found = optimizer.memory()
    assert planned == replace(found, pending=found.total)
    place = f"paged, in {folder or tempfile.gettempdir()}"
    assert found.places == {place: found.paged, "cpu": found.total - found.paged}
    assert found.paged == found.moments_8bit + found.scales > 0
    assert f"{place}: " in str(found)


# -- sharded -------------------------------------------------------------------------------------


def _sharded(rank: int, world_size: int, shapes: Any) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (world_size,))
    model = fsdp_weights(mesh)
    (cut,) = make_params(shapes=[(10, 300)])
    model.cut = distributed_param(cut, mesh, [Shard(1)])
    optimizer = torchao8.AdamW8bit(model.named_parameters(), min_8bit_size=SMALL)
    planned = optimizer.memory()
    step_with(optimizer, range(1))
    found = optimizer.memory()
    assert planned == replace(found, pending=found.total)
    assert found.total == bytes_of(optimizer, "")
    assert found.elements == sum(local(p).numel() for p in model.parameters())
    assert found.state_32bit == 8 * found.elements + 4 * found.tensors
    assert found.is_sharded
    assert "on this rank" in str(found)
    return asdict(found)


@pytest.mark.filterwarnings("ignore")
def test_sharded() -> None:
    """Uneven shards, vectors, short and cut rows: each rank tells of what it holds."""
    found = run_ranks(3, _sharded, None)
    assert len({each["moments_8bit"] for each in found}) > 1
    for each in found:
        assert each["kept_32bit"] == {
            SHARDED_VECTOR: ("w2",),
            TOO_SMALL: ("w5",),
            SHORT_ROWS: ("w6",),
            CUT_ROWS: ("cut",),
        }


# -- the table -----------------------------------------------------------------------------------

# Of (64, 300), (5000,) and (9, 16, 40) in 8 bits: 59,920 bytes of codes, 2 * 4 * (128 + 20 + 27) of
# scales. 26 elements in 32 bits.
TABLE = """\
AdamW8bit, state of 5 tensors, 29,986 elements: 60.11 KiB, in 32 bits 234.29 KiB
8-bit moments                  58.52 KiB
their scales                    1.37 KiB
32-bit moments                     208 B
step counts and other numbers       20 B
together                       60.11 KiB
32 bits: 2 of 5 (too small: parameter 3, ...)"""


def test_table() -> None:
    params = make_params(shapes=((64, 300), (5000,), (9, 16, 40), (25,), (1,)))
    optimizer = torchao8.AdamW8bit(params)
    lines = TABLE.splitlines()
    pending = "not there yet: all of it, which the next step makes"
    assert str(optimizer.memory()).splitlines() == [*lines[:-1], pending, lines[-1]]
    train(optimizer, params, range(1))
    assert str(optimizer.memory()) == TABLE
    optimizer.add_param_group({"params": make_params(shapes=[(1,)])})
    assert "not there yet: 12 B, which the next step makes" in str(optimizer.memory())
    with pytest.raises(FrozenInstanceError):
        optimizer.memory().tensors = 0  # type: ignore[misc]
    wide = str(torchao8.AdamW(make_params()).memory())
    assert "8-bit" not in wide
    assert OPTION not in wide
    assert "in 32 bits" not in wide


# -- the log -------------------------------------------------------------------------------------


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What the library logs from now on, as of those who ask for it."""

    class Lines(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(f"{record.levelname}: {record.getMessage()}")

    lines: list[str] = []
    handler, logger = Lines(), logging.getLogger("torchao8")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


def test_nothing_is_logged_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger("torchao8")
    assert logger.level == logging.NOTSET
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]

    def never(optimizer: Any) -> Any:
        raise AssertionError("the sizes were asked for")

    monkeypatch.setattr(memory, "memory_of", never)
    params = make_params()
    train(torchao8.AdamW8bit(params), params, range(2))


def test_one_line_for_new_state(records: list[str]) -> None:
    params = make_params(shapes=MODEL)
    optimizer = torchao8.AdamW8bit(params)
    optimizer.memory()
    assert records == []
    train(optimizer, params, range(1))
    line = str(optimizer.memory()).splitlines()[0]
    assert records == [f"INFO: {line}"]
    train(optimizer, params, range(3))
    assert len(records) == 1
    later = make_params(shapes=[(3, 300)])
    optimizer.add_param_group({"params": later})
    train(optimizer, [*params, *later], range(2))
    assert len(records) == 2
    assert "state of 6 tensors" in records[1]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_no_line_for_a_load(records: list[str], tmp_path: Path) -> None:
    """load_dcp makes state for a moment to learn the names of parameters."""
    model = Weights(shapes=MODEL[:3])
    optimizer = torchao8.AdamW8bit(model.parameters())
    step_with(optimizer, range(1))
    state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    records.clear()
    fresh = torchao8.AdamW8bit(model.parameters())
    load_dcp(model, fresh, tmp_path, no_dist=True)
    step_with(fresh, range(2))
    assert records == []


@pytest.mark.parametrize("case", OPTIMIZERS[:4], ids=lambda case: case.cls.__name__)
def test_under_torch_compile(case: OptimizerCase, records: list[str]) -> None:
    """One graph, one line, and no second trace."""
    reset_compiler()
    params = make_params(shapes=MODEL)
    optimizer = case.make(params, lr=torch.tensor(0.01))
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
    for i in range(4):
        for p in params:
            p.grad = torch.full_like(p, 0.1 * i)
        optimizer.param_groups[0]["lr"].fill_(0.01 * i)
        step()
        assert _told(records, optimizer)
    assert counter.frame_count == 1


def _told(records: list[str], optimizer: Any) -> bool:
    return records == [f"INFO: {str(optimizer.memory()).splitlines()[0]}"]


def test_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes alone: on a GPU it waits for nothing."""
    params = make_params(shapes=MODEL)
    optimizer = torchao8.AdamW8bit(params)
    train(optimizer, params, range(1))
    for name in ("item", "cpu", "tolist", "__float__", "__bool__", "to"):

        def refuse(self: Tensor, *args: Any, name: str = name) -> Any:
            raise AssertionError(name)

        monkeypatch.setattr(Tensor, name, refuse)
    assert optimizer.memory().tensors == len(MODEL)


def test_a_notebook_shows_the_table() -> None:
    optimizer = torchao8.AdamW8bit(make_params())
    assert repr(optimizer.memory()) == str(optimizer.memory())
    estimate = torchao8.estimate([(64, 64)])
    assert repr(estimate) == str(estimate)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (1000, "1000 B"), (1024, "1.00 KiB"), (2**20 - 1, "1.00 MiB")],
)
def test_sizes(nbytes: int, text: str) -> None:
    assert _tables.size(nbytes) == text
