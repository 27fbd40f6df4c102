"""Paged state: the bits of other state, in files that leave nothing behind."""

import ctypes
import gc
import mmap
import os
import pickle
import re
import signal
import struct
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import (
    all_bits,
    assert_same_training,
    bits,
    make_params,
    needs_kernels,
    set_grads,
)
from optim_table import OptimizerCase
from paged import (
    PAGED,
    ROOT,
    SHAPES,
    adam,
    assert_paged,
    every_family,
    folders,
    held,
    mapping_of,
    needs_proc,
    paged,
    params_of,
    run_python,
    trained,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import torchao8
from torchao8 import ops
from torchao8.optim._state import paging
from torchao8.optim._state.dlpack import tensor_on

# -- the classes -----------------------------------------------------------------------------------


@every_family()
def test_the_bits_of_other_state(case: OptimizerCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one op call for each bucket and in pieces, which changes nothing either."""
    optimizers = []
    for piece in (None, 1 << 30, 1 << 17):
        params = make_params(shapes=SHAPES) + make_params(torch.bfloat16, [(128, 1024)])
        options = {"weight_decay": 0.1, "min_8bit_size": 100, **case.full}
        if piece is not None:
            monkeypatch.setattr(paging, "PIECE", piece)
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
    assert f":class:`{name}`" in str(cls.__doc__)
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
    assert not paging.any_pages()


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


@needs_kernels
@needs_proc
def test_pages_come_ahead_of_the_step() -> None:
    """Those that the system has put out."""
    optimizer = trained(torchao8.PagedAdam(make_params(shapes=[(1024, 1024)])), range(1))
    state = optimizer.state[params_of(optimizer)[0]]["exp_avg"]
    expected = bits(state)
    pages = paging._pages[state.data_ptr()]
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


def test_a_tensor_on_memory_of_another_owner() -> None:
    """As managed memory gets into torch: no copy, and the owner lives as long as a tensor of it."""

    class Owner:
        values = (ctypes.c_ubyte * 5000)(*range(100))

    owner = Owner()
    gone = weakref.ref(owner)
    start = ctypes.addressof(owner.values)
    tensor = tensor_on(owner, start + 8, 4000, torch.device("cpu"))
    del owner
    assert (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) == (
        start + 8,
        torch.uint8,
        (4000,),
    )
    assert tensor.untyped_storage().nbytes() == 4000
    assert tensor[:3].tolist() == [8, 9, 10]
    view = tensor.view(torch.float32).view(10, 100)
    del tensor
    view.fill_(1.5)
    gc.collect()
    owner = gone()
    assert owner is not None
    assert bytes(owner.values[8:12]) == struct.pack("f", 1.5)
    del owner, view
    gc.collect()
    assert gone() is None


def test_each_call_has_the_pages_of_the_next_on_their_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """And those of the first one before it."""
    seen: list[tuple[str, list[int]]] = []
    prefetch, step = ops._prefetch_pages_, dict(ops._STEP_OPS)

    def seen_prefetch(tensors: list[Tensor], now: Tensor) -> None:
        seen.append(("prefetch", [t.data_ptr() for t in tensors]))
        prefetch(tensors, now)

    def seen_step(params: Any, grads: Any, *lists: Any, **options: Any) -> None:
        seen.append(("step", [t.data_ptr() for ts in lists[:6] for t in ts]))
        step["adam_step_"](params, grads, *lists, **options)

    optimizer = trained(torchao8.PagedAdam8bit(make_params(shapes=[(200, 512)] * 3 + [(64, 70)])))
    monkeypatch.setattr(paging, "PIECE", 1)
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
    assert [kind for kind, _ in seen[7:]] == ["step"]


def test_the_look_at_one_scale_has_its_pages_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes through all of the state ahead of the step."""
    seen: list[str] = []
    prefetch, extremes = ops._prefetch_pages_, ops.extremes

    def seen_prefetch(tensors: list[Tensor], now: Tensor) -> None:
        seen.append("prefetch")
        prefetch(tensors, now)

    def seen_extremes(*arguments: Any, **options: Any) -> Tensor:
        seen.append("look")
        return extremes(*arguments, **options)

    params = make_params(shapes=[(200, 512)] * 2)
    optimizer = trained(torchao8.PagedAdam8bit(params, block_wise=False))
    monkeypatch.setattr(paging, "PIECE", 1)
    monkeypatch.setattr(ops, "_prefetch_pages_", seen_prefetch)
    monkeypatch.setattr(ops, "extremes", seen_extremes)
    optimizer.step()
    assert seen == ["prefetch", "prefetch", "look", "look", *["prefetch"] * 2]


@needs_kernels
def test_the_op_that_prefetches(device: str) -> None:
    op = torch.ops.torchao8.prefetch_pages_.default
    pages = [torch.ones(1000, device=device), torch.ones(3, dtype=torch.uint8, device=device)[1:]]
    now = torch.ones((), device=device)
    torch.library.opcheck(op, (pages, now))
    op([], now)
    op([torch.ones(0, device=device)], now)
    with pytest.raises(RuntimeError, match=r"prefetch_pages_: pages\[1\] must be contiguous"):
        op([pages[0], torch.ones(3, 2, device=device).t()], now)


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
    step = (
        torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
        if compiled
        else optimizer.step
    )
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
    optimizer = torchao8.PagedAdam8bit([p])  # without a gradient, or the step is refused for meta
    with pytest.raises(ValueError, match="is_paged: expected parameters on the CPU or on a GPU"):
        optimizer.step()


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("cls", [torchao8.PagedAdamW8bit, torchao8.PagedLAMB8bit])
def test_compiled_in_one_graph(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the prefetches in their places, and the bits of the eager step."""
    monkeypatch.setattr(paging, "PIECE", 1 << 18)
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
    monkeypatch.setattr(paging, "PIECE", 1)
    params = make_params(shapes=[(200, 512)] * 3)
    optimizer = torchao8.PagedAdamW8bit(params, lr=torch.tensor(0.01))
    set_grads(params, 0)
    _, (code,) = run_and_get_code(torch.compile(optimizer.step, fullgraph=True))
    body = code[code.index("def call(") : code.index("runner = Runner")]
    for copying in ("clone", "copy_", "as_strided", "auto_functionalized"):
        assert copying not in body
    # The numbers of the rule, in one tensor for all calls; nothing else is allocated.
    assert re.findall(r"empty_strided\w*\((\([^)]*\))", body) == ["(4, )"]
    calls = re.findall(r"torch.ops.torchao8.(prefetch_pages_|adam_step_).default\(", body)
    assert calls == ["prefetch_pages_", *["prefetch_pages_", "adam_step_"] * 2, "adam_step_"]
