"""What every test stands on: the same random numbers, and a compiler that starts afresh."""

from collections.abc import Iterator

import pytest
import torch

try:
    import hypothesis
except ImportError:  # `make gpu` does without: the tests for a GPU use none
    pass
else:
    # The same examples at every run, so that a failure in CI is one that anybody can see again. The
    # first example of a test may compile or build a table: no deadline.
    hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
    hypothesis.settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """No compiled code and no count of recompilations from another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
