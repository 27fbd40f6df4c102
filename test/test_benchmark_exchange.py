"""``benchmarks.exchange``: what is timed on two ranks, and its table."""

from typing import Any

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("benchmarks.exchange", reason="no benchmarks beside the tests")
from benchmarks import exchange


def _measured(rank: int, world_size: int) -> dict[str, Any]:
    return exchange.measure([(64, 64)] * 2, "Muon", torch.float32, 2)


def test_what_two_ranks_measure() -> None:
    """Half of each matrix goes to its owner and back, in bfloat16."""
    found = run_ranks(2, _measured)
    for one in found:
        assert one["sent_bytes"] == 2 * 2 * 64 * 64 // 2
        for key in ("alone", "shared", "waited", "exchanged"):
            assert len(one[key]) == 2
            assert min(one[key]) > 0
        parts = zip(one["shared"], one["waited"], one["exchanged"], strict=True)
        assert all(whole > waited + sent for whole, waited, sent in parts)
    shown = exchange.table([exchange.row("Muon", "float32", found)])
    assert "| Muon      | float32 |" in shown


def test_the_row_is_of_medians_over_rounds() -> None:
    of_ranks = [
        {"alone": [4.0, 8.0, 4.0], "shared": [2.0, 2.0, 9.0], "waited": [0.0, 1.0, 0.0],
         "exchanged": [0.5, 0.5, 0.9], "sent_bytes": 3_000_000,
         "peak_extra_bytes": {"alone": 1, "shared": 4}},
        {"alone": [4.0, 8.0, 4.0], "shared": [2.0, 4.0, 9.0], "waited": [0.2, 1.0, 0.0],
         "exchanged": [0.5, 0.7, 0.9], "sent_bytes": 2_000_000,
         "peak_extra_bytes": {"alone": 2, "shared": 3}},
    ]  # fmt: skip
    found = exchange.row("Muon8bit", "bfloat16", of_ranks)
    assert found["alone_ms"] == 4000.0
    assert found["ms"] == 3000.0
    assert found["waited_ms"] == 100.0
    assert found["exchanged_ms"] == 600.0
    assert found["exchanged_share"] == pytest.approx(0.2)
    assert found["speed_up"] == 2.0
    assert found["sent_bytes"] == 3_000_000
    assert (found["peak_extra_bytes"], found["alone_peak_extra_bytes"]) == (4, 2)


def test_the_matrices_of_gpt2() -> None:
    shapes = exchange.hidden_matrices()
    assert len(shapes) == 48
    assert sum(rows * columns for rows, columns in shapes) == 84_934_656
