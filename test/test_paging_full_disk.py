"""Paged state where there is no space for it: an error that changes nothing."""

import copy
import errno
import gc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import all_bits, assert_same_training, make_params, set_grads, through_file
from paged import ROOT, SHAPES, adam, assert_paged, full_disk, params_of, run_python, trained

import torchao8


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
