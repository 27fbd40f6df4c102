"""Parameters that are not what they were, or stand there twice: the message names their shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, as_matrix, bits, make_params, set_grads, train
from optim_table import OptimizerCase, every_optimizer

from torchao8 import AdamW8bit


@every_optimizer()
@pytest.mark.parametrize("optim_bits", [8, 32])
@pytest.mark.parametrize("shape", [(41, 70), (40, 71), (2800,), (2, 3), (70, 40)], ids=str)
def test_a_resized_parameter(case: OptimizerCase, optim_bits: int, shape: tuple[int, ...]) -> None:
    """A vocabulary that grew, data that were swapped: not an option that was changed."""
    params = make_params(shapes=[(40, 70), (5,)])
    names = ("embedding", "bias")
    optimizer = case.make(
        list(zip(names, params, strict=True)), optim_bits=optim_bits, min_8bit_size=SMALL
    )
    train(optimizer, params, [0])
    params[0].grad = None
    shape = as_matrix(shape) if case.matrices else shape
    params[0].data = torch.ones(shape)
    set_grads(params, 1)
    before = all_bits(optimizer)
    with pytest.raises(RuntimeError) as info:
        optimizer.step()
    text = str(info.value)
    assert f"parameter 0 (embedding) is of shape {list(shape)} now" in text
    assert "its state of shape [40, 70]" in text
    assert "optim_bits" not in text
    assert all_bits(optimizer) == before
    optimizer.state.pop(params[0])  # the way out that the message tells of
    optimizer.step()


def test_a_load_names_the_shapes() -> None:
    params, others = make_params(shapes=[(40, 70)]), make_params(shapes=[(41, 70)])
    optimizer, other = (
        AdamW8bit(params, min_8bit_size=SMALL),
        AdamW8bit(others, min_8bit_size=SMALL),
    )
    train(optimizer, params, [0])
    with pytest.raises(ValueError, match=r"of shape \[41, 70\], got torch.uint8 of shape \[40, 70"):
        other.load_state_dict(optimizer.state_dict())


@every_optimizer()
def test_an_option_that_was_changed_names_the_shape(case: OptimizerCase) -> None:
    """Where parameters have no names, of which nobody knows the third."""
    params = make_params(shapes=[(5,), (40, 70)])
    optimizer = case.make(params, optim_bits=8, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    optimizer.param_groups[0]["optim_bits"] = 32
    set_grads(params, 1)
    with pytest.raises(
        RuntimeError, match=r"parameter 1 \(of shape \[40, 70\]\) already has 8-bit"
    ):
        optimizer.step()


def test_tied_weights_are_named() -> None:
    embedding, head = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 7)
    head.weight = embedding.weight
    twice: list[Callable[[], Any]] = [
        lambda: AdamW8bit([*embedding.parameters(), *head.parameters()]),
        lambda: AdamW8bit([{"params": embedding.parameters()}, {"params": head.parameters()}]),
        lambda: AdamW8bit(
            [("embedding", embedding.weight), ("head", head.weight)],
        ),
    ]
    for make in twice:
        with pytest.raises(ValueError, match=r"of shape \[7, 4\].*Tied weights"):
            make()


@every_optimizer()
@pytest.mark.parametrize("when", ["first", "later"])
def test_a_step_on_meta_is_refused(case: OptimizerCase, when: str) -> None:
    """As torch.optim does with fused=True; nothing changes, and no state is made there."""
    params = make_params(shapes=[(5,), (40, 70)])
    meta = torch.nn.Parameter(torch.empty(40, 70, device="meta"))
    optimizer = case.make([{"params": params}, {"params": [meta]}], min_8bit_size=SMALL)
    if when == "later":  # its state came of a state dict that asked for one
        train(optimizer, params, [0])
        assert next(iter(optimizer.state[meta].values())).is_meta
    meta.grad = torch.empty_like(meta)
    set_grads(params, 1)
    before = [bits(p) for p in params], {p: list(s) for p, s in optimizer.state.items()}
    with pytest.raises(RuntimeError, match=r"parameter 2, of shape \[40, 70\], is on the device m"):
        optimizer.step()
    assert ([bits(p) for p in params], {p: list(s) for p, s in optimizer.state.items()}) == before
    meta.grad = None
    optimizer.step()


@pytest.mark.parametrize("cls", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad])
def test_torch_refuses_meta_with_fused(cls: Any) -> None:
    meta = torch.nn.Parameter(torch.empty(2, device="meta"))
    meta.grad = torch.empty_like(meta)
    optimizer = cls([meta], fused=True)
    with pytest.raises(RuntimeError, match="requires all the params to be"):
        optimizer.step()
