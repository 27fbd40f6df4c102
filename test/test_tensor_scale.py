"""block_wise=False: one scale for all of a tensor, in place of one for each block."""

import copy
import math
import re
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import reference
import torch
import torch.distributed.checkpoint as dcp
from helpers import (
    SMALL,
    all_bits,
    assert_same_training,
    bits,
    make_params,
    params_for,
    set_grads,
    through_file,
    train,
)
from optim_table import OF_8_BITS, OptimizerCase, Options, every_8bit, every_option_set, few_8bit
from ranks import run_ranks
from reference_rules import RULES
from sharded import (
    Weights,
    distributed_param,
    fsdp_weights,
    gathered,
    groups_of,
    step_with,
)
from test_optim import check_stored, on_cpu
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import Replicate, Shard

import torchao8
from torchao8 import AdamW, AdamW8bit
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors, to_torch
from torchao8.optim._state import paging
from torchao8.optim.base import LowPrecisionOptimizer

STEP_OP = "torchao8::adam_step_"
ONE_SCALE: Options = {"optim_bits": 8, "min_8bit_size": SMALL, "block_wise": False}


def of_vector(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state of a tensor with one scale as that of a vector of one block: codes in one row."""
    return {k: v.flatten() if k.endswith("_codes") else v for k, v in state.items()}


def moment(case: OptimizerCase, state: dict[str, Tensor], name: str) -> Tensor:
    """A state in float64, by the oracle's decoder."""
    if name in state:
        return state[name].double()
    codes, scale = state[f"{name}_codes"], state[f"{name}_scale"]
    assert scale.shape == (1,)
    return reference.dynamic_map(case.is_signed(name))[codes.long()] * scale.double()


# -- the step --------------------------------------------------------------------------------------


@every_option_set(cases=OF_8_BITS)
def test_each_step_is_that_of_the_oracle(
    case: OptimizerCase, options: Options, device: str
) -> None:
    """As in test_optim.py, with the whole tensor for a block."""
    params = make_params(device=device)
    rounding = "nearest" if options.get("amsgrad") else "stochastic"
    optimizer = case.make(params, **options, **ONE_SCALE, state_rounding=rounding)
    optimizer._init_states()
    group = optimizer.param_groups[0]
    names = [s.name for s in optimizer._states(group)]
    for step in range(3):
        set_grads(params, step)
        if step == 2:
            params[0].grad.zero_()  # type: ignore[union-attr]
            params[1].grad[3] = math.inf  # type: ignore[index]
        expected = []
        for p in params:
            state = on_cpu(optimizer.state[p])
            old = {name: moment(case, state, name) for name in names}
            p64, g64 = p.detach().cpu().double(), p.grad.cpu().double()  # type: ignore[union-attr]
            in_8bit = any(key.endswith("_codes") for key in state)
            expected.append(RULES[case.rule](p64, g64, old, step + 1, group, in_8bit))
        optimizer.step()
        for p, want in zip(params, expected, strict=True):
            limit = want.param_error + torch.finfo(torch.float32).smallest_normal
            assert ((p.detach().cpu().double() - want.param).abs() <= limit).all()
            state = on_cpu(optimizer.state[p])
            for name, value in want.states.items():
                in_8bit = f"{name}_codes" in state
                check_stored(
                    of_vector(state),
                    name,
                    value.flatten() if in_8bit else value,
                    want.errors[name].flatten() if in_8bit else want.errors[name],
                    signed=case.is_signed(name),
                    stochastic=rounding == "stochastic" and case.is_stochastic(name),
                    block_size=max(value.numel(), 1),
                )


@every_8bit()
def test_where_a_tensor_is_a_block_nothing_changes(case: OptimizerCase, device: str) -> None:
    """The same bits as with a scale for each block, of which there is one: bad gradients too."""
    shapes = [(200,), (1, 256), (1, 97), (2048,)]
    ends = []
    for block_wise in (True, False):
        params = make_params(shapes=shapes, device=device)
        options = case.known({"amsgrad": True, "weight_decay": 0.1, "block_size": 2048})
        optimizer = case.make(params, **{**ONE_SCALE, **options, "block_wise": block_wise})
        for seed in range(4):
            set_grads(params, seed, scale=[1.0, 1e-20, 0.0, 1e15][seed])
            params[1].grad.view(-1)[::7] = [math.nan, math.inf, -math.inf, 3e38][seed]
            optimizer.step()
        ends.append(
            [{"": bits(p)} | {k: bits(v) for k, v in optimizer.state[p].items()} for p in params]
        )
    assert ends[0] == ends[1]


@every_8bit()
def test_grouping_and_views_do_not_matter(case: OptimizerCase, device: str) -> None:
    """One tensor at a time or all at once; transposed, at odd offsets, in several dtypes."""
    ends = []
    options = {**ONE_SCALE, **case.known({"amsgrad": True, "weight_decay": 0.1})}
    for alone in (True, False):
        params = make_params(device=device) + make_params(torch.bfloat16, device=device)
        parts = [[p] for p in params] if alone else [params]
        optimizers = [case.make(part, **options) for part in parts]
        for seed in range(3):
            set_grads(params, seed)
            if alone:
                for p in params:  # the same numbers elsewhere in memory
                    if p.ndim > 1:
                        p.grad = p.grad.movedim(0, -1).contiguous().movedim(-1, 0)  # type: ignore[union-attr]
                    elif p.ndim:
                        p.grad = torch.cat((p.grad[:1], p.grad))[1:]  # type: ignore[index]
            for optimizer in optimizers:
                optimizer.step()
        ends.append(
            [
                {"": bits(p)} | {k: bits(v) for k, v in o.state[p].items()}
                for o in optimizers
                for p in o.param_groups[0]["params"]
            ]
        )
    assert ends[0] == ends[1]


@every_8bit()
def test_what_a_step_may_meet(case: OptimizerCase, device: str) -> None:
    """GradScaler's tensors, clipping, a group with blocks: the bits of what they stand for."""

    def make(**options: Any) -> tuple[list[Tensor], LowPrecisionOptimizer]:
        params = make_params(device=device)
        groups = [{"params": params[:3]}, {"params": params[3:], "block_wise": True}]
        return params, case.make(groups, **{**ONE_SCALE, "lr": 0.1, **options})

    plain, scaled = make(), make(fused=True)
    for seed in range(3):
        set_grads(plain[0], seed)
        set_grads(scaled[0], seed)
        for p in scaled[0]:
            p.grad *= 1024.0  # type: ignore[operator]
        scaled[1].grad_scale = torch.tensor(1024.0, device=device)  # type: ignore[attr-defined]
        scaled[1].found_inf = torch.tensor(0.0, device=device)  # type: ignore[attr-defined]
        plain[1].step()
        scaled[1].step()
    assert all_bits(plain[1])["params"] == all_bits(scaled[1])["params"]
    assert all_bits(plain[1])["states"] == all_bits(scaled[1])["states"]
    before = all_bits(scaled[1])
    scaled[1].found_inf = torch.tensor(1.0, device=device)  # type: ignore[attr-defined]
    scaled[1].step()
    assert all_bits(scaled[1]) == before

    clipped, by_hand = make(percentile_clipping=1), make()
    for power in (0, 0, 3):
        for params, optimizer in (clipped, by_hand):
            set_grads(params, 0, scale=1.0 if optimizer is by_hand[1] else 2.0**power)
            optimizer.step()
    assert all_bits(clipped[1])["params"] == all_bits(by_hand[1])["params"]


def test_a_corrupt_scale_stays_one_and_a_zero_gradient_leaves_zero(device: str) -> None:
    for value in (math.nan, math.inf, -1.0):
        (p,) = make_params(shapes=[(4, 300)], device=device)
        optimizer = AdamW8bit([p], **ONE_SCALE)
        train(optimizer, [p], [0])
        optimizer.state[p]["exp_avg_sq_scale"].fill_(value)
        before = bits(p)
        train(optimizer, [p], [1])
        assert optimizer.state[p]["exp_avg_sq_scale"].isnan().all()
        if value > 0 or math.isnan(value):  # a negative v that a gradient outweighs is none
            assert bits(p) == before
    (p,) = make_params(shapes=[(4, 300)], device=device)
    optimizer = AdamW8bit([p], weight_decay=0.0, **ONE_SCALE)
    before = bits(p)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert bits(p) == before
    assert float(optimizer.state[p]["exp_avg_scale"]) == 0.0
    assert (optimizer.state[p]["exp_avg_codes"] == 127).all()


def test_opcheck(device: str) -> None:
    """Two parts of one tensor, which share its scales."""
    (p,) = make_params(shapes=[(8, 300)], device=device)
    codes = [torch.full((8, 300), zero, dtype=torch.uint8, device=device) for zero in (127, 0)]
    scales = [torch.zeros(1, device=device) for _ in codes]
    parts = [slice(0, 3), slice(3, 8)]
    lists = [[t[part] for part in parts] for t in (p.detach(), torch.ones_like(p), *codes)]
    args = [*lists, [], *([scale] * 2 for scale in scales), []]
    steps = [torch.tensor(3.0, device=device)] * 2
    numbers = torch.tensor([0.9, 0.99, 1e-8, 0.1], dtype=torch.float64)
    options = {"decoupled_weight_decay": True, "maximize": False}
    lr = torch.tensor(0.1, device=device)
    find, step = torch.ops.torchao8.adam_extremes.default, torch.ops.torchao8.adam_step_.default
    torch.library.opcheck(find, (*args, steps, [], lr, numbers, None), options)
    extremes = list(find(*args, steps, [], lr, numbers, None, **options).unbind())
    torch.library.opcheck(step, (*args, steps, [], extremes, lr, numbers, None, None), options)
    with pytest.raises(RuntimeError, match="adam_extremes: params must not be empty"):
        torch.ops.torchao8.adam_extremes.default(*[[]] * 8, [], [], lr, numbers, None, **options)
    floats = [torch.zeros_like(p)]
    with pytest.raises(RuntimeError, match="adam_extremes: exp_avgs must be uint8, as 8-bit state"):
        find([p.detach()], [p.detach()], floats, floats, [], [], [], [], steps[:1], [], lr,
             numbers, None, **options)  # fmt: skip


def test_options_that_lay_out_the_state(device: str) -> None:
    """Which parameters keep 8 bits does not depend on it; after a step it may not change."""
    params = make_params(device=device)
    optimizers = [AdamW8bit(params, **{**ONE_SCALE, "block_wise": b}) for b in (True, False)]
    for optimizer in optimizers:
        train(optimizer, params, [0])
    for p in params:
        kinds = [{k: v.dtype for k, v in o.state[p].items()} for o in optimizers]
        assert kinds[0] == kinds[1]
    before = all_bits(optimizers[1])
    optimizers[1].param_groups[0]["block_wise"] = True
    with pytest.raises(RuntimeError, match=r"scales \[1\], but its group now .*block_wise=True"):
        optimizers[1].step()
    optimizers[1].param_groups[0]["block_wise"] = False
    assert all_bits(optimizers[1]) == before


# -- compiled --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@few_8bit()
def test_compiled_it_is_one_graph(case: OptimizerCase, device: str) -> None:
    options = {**ONE_SCALE, "weight_decay": 0.1, "percentile_clipping": 50}
    pair = [case.make(make_params(device=device), **options) for _ in range(2)]
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(pair[0].step, backend=counter, fullgraph=True)
    for seed in range(3):
        for optimizer in pair:
            set_grads(optimizer.param_groups[0]["params"], seed)
        step()
        pair[1].step()
        assert_same_training(*pair)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_generated_code_copies_nothing(device: str) -> None:
    """What the step allocates itself is the numbers of the rule."""
    params = make_params(device=device)
    lr = torch.tensor(0.01, device=device)
    optimizer = AdamW8bit(params, lr=lr, **ONE_SCALE)
    set_grads(params, 0)
    _, codes = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    (code,) = codes
    body = code[code.index("def call(") : code.index("runner = Runner")]
    assert body.count("torch.ops.torchao8.adam_extremes.default(") == 1
    assert body.count("torch.ops.torchao8.adam_step_.default(") == 2
    for copying in ("clone", "copy_(", "auto_functionalized"):
        assert copying not in body.replace("copy_if_misaligned(", "(")
    assert re.findall(r"empty_strided\w*\((\([^)]*\))", body) == ["(4, )"]


# -- sharded ---------------------------------------------------------------------------------------

SHARDED: Options = {**ONE_SCALE, "lr": 0.01, "weight_decay": 0.1, "seed": 3}


def _fsdp_against_unsharded(rank: int, world_size: int, mesh_shape: tuple[int, ...]) -> None:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for i, case in enumerate(OF_8_BITS):
        dtype = (torch.float32, torch.bfloat16)[i % 3 % 2]
        options = {**SHARDED, **case.known({"amsgrad": True, "percentile_clipping": 30})}
        options["stochastic_rounding"] = dtype == torch.bfloat16
        ends = []
        for m in (mesh, None):
            with params_for(case):
                params = groups_of(fsdp_weights(m, dtype).parameters(), m is not None)
            optimizer = case.make(params, **options)
            step_with(optimizer, range(4))
            ends.append(gathered(optimizer))
        assert ends[0] == ends[1], (case.cls, dtype)


@pytest.mark.parametrize("world_size", [2, 3])
def test_same_bits_at_every_world_size(world_size: int) -> None:
    """With ranks where nothing of a parameter lies: they have its scales all the same."""
    run_ranks(world_size, _fsdp_against_unsharded, (world_size,))


def test_same_bits_under_hsdp() -> None:
    run_ranks(4, _fsdp_against_unsharded, (2, 2))


PLACEMENTS = (
    ((6, 1024), (Shard(1), Replicate())),
    ((9, 512), (Shard(0), Shard(1))),
    ((3, 6, 300), (Shard(1), Shard(0))),  # in several pieces on a rank
    ((1, 512), (Shard(0), Shard(0))),
)


def _placed_against_unsharded(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    paging.LEAST = paging.PIECE = 1  # as many calls as there may be
    for compiled in (False, True):
        ends = []
        params = make_params(shapes=[shape for shape, _ in PLACEMENTS])
        for sharded in (True, False):
            own = [
                distributed_param(p, mesh, placements)
                if sharded
                else torch.nn.Parameter(p.detach().clone())
                for p, (_, placements) in zip(params, PLACEMENTS, strict=True)
            ]
            optimizer = AdamW8bit(own, **SHARDED, is_paged=compiled and sharded)
            step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
            step_with(optimizer, range(3), step if compiled and sharded else None)
            ends.append(gathered(optimizer))
        assert ends[0] == ends[1]


@pytest.mark.filterwarnings("ignore")
def test_same_bits_for_pieces_and_for_compiled_paged_ones() -> None:
    """Pieces have one scale, which no call may write before another one has read it."""
    run_ranks(4, _placed_against_unsharded)


def _pieces_in_one_call(rank: int, world_size: int) -> None:
    """With paged state, where op calls are as small as they can be, and parameters in bfloat16."""
    mesh = init_device_mesh("cpu", (2, 2))
    with mock.patch.object(paging, "PIECE", 1):
        for options in ({"is_paged": True}, {"is_paged": True, "stochastic_rounding": True}):
            ends = []
            params = make_params(torch.bfloat16, [shape for shape, _ in PLACEMENTS])
            for sharded in (True, False):
                own = [
                    distributed_param(p, mesh, placements)
                    if sharded
                    else torch.nn.Parameter(p.detach().clone())
                    for p, (_, placements) in zip(params, PLACEMENTS, strict=True)
                ]
                optimizer = AdamW8bit(own, **{**SHARDED, **options})
                with torch.profiler.profile() as profile:
                    step_with(optimizer, range(3))
                ends.append(gathered(optimizer))
                calls = sum(e.count for e in profile.key_averages() if e.key == STEP_OP)
                assert calls == 3 * len(PLACEMENTS)
            assert ends[0] == ends[1]


def test_pieces_that_share_a_scale_are_stepped_together() -> None:
    """The first of several calls would leave the new scale to the others, whose codes are old."""
    run_ranks(4, _pieces_in_one_call)


def _calls_of_a_step(rank: int, world_size: int) -> int:
    model = fsdp_weights(init_device_mesh("cpu", (world_size,)))
    optimizer = AdamW8bit(groups_of(model.parameters(), True), **SHARDED)
    with torch.profiler.profile() as profile:
        step_with(optimizer, range(3))
    return sum(e.count for e in profile.key_averages() if e.key == "gloo:all_reduce")


def test_one_collective_for_all_parameters() -> None:
    assert run_ranks(2, _calls_of_a_step) == [3, 3]


def _fsdp1(rank: int, world_size: int) -> None:
    model = FullyShardedDataParallel(
        torch.nn.Linear(64, 64), device_id=torch.device("cpu"), use_orig_params=True
    )
    optimizer = AdamW8bit(model.parameters(), **SHARDED)
    model(torch.ones(2, 64)).sum().backward()
    with pytest.raises(ValueError, match=r"flattened by FSDP1.*block_wise=False need all of it"):
        optimizer.step()


@pytest.mark.filterwarnings("ignore")
def test_parameters_that_fsdp1_flattened_are_refused() -> None:
    run_ranks(2, _fsdp1)


# -- checkpoints -----------------------------------------------------------------------------------


def quantized(value: Tensor, signed: bool) -> tuple[bytes, bytes]:
    codes, scale = reference.quantize(value.cpu().flatten(), value.numel(), signed)
    return bits(codes), bits(scale)


def loaded(saved: Any, device: str, **options: Any) -> tuple[LowPrecisionOptimizer, list[str]]:
    optimizer = AdamW8bit(make_params(device=device), **{**ONE_SCALE, **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(through_file(saved))
    return optimizer, [str(w.message) for w in caught]


def test_checkpoints_keep_their_bytes(device: str, tmp_path: Path) -> None:
    params = make_params(device=device)
    optimizer = AdamW8bit(params, **ONE_SCALE)
    train(optimizer, params, range(3))
    again, told = loaded(optimizer.state_dict(), device)
    assert told == []
    assert all_bits(again)["states"] == all_bits(optimizer)["states"]
    pytest.importorskip("safetensors")
    save_safetensors(optimizer, tmp_path / "state.safetensors")
    other = AdamW8bit(make_params(device=device), **ONE_SCALE)
    load_safetensors(other, tmp_path / "state.safetensors")
    assert all_bits(other)["states"] == all_bits(optimizer)["states"]
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        q.data.copy_(p.data)
    train(optimizer, params, [3])
    train(other, other.param_groups[0]["params"], [3])
    assert_same_training(optimizer, other)


@pytest.mark.parametrize(
    ("there", "here", "how"),
    [
        ({"block_wise": True}, {}, "with another block_wise, and is rounded anew"),
        ({}, {"block_wise": True}, "with another block_wise, and is rounded anew"),
        ({"optim_bits": 32}, {}, "in 32 bits, and is rounded to 8"),
        ({}, {"optim_bits": 32}, "in 8 bits, and is kept in 32 from here on"),
    ],
    ids=str,
)
def test_state_of_another_format_is_converted(
    there: Options, here: Options, how: str, device: str
) -> None:
    params = make_params(device=device)
    optimizer = AdamW8bit(params, **{**ONE_SCALE, **there})
    train(optimizer, params, range(3))
    new, told = loaded(optimizer.state_dict(), device, **here)
    assert len(told) == 1
    who = "the state of parameter 0 (of shape [3, 300]) and 5 more"
    assert f"{who} was saved {how}. The options" in told[0]
    block_wise = there.get("block_wise", False)
    for p, q in zip(params, new.param_groups[0]["params"], strict=True):
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            old, state = optimizer.state[p], new.state[q]
            value = old.get(name)
            if value is None:
                codes, scale = old[f"{name}_codes"], old[f"{name}_scale"]
                if not block_wise:
                    value = torchao8.dynamic_map(signed).to(device)[codes.long()] * scale
                else:
                    value = torchao8.dequantize_blockwise(codes, scale, signed=signed)
            if name in state:
                assert bits(state[name]) == bits(value)
                continue
            got = tuple(bits(state[f"{name}_{part}"]) for part in ("codes", "scale"))
            if here.get("block_wise", False):
                want = torchao8.quantize_blockwise(value, signed=signed)
                assert got == (bits(want[0]), bits(want[1]))
            else:
                assert state[f"{name}_scale"].shape == (1,)
                assert got == quantized(value, signed)
    train(new, new.param_groups[0]["params"], [3])


def test_extremes_of_conversion_keep_their_sign(device: str) -> None:
    """The largest magnitude, the positive one in a tie; zeros; and a damaged moment is refused."""
    for values, extreme in (([-3.0, 2.0], -3.0), ([-2.0, 2.0], 2.0), ([0.0, -0.0], 0.0)):
        (p,) = make_params(shapes=[(2, 300)], device=device)
        source = AdamW([p])
        train(source, [p], [0])
        source.state[p]["exp_avg"].zero_()
        source.state[p]["exp_avg"][0, :2] = torch.tensor(values)
        target = AdamW8bit([p], **ONE_SCALE)
        with pytest.warns(UserWarning, match="rounded to 8"):
            target.load_state_dict(copy.deepcopy(source.state_dict()))
        assert float(target.state[p]["exp_avg_scale"]) == extreme
    source.state[p]["exp_avg"][0, 0] = math.nan
    before = all_bits(target)
    with pytest.raises(ValueError, match="exp_avg of parameter 0: expected finite numbers"):
        target.load_state_dict(source.state_dict())
    assert all_bits(target) == before


def test_torch_gets_32_bits() -> None:
    params = make_params()
    optimizer = AdamW8bit(params, **ONE_SCALE)
    train(optimizer, params, range(2))
    codes, scale = (optimizer.state[params[0]][f"exp_avg_{part}"] for part in ("codes", "scale"))
    want = torchao8.dynamic_map()[codes.long()] * scale
    assert bits(to_torch(optimizer)["state"][0]["exp_avg"]) == bits(want)


def test_bitsandbytes_state_with_one_scale_loads_code_for_code() -> None:
    """max1 and max2 of versions up to 0.45, whose maps are ours to rounding."""
    generator = torch.Generator().manual_seed(0)
    params = make_params(shapes=[(7, 300)])
    codes = [torch.randint(0, 256, (7, 300), generator=generator).byte() for _ in range(2)]
    state: dict[str, Any] = {"step": 3}
    for i, signed in ((1, True), (2, False)):
        state |= {
            f"state{i}": codes[i - 1],
            f"qmap{i}": reference.dynamic_map(signed).float(),
            f"max{i}": torch.tensor([0.5 * i]),
            f"new_max{i}": torch.tensor([7.0]),
        }
    group = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "params": [0]}
    optimizer = AdamW8bit(params, **ONE_SCALE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict({"state": {0: state}, "param_groups": [group]})
    ours = optimizer.state[params[0]]
    for i, name in enumerate(("exp_avg", "exp_avg_sq")):
        assert bits(ours[f"{name}_codes"]) == bits(codes[i])
        assert ours[f"{name}_scale"].tolist() == [0.5 * (i + 1)]


def new_run(world_size: int, **options: Any) -> tuple[Weights, LowPrecisionOptimizer]:
    model = fsdp_weights(init_device_mesh("cpu", (world_size,)))
    return model, AdamW8bit(groups_of(model.parameters(), True), **{**SHARDED, **options})


def unsharded_run(**options: Any) -> LowPrecisionOptimizer:
    params = groups_of(Weights().parameters(), False)
    optimizer = AdamW8bit(params, **{**SHARDED, **options})
    step_with(optimizer, range(3))
    return optimizer


SAVED_BY = (1, 3)
FORMATS: tuple[Options, ...] = ({}, {"block_wise": True}, {"optim_bits": 32})


def _save(rank: int, world_size: int, folder: Path) -> None:
    for i, options in enumerate(FORMATS):
        model, optimizer = new_run(world_size, **options)
        step_with(optimizer, range(3))
        state = get_optimizer_state_dict(model, optimizer)
        dcp.save({"optimizer": state}, checkpoint_id=folder / f"{world_size}-{i}")


def states(optimizer: LowPrecisionOptimizer) -> list[dict[str, Any]]:
    return [{k: v for k, v in end.items() if k != "param"} for end in gathered(optimizer)]


def _load(rank: int, world_size: int, folder: Path) -> None:
    """By torch's means in the same format, and by load_dcp from and to every other."""
    for saved_by in SAVED_BY:
        model, optimizer = new_run(world_size)
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / f"{saved_by}-0")
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        assert states(optimizer) == states(unsharded_run())
        for there, here in ((0, 1), (0, 2), (1, 0), (2, 0)):
            model, optimizer = new_run(world_size, **FORMATS[here])
            other = AdamW8bit(
                groups_of(Weights().parameters(), False), **{**SHARDED, **FORMATS[here]}
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_dcp(model, optimizer, folder / f"{saved_by}-{there}")
                other.load_state_dict(copy.deepcopy(unsharded_run(**FORMATS[there]).state_dict()))
            assert states(optimizer) == states(other), (saved_by, there, here)


@pytest.mark.filterwarnings("ignore")
def test_sharded_checkpoints_of_any_world_size_and_format(tmp_path: Path) -> None:
    for world_size in SAVED_BY:
        run_ranks(world_size, _save, tmp_path)
    for world_size in (2, 3):
        run_ranks(world_size, _load, tmp_path)


def _through_state_dict(rank: int, world_size: int) -> None:
    for options in (
        {"full_state_dict": True, "cpu_offload": True, "broadcast_from_rank0": True},
        {"flatten_optimizer_state_dict": True},
    ):
        model, optimizer = new_run(world_size)
        step_with(optimizer, range(3))
        get = StateDictOptions(**{k: v for k, v in options.items() if k != "broadcast_from_rank0"})
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=get))
        if "broadcast_from_rank0" in options and rank > 0:
            state = {}
        other_model, other = new_run(world_size)
        set_optimizer_state_dict(other_model, other, state, options=StateDictOptions(**options))
        assert states(other) == states(optimizer)


@pytest.mark.filterwarnings("ignore")
def test_state_dict_options() -> None:
    run_ranks(3, _through_state_dict)


def _one_rank_refuses(rank: int, world_size: int) -> None:
    """A moment damaged on one rank, where the others talk about the largest: all refuse."""
    model, source = new_run(world_size, optim_bits=32)
    step_with(source, range(1))
    p = next(iter(model.parameters()))
    if rank == 1:
        source.state[p]["exp_avg"].to_local().fill_(math.nan)
    _, target = new_run(world_size)
    before = states(target)
    reason = "expected finite numbers" if rank == 1 else "another rank"
    with pytest.raises(ValueError, match=reason):
        target.load_state_dict(source.state_dict())
    assert states(target) == before


def test_what_one_rank_refuses_all_do() -> None:
    run_ranks(2, _one_rank_refuses)


# -- estimates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [None, 4, (2, 2)])
def test_the_estimate_is_what_the_state_takes(mesh: Any) -> None:
    shapes = [(64, 300), (5, 10), (128, 64)]
    estimate = torchao8.estimate(shapes, mesh, block_wise=False)
    in_8bit = [shape for shape in shapes if math.prod(shape) >= 4096]
    # Two moments and a step of each tensor; 32 bits for the small one.
    whole = sum(2 * math.prod(s) + 2 * 4 for s in in_8bit) + 2 * 4 * 50 + 3 * 4
    assert estimate.checkpoint_8bit == whole
    ranks, shards = {None: (1, 1), 4: (4, 4), (2, 2): (4, 2)}[mesh]
    elements = sum(2 * math.prod(s) for s in in_8bit) + 2 * 4 * 50
    assert estimate.total.state_8bit == elements * ranks // shards + ranks * (2 * 2 * 4 + 3 * 4)
    if mesh is None:
        params = make_params(shapes=shapes)
        optimizer = AdamW8bit(params, block_wise=False)
        train(optimizer, params, [0])
        tensors = [t for s in optimizer.state.values() for t in s.values()]
        assert estimate.state_8bit == sum(t.numel() * t.itemsize for t in tensors)
