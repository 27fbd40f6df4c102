"""A Llama of 70 billion parameters on 8 to 2,048 ranks, without its memory: see mesh_worker.py."""

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from mesh_worker import HIDDEN, INNER, KEYS, MESHES, VOCABULARY, survey_ranks
from ranks import forking_context
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

import torchao8
from torchao8 import shard_layout
from torchao8._estimate_command import MODELS
from torchao8.state_bits import CUT_ROWS, SHARDED_VECTOR

SHAPES = ((VOCABULARY, HIDDEN), (HIDDEN, HIDDEN), (KEYS, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER))
Facts = dict[str, Any]


class Surveys:
    """What the worker wrote: a record for every rank that it was, and one without a mesh."""

    def __init__(self, layers: int, folder: Path) -> None:
        lines = []
        for position in ("first", "middle", "last"):
            path = folder / position
            arguments = (layers, position, str(path))
            process = forking_context().Process(target=survey_ranks, args=arguments)
            process.start()
            process.join(600)
            assert process.exitcode == 0
            lines += path.read_text().splitlines()
        self.unsharded, *self.of_ranks = map(json.loads, lines)
        assert len(self.of_ranks) == 3 * len(MESHES)

    def on(self, mesh: dict[str, int]) -> list[Facts]:
        """The first, a middle and the last rank."""
        return [survey for survey in self.of_ranks if survey["mesh"] == mesh]


@pytest.fixture(
    scope="module", params=[1, pytest.param(80, marks=pytest.mark.slow)], ids="{} layers".format
)
def surveys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Surveys:
    return Surveys(request.param, tmp_path_factory.mktemp("surveys"))


def name_of(mesh: dict[str, int]) -> str:
    return "x".join(f"{size} {name}" for name, size in mesh.items())


on_each_mesh = pytest.mark.parametrize("mesh", MESHES, ids=name_of)


def cut(mesh: dict[str, int], shape: Sequence[int]) -> bool:
    """28672 columns over 32 ranks are three and a half blocks: of these meshes the one case."""
    return mesh.get("tensor") == 32 and list(shape) == [HIDDEN, INNER]


@on_each_mesh
def test_local_tensors_hold_whole_rows(mesh: dict[str, int], surveys: Surveys) -> None:
    """Where the library says that a shard lies is where FSDP2 put it, for parameter and state."""
    for survey in surveys.on(mesh):
        for facts in survey["parameters"].values():
            shape, local, place = facts["shape"], facts["local"], facts["place"]
            state = facts["local_state"]
            values = [key for key in state if key != "step" and not key.endswith("_scale")]
            assert [state[key] for key in values] == [local] * 2
            assert (place is None) == (len(shape) == 1 or cut(mesh, shape))
            if place is None:
                continue
            rows = sum(last - first for first, last, _, _ in place["runs"])
            assert rows == (local[0] if math.prod(local) else 0)
            assert place["whole"]
            scales = state["exp_avg_scale"]
            assert scales == state["exp_avg_sq_scale"] == place["scale_shape"]
            assert scales[0] == local[0]
            if rows:
                assert rows * place["row"] == math.prod(local)
                assert place["blocks"] * 256 == place["row"] == local[1]
                assert place["runs"][0][2] == facts["start"]  # torch's own reckoning
                assert place["runs"][0][3] == shape[1]


def test_empty_shards_are_among_them(surveys: Surveys) -> None:
    """1,024 rows of keys, and 128,256 of the embedding in chunks of 63, end before 2,048 ranks."""
    last = surveys.on({"shard": 2048})[-1]["parameters"]
    empty = [name for name, facts in last.items() if facts["local"][0] == 0]
    assert "model.embed_tokens.weight" in empty
    assert "model.layers.0.self_attn.k_proj.weight" in empty
    assert last["model.layers.0.self_attn.q_proj.weight"]["local"] == [4, HIDDEN]


@on_each_mesh
def test_eligibility_does_not_depend_on_the_mesh(mesh: dict[str, int], surveys: Surveys) -> None:
    """The same keys, dtypes and global shapes as without a mesh, for matrices, on every rank."""
    unsharded = surveys.unsharded["parameters"]
    for survey in surveys.on(mesh):
        assert survey["checkpoint"].keys() == survey["parameters"].keys()
        for name, facts in survey["parameters"].items():
            assert facts["shape"] == unsharded[name]["shape"]
            assert facts["state"] == survey["checkpoint"][name]
            if len(facts["shape"]) == 2 and not cut(mesh, facts["shape"]):
                assert facts["state"] == unsharded[name]["state"]
                assert facts["state"]["exp_avg_codes"] == ["torch.uint8", facts["shape"]]
            else:  # a vector that is sharded, however; rows that are cut
                moments = {"exp_avg", "exp_avg_sq"}
                assert facts["state"].keys() == {"step", *moments}
                assert [facts["state"][m] for m in moments] == [
                    ["torch.float32", facts["shape"]]
                ] * 2


def test_checkpoints_have_the_same_metadata(surveys: Surveys) -> None:
    """One saved on any of the meshes loads on any other, but for the one that cuts rows."""
    deepest = surveys.on({"shard": 8})[0]
    assert len(deepest["checkpoint"]) == 723
    for survey in surveys.of_ranks:
        for name, state in survey["checkpoint"].items():
            if not cut(survey["mesh"], survey["parameters"][name]["shape"]):
                assert state == deepest["checkpoint"][name]


@on_each_mesh
def test_bytes_of_a_rank(mesh: dict[str, int], surveys: Surveys) -> None:
    """The estimate is what the first rank holds, and none of the others holds more."""
    for survey in surveys.on(mesh):
        estimated = survey["estimate"]
        if survey["rank"] == 0:
            assert estimated["state_8bit"] == survey["state_bytes"]
        assert survey["state_bytes"] <= estimated["state_8bit"]
        vectors = 2 * survey["layers"] + 1
        down = survey["layers"] if mesh.get("tensor") == 32 else 0
        kept = {reason: len(names) for reason, names in estimated["kept_32bit"].items()}
        assert kept == {SHARDED_VECTOR: vectors} | ({CUT_ROWS: down} if down else {})


@pytest.mark.parametrize("mesh", [mesh for mesh in MESHES if "tensor" not in mesh], ids=name_of)
def test_shapes_alone_give_the_same_estimate(mesh: dict[str, int], surveys: Surveys) -> None:
    """What people are told before they have a single rank is what the sharded model gives."""
    first = surveys.on(mesh)[0]
    model = {name: MODELS["llama-70b"][name] for name in first["parameters"]}
    assert len(model) == 9 * first["layers"] + 3
    estimated = torchao8.estimate(model, tuple(mesh.values()), dtype=torch.bfloat16)
    expected = vars(estimated) | {"total": vars(estimated.total)}
    assert json.loads(json.dumps(expected)) == first["estimate"]


def test_it_takes_no_memory(surveys: Surveys) -> None:
    """The parameters alone are 131 GiB, a rank's share of 8 is 16."""
    assert max(survey["peak_memory"] for survey in surveys.of_ranks) < 2**30


PLACEMENTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "8": ((8,), (Shard(0),)),
    "512": ((512,), (Shard(0),)),
    "2048": ((2048,), (Shard(0),)),
    "256x8 rows": ((256, 8), (_StridedShard(0, split_factor=8), Shard(0))),
    "256x8 columns": ((256, 8), (Shard(0), Shard(1))),
}


@pytest.mark.parametrize("case", PLACEMENTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_ranks_cover_the_tensor(case: str, shape: tuple[int, int]) -> None:
    """The rows of all ranks: each element on one of them, none on two, each cut between blocks."""
    mesh_shape, placements = PLACEMENTS[case]
    pieces = []
    for where in itertools.product(*map(range, mesh_shape)):
        place = shard_layout.block_rows(shape, mesh_shape, where, placements, 256)
        assert place is not None
        for first, last, offset, stride in place.runs:
            if stride == place.row:  # rows that follow each other
                pieces.append((offset, (last - first) * stride))
            else:
                pieces += [(offset + i * stride, place.row) for i in range(last - first)]
    end = 0
    for offset, length in sorted(pieces):
        assert offset == end
        end = offset + length
        assert end % 256 == 0
    assert end == math.prod(shape)
