"""``torchao8.estimate``: to the byte what real optimizers keep. And its command."""

import inspect
import itertools
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import SHAPES, SMALL, as_matrix
from optim_table import OF_4_BITS, OPTIMIZERS, OptimizerCase
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import torchao8
from torchao8 import Estimate, estimate, shard_layout, sharding
from torchao8.__main__ import command
from torchao8._estimate_command import MODELS
from torchao8.estimate import class_names
from torchao8.state_bits import CUT_ROWS, OPTION, SHARDED_VECTOR, SHORT_ROWS, TOO_SMALL

PACKAGE = Path(torchao8.__file__).parent
Sizes = dict[str, int | None]
HAVE_4_BITS = {case.cls.__name__.removesuffix("4bit") for case in OF_4_BITS}


# -- against optimizers --------------------------------------------------------------------------


def model_of(shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.ParameterList([torch.zeros(shape, dtype=dtype) for shape in shapes])


def storage(tensors: Any) -> int:
    """Bytes of memory behind tensors, what of them lies on this rank."""
    return sum(sharding.local(t).untyped_storage().nbytes() for t in tensors)


def whole(tensors: Any) -> int:
    """Bytes of tensors once, wherever they lie."""
    return sum(t.numel() * t.itemsize for t in tensors)


def kept(model: nn.Module, cls: Any, **options: Any) -> list[Tensor]:
    """Every tensor of the state of an optimizer that has made a step."""
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer = cls(params, **options)
    optimizer.step()
    return [t for state in optimizer.state_dict()["state"].values() for t in state.values()]


def measured(model: nn.Module, optimizer: str = "AdamW", **options: Any) -> Sizes:
    """The fields of an estimate, of this rank, as real tensors have them."""
    state_32bit = kept(model, getattr(torchao8, optimizer), **options)
    state_8bit = kept(model, getattr(torchao8, f"{optimizer}8bit"), **options)
    state_4bit: list[Tensor] | None = None
    if optimizer in HAVE_4_BITS and options.get("block_wise", True):
        state_4bit = kept(model, getattr(torchao8, f"{optimizer}4bit"), **options)
    params = list(model.parameters())
    return {
        "parameters": sum(whole([sharding.local(p)]) for p in params),
        "gradients": sum(whole([sharding.local(p.grad)]) for p in params if p.grad is not None),
        "state_32bit": storage(state_32bit),
        "state_8bit": storage(state_8bit),
        "state_4bit": None if state_4bit is None else storage(state_4bit),
        "checkpoint_32bit": whole(state_32bit),
        "checkpoint_8bit": whole(state_8bit),
        "checkpoint_4bit": None if state_4bit is None else whole(state_4bit),
    }


FIELDS = ("parameters", "gradients", "state_32bit", "state_8bit", "state_4bit")


def fields(estimated: Estimate) -> Sizes:
    names = (*FIELDS, "checkpoint_32bit", "checkpoint_8bit", "checkpoint_4bit")
    return {name: getattr(estimated, name) for name in names}


# Matrices with short last blocks, convolutions, experts, vectors, a scalar, an empty one.
MIXED = ((70, 300), (64, 3, 7, 7), (33, 16, 3, 3), (3, 40, 260), (5000,), (100,), (9, 15), (0, 64))
ALL = (*MIXED, *SHAPES)
CASES: list[tuple[Any, torch.dtype, dict[str, Any]]] = [
    (ALL, torch.float32, {}),
    (ALL, torch.bfloat16, {"min_8bit_size": SMALL}),
    (ALL, torch.float16, {"min_8bit_size": 0, "block_size": 64}),
    (ALL, torch.float32, {"min_8bit_size": 1, "block_size": 2048}),
    (ALL, torch.bfloat16, {"min_8bit_size": 0, "block_wise": False}),
]


@pytest.mark.parametrize(("shapes", "dtype", "options"), CASES)
def test_state_of_real_optimizers(shapes: Any, dtype: torch.dtype, options: Any) -> None:
    """A module, the same on the meta device, its shapes and its names: the bytes of two steps."""
    model = model_of(shapes, dtype)
    expected = measured(model, **options)
    estimated = estimate(model, **options)
    assert fields(estimated) == expected
    assert vars(estimated.total) == {name: expected[name] for name in FIELDS}
    assert (estimated.ranks, estimated.tensors) == (1, len(shapes))
    assert estimated.elements == sum(map(math.prod, shapes))
    meta = model_of(shapes, dtype).to("meta")
    assert fields(estimate(meta, **options)) == expected
    assert fields(estimate(iter(shapes), dtype=dtype, **options)) == expected
    assert fields(estimate(list(model.parameters()), **options)) == expected
    names = {str(i): shape for i, shape in enumerate(shapes)}
    assert fields(estimate(names, dtype=dtype, **options)) == expected


OF_32_BITS = [case for case in OPTIMIZERS if case.optim_bits == 32]


@pytest.mark.parametrize("case", OF_32_BITS, ids=lambda case: case.cls.__name__)
def test_the_family(case: OptimizerCase) -> None:
    """Of every class, with each option that adds states, all of them, and a history of norms."""
    name, known = case.cls.__name__, {**case.base, **case.full}
    singles: list[dict[str, Any]] = [{option: value} for option, value in known.items()]
    shapes = ((70, 300), (5000,), (7,), ())
    model = model_of(tuple(map(as_matrix, shapes)) if case.matrices else shapes)
    clipped = {**known, "percentile_clipping": 5, "min_8bit_size": SMALL}
    for options in ({}, *singles, clipped, {**known, "block_wise": False}):
        expected = measured(model, name, **options)
        estimated = estimate(model, optimizer=name, **options)
        assert fields(estimated) == expected
        for each in (name, f"{name}8bit", f"Paged{name}", f"Paged{name}8bit", f"{name}4bit"):
            assert estimate([], optimizer=each).optimizer == estimated.optimizer == name
        stateless = expected["state_8bit"] == expected["state_32bit"]
        assert stateless == (bool(case.base) and not options)
        # What has no state does not keep any in 32 bits.
        assert bool(estimated.kept_32bit) != stateless


def test_every_class_can_be_estimated() -> None:
    assert sorted(class_names()) == sorted([*(c.cls.__name__ for c in OF_32_BITS), "MuonAdamW"])


def test_options_that_an_optimizer_lacks() -> None:
    """One that is off is as good as none, but not one that no optimizer has."""
    shapes = [(64, 64)]
    assert estimate(shapes, optimizer="Lion", amsgrad=False) == estimate(shapes, optimizer="Lion")
    with pytest.raises(ValueError, match="centered: Lion has no such option, leave it out"):
        estimate(shapes, optimizer="Lion", centered=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentun'"):
        estimate(shapes, optimizer="SGD", momentun=0)
    for options, message in (
        ({"amsgrad": 1}, "amsgrad: expected True or False, got 1"),
        ({"percentile_clipping": 0}, "percentile_clipping: expected an int from 1 to 99"),
        ({"optimizer": "SGD", "momentum": -1}, "momentum: expected a finite number >= 0, got -1"),
        ({"block_wise": 1}, "block_wise: expected True or False, got 1"),
        ({"optimizer": "Adamax"}, "optimizer: expected one of .*RMSprop, SGD, got 'Adamax'"),
    ):
        with pytest.raises(ValueError, match=message):
            estimate(shapes, **options)


def two_rules() -> nn.Module:
    """An embedding of more than 4,096 elements, hidden matrices of both sizes, experts, a head."""
    layers = (nn.Embedding(200, 48), nn.Linear(48, 120), nn.Linear(48, 20), nn.Linear(120, 64))
    net = nn.ModuleDict({"blocks": nn.ModuleList(layers[1:]), "table": layers[0]})
    net["lm_head"] = nn.Linear(64, 200)
    net["experts"] = nn.ParameterList([torch.zeros(3, 40, 260)])
    net.blocks[2].bias.requires_grad_(False)
    return net


@pytest.mark.parametrize("options", [{}, {"percentile_clipping": 5, "block_wise": False}], ids=str)
@pytest.mark.parametrize("in_32bit", [False, True])
def test_muon_beside_adamw(in_32bit: bool, options: dict[str, Any]) -> None:
    """The bytes of optimizers of the groups that param_groups makes; who trains what."""
    net = two_rules()
    for p in net.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    hidden = tuple(f"blocks.{i}.weight" for i in range(3))
    estimated = estimate(
        net, optimizer="PagedMuonAdamW8bit", embeddings_in_32bit=in_32bit, **options
    )
    assert estimated.optimizer == "MuonAdamW"
    assert estimated.muon == hidden
    for cls, nbytes in (
        (torchao8.MuonAdamW, estimated.state_32bit),
        (torchao8.MuonAdamW8bit, estimated.state_8bit),
    ):
        groups = torchao8.param_groups(net, muon=True, embeddings_in_32bit=in_32bit)
        optimizer = cls(groups, **options)
        optimizer.step()
        assert nbytes == storage(t for s in optimizer.state.values() for t in s.values())
    assert estimated.state_4bit is None
    again = {**options, "optimizer": "MuonAdamW", "embeddings_in_32bit": in_32bit}
    assert estimate(net.to("meta"), **again) == estimated
    assert str(estimated).endswith(
        "\nMuon: 3 of 10 (blocks.0.weight, ...); AdamW: the others"
    )  # fmt: skip


def test_muon_by_the_names_of_shapes() -> None:
    """Without names, all matrices are hidden ones but for those that are said not to be."""
    named = {"wte.weight": (500, 64), "h.0.w.weight": (64, 64), "head.weight": (500, 64), "b": (9,)}
    assert estimate(named, optimizer="MuonAdamW").muon == ("h.0.w.weight",)
    shapes = list(named.values())
    assert estimate(shapes, optimizer="MuonAdamW").muon == ("[0]", "[1]", "[2]")
    one = estimate(shapes, optimizer="MuonAdamW", embeddings_in_32bit=["[0]"])
    assert one.muon == ("[1]", "[2]")
    assert estimate(named).muon == ()
    assert "AdamW: the others" not in str(estimate([(9,)], optimizer="MuonAdamW"))


def test_muon_refuses_what_is_no_matrix() -> None:
    with pytest.raises(ValueError) as error:
        estimate({"w": (64, 64), "norm": (300,)}, optimizer="Muon8bit")
    assert str(error.value) == (
        "norm: expected a matrix, got the shape [300]. The optimizer MuonAdamW trains the rest by "
        "AdamW"
    )
    experts = [(4, 64, 64)]
    with pytest.raises(ValueError, match=r"\[0\]: expected a matrix.*higher_dims='batch' takes"):
        estimate(experts, optimizer="Muon")
    sizes = estimate(experts, optimizer="Muon", higher_dims="batch")
    assert sizes.state_32bit == 4 * 4 * 64 * 64 + 4
    frozen = nn.ParameterList([nn.Parameter(torch.ones(3), requires_grad=False)])
    assert estimate(frozen, optimizer="Muon").state_32bit == 0
    with pytest.raises(ValueError, match=r"^higher_dims: expected one of .*, got 'foo'$"):
        estimate(experts, optimizer="Muon", higher_dims="foo")


def test_32_bit_state_is_that_of_torch() -> None:
    model = model_of(ALL)
    assert estimate(model).state_32bit == storage(kept(model, torch.optim.AdamW))


def test_defaults_are_those_of_the_optimizer() -> None:
    ours, theirs = (inspect.signature(f).parameters for f in (estimate, torchao8.AdamW8bit))
    for name in ("min_8bit_size", "state_format", "block_wise", "percentile_clipping"):
        assert ours[name].default == theirs[name].default
    shapes = [(64, 300), (33, 16, 3, 3)]
    assert estimate(shapes, block_size=256).state_8bit == estimate(shapes).state_8bit
    assert estimate(shapes, block_size=64).state_4bit == estimate(shapes).state_4bit
    assert estimate(shapes, block_size=256).state_4bit < estimate(shapes).state_4bit


def test_frozen_and_tied_parameters() -> None:
    """Frozen ones have no gradient and no state, of whatever dtype; tied ones count once."""
    model = nn.Sequential(nn.Linear(300, 40), nn.Linear(300, 40), nn.Linear(40, 300))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    packed = torch.zeros(500, 16, dtype=torch.uint8)
    model[2].packed = nn.Parameter(packed, requires_grad=False)
    expected = measured(model)
    estimated = estimate(model)
    assert fields(estimated) == expected
    assert estimated.tensors == 6
    in_bfloat16 = estimate(model, dtype=torch.bfloat16)
    assert in_bfloat16.parameters == (expected["parameters"] - 8000) // 2 + 8000
    assert in_bfloat16.gradients == expected["gradients"] // 2
    assert in_bfloat16.state_8bit == expected["state_8bit"]


def test_why_32_bits() -> None:
    shapes = {"norm": (8192,), "bias": (8,), "scale": (), "lora": (4096, 8), "w": (64, 300)}
    small = ("bias", "scale")
    assert estimate(shapes).kept_32bit == {TOO_SMALL: small}
    assert estimate(shapes, 1).kept_32bit == {
        SHARDED_VECTOR: ("norm",), TOO_SMALL: small, SHORT_ROWS: ("lora",)
    }  # fmt: skip


def test_embeddings_in_32bit() -> None:
    """As in an optimizer of param_groups: by the model, or by the names of shapes."""
    model = nn.Sequential(
        nn.Embedding(300, 64), nn.Embedding(10, 64), nn.Linear(64, 300), nn.Linear(300, 20)
    )
    model[2].weight = model[0].weight  # tied, so an embedding
    estimated = estimate(model, embeddings_in_32bit=True)
    for bits, cls in ((32, torchao8.AdamW), (8, torchao8.AdamW8bit), (4, torchao8.AdamW4bit)):
        memory = cls(torchao8.param_groups(model)).memory()
        assert getattr(estimated, f"state_{bits}bit") == memory.total
    assert estimated.kept_32bit == {
        OPTION: ("0.weight", "1.weight"), TOO_SMALL: ("2.bias", "3.bias")
    }  # fmt: skip
    assert estimated.state_8bit > estimate(model).state_8bit
    assert estimate(model, embeddings_in_32bit=False) == estimate(model)
    names = ["0.weight", "1.weight"]
    shapes = dict(model.named_parameters())
    assert estimate(shapes, embeddings_in_32bit=names) == estimated
    model[0].weight.requires_grad_(False)
    assert estimate(model, embeddings_in_32bit=True).kept_32bit[OPTION] == ("1.weight",)


# -- sharded ---------------------------------------------------------------------------------------

UNEVEN = ((70, 300), (7, 640), (64, 3, 7, 7), (2, 40, 260), (5000,), (7,), (401, 16), (1, 5000))


def step_sharded(
    rank: int, world_size: int, mesh_shape: tuple[int, ...], options: dict[str, Any]
) -> tuple[Sizes, Sizes]:
    """What lies on this rank after a step, and what the sharded model itself is estimated at."""
    model = model_of(UNEVEN, torch.bfloat16)
    names = ("replicas", "shards")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    of_shapes = estimate(model, mesh, **options)  # not sharded yet
    fully_shard(model, mesh=mesh)
    assert of_shapes == estimate(model, **options)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return measured(model, **options), fields(estimate(model, **options))


FULL = {"optimizer": "RMSprop", "centered": True, "momentum": 0.9, "percentile_clipping": 5}


@pytest.mark.parametrize(
    ("mesh", "options"), [((1,), {}), ((2,), {}), ((3,), FULL), ((2, 2), FULL)], ids=str
)
def test_fully_sharded(mesh: tuple[int, ...], options: dict[str, Any]) -> None:
    """Rows that ranks share unevenly; replicas; the largest rank and the sum of all."""
    estimated = estimate(UNEVEN, mesh, dtype=torch.bfloat16, **options)
    of_ranks = run_ranks(math.prod(mesh), step_sharded, mesh, options)
    assert estimated.ranks == len(of_ranks)
    for sizes, of_model in of_ranks:
        assert of_model == fields(estimated)
        for name in ("checkpoint_32bit", "checkpoint_8bit", "checkpoint_4bit"):
            assert sizes[name] == getattr(estimated, name)
    for name in FIELDS:
        found = [sizes[name] for sizes, _ in of_ranks]
        if name == "state_4bit" and None in found:
            continue
        assert max(found) == getattr(estimated, name)
        assert sum(found) == getattr(estimated.total, name)
    if mesh in ((2,), (3,)):
        assert len({sizes["state_8bit"] for sizes, _ in of_ranks}) > 1
        assert estimate(UNEVEN, mesh[0], dtype=torch.bfloat16, **options) == estimated


class TensorParallel(nn.Module):
    """Parameters that are placed in several ways, of which two cut blocks, beside a plain one."""

    def __init__(self) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2,))

        def parameter(shape: tuple[int, ...], placement: Placement) -> nn.Parameter:
            return nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [placement]))

        self.columns = parameter((30, 1024), Shard(1))
        self.cut = parameter((30, 1000), Shard(1))
        self.experts = parameter((3, 5, 1024), Shard(1))
        self.cut_experts = parameter((3, 5, 1024, 40), Shard(3))
        self.copied = parameter((30, 300), Replicate())
        self.odd = parameter((30, 1023), Shard(1))
        self.vector = parameter((5000,), Replicate())
        self.plain = nn.Parameter(torch.zeros(5000))


def step_tensor_parallel(rank: int, world_size: int) -> tuple[Sizes, Estimate]:
    model = TensorParallel()
    with pytest.warns(UserWarning, match="cuts its blocks"):
        sizes = measured(model)
    with pytest.raises(ValueError, match="mesh: expected None, as columns is a DTensor"):
        estimate(model, 2)
    return sizes, estimate(model)


def test_tensor_parallel() -> None:
    """A module of DTensors counts as it is placed."""
    of_ranks = run_ranks(2, step_tensor_parallel)
    for _, estimated in of_ranks:
        assert estimated.kept_32bit == {
            CUT_ROWS: ("cut", "cut_experts"), SHARDED_VECTOR: ("vector",)
        }  # fmt: skip
        for name in FIELDS:
            found = [sizes[name] for sizes, _ in of_ranks]
            assert max(found) == getattr(estimated, name)
            assert sum(found) == getattr(estimated.total, name)
        for name in ("checkpoint_32bit", "checkpoint_8bit", "checkpoint_4bit"):
            assert getattr(estimated, name) == of_ranks[0][0][name]


STRIDED = _StridedShard(0, split_factor=2)
PLACED: list[tuple[tuple[int, ...], tuple[Placement, ...]]] = [
    ((5,), (Shard(0),)),
    ((2, 3), (Replicate(), Shard(0))),
    ((3, 2), (Shard(0), Shard(0))),
    ((3, 2), (STRIDED, Shard(0))),
    ((3, 2), (Shard(0), Shard(1))),
    ((2, 3), (Shard(1), Shard(0))),
    ((2, 2, 2), (Replicate(), STRIDED, Shard(0))),
]


@pytest.mark.parametrize(("mesh_shape", "placements"), PLACED, ids=str)
@pytest.mark.parametrize("shape", [(7, 512), (13, 1000), (1, 300), (11, 3, 260), (17, 2, 3, 50)])
def test_the_first_rank_holds_most(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: tuple[Placement, ...]
) -> None:
    """What an estimate relies on: no coordinate has more elements or scales than the first."""
    elements, scales, packed = [], [], []
    for where in itertools.product(*(range(size) for size in mesh_shape)):
        dims = range(len(shape))
        indices = [
            shard_layout.shard_indices(shape, mesh_shape, where, placements, d) for d in dims
        ]
        elements.append(math.prod(map(len, indices)))
        place = shard_layout.block_rows(shape, mesh_shape, where, placements, 256)
        scales.append(0 if place is None else math.prod(place.scale_shape))
        place = shard_layout.block_rows(shape, mesh_shape, where, placements, 64, 4)
        packed.append(0 if place is None else math.prod(place.codes_shape(4)))
    assert elements[0] == max(elements)
    assert scales[0] == max(scales)
    assert packed[0] == max(packed)


# -- refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((5,), {}, TypeError, "model_or_shapes: expected a module or shapes, got int"),
        (((64, 64),), {}, TypeError, "expected a list of shapes"),
        ([[("w", (4, 4))]], {}, TypeError, r"got pairs; put dict\(\) around them"),
        (("64x64",), {}, TypeError, "expected a module or shapes, got str"),
        (([(4, -1)],), {}, ValueError, r"\[0\]: expected a shape of whole numbers >= 0"),
        (({"w": (4, 1.5)},), {}, ValueError, "w: expected a shape of whole numbers >= 0"),
        (([(4, 4)], 0), {}, ValueError, r"mesh: expected one or two numbers >= 1, got \(0,\)"),
        (([(4, 4)], (2, 2, 2)), {}, ValueError, "mesh: expected one or two numbers >= 1"),
        (([(4, 4)], ()), {}, ValueError, "mesh: expected one or two numbers >= 1"),
        (([(4, 4)], "8"), {}, TypeError, r"mesh: expected a number of ranks, \(replicas, shards\)"),
        (([(4, 4)], (2, 2.0)), {}, TypeError, "mesh: expected a number of ranks"),
        (([(4, 4)], True), {}, TypeError, "mesh: expected a number of ranks"),
        (([(4, 4)],), {"dtype": torch.float64}, ValueError, "dtype: expected torch.float32"),
        (([(4, 4)],), {"min_8bit_size": -1}, ValueError, "min_8bit_size: expected an int >= 0"),
        (([(4, 4)],), {"embeddings_in_32bit": True}, TypeError, "shapes do not tell which of them"),
        (([(4, 4)],), {"embeddings_in_32bit": "[0]"}, TypeError, "or a list of names, got '.0.'"),
        (([(4, 4)],), {"embeddings_in_32bit": ["0"]}, ValueError, r"as '\[0\]', got \['0'\]"),
        (([(4, 4)],), {"block_size": 100}, ValueError, "block_size: expected a power of two"),
        ((nn.Linear(4, 4).double(),), {}, ValueError, "weight: expected float32, bfloat16 or"),
    ],
)
def test_refused(arguments: Any, options: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(*arguments, **options)


def test_nothing() -> None:
    assert vars(estimate([]).total) == dict.fromkeys(FIELDS, 0)
    none = estimate([], optimizer="NAdam")
    assert none.state_4bit is none.checkpoint_4bit is none.total.state_4bit is None
    assert "0 tensors, 0 elements, 1 rank, AdamW" in str(estimate([]))


# -- the table and the command ---------------------------------------------------------------------


def test_table() -> None:
    """Of one rank; of several with a column for all of them."""
    shapes = {"w": (1024, 1024), "a": (7,), "b": (7,)}
    assert str(estimate(shapes)).split("\n") == [
        "3 tensors, 1,048,590 elements, 1 rank, AdamW",
        "                         32-bit      8-bit     4-bit",
        "parameters             4.00 MiB   4.00 MiB  4.00 MiB",
        "gradients              4.00 MiB   4.00 MiB  4.00 MiB",
        "optimizer state        8.00 MiB   2.03 MiB  1.13 MiB",
        "together              16.00 MiB  10.03 MiB  9.13 MiB",
        "optimizer checkpoint   8.00 MiB   2.03 MiB  1.13 MiB",
        "32 bits in AdamW8bit too: 2 of 3 (too small: a, ...)",
    ]
    sharded = estimate({"w": (1024, 1024)}, (2, 2048), dtype=torch.bfloat16)
    assert (
        str(sharded)
        == """\
1 tensor, 1,048,576 elements, 4,096 ranks, AdamW
                      a rank: 32-bit     8-bit     4-bit  all ranks: 32-bit      8-bit      4-bit
parameters                  2.00 KiB  2.00 KiB  2.00 KiB           4.00 MiB   4.00 MiB   4.00 MiB
gradients                   2.00 KiB  2.00 KiB  2.00 KiB           4.00 MiB   4.00 MiB   4.00 MiB
optimizer state             8.00 KiB  2.04 KiB  1.13 KiB          16.02 MiB   4.08 MiB   2.27 MiB
together                   12.00 KiB  6.04 KiB  5.13 KiB          24.02 MiB  12.08 MiB  10.27 MiB
optimizer checkpoint                                               8.00 MiB   2.03 MiB   1.13 MiB"""
    )
    without = estimate({"w": (1024, 1024)}, (2, 2048), optimizer="NAdam")
    assert str(without).split("\n")[1] == (
        "                      a rank: 32-bit      8-bit  all ranks: 32-bit      8-bit"
    )


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [("gpt2", 148, 124_439_808), ("llama-8b", 291, 8_030_261_248), ("llama-70b", 723, 70553706496)],
)
def test_models(name: str, tensors: int, elements: int) -> None:
    """The published counts, https://huggingface.co/meta-llama/Meta-Llama-3-70B and the like."""
    estimated = estimate(MODELS[name])
    assert (estimated.tensors, estimated.elements) == (tensors, elements)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "estimate --model llama-8b --mesh 8 4x8 --dtype bfloat16 --block-size 128"
    assert command([*arguments.split(), "--min-8bit-size", "100"]) == 0
    options: Any = {"dtype": torch.bfloat16, "block_size": 128, "min_8bit_size": 100}
    tables = [str(estimate(MODELS["llama-8b"], mesh, **options)) for mesh in (8, (4, 8))]
    assert capsys.readouterr().out == (
        f"llama-8b in bfloat16: {tables[0]}\n\n"
        f"llama-8b in bfloat16 as 4 replicas of 8 shards: {tables[1]}\n"
    )


def test_page_about_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """What the page shows is what its commands print."""
    page = (PACKAGE.parent / "docs" / "memory.md").read_text(encoding="utf-8")
    _, *examples = page.split("$ python -m torchao8 estimate ")
    assert examples
    for shown in examples:
        arguments, output = shown.split("```")[0].split("\n", 1)
        assert command(["estimate", *arguments.split()]) == 0
        assert capsys.readouterr().out == output


def test_command_with_an_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    options = {"centered": True, "momentum": 0.9, "percentile_clipping": 5}
    arguments = "--optimizer RMSprop --centered --momentum 0.9 --percentile-clipping 5"
    assert command(["estimate", "--shapes", "64x300,7", *arguments.split()]) == 0
    table = estimate({"0: 64x300": (64, 300), "1: 7": (7,)}, optimizer="RMSprop", **options)
    assert capsys.readouterr().out == f"shapes in float32: {table}\n"
    assert "RMSprop8bit too: 1 of 2" in str(table)


def test_command_with_muon(capsys: pytest.CaptureFixture[str]) -> None:
    shapes = "640x300:embedding,2*64x300,7"
    assert command(["estimate", "--shapes", shapes, "--optimizer", "MuonAdamW8bit"]) == 0
    assert "\nMuon: 2 of 4 (1: 64x300, ...); AdamW: the others\n" in capsys.readouterr().out
    batch = "--shapes 4x64x300 --optimizer Muon --higher-dims batch"
    assert command(["estimate", *batch.split()]) == 0
    assert capsys.readouterr().out.startswith("shapes in float32: 1 tensor, 76,800 elements, 1 ra")


def test_command_with_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["estimate", "--shapes", "2*640x300, 7,3x3X3"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("shapes in float32: 4 tensors, 384,034 elements, 1 rank, AdamW\n")
    assert out.endswith("32 bits in AdamW8bit too: 2 of 4 (too small: 2: 7, ...)\n")


def test_command_with_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a known model, and of shapes that are said to be embeddings."""
    for name, embeddings in (
        ("gpt2", ["wte.weight", "wpe.weight"]),
        ("llama-70b", ["model.embed_tokens.weight"]),
    ):
        assert command(["estimate", "--model", name, "--embeddings-in-32bit"]) == 0
        table = estimate(MODELS[name], embeddings_in_32bit=embeddings)
        assert capsys.readouterr().out == f"{name} in float32: {table}\n"
    shapes = ["estimate", "--shapes", "2*640x64:embedding, 640x64"]
    assert command([*shapes, "--embeddings-in-32bit"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("too: 2 of 3 (optim_bits=32: 0: 640x64:embedding, ...)\n")
    assert command(shapes) == 0
    assert "32 bits in" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("estimate", "one of the arguments --model --shapes is required"),
        ("estimate --model gpt2 --shapes 4x4", "not allowed with argument --model"),
        ("estimate --shapes 4096x", "expected whole numbers with an x between them, as 4096x1024"),
        ("estimate --shapes 4x4*3x3", "expected one number before the *, got '4x4*3x3'"),
        ("estimate --model gpt2 --mesh 2x2x2", "expected a number of ranks, as 8, or replicas x"),
        ("estimate --model gpt2 --mesh 0", "expected a number of ranks, as 8, or replicas x"),
        ("estimate --model gpt2 --block-size 100", "expected a power of two from 64 to 2048"),
        ("estimate --model gpt2 --min-8bit-size 4x4", "expected one number, got '4x4'"),
        ("estimate --model gpt2 --optimizer Rprop", "invalid choice: 'Rprop'"),
        ("estimate --model gpt2 --amsgrad --optimizer Lion", "amsgrad: Lion has no such option"),
        ("estimate --model gpt2 --optimizer Muon", "MuonAdamW trains the rest by AdamW"),
        ("estimate --model gpt2 --higher-dims batch", "higher_dims: AdamW has no such option"),
        ("estimate --model gpt2 --momentum 0.9", "momentum: AdamW has no such option"),
        ("estimate --model gpt2 --momentum -1", "expected a finite number >= 0, got '-1'"),
        ("estimate --model gpt2 --percentile-clipping 0", "expected an int from 1 to 99"),
        ("estimate --shapes 64x64 --embeddings-in-32bit", "--shapes 32000x4096:embedding,65*4096"),
        ("estimation", "invalid choice: 'estimation'"),
    ],
)
def test_command_refuses(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the status of a wrong call, and what was expected."""
    with pytest.raises(SystemExit) as stopped:
        command(arguments.split())
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_the_extension(tmp_path: Path) -> None:
    """In a new interpreter: the classes need it, and the command says how to build it."""
    ignore = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "torchao8", ignore=ignore)
    for arguments, code, expected in (
        (["estimate", "--model", "gpt2"], 1, "pip install --no-build-isolation -e ."),
        (["--help"], 0, "estimate"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", "torchao8", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
        )
        assert result.returncode == code, result.stderr
        assert expected in (result.stderr if code else result.stdout)
        assert "Traceback" not in result.stderr


def test_tensors_of_a_state_dict_stand_for_shapes() -> None:
    """They do not require gradients, but nobody asks for the memory of a model that is frozen."""
    model = torch.nn.Linear(64, 128)
    assert estimate(model.state_dict()) == estimate(model)
    assert estimate(model, mesh=[2, 4]) == estimate(model, mesh=(2, 4))
    model.requires_grad_(False)
    assert estimate(model).state_8bit == 0
