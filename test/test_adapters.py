"""Matrices of fewer than 16 columns, as LoRA's: 8 bits in blocks of the whole where they are plain
tensors, 32 bits as DTensors."""

import warnings
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, set_grads, through_file, train
from optim_table import OF_ELEMENTS, OptimizerCase, every_8bit, every_optimizer
from ranks import run_ranks
from sharded import distributed_param, gathered, step_with, whole
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import torchao8
from torchao8 import dequantize_blockwise, quantize_blockwise, shard_layout

# Blocks of 256 that rows start inside of, a last one that is short, and three dimensions.
SHAPES = ((300, 3), (200, 5, 3), (512, 8), (64, 3, 1, 1))


def trained(case: OptimizerCase, params: list[nn.Parameter], **options: Any) -> Any:
    optimizer = case.make(params, lr=0.05, min_8bit_size=SMALL, seed=3, **options)
    train(optimizer, params, range(3))
    return optimizer


# -- bytes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [4, 8])
def test_bytes_of_an_adapter(rank: int) -> None:
    """2 codes and 2/64 of a scale for a parameter, steps included; and so says the estimate."""
    shapes = [(rank, 4096), (4096, rank), (rank, 4096), (11008, rank)]
    params = make_params(shapes=shapes)
    optimizer = torchao8.AdamW8bit(params)
    train(optimizer, params, [0])
    size = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    assert size <= 2.05 * sum(p.numel() for p in params)
    assert torchao8.estimate(shapes).state_8bit == size


# -- a matrix of few columns is a vector -----------------------------------------------------------


@every_optimizer(tuple(case for case in OF_ELEMENTS if case.optim_bits == 8))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": 64, "state_rounding": "nearest", "weight_decay": 0.1},
        {"block_wise": False},
        {"percentile_clipping": 20},
    ],
    ids=str,
)
def test_bits_are_those_of_the_vector(
    case: OptimizerCase, options: dict[str, Any], device: str
) -> None:
    """Of codes, scales and parameters, which are rounded stochastically, in every layout of memory;
    and the trust ratios of LAMB and LARS are those of the whole."""
    ends = []
    for flat in (False, True):
        params = make_params(torch.bfloat16, SHAPES, device=device)
        options = {**options, **case.known({"amsgrad": True}), "stochastic_rounding": True}
        if flat:
            params = [nn.Parameter(p.detach().flatten()) for p in params]
        optimizer = case.make(params, lr=0.05, min_8bit_size=SMALL, seed=3, **options)
        for seed in range(3):
            like = make_params(torch.bfloat16, SHAPES, device=device)
            set_grads(like, seed)
            for p, q in zip(params, like, strict=True):
                assert q.grad is not None
                p.grad = (
                    q.grad.flatten() if flat else q.grad.movedim(0, -1).contiguous().movedim(-1, 0)
                )
            optimizer.step()
        ends.append(
            [[bits(p), {k: bits(v) for k, v in optimizer.state[p].items()}] for p in params]
        )
        assert all(any(k.endswith("_codes") for k in optimizer.state[p]) for p in params)
    assert ends[0] == ends[1]


def test_it_trains_compiled(device: str) -> None:
    ends = []
    for compiled in (False, True):
        params = make_params(shapes=SHAPES[:2], device=device)
        optimizer = torchao8.AdamW8bit(params, lr=0.05, min_8bit_size=SMALL)
        step = (
            torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
            if compiled
            else optimizer.step
        )
        for seed in range(2):
            set_grads(params, seed)
            step()
        ends.append(all_bits(optimizer)["states"])
    assert ends[0] == ends[1]


# -- checkpoints -----------------------------------------------------------------------------------


@every_8bit()
def test_checkpoints_from_when_they_had_32_bits(case: OptimizerCase) -> None:
    """The groups of those say optim_bits=8. They are rounded to the nearest codes, with a warning;
    and what is saved now loads without one."""
    params = make_params(shapes=SHAPES)
    old = trained(case, params, optim_bits=32)
    saved = through_file(old.state_dict())
    saved["param_groups"][0]["optim_bits"] = 8
    new = case.make(make_params(shapes=SHAPES), min_8bit_size=SMALL)
    with pytest.warns(
        UserWarning, match=r"parameter 0 \(of shape .*\) and 3 more was saved in 32 bits, and is"
    ):
        new.load_state_dict(saved)
    for p, q in zip(params, new.param_groups[0]["params"], strict=True):
        for name, signed in case.states:
            codes, scale = quantize_blockwise(old.state[p][name].flatten(), signed=signed)
            assert bits(new.state[q][f"{name}_codes"]) == bits(codes)
            assert bits(new.state[q][f"{name}_scale"]) == bits(scale)
    again = case.make(make_params(shapes=SHAPES), min_8bit_size=SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(through_file(new.state_dict()))
    assert all_bits(again)["states"] == all_bits(new)["states"]


# -- sharded ---------------------------------------------------------------------------------------


def _sharded(rank: int, world_size: int) -> None:
    """32 bits, without a warning, wherever they lie; to and from the 8 bits of plain tensors."""
    mesh = init_device_mesh("cpu", (world_size,))
    for placement in (Shard(0), Shard(1), Replicate()):
        plain = make_params(shapes=SHAPES)
        unsharded = torchao8.AdamW8bit(plain, min_8bit_size=SMALL)
        train(unsharded, plain, range(2))

        def placed(placement: Any = placement) -> list[Tensor]:
            return [distributed_param(p, mesh, [placement]) for p in make_params(shapes=SHAPES)]

        params = placed()
        sharded = torchao8.AdamW8bit(params, min_8bit_size=SMALL)
        wide = torchao8.AdamW8bit(make_params(shapes=SHAPES), optim_bits=32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            step_with(sharded, range(2))
        step_with(wide, range(2))
        assert gathered(sharded) == gathered(wide)

        loaded = torchao8.AdamW8bit(placed(), min_8bit_size=SMALL)
        with pytest.warns(UserWarning, match="saved in 8 bits, and is kept in 32 from here on"):
            loaded.load_state_dict(unsharded.state_dict())
        for p, q in zip(plain, loaded.param_groups[0]["params"], strict=True):
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                codes, scale = (unsharded.state[p][f"{name}_{part}"] for part in ("codes", "scale"))
                value = dequantize_blockwise(codes, scale, signed=signed)
                assert bits(whole(loaded.state[q][name])) == bits(value)

        gathered_state = loaded.state_dict()
        for state in gathered_state["state"].values():
            state.update({key: whole(value) for key, value in state.items()})
        back = torchao8.AdamW8bit(make_params(shapes=SHAPES), min_8bit_size=SMALL)
        with pytest.warns(UserWarning, match="saved in 32 bits, and is rounded to 8"):
            back.load_state_dict(gathered_state)
        assert all_bits(back)["states"] == all_bits(unsharded)["states"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_dtensors_keep_32_bits(world_size: int) -> None:
    run_ranks(world_size, _sharded)


def test_no_shard_is_one_row_by_its_own_shape() -> None:
    """The op sees local shapes: a shard of fewer than 16 columns would get blocks of the whole."""
    for size, kept in ((57, False), (58, True), (64, True)):
        shape = (5, size, 8)  # 7 ranks have 64 columns each, the last one what is left
        assert shard_layout.keeps_blocks(shape, (8,), (Shard(1),), 64) == kept
        rest = shard_layout.block_rows(shape, (8,), (7,), (Shard(1),), 64)
        assert rest is None or rest.row == 8 * size - 7 * 64 >= 16
    empty = shard_layout.block_rows((5, 5, 128), (4,), (3,), (Shard(1),), 256)  # is no short row
    assert empty is not None
    assert (empty.shape, empty.whole) == ((5, 0, 128), True)
