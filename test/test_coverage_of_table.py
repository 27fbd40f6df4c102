"""What `make test` leaves of products: each class meets sharding, each rule the compiler.

Read from the marks of the tests themselves, so that a case that is moved to `thorough`, or a class
that is new in the table, is seen here.
"""

import itertools
from typing import Any

import pytest
import test_compile as compiling
import test_portable as portable
import test_sharded_checkpoints as checkpoints
import test_sharded_training as training
from optim_table import OF_8_BITS, OPTIMIZERS

CLASSES = {case.cls.__name__ for case in OPTIMIZERS}
MESHES = {(2,), (3,), (8,), (2, 2)}


def common_cases(test: Any) -> list[tuple[Any, ...]]:
    """Values of the parameters in `make test`, of a test with one mark for all of them."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    cases = []
    for values in mark.args[1]:
        if isinstance(values, type(pytest.param())):
            if any(each.name in ("thorough", "slow") for each in values.marks):
                continue
            values = values.values
        cases.append(tuple(values))
    return cases


def pairs(triples: set[tuple[Any, ...]], first: int, second: int) -> set[tuple[Any, ...]]:
    return {(triple[first], triple[second]) for triple in triples}


def test_training() -> None:
    """Classes, meshes and kinds of runs: all pairs of any two."""
    runs = common_cases(training.test_same_bits_on_every_mesh)
    triples = {
        (OPTIMIZERS[i].cls.__name__, mesh, training.KINDS[kind])
        for mesh, turn in runs
        for i, kind in training.planned(turn)
    }
    kinds = set(training.KINDS)
    assert len(kinds) == 4
    assert pairs(triples, 0, 1) == set(itertools.product(CLASSES, MESHES))
    assert pairs(triples, 0, 2) == set(itertools.product(CLASSES, kinds))
    assert pairs(triples, 1, 2) == set(itertools.product(MESHES, kinds))


def test_checkpoints() -> None:
    """Each class; each of the world sizes saves for each other one, and both dtypes both ways."""
    plans = common_cases(checkpoints.test_saved_at_any_world_size_and_loaded_at_any)
    assert {name for *_, names in plans for name in names} == CLASSES
    assert all("AdamW8bit" in names for *_, names in plans)
    worlds, dtypes = {2, 3, 8}, set(checkpoints.DTYPES)
    assert {plan[:2] for plan in plans} == set(itertools.permutations(worlds, 2))
    for side in (0, 1):
        assert pairs(set(plans), side, 2) == set(itertools.product(worlds, dtypes))


def test_compiling() -> None:
    """The 8-bit classes, which step both formats of state, and so every rule; with dynamic=True a
    rule of two states, one of three, and one that measures its update before."""
    cases = common_cases(compiling.test_one_graph_and_the_bits_of_eager)
    of_8_bits = {case.cls for case in OF_8_BITS}
    assert {case.cls for case, _, dynamic in cases if not dynamic} == of_8_bits
    assert {case.rule for case, _, _ in cases} == {case.rule for case in OPTIMIZERS}
    assert len({len(case.states) for case, _, dynamic in cases if dynamic}) == 2
    no_clone = common_cases(compiling.test_generated_code_has_no_clone)
    assert {case.cls for case, _ in no_clone} == of_8_bits


def test_portable_steps() -> None:
    """Each set of options, and each class in each kind of parameters and state."""
    cases = common_cases(portable.test_steps_like_the_kernels)
    sets = {(case.cls, str(options)) for case, options, *_ in cases}
    assert sets == {(case.cls, str(options)) for case in OPTIMIZERS for options in case.options}
    kinds = {(case.cls, str(kind)) for case, _, *kind in cases}
    expected = [list(kind) for kind in list(portable.KINDS.values())[:-2]]
    assert kinds == {
        (case.cls, str(kind))
        for case in OPTIMIZERS
        for kind in expected
        if case.optim_bits == 8 or "state_format" not in kind[1]
    }
