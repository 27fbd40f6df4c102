"""What every test stands on: the devices, the same random numbers, a compiler that starts anew."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import helpers
import hypothesis
import pytest
import torch
from cpu_paths import Workers
from helpers import DEVICES, reset_compiler
from ranks import forking_context

# The same examples at every run, so that a failure in CI is one that anybody can see again. The
# first example of a test may compile or build a table: no deadline.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.load_profile("repeatable")


def pytest_report_header() -> str:
    return f"devices: {', '.join(DEVICES)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs every test that has an argument `device` on each of them."""
    if "device" in metafunc.fixturenames and len(DEVICES) > 1:
        metafunc.parametrize("device", DEVICES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """On a GPU, at last what may take it or the process along: captures, then managed memory.

    Several processes would share the memory of the GPU, which tests of managed memory look at.
    """
    if not torch.cuda.is_available():
        return

    def rank(item: pytest.Item) -> int:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("device") == "cpu":
            return 0
        marks = {mark.name for mark in item.iter_markers()}
        return 2 if "paged_cuda" in marks else int("captured" in marks)

    items.sort(key=rank)
    if hasattr(config, "workerinput"):  # of pytest-xdist
        alone = pytest.mark.skip(reason="beside other processes on the GPU: pytest -m paged_cuda")
        for item in items:
            if rank(item) == 2:
                item.add_marker(alone)


@pytest.fixture
def device() -> str:
    """The only one. It does not appear in the names of the tests, as one of several does."""
    (only,) = DEVICES
    return only


@pytest.fixture(autouse=True)
def _matrices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that run over the table of optimizers get parameters that the one of theirs takes."""
    callspec = getattr(request.node, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    monkeypatch.setattr(helpers, "as_matrices", getattr(case, "matrices", False))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    """Processes on the paths of the CPU, for all tests: each takes seconds to start."""
    started = Workers()
    yield started
    started.close()


@pytest.fixture
def assert_expected_inline() -> Callable[[str, str], None]:
    """Compares a text with that in the source of the test, which EXPECTTEST_ACCEPT=1 rewrites."""
    expecttest = pytest.importorskip("expecttest", reason="no expecttest: pip install expecttest")
    compare: Callable[[str, str], None] = expecttest.assert_expected_inline
    return compare


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code and no count of recompilations from another test."""
    reset_compiler()
    yield
    reset_compiler()


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benchmarks make their processes as forks of one that has imported torch: these start at once,
    but do not get variables of their own. Some tests of benchmarks have new interpreters."""
    from benchmarks import process

    forking = SimpleNamespace(get_context=lambda method: forking_context())
    monkeypatch.setattr(process, "multiprocessing", forking)
