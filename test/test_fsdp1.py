"""FSDP1 gathers the state of every class and takes it back, also where ranks have empty shards."""

from typing import Any

import pytest
import torch
from helpers import SMALL
from optim_table import OPTIMIZERS, OptimizerCase
from ranks import run_ranks
from sharded import gathered
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    StateDictType,
)

from torchao8.optim.base import LowPrecisionOptimizer

# Rank 0 has the first half of all elements, which lies in the first weight.
SHAPES = {"0.weight": (256, 64), "0.bias": (256,), "1.weight": (8, 256), "1.bias": (8,)}


def _model() -> FullyShardedDataParallel:
    torch.manual_seed(0)
    model = FullyShardedDataParallel(
        nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 8)),
        use_orig_params=True,
        device_id=torch.device("cpu"),
    )
    # Offloading to the CPU, the default, copies nothing here: torch (2.13) then gives one buffer
    # for all moments.
    FullyShardedDataParallel.set_state_dict_type(
        model,
        StateDictType.FULL_STATE_DICT,
        FullStateDictConfig(offload_to_cpu=False),
        FullOptimStateDictConfig(offload_to_cpu=False),
    )
    return model


def _step(model: FullyShardedDataParallel, optimizer: LowPrecisionOptimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    model(torch.randn(4, 64, generator=generator)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _options(case: OptimizerCase) -> list[dict[str, Any]]:
    """With all states and, of a rule that can do without, none. FSDP1 shards allow no ratios."""
    common = {"lr": 0.01, "min_8bit_size": SMALL, "weight_decay": 0.1}
    if "adaptive" in case.known({"adaptive": False}):
        common["adaptive"] = False
    most = {**case.base, **case.full, **common}
    return [most, {**most, "momentum": 0.0}] if "momentum" in case.base else [most]


def _round_trips(rank: int, world_size: int) -> None:
    fsdp = FullyShardedDataParallel
    for case in OPTIMIZERS:
        if case.matrices:
            with pytest.raises(ValueError, match="flattened by FSDP1"):
                case.cls(_model().parameters())
            continue
        for options in _options(case):
            what = (case.cls.__name__, options)
            model = _model()
            optimizer = case.cls(model.parameters(), **options)
            _step(model, optimizer, 0)
            empty = [p for p in model.parameters() if not p.numel()]
            assert len(empty) == (3 if rank == 0 else 0)
            states = optimizer._states(optimizer.param_groups[0])
            elements = [state.name for state in states if not state.is_scalar]
            numbers = [state.name for state in states if state.is_scalar]
            saved = fsdp.optim_state_dict(model, optimizer)
            assert set(saved["state"]) == set(SHAPES), what
            for name, state in saved["state"].items():
                assert state["step"] == 1, (what, name)
                shapes = {key: tuple(state[key].shape) for key in state if key != "step"}
                expected = dict.fromkeys(elements, SHAPES[name]) | dict.fromkeys(numbers, ())
                assert shapes == expected, (what, name)
            of_dcp = get_optimizer_state_dict(
                model, optimizer, options=StateDictOptions(full_state_dict=True)
            )
            assert {k: v["step"] for k, v in of_dcp["state"].items()} == dict.fromkeys(SHAPES, 1)
            weights = {k: v.clone() for k, v in model.state_dict().items()}
            _step(model, optimizer, 1)
            for by_dcp in (False, True):
                other = _model()
                other.load_state_dict(weights)
                resumed = case.cls(other.parameters(), **options)
                if by_dcp:
                    set_optimizer_state_dict(
                        other, resumed, of_dcp, options=StateDictOptions(full_state_dict=True)
                    )
                else:
                    state = fsdp.optim_state_dict_to_load(other, resumed, saved)
                    resumed.load_state_dict(state)
                _step(other, resumed, 1)
                assert gathered(resumed) == gathered(optimizer), (what, by_dcp)
                again = fsdp.optim_state_dict(other, resumed)["state"]
                assert {k: v["step"] for k, v in again.items()} == dict.fromkeys(SHAPES, 2)


@pytest.mark.filterwarnings("ignore")
def test_state_is_gathered_and_taken_back() -> None:
    """All states there can be, and none (momentum 0), where the step count is all that there is."""
    run_ranks(2, _round_trips)
