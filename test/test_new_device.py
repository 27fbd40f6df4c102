"""A device that the library has never heard of, and that has no float64: see new_device.cpp.

All that it has of the library's is the portable implementation, so it computes the bits that the
CPU computes with that.
"""

import contextlib
import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paged
import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, set_grads, train
from new_device import HERE, NAME, library, run_there, waits
from optim_table import OF_ELEMENTS, OPTIMIZERS, OptimizerCase, Options, every_optimizer
from sharded import Weights
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import torchao8
from torchao8 import __main__ as command
from torchao8 import ops
from torchao8._implementation import choose_portable
from torchao8.checkpoint import load_dcp, load_safetensors, save_safetensors

DEVICES = ("cpu", HERE)


@pytest.fixture(scope="session")
def device_file() -> Path:
    return library()


def tensors_of(optimizer: Any) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(v for p in params for v in optimizer.state[p].values())]


def test_the_device_is_strict(device_file: Path) -> None:
    """It counts what the host waits for, and refuses what a real device may."""
    run_there(device_file, _strict)


def _strict() -> None:
    x = torch.arange(6.0).to(HERE)
    waiting: list[Callable[[], Any]] = [
        x.cpu,
        x[0].item,
        x.tolist,
        x.nonzero,
        lambda: x[x > 2],
        lambda: bool(x.any()),
        lambda: torch.equal(x, x),
        lambda: torch.zeros(6).copy_(x),
    ]
    for read in waiting:
        before = waits()
        read()
        assert waits() > before, read
    before = waits()
    (x.view(2, 3).t() + 1).sum(0).to(torch.bfloat16)
    x.copy_(torch.ones(6))
    assert waits() == before
    refused: list[Callable[[], Any]] = [
        x.double,
        lambda: torch.zeros(3, dtype=torch.float64, device=HERE),
        lambda: x + torch.ones(6),
        lambda: torch.ones(6).to(HERE, non_blocking=True),
    ]
    for use in refused:
        with pytest.raises((TypeError, RuntimeError), match=r"float64|device|non_blocking"):
            use()


# -- steps -----------------------------------------------------------------------------------------

STEPS: tuple[tuple[torch.dtype, Options], ...] = (
    (torch.float32, {}),
    (torch.bfloat16, {"stochastic_rounding": True, "amsgrad": True}),
    (torch.float32, {"percentile_clipping": 50}),
    (torch.float16, {"block_wise": False, "maximize": True}),
)


@every_optimizer()
def test_steps_as_the_cpu_does(case: OptimizerCase, device_file: Path) -> None:
    run_there(device_file, _steps, OPTIMIZERS.index(case))


def _steps(index: int) -> None:
    case = OPTIMIZERS[index]
    for dtype, options in STEPS:
        options = {**case.known(options), "min_8bit_size": SMALL}
        pair = [
            case.make(make_params(dtype, device=d, matrices=case.matrices), **options)
            for d in DEVICES
        ]
        for seed in range(3):
            for optimizer in pair:
                set_grads(optimizer.param_groups[0]["params"], seed)
            pair[0].step()
            before = waits()
            pair[1].step()
            assert waits() == before  # nothing is read on the host
        assert all_bits(pair[0]) == all_bits(pair[1]), options
        assert all(str(t.device) == HERE for t in tensors_of(pair[1]))


def test_numbers_on_the_device(device_file: Path) -> None:
    """A learning rate, betas, and what GradScaler leaves, as tensors there: none is read."""
    run_there(device_file, _numbers_there)


def _numbers_there() -> None:
    for found in (0.0, 1.0):
        pair = []
        for device in DEVICES:
            lr, beta, scale, inf = (
                torch.tensor(x, device="cpu").to(device) for x in (0.01, 0.8, 2.0, found)
            )
            options: Options = {"lr": lr, "betas": (beta, 0.75), "percentile_clipping": 50}
            optimizer = torchao8.AdamW8bit(make_params(device=device), fused=True, **options)
            for seed in range(2):
                set_grads(optimizer.param_groups[0]["params"], seed)
                lr.mul_(0.5)
                if seed:
                    optimizer.grad_scale, optimizer.found_inf = scale, inf
                before = waits()
                optimizer.step()
                assert waits() == before
            pair.append(optimizer)
        assert [bits(t) for t in tensors_of(pair[0])] == [bits(t) for t in tensors_of(pair[1])]


def test_as_the_default_device(device_file: Path) -> None:
    """Chosen before anything else, as a script does in its first line."""
    run_there(device_file, _default_device)


def _default_device() -> None:
    torch.set_default_device(HERE)
    results = []
    for device in DEVICES[::-1]:
        optimizer = torchao8.AdamW8bit(make_cpu_params(device), min_8bit_size=SMALL)
        for seed in range(2):
            with torch.device("cpu"):
                set_grads(optimizer.param_groups[0]["params"], seed)
            optimizer.step()
        results.append(all_bits(optimizer))
    assert results[0] == results[1]


def make_cpu_params(device: str) -> list[torch.nn.Parameter]:
    with torch.device("cpu"):
        return make_params(device=device)


def test_bad_gradients_stay_where_they_are(device_file: Path) -> None:
    run_there(device_file, _bad_gradients)


def _bad_gradients() -> None:
    for case in OF_ELEMENTS:
        params = make_params(device=HERE)
        optimizer = case.make(params, min_8bit_size=SMALL)
        set_grads(params, 0)
        for p in params:
            p.grad.view(-1)[:1] = torch.nan  # type: ignore[union-attr]
        before = [p.detach().cpu() for p in params]
        optimizer.step()
        for p, old in zip(params, before, strict=True):
            new = p.detach().cpu()
            assert bits(new.view(-1)[:1]) == bits(old.view(-1)[:1])
            assert new.isfinite().all()
            assert p.numel() < 2 or not torch.equal(new, old)


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_on", DEVICES)
def test_a_checkpoint_goes_to_the_kernels_and_back(saved_on: str, device_file: Path) -> None:
    """Byte for byte, to the CPU with its kernels and from there."""
    run_there(device_file, _checkpoints, saved_on)


def _checkpoints(saved_on: str) -> None:
    choose_portable("cpu", False)
    loads_on = DEVICES[1 - DEVICES.index(saved_on)]
    for case in OPTIMIZERS:
        options = {**case.full, "percentile_clipping": 50, "min_8bit_size": SMALL}
        writer, reader = (
            case.make(make_params(device=d, matrices=case.matrices), **options)
            for d in (saved_on, loads_on)
        )
        params = writer.param_groups[0]["params"]
        train(writer, params, range(2))
        file = io.BytesIO()
        torch.save(writer.state_dict(), file)
        file.seek(0)
        reader.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        assert all_bits(writer)["states"] == all_bits(reader)["states"]
        assert all(str(t.device).startswith(loads_on) for t in tensors_of(reader))
        train(reader, reader.param_groups[0]["params"], range(2, 4))
        assert all(t.isfinite().all() for t in reader.param_groups[0]["params"])


@pytest.mark.parametrize("saved_on", DEVICES)
def test_files_of_the_library(saved_on: str, device_file: Path, tmp_path: Path) -> None:
    run_there(device_file, _files, saved_on, tmp_path)


def _files(saved_on: str, folder: Path) -> None:
    choose_portable("cpu", False)
    loads_on = DEVICES[1 - DEVICES.index(saved_on)]
    options: Options = {"percentile_clipping": 50, "min_8bit_size": SMALL, "lr": 0.01}
    written, model = (Weights().to(d) for d in (saved_on, loads_on))
    writer = torchao8.NAdam8bit(written.named_parameters(), **options)
    train(writer, written.parameters(), range(2))
    save_safetensors(writer, folder / "file")
    plain = dcp.FileSystemWriter(folder / "dcp", per_thread_copy_ahead=0)  # without streams
    saved = {"optimizer": get_optimizer_state_dict(written, writer)}
    dcp.save(saved, storage_writer=plain, no_dist=True)
    loads: list[Callable[[Any], None]] = [
        lambda reader: load_safetensors(reader, folder / "file"),
        lambda reader: load_dcp(model, reader, folder / "dcp", no_dist=True),
    ]
    for load in loads:
        reader = torchao8.NAdam8bit(model.named_parameters(), **options)
        load(reader)
        assert all_bits(reader)["states"] == all_bits(writer)["states"]
        assert all(str(t.device).startswith(loads_on) for t in tensors_of(reader))


def test_bits_convert_and_copies_go_on(device_file: Path) -> None:
    run_there(device_file, _conversions)


def _conversions() -> None:
    for first, second in ((8, 32), (32, 8)):
        results = []
        for device in DEVICES:
            options = {"min_8bit_size": SMALL, "percentile_clipping": 50}
            a, b = (
                torchao8.AdamW8bit(make_params(device=device), optim_bits=n, **options)
                for n in (first, second)
            )
            train(a, a.param_groups[0]["params"], range(2))
            b.load_state_dict(a.state_dict())
            b = copy.deepcopy(b)
            train(b, b.param_groups[0]["params"], range(2, 4))
            results.append(all_bits(b))
        assert results[0] == results[1]


def test_codec(device_file: Path) -> None:
    run_there(device_file, _codec)


def _codec() -> None:
    x = torch.randn(7, 700, generator=torch.Generator().manual_seed(0))
    for signed in (True, False):
        here = torchao8.quantize_blockwise(x, signed=signed)
        there = torchao8.quantize_blockwise(x.to(HERE), signed=signed)
        assert [bits(t) for t in here] == [bits(t) for t in there]
        back = torchao8.dequantize_blockwise(*there, signed=signed)
        assert str(back.device) == HERE
        assert bits(back) == bits(torchao8.dequantize_blockwise(*here, signed=signed))
    sums = ops.sum_squares([x.to(HERE)])
    assert bits(sums) == bits(ops.sum_squares([x]))
    assert ops.norms(sums).dtype == torch.float32
    with pytest.raises(RuntimeError, match="scale"):
        torchao8.dequantize_blockwise(there[0], here[1])


# -- what a user asks ------------------------------------------------------------------------------


def test_what_is_refused_names_the_option(device_file: Path) -> None:
    run_there(device_file, _refused)


def _refused() -> None:
    optimizer = paged.adam(device=HERE)
    params = paged.params_of(optimizer)
    set_grads(params, 0)
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match=f"is_paged: expected .* got {HERE}"):
        optimizer.step()
    assert all_bits(optimizer) == before
    with pytest.raises(TypeError, match="float64"):
        params[0].double()


def test_memory_and_estimate(device_file: Path) -> None:
    run_there(device_file, _memory)


def _memory() -> None:
    options: Options = {"min_8bit_size": SMALL, "percentile_clipping": 50}
    here, there = (torchao8.AdamW8bit(make_params(device=d), **options) for d in DEVICES)
    for is_pending in (True, False):
        a, b = here.memory(), there.memory()
        assert (a.total, a.pending > 0) == (b.total, is_pending)
        assert b.places == {HERE: a.places["cpu"]}
        for optimizer in (here, there):
            train(optimizer, optimizer.param_groups[0]["params"], range(1))
    model = torch.nn.Linear(300, 40)
    on_the_cpu = torchao8.estimate(model)
    assert torchao8.estimate(model.to(HERE)) == on_the_cpu


def test_the_report_names_it_and_checks_it(device_file: Path) -> None:
    text = run_there(device_file, _report)
    lines = {line.strip() for line in text.splitlines()}
    portable = "PyTorch operators (torchao8.portable)"
    assert any(line.endswith(f"{NAME}: {portable}") for line in lines), text
    assert any(line.endswith(f"ok: 8-bit AdamW on {HERE} against float64") for line in lines), text


def _report() -> str:
    choose_portable("cpu", False)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert command.main() == 0, out.getvalue()
    return out.getvalue()


def test_a_traced_step_is_one_graph(device_file: Path) -> None:
    """Where a compiler does not know the device, as inductor does not know this one."""
    run_there(device_file, _traced)


def _traced() -> None:
    pair = [torchao8.AdamW8bit(make_params(device=HERE), min_8bit_size=SMALL) for _ in range(2)]
    step = torch.compile(pair[0].step, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        for optimizer in pair:
            set_grads(optimizer.param_groups[0]["params"], seed)
        step()
        pair[1].step()
        assert all_bits(pair[0]) == all_bits(pair[1])
    with pytest.raises(Exception, match=NAME):
        torch.compile(pair[1].step)()
