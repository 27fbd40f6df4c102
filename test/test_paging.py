"""Paged state: the bits of other state, in files that leave nothing behind, and a disk that is full.

The sizes lie around 100,000 elements, from which on state is paged.
"""

import copy
import ctypes
import errno
import gc
import io
import mmap
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    all_bits,
    assert_same_training,
    bits,
    make_params,
    set_grads,
    through_file,
    train,
)
from optim_table import OPTIMIZERS, OptimizerCase
from ranks import run_ranks
from sharded import Weights, distributed_param, gathered, step_with
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.optim import Optimizer

import torchao8
from torchao8 import ops
from torchao8.optim import _paging

ROOT = Path(__file__).resolve().parent.parent
# Of these the third to fifth are paged: matrices of rows that are a multiple of the block and not,
# and a vector.
SHAPES = ((300, 333), (64, 70), (400, 250), (200, 512), (100_001,), ())
PAGED = (2, 3, 4)

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="no /proc/self/maps, as Linux has it"
)
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU that this torch can use: run `make gpu` on a machine with one, and with nvcc",
)


def every_family() -> pytest.MarkDecorator:
    """Runs a test over the classes of the table, each of which has a paged form."""
    return pytest.mark.parametrize("case", OPTIMIZERS, ids=lambda c: f"Paged{c.cls.__name__}")


def paged(case: OptimizerCase, params: Any, **options: Any) -> Any:
    cls = getattr(torchao8, f"Paged{case.cls.__name__}")
    return cls(params, **{**case.base, **options})


def adam(cls: Any = torchao8.PagedAdamW8bit, device: str = "cpu", **options: Any) -> Any:
    return cls(make_params(shapes=SHAPES, device=device), **{"lr": 0.01, "seed": 3, **options})


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def trained(optimizer: Any, steps: Sequence[int] = range(2)) -> Any:
    train(optimizer, params_of(optimizer), steps)
    return optimizer


def folders(optimizer: Optimizer) -> list[dict[str, str | None]]:
    """Of each parameter, where each tensor of its state lies; None in ordinary memory."""
    return [
        {k: _paging.found_in(v) for k, v in optimizer.state[p].items()}
        for p in params_of(optimizer)
    ]


def assert_paged(optimizer: Optimizer, folder: str = "", of: Sequence[int] = PAGED) -> None:
    """All states of these parameters, and no other tensor of state."""
    for i, found in enumerate(folders(optimizer)):
        for key, where in found.items():
            assert where == (folder if i in of and key != "step" else None), (i, key)


def mapping_of(address: int) -> str:
    """The line of /proc/self/maps."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(n, 16) for n in line.split()[0].split("-"))
        if first <= address < last:
            return line
    raise AssertionError("not mapped")


def held() -> tuple[int, int]:
    """File descriptors, and mapped files without a name."""
    gc.collect()
    maps = Path("/proc/self/maps").read_text().splitlines()
    nameless = [line for line in maps if re.search(r"rw-s .* \(deleted\)$", line)]
    return len(os.listdir("/proc/self/fd")), len(nameless)


# -- the classes -----------------------------------------------------------------------------------


@every_family()
def test_the_bits_of_other_state(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one op call for each bucket and in pieces, which changes nothing either."""
    optimizers = []
    for piece in (None, 1 << 30, 1 << 17):
        params = make_params(shapes=SHAPES) + make_params(torch.bfloat16, [(128, 1024)])
        options = {"weight_decay": 0.1, "min_8bit_size": 100, **case.full}
        if piece is not None:
            monkeypatch.setattr(_paging, "PIECE", piece)
        make = case.make if piece is None else lambda *a, **k: paged(case, *a, **k)
        optimizers.append(trained(make(params, **options), range(3)))
    plain, whole, in_pieces = optimizers
    assert_same_training(whole, plain)
    assert_same_training(in_pieces, plain)
    assert_paged(whole, of=(*PAGED, 6))
    assert_paged(plain, of=())


@every_family()
def test_a_paged_class(case: OptimizerCase) -> None:
    """A subclass that differs in one default, which a group may have otherwise."""
    optimizer = paged(case, make_params(shapes=SHAPES))
    cls, name = type(optimizer), case.cls.__name__
    assert cls.__bases__ == (case.cls,)
    assert (cls.__name__, cls.__module__) == (f"Paged{name}", case.cls.__module__)
    assert cls.__doc__ and f":class:`{name}`" in cls.__doc__
    assert getattr(torchao8.optim, cls.__name__) is cls is pickle.loads(pickle.dumps(cls))
    assert {f"Paged{name}"} <= set(torchao8.__all__) & set(torchao8.optim.__all__)
    plain = case.make(make_params(shapes=SHAPES))
    assert {**plain.defaults, "is_paged": True} == optimizer.defaults
    resident = trained(paged(case, make_params(shapes=SHAPES), is_paged=False))
    assert_paged(resident, of=())
    by_option = trained(case.make(make_params(shapes=SHAPES), is_paged=True))
    assert_paged(by_option)
    assert_same_training(by_option, resident)


def test_groups_have_their_own(tmp_path: Path) -> None:
    params = make_params(shapes=[(200, 512)] * 4)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "is_paged": False},
        {"params": params[2:], "page_dir": str(tmp_path)},
    ]
    optimizer = trained(torchao8.PagedAdam8bit(groups))
    where = [found["exp_avg_codes"] for found in folders(optimizer)]
    assert where == ["", None, str(tmp_path), str(tmp_path)]
    plain = trained(torchao8.Adam8bit(make_params(shapes=[(200, 512)] * 4)))
    assert_same_training(optimizer, plain)


def test_a_group_that_comes_later() -> None:
    pair = [adam(), adam(torchao8.AdamW8bit)]
    for optimizer in pair:
        trained(optimizer)
        later = make_params(shapes=[(300, 400), (10, 20)], seed=5)
        optimizer.add_param_group({"params": later})
        trained(optimizer, range(2, 4))
    assert_same_training(*pair)
    assert_paged(pair[0], of=(*PAGED, 6))


def test_float32_numbers_that_do_not_start_at_zero() -> None:
    pair = [
        cls(make_params(shapes=SHAPES), initial_accumulator_value=0.5)
        for cls in (torchao8.PagedAdagrad, torchao8.Adagrad)
    ]
    assert_same_training(*(trained(optimizer, range(1)) for optimizer in pair))


# -- the memory ------------------------------------------------------------------------------------


@needs_proc
def test_state_lies_in_a_file_without_a_name(tmp_path: Path) -> None:
    optimizer = trained(adam(page_dir=str(tmp_path)))
    assert_paged(optimizer, str(tmp_path))
    for i in PAGED:
        for key, value in optimizer.state[params_of(optimizer)[i]].items():
            line = mapping_of(value.data_ptr())
            in_file = re.search(rf"rw-s .*{re.escape(str(tmp_path))}/.* \(deleted\)$", line)
            assert bool(in_file) == (key != "step"), line
            if key != "step":
                assert value.data_ptr() % mmap.PAGESIZE == 0
                assert value.untyped_storage().nbytes() == value.nbytes
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_one_file_however_many_tensors_and_none_after_the_optimizer() -> None:
    before = held()
    many = make_params(shapes=[(200, 512)] * 40)
    optimizer = trained(torchao8.PagedAdam8bit(many), range(1))
    during = held()
    assert (during[0] - before[0], during[1] - before[1]) == (1, 1)
    state = optimizer.state[many[3]]["exp_avg_codes"]
    expected = bits(state)
    del optimizer
    assert held() == during  # a tensor of it is still there, and so are its bytes
    assert bits(state) == expected
    del state
    assert held() == before
    assert not _paging.any_pages()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torchao8
from helpers import make_params, train
params = make_params(shapes=[(400, 500)])
optimizer = torchao8.PagedAdam8bit(params, page_dir={folder!r})
train(optimizer, params, range(1))
print(os.listdir({folder!r}), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def run_python(script: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, **options)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(ROOT / "test"), folder=str(tmp_path))
    result = run_python(script)
    assert (result.returncode, result.stdout) == (-signal.SIGKILL, "[]\n"), result.stderr
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
import torch
import torchao8
torch.set_num_threads(1)
rows = 4096  # of 4 KiB
def step(cls, p):
    p.grad = torch.ones_like(p)
    optimizer = cls([p])
    limit = resource.getrlimit(resource.RLIMIT_DATA)
    used = 1024 * int(next(l for l in open("/proc/self/status") if "VmData" in l).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + 4096 * rows, limit[1]))
    try:
        for _ in range(3):
            optimizer.step()
    except (RuntimeError, MemoryError) as error:
        return type(error).__name__
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limit)
    return float(p.detach().double().sum())
step(torchao8.AdamW, torch.nn.Parameter(torch.ones(8, 8)))  # what a first step allocates once
make = lambda: torch.nn.Parameter(torch.ones(rows, 1024))
print(step(torchao8.AdamW, make()), step(torchao8.PagedAdamW, make()))
p = make()
p.grad = torch.ones_like(p)
optimizer = torchao8.AdamW([p])
for _ in range(3):
    optimizer.step()
print(float(p.detach().double().sum()))
"""


@needs_proc
def test_state_that_exceeds_the_memory_of_a_process_trains() -> None:
    """The limit leaves room for one of its two moments."""
    result = run_python(LIMITED)
    assert result.returncode == 0, result.stderr
    limited, plain = result.stdout.splitlines()
    assert limited.split() == ["RuntimeError", plain]


PAGE_OUT = 21  # MADV_PAGEOUT, which Python has no name for


def resident_pages(tensor: Tensor) -> int:
    count = -(-tensor.nbytes // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * count)()
    libc = ctypes.CDLL(None, use_errno=True)
    address, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.nbytes)
    assert libc.mincore(address, size, found) == 0
    return sum(page & 1 for page in found)


@needs_proc
def test_pages_come_ahead_of_the_step() -> None:
    """Those that the system has put out."""
    optimizer = trained(torchao8.PagedAdam(make_params(shapes=[(1024, 1024)])), range(1))
    state = optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    expected = bits(state)
    pages = _paging._pages[state.data_ptr()]
    assert isinstance(pages, mmap.mmap)
    every = state.nbytes // mmap.PAGESIZE
    pages.flush()
    try:
        pages.madvise(PAGE_OUT)
    except OSError as error:
        pytest.skip(f"this system puts no pages out when asked: {error}")
    if resident_pages(state) > every / 2:
        pytest.skip("this system put no pages out; is the temporary folder in RAM? Set TMPDIR")
    ops.prefetch_pages_([[state]], state)
    deadline = time.monotonic() + 30
    while resident_pages(state) < every and time.monotonic() < deadline:
        time.sleep(0.01)
    assert resident_pages(state) == every
    assert bits(state) == expected


def test_each_call_has_the_pages_of_the_next_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of the first one before it."""
    seen: list[tuple[str, list[int]]] = []
    prefetch, step = ops._prefetch_pages_, dict(ops._STEP_OPS)

    def seen_prefetch(tensors: list[Tensor], now: Tensor) -> None:
        seen.append(("prefetch", [t.data_ptr() for t in tensors]))
        prefetch(tensors, now)

    def seen_step(params: Any, grads: Any, *lists: Any, **options: Any) -> None:
        seen.append(("step", [t.data_ptr() for ts in lists[:4] for t in ts]))
        step["adam_step_"](params, grads, *lists, **options)

    optimizer = trained(torchao8.PagedAdam8bit(make_params(shapes=[(200, 512)] * 3 + [(64, 70)])))
    monkeypatch.setattr(_paging, "PIECE", 1)
    monkeypatch.setattr(ops, "_prefetch_pages_", seen_prefetch)
    monkeypatch.setitem(ops._STEP_OPS, "adam_step_", seen_step)
    optimizer.step()
    states = [
        {v.data_ptr() for k, v in optimizer.state[p].items() if k != "step"}
        for p in params_of(optimizer)
    ]
    order = [(kind, states.index(set(found)) if found else None) for kind, found in seen[:7]]
    assert order == [
        ("prefetch", 0), ("prefetch", 1), ("step", 0), ("prefetch", 2), ("step", 1),
        ("prefetch", None), ("step", 2),
    ]  # fmt: skip
    assert seen[7][0] == "step" and len(seen) == 8


def test_the_op_that_prefetches(device: str) -> None:
    op = torch.ops.torchao8.prefetch_pages_.default
    pages = [torch.ones(1000, device=device), torch.ones(3, dtype=torch.uint8, device=device)[1:]]
    now = torch.ones((), device=device)
    torch.library.opcheck(op, (pages, now))
    op([], now)
    op([torch.ones(0, device=device)], now)
    with pytest.raises(RuntimeError, match=r"prefetch_pages_: pages\[1\] must be contiguous"):
        op([pages[0], torch.ones(3, 2, device=device).t()], now)


# -- a disk that is full ---------------------------------------------------------------------------


def full_disk(file: int, offset: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_at_the_first_step_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the step is made once there is space. The group that has no paged state waits as well."""
    groups = [
        {"params": make_params(shapes=SHAPES), "is_paged": False},
        {"params": make_params(shapes=SHAPES), "page_dir": str(tmp_path)},
    ]
    optimizer = torchao8.PagedLAMB8bit(groups, percentile_clipping=50)
    set_grads(params_of(optimizer), 0)
    before = all_bits(optimizer)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full_disk, raising=False)
        for _ in range(2):
            with pytest.raises(OSError) as info:
                optimizer.step()
            assert info.value.errno == errno.ENOSPC
    assert re.search(
        r"No space left on device: no file of [\d,]+ bytes for paged state in "
        rf"'{re.escape(str(tmp_path))}', [\d,]+ are free; nothing has changed. "
        "Choose another folder with page_dir=, or make room",
        str(info.value),
    )
    assert all_bits(optimizer) == before
    assert not any(optimizer.state.values())
    assert list(tmp_path.iterdir()) == []
    optimizer.step()
    assert all(float(state["step"]) == 1 for state in optimizer.state.values())


def test_a_full_disk_at_a_load_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = through_file(trained(adam(torchao8.AdamW8bit), range(3)).state_dict())
    in_32bit = through_file(trained(adam(torchao8.AdamW), range(3)).state_dict())
    for state_dict in (saved, in_32bit):  # the second is converted
        optimizer = trained(adam(), range(1))
        before = all_bits(optimizer)
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full_disk, raising=False)
            with pytest.raises(OSError, match="No space left on device"):
                optimizer.load_state_dict(state_dict)
            assert all_bits(optimizer) == before
            with pytest.raises(OSError, match="No space left on device"):
                copy.deepcopy(optimizer)
        assert_paged(optimizer)
        trained(optimizer, range(1, 2))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[str, Callable[[str], None]]]:
    """A file system of 1 MiB, and how to give it another size."""
    folder = str(tmp_path / "disk")
    os.mkdir(folder)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"only root, with the rights to, can mount a small disk: {done.stderr.strip()}")

    def resize(size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", folder], check=True)

    try:
        yield folder, resize
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With space reserved, and where zeros must be written for it."""
    folder, resize = small_disk
    for can_reserve in (True, False):
        if not can_reserve:
            monkeypatch.delattr(os, "posix_fallocate")
        resize("512k")
        optimizer = adam(page_dir=folder)  # of 603,000 bytes of paged state
        set_grads(params_of(optimizer), 0)
        before = all_bits(optimizer)
        with pytest.raises(OSError, match="No space left on device: no file of"):
            optimizer.step()
        assert all_bits(optimizer) == before
        assert os.statvfs(folder).f_bavail == os.statvfs(folder).f_blocks  # nothing half-made
        resize("1m")
        trained(optimizer)
        saved = optimizer.state_dict()["state"]
        plain = trained(adam(torchao8.AdamW8bit))
        assert_same_training(optimizer, plain)
        before = all_bits(optimizer)
        with pytest.raises(OSError, match="No space left on device: no file of"):
            optimizer.load_state_dict(trained(plain).state_dict())  # no room for both
        assert all_bits(optimizer) == before
        del optimizer, saved
        gc.collect()


TOO_LARGE = """
import resource, sys
sys.path.insert(0, {tests!r})
import torchao8
from helpers import all_bits, make_params, set_grads
params = make_params(shapes=[(400, 500)])
optimizer = torchao8.PagedAdam8bit(params)
set_grads(params, 0)
before = all_bits(optimizer)
limit = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
try:
    optimizer.step()
except OSError as error:
    print(type(error).__name__, "no file of" in str(error), all_bits(optimizer) == before)
resource.setrlimit(resource.RLIMIT_FSIZE, limit)
optimizer.step()
print(float(optimizer.state[params[0]]["step"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of a process on this system")
def test_a_limit_on_the_size_of_files() -> None:
    result = run_python(TOO_LARGE.format(tests=str(ROOT / "test")))
    assert result.stdout == "OSError True True\n1.0\n", result.stderr


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, None])
def test_a_file_system_that_cannot_reserve(
    number: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a platform that cannot ask for it: zeros are written, and the bits are the same."""

    def cannot(file: int, offset: int, size: int) -> None:
        assert number is not None
        raise OSError(number, os.strerror(number))

    if number is None:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", cannot, raising=False)
    optimizer = trained(adam())
    assert_paged(optimizer)
    assert_same_training(optimizer, trained(adam(torchao8.AdamW8bit)))


# -- options ---------------------------------------------------------------------------------------


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    """After construction, which would have refused it."""
    folder = tmp_path / "pages"
    with pytest.raises(ValueError, match="page_dir: expected a folder that can be written to"):
        adam(page_dir=str(folder))
    folder.mkdir()
    optimizer = adam(page_dir=str(folder))
    folder.rmdir()
    set_grads(params_of(optimizer), 0)
    before = all_bits(optimizer)
    with pytest.raises(FileNotFoundError, match=f"paged state in '{re.escape(str(folder))}'"):
        optimizer.step()
    assert all_bits(optimizer) == before
    folder.mkdir()
    trained(optimizer)


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write to any folder"
)
def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="page_dir: expected a folder that can be written to"):
        adam(page_dir=str(tmp_path))


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    """Found out at the first step where the option was changed in a group."""
    path = tmp_path / "file"
    path.touch()
    optimizer = adam()
    optimizer.param_groups[0]["page_dir"] = str(path)
    set_grads(params_of(optimizer), 0)
    with pytest.raises(NotADirectoryError, match="Choose another folder with page_dir="):
        optimizer.step()
    assert not any(optimizer.state.values())


@pytest.mark.parametrize(
    ("cls", "change"),
    [
        (torchao8.PagedAdamW8bit, {"is_paged": False}),
        (torchao8.AdamW8bit, {"is_paged": True}),
        (torchao8.PagedAdamW8bit, {"page_dir": "."}),
        (torchao8.PagedAdamW, {"is_paged": False}),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_an_option_that_is_changed_late(cls: Any, change: dict[str, Any], compiled: bool) -> None:
    """It raises and changes nothing; set back, or with the state moved, it goes on."""
    optimizer, other = trained(adam(cls)), trained(adam(cls))
    step = torch.compile(optimizer.step, fullgraph=True) if compiled else optimizer.step
    before = all_bits(optimizer)
    group = optimizer.param_groups[0]
    old = {name: group[name] for name in change}
    group.update(change)
    with pytest.raises(Exception, match=r"parameter 2 already has (paged )?state.*Set them back"):
        step()
    assert all_bits(optimizer)["states"] == before["states"]
    assert all_bits(optimizer)["params"] == before["params"]
    group.update(old)
    trained(optimizer, range(2, 3))
    group.update(change)
    optimizer.load_state_dict(optimizer.state_dict())
    trained(optimizer, range(3, 4))
    assert_paged(optimizer, group["page_dir"], of=PAGED if group["is_paged"] else ())
    assert_same_training(optimizer, trained(other, range(2, 4)))


def test_another_device_than_can_be_paged() -> None:
    p = torch.nn.Parameter(torch.empty(400, 300, device="meta"))
    p.grad = torch.empty_like(p)
    optimizer = torchao8.PagedAdam8bit([p])
    with pytest.raises(ValueError, match="is_paged: expected parameters on the CPU or on a GPU"):
        optimizer.step()


# -- checkpoints and copies ------------------------------------------------------------------------


@every_family()
def test_checkpoints_go_both_ways(case: OptimizerCase) -> None:
    """Byte for byte, and what is loaded lies where the optimizer keeps it."""

    def make(is_paged: bool) -> Any:
        params = make_params(shapes=SHAPES)
        return paged(case, params, seed=4) if is_paged else case.make(params, seed=4)

    saved = {is_paged: trained(make(is_paged)) for is_paged in (True, False)}
    files = {}
    for is_paged, optimizer in saved.items():
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        files[is_paged] = file.getbuffer().nbytes
    assert files[True] == pytest.approx(files[False], abs=2000)  # names of storages, alignment
    for of, to in ((True, False), (False, True), (True, True)):
        optimizer = make(to)
        for p, q in zip(params_of(optimizer), params_of(saved[of]), strict=True):
            p.data.copy_(q)
        optimizer.load_state_dict(through_file(saved[of].state_dict()))
        assert_paged(optimizer, of=PAGED if to else ())
        assert [group["is_paged"] for group in optimizer.param_groups] == [to]
        assert_same_training(optimizer, saved[of])
        trained(optimizer, range(2, 4))
        other = copy.deepcopy(saved[of])
        assert_same_training(optimizer, trained(other, range(2, 4)))


def test_live_state_of_another_optimizer(tmp_path: Path) -> None:
    """Paged state is taken over, as other state is, where it lies in the right place already, and
    moved where it does not."""
    first = trained(adam())
    for cls, options, is_shared in (
        (torchao8.PagedAdamW8bit, {}, True),
        (torchao8.PagedAdamW8bit, {"page_dir": str(tmp_path)}, False),
        (torchao8.AdamW8bit, {}, False),
    ):
        second = adam(cls, **options)
        second.load_state_dict(first.state_dict())
        of = PAGED if cls is torchao8.PagedAdamW8bit else ()
        assert_paged(second, options.get("page_dir", ""), of=of)
        for i in PAGED:
            a, b = (o.state[params_of(o)[i]]["exp_avg_codes"] for o in (first, second))
            assert (a.data_ptr() == b.data_ptr()) == is_shared
            assert torch.equal(a, b)


def test_one_tensor_twice_in_a_checkpoint() -> None:
    """Each gets memory of its own, in pages."""
    optimizer = trained(adam())
    saved = optimizer.state_dict()
    state = saved["state"][2]
    for twice in (state["exp_avg_codes"], state["exp_avg_codes"].clone()):
        saved["state"][2] = {**state, "exp_avg_codes": twice, "exp_avg_sq_codes": twice}
        optimizer.load_state_dict(saved)
        assert_paged(optimizer)
        new = optimizer.state[params_of(optimizer)[2]]
        assert new["exp_avg_codes"].data_ptr() != new["exp_avg_sq_codes"].data_ptr()
        assert bits(new["exp_avg_codes"]) == bits(new["exp_avg_sq_codes"]) == bits(twice)


@needs_proc
def test_a_checkpoint_that_is_refused_leaves_no_pages() -> None:
    optimizer = trained(adam())
    saved = through_file(optimizer.state_dict())
    saved["state"][4]["exp_avg_scale"][0] = torch.nan
    before, memory = all_bits(optimizer), held()
    with pytest.raises(ValueError, match="expected finite numbers"):
        optimizer.load_state_dict(saved)
    assert all_bits(optimizer) == before
    assert held() == memory


def test_old_checkpoints_and_pickles_have_no_such_options(tmp_path: Path) -> None:
    optimizer = trained(adam(page_dir=str(tmp_path)))
    saved = through_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["is_paged"], group["page_dir"]
    optimizer.load_state_dict(saved)
    assert_paged(optimizer, str(tmp_path))
    plain = trained(adam(torchao8.AdamW8bit))
    old = plain.__getstate__()
    for group in (old["defaults"], *old["param_groups"]):
        del group["page_dir"]
    again = pickle.loads(pickle.dumps(plain))
    trained(again)
    assert again.param_groups[0]["page_dir"] == again.defaults["page_dir"] == ""


def by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def by_file(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_file])
def test_copies_are_paged_and_apart(duplicate: Callable[[Any], Any], tmp_path: Path) -> None:
    optimizer = trained(adam(page_dir=str(tmp_path)))
    before = all_bits(optimizer)
    other = duplicate(optimizer)
    assert_paged(other, str(tmp_path))
    trained(other, range(2, 4))
    assert all_bits(optimizer)["states"] == before["states"]
    assert_same_training(other, trained(optimizer, range(2, 4)))


def test_safetensors(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="no safetensors: pip install safetensors")
    from torchao8.checkpoint import load_safetensors, save_safetensors

    optimizer = trained(adam())
    save_safetensors(optimizer, tmp_path / "file.safetensors")
    other = adam()
    for p, q in zip(params_of(other), params_of(optimizer), strict=True):
        p.data.copy_(q)
    load_safetensors(other, tmp_path / "file.safetensors")
    assert_paged(other)
    assert_same_training(other, optimizer)


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("cls", [torchao8.PagedAdamW8bit, torchao8.PagedLAMB8bit])
def test_compiled_in_one_graph(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prefetches in their places, and the bits of the eager step."""
    monkeypatch.setattr(_paging, "PIECE", 1 << 18)
    compiled, eager = (cls(make_params(shapes=SHAPES), lr=torch.tensor(0.01)) for _ in range(2))
    counter = CompileCounterWithBackend("inductor")
    step = torch.compile(compiled.step, backend=counter, fullgraph=True)
    for seed in range(3):
        for optimizer in (compiled, eager):
            set_grads(params_of(optimizer), seed)
        step()
        eager.step()
        assert_same_training(compiled, eager)
    assert counter.frame_count == 1
    assert_paged(compiled)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's own
def test_compiled_code_has_no_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_paging, "PIECE", 1)
    params = make_params(shapes=[(200, 512)] * 3)
    optimizer = torchao8.PagedAdamW8bit(params, lr=torch.tensor(0.01))
    set_grads(params, 0)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    body = code[code.index("def call(") : code.index("runner = Runner")]
    for copying in ("clone", "copy_", "as_strided", "auto_functionalized", "empty_strided"):
        assert copying not in body
    calls = re.findall(r"torch.ops.torchao8.(prefetch_pages_|adam_step_).default\(", body)
    assert calls == ["prefetch_pages_", *["prefetch_pages_", "adam_step_"] * 2, "adam_step_"]


# -- sharded ---------------------------------------------------------------------------------------

SHARDED = ((500, 256), (333, 301), (40, 70), (7, 20_000))


def sharded_worker(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (world_size,))

    def make(cls: Any, **options: Any) -> Any:
        params = [
            distributed_param(p, mesh, [Shard(0)]) for p in Weights(shapes=SHARDED).parameters()
        ]
        return cls(params, lr=0.01, **options)

    def where(optimizer: Any) -> list[str | None]:
        states = (optimizer.state[p] for p in params_of(optimizer))
        return [_paging.found_in(s["exp_avg_codes"].to_local()) for s in states]

    optimizer, plain = make(torchao8.PagedAdamW8bit), make(torchao8.AdamW8bit)
    for each in (optimizer, plain):
        step_with(each, range(2))
    result = {"same": gathered(optimizer) == gathered(plain), "where": where(optimizer)}
    again = make(torchao8.PagedAdamW8bit, page_dir=folder)
    for p, q in zip(params_of(again), params_of(plain), strict=True):
        p.data.copy_(q.data)
    again.load_state_dict(plain.state_dict())
    for each in (again, plain):
        step_with(each, range(2, 4))
    result |= {"loaded": gathered(again) == gathered(plain), "where loaded": where(again)}
    other = copy.deepcopy(again)
    result |= {"copied": gathered(other) == gathered(plain), "where copied": where(other)}
    before = gathered(again)
    if rank == 0:
        os.posix_fallocate = full_disk
    try:
        again.load_state_dict(plain.state_dict())
    except (OSError, ValueError) as error:
        result["refused"] = str(error)
    result["unchanged"] = gathered(again) == before
    return result


@pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch is built without torch.distributed"
)
def test_two_ranks(tmp_path: Path) -> None:
    """What is paged follows from whole parameters; a rank without space speaks for all of them.

    The second and the last one have less than 100,000 elements on a rank; the last has an uneven
    shard.
    """
    first, second = run_ranks(2, sharded_worker, str(tmp_path))
    assert "No space left on device" in first.pop("refused")
    assert "another rank refused" in second.pop("refused")
    folder = str(tmp_path)
    for result in (first, second):
        assert result == {
            "same": True,
            "where": ["", "", None, ""],
            "loaded": True,
            "where loaded": [folder, folder, None, folder],
            "copied": True,
            "where copied": [folder, folder, None, folder],
            "unchanged": True,
        }


# -- on a GPU --------------------------------------------------------------------------------------


@needs_gpu
@every_family()
def test_a_gpu_gives_the_bits_of_the_cpu(
    case: OptimizerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of some MB of managed memory; the GPU that runs the tests has more than that free."""
    monkeypatch.setattr(_paging, "PIECE", 1 << 17)
    on_cpu, on_gpu = (
        trained(paged(case, make_params(shapes=SHAPES, device=device)), range(3))
        for device in ("cpu", "cuda")
    )
    assert_paged(on_gpu)
    assert_same_training(on_gpu, on_cpu)
    states = on_gpu.state[params_of(on_gpu)[2]].values()
    assert all(value.is_cuda for value in states)


@needs_gpu
def test_managed_memory_goes_with_the_optimizer() -> None:
    """Of at most a quarter of what is free."""
    free, _ = torch.cuda.mem_get_info()
    rows = min(free // 4 // (2 * 4096), 16384)
    p = torch.nn.Parameter(torch.ones(rows, 1024, device="cuda"))
    p.grad = torch.ones_like(p)
    allocated = torch.cuda.memory_allocated()
    optimizer = torchao8.PagedAdam([p])
    for _ in range(2):
        optimizer.step()
    assert torch.cuda.memory_allocated() - allocated < 1 << 20  # torch's own memory has no state
    torch.cuda.synchronize()
    in_use, _ = torch.cuda.mem_get_info()
    del optimizer
    gc.collect()
    assert not _paging.any_pages()
    assert torch.cuda.mem_get_info()[0] - in_use > rows * 4096


@needs_gpu
def test_a_captured_step_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fetches its pages by itself; state that was loaded since is another graph's."""
    monkeypatch.setattr(_paging, "PIECE", 1 << 17)
    captured, eager = (adam(device="cuda", lr=torch.tensor(0.01, device="cuda")) for _ in range(2))
    for optimizer in (captured, eager):
        trained(optimizer, range(1))
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured.step()
        for _ in range(3):
            graph.replay()
            eager.step()
            assert_same_training(captured, eager)
        captured.load_state_dict(copy.deepcopy(captured.state_dict()))
        assert_paged(captured)


@needs_gpu
def test_a_folder_has_no_use_on_a_gpu(tmp_path: Path) -> None:
    optimizer = adam(device="cuda", page_dir=str(tmp_path))
    set_grads(params_of(optimizer), 0)
    with pytest.raises(ValueError, match="page_dir: expected '', as parameters are on cuda:0"):
        optimizer.step()
    assert not any(optimizer.state.values())


@needs_gpu
def test_more_managed_memory_than_there_can_be() -> None:
    with pytest.raises(RuntimeError, match="allocate_managed: size must be above 0, got -1"):
        ops.allocate_managed(torch.device("cuda"), -1)
