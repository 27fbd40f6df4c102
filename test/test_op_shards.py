"""adam_step_ on shards that are told where they lie: the bits of the whole tensor."""

import itertools
import math
from collections.abc import Callable

import pytest
import reference
import torch
from adam_call import (
    FLOATS,
    FOUR_BIT,
    Call,
    assert_same_bits,
    call_bits,
    copy_call,
    live_state,
    new_call,
    run,
)
from helpers import bits

Piece = tuple[int, int, int, int]  # rows and columns of a shard: [r0, r1) x [c0, c1)


def by_rows(*borders: int) -> Callable[[int, int], list[Piece]]:
    def pieces(rows: int, columns: int) -> list[Piece]:
        edges = [0, *borders, rows]
        return [(a, b, 0, columns) for a, b in itertools.pairwise(edges)]

    return pieces


def by_columns(*borders: int) -> Callable[[int, int], list[Piece]]:
    def pieces(rows: int, columns: int) -> list[Piece]:
        edges = [0, *borders, columns]
        return [(0, rows, a, b) for a, b in itertools.pairwise(edges)]

    return pieces


SPLITS: dict[str, Callable[[int, int], list[Piece]]] = {
    "two halves": by_rows(6),
    "uneven rows": by_rows(1, 8, 9),
    "empty shards": by_rows(0, 5, 5, 12),
    "a row each": by_rows(*range(1, 12)),
    "columns": by_columns(512),
    "uneven columns": by_columns(256, 256, 768),
    "rows and columns": lambda rows, columns: [
        (a, b, c, d)
        for a, b in [(0, 7), (7, rows)]
        for c, d in [(0, 256), (256, columns)]
    ],
}  # fmt: skip


def shard(call: Call, pieces: list[Piece], columns: int, placed: bool) -> Call:
    """A call on copies of the pieces of the call's one matrix."""
    local = copy_call(call)
    size = call["block_size"]
    for name, value in call.items():
        if name == "steps":
            local[name] = [value[0].clone() for _ in pieces]
        elif isinstance(value, list) and value:
            in_bytes = name.endswith(("avgs", "sqs")) and call["state_format"] == FOUR_BIT
            per = size if name.endswith("_scales") else 2 if in_bytes else 1
            local[name] = [
                value[0][a:b, c // per : -(-d // per)].contiguous().clone()
                for a, b, c, d in pieces
            ]  # fmt: skip
    if placed:
        local["shard_offsets"] = [a * columns + c for a, _, c, _ in pieces]
        local["shard_row_strides"] = [columns for _ in pieces]
    return local


@pytest.mark.parametrize("columns", [1024, 1000])
@pytest.mark.parametrize("name", list(SPLITS))
def test_shards_have_the_bits_of_the_whole(name: str, columns: int, device: str) -> None:
    """Stochastic rounding included; and not without being told where the shards lie."""
    rows = 12
    pieces = SPLITS[name](rows, columns)
    for dtype in FLOATS:
        call = new_call([torch.randn(rows, columns).to(dtype)], [torch.randn(rows, columns)],
                        amsgrad=True, weight_decay=0.1, step=3, seed=5,
                        device=device)  # fmt: skip
        live_state(call)
        placed = run(shard(call, pieces, columns, placed=True))
        lost = run(shard(call, pieces, columns, placed=False))
        run(call)
        assert_same_bits(placed, shard(call, pieces, columns, placed=True))
        assert call_bits(lost)["exp_avg_sqs"] != call_bits(placed)["exp_avg_sqs"]
        assert call_bits(lost)["params"] == call_bits(placed)["params"]


@pytest.mark.parametrize("columns", [1024, 1001])
@pytest.mark.parametrize("name", list(SPLITS))
def test_shards_in_4_bits(name: str, columns: int) -> None:
    """Two elements share a byte; the last one of an odd row has one of its own."""
    rows = 12
    pieces = SPLITS[name](rows, columns)
    call = new_call([torch.randn(rows, columns).bfloat16()], [torch.randn(rows, columns)],
                    amsgrad=True, step=3, seed=5, stochastic_params=True, block_size=64,
                    state_format=FOUR_BIT)  # fmt: skip
    live_state(call)
    placed = run(shard(call, pieces, columns, placed=True))
    run(call)
    assert_same_bits(placed, shard(call, pieces, columns, placed=True))


def test_shards_of_more_dimensions(device: str) -> None:
    """Of the leading dimension; rows are (70,) x 5 here, and (3, 90) there."""
    for shape in [(6, 5, 70), (6, 4, 3, 90), (6, 2, 300)]:
        call = new_call([torch.randn(shape)], [torch.randn(shape)], step=3, device=device)
        live_state(call)
        per_row = math.prod(shape[1:])
        lists = [n for n, v in call.items() if isinstance(v, list) and v and n != "steps"]
        parts = []
        row = math.prod(shape[reference.row_dims(shape, 256) :])
        for a, b in [(0, 1), (1, 4), (4, 6)]:
            part = copy_call(call) | {n: [call[n][0][a:b].clone()] for n in lists}
            part |= {"shard_offsets": [a * per_row], "shard_row_strides": [row]}
            parts.append(run(part))
        run(call)
        for n in lists:
            assert bits(torch.cat([part[n][0] for part in parts])) == bits(call[n][0]), n
