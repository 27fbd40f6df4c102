"""Bad input to an optimizer: the message says what was expected and what came; nothing changes."""

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, report, set_grads, train
from optim_table import (
    ADAMS,
    BAD_OPTIONS,
    OptimizerCase,
    every_bad_option,
    every_optimizer,
)
from torch import Tensor
from torch.optim import Optimizer

from torchao8 import AdamW, AdamW8bit, RMSprop, ops
from torchao8.optim._state import paging


def message(error: type[Exception], call: Callable[[], Any]) -> str:
    """What an error says; it must be of exactly this type."""
    with pytest.raises(error) as info:
        call()
    assert type(info.value) is error
    return str(info.value)


def trained(case: OptimizerCase, device: str = "cpu", **options: Any) -> Optimizer:
    """An optimizer with state in both formats."""
    params = make_params(device=device)
    optimizer = case.make(params, min_8bit_size=SMALL, **options)
    train(optimizer, params, [0])
    return optimizer


# -- options -----------------------------------------------------------------------------------


def test_messages_of_options(assert_expected_inline: Callable[[str, str], None]) -> None:
    lines = [
        message(error, lambda options=options: AdamW8bit(make_params(), **options))
        for options, error in BAD_OPTIONS
    ]
    assert_expected_inline(
        report(lines),
        """\
lr: expected a finite number >= 0, got -0.001
lr: expected a finite number >= 0, got nan
lr: expected a finite number >= 0, got 'fast'
lr: expected one element, got a tensor of shape [2]
lr: expected a finite number >= 0, got -1.0
optim_bits: expected 4, 8 or 32, got 16
state_format: expected 'dynamic' with optim_bits=4, got 'mulaw'. 4 bits have a format of their
    own; the others have 8 bits (optim_bits=8)
block_wise: expected True with optim_bits=4, got False. One scale for a whole tensor is there
    with 8 bits (optim_bits=8)
min_8bit_size: expected an int >= 0, got -1
min_8bit_size: expected an int >= 0, got 4096.0
block_size: expected a power of two from 64 to 2048, got 32
block_size: expected a power of two from 64 to 2048, got 100
block_size: expected a power of two from 64 to 2048, got 4096
block_size: expected a power of two from 64 to 2048, got 256.0
block_wise: expected True or False, got 0
state_rounding: expected 'stochastic' or 'nearest', got 'up'
maximize: expected True or False, got 1
stochastic_rounding: expected True or False, got 1
seed: expected an int of 64 bits, got 0.5
seed: expected an int of 64 bits, got 9223372036854775808
differentiable=True: a step that autograd records is not implemented, it must be False
percentile_clipping: expected an int from 1 to 99, or 100 for off, got 0
percentile_clipping: expected an int from 1 to 99, or 100 for off, got 101
percentile_clipping: expected an int from 1 to 99, or 100 for off, got 5.0
is_paged: expected True or False, got 'yes'
page_dir: expected '', as is_paged is False, got '.'
page_dir: expected a str, got b'.'
page_dir: expected a folder that can be written to, got 'no such folder'""",
    )


@every_bad_option()
def test_options_are_refused_wherever_they_come_from(
    case: OptimizerCase, options: dict[str, Any], error: type[Exception], message: str, device: str
) -> None:
    """As defaults, in a group at construction, in a group added later, and in a checkpoint."""
    params = make_params(device=device)
    before = [bits(p) for p in params]
    with pytest.raises(error, match=re.escape(message) or None):
        case.make(params, **options)
    with pytest.raises(error):
        case.make([{"params": params[:2]}, {"params": params[2:], **options}])
    assert [bits(p) for p in params] == before

    optimizer = trained(case, device)
    before_all = all_bits(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group({"params": make_params(seed=1, device=device), **options})
    assert all_bits(optimizer) == before_all

    # Options that lay out the state are not taken from a checkpoint. A schedule may have changed
    # what must go together in a new group, and the learning rate to less than 0.
    layout = {"optim_bits", "min_8bit_size", "block_size", "is_paged", "page_dir", "higher_dims"}
    below_0 = str(options.get("lr")) in ("-0.001", "tensor(-1.)")
    if not set(options) & layout and options.get("nesterov") is not True and not below_0:
        saved = copy.deepcopy(optimizer.state_dict())
        saved["param_groups"][0].update(options)
        saved["state"][0]["step"] += 5
        with pytest.raises(error):
            optimizer.load_state_dict(saved)
        assert all_bits(optimizer) == before_all


@every_optimizer()
def test_unknown_option(case: OptimizerCase) -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'temperature'"):
        case.make(make_params(), temperature=0.9)


# -- parameters --------------------------------------------------------------------------------


def bad_params() -> dict[str, tuple[type[Exception], Callable[[], Any]]]:
    """Each makes what is passed as parameters, on torch's default device."""
    p = torch.nn.Parameter(torch.ones(1, 3))
    return {
        "empty list": (ValueError, list),
        "a tensor": (TypeError, lambda: torch.ones(1, 3)),
        "a set": (TypeError, lambda: [{"params": {p}}]),
        "no tensor": (TypeError, lambda: [p, "weight"]),
        "twice in a group": (ValueError, lambda: [torch.nn.Parameter(torch.ones(1, 2)), p, p]),
        "twice with names": (ValueError, lambda: [("a", p), ("b", p)]),
        "in two groups": (ValueError, lambda: [{"params": [p]}, {"params": [p]}]),
        "names for some": (ValueError, lambda: [("a", p), torch.nn.Parameter(torch.ones(1, 2))]),
        "no leaf": (ValueError, lambda: [p * 2]),
        "complex": (ValueError, lambda: [p, torch.nn.Parameter(torch.ones(1, 3) * 1j)]),
        "float64": (ValueError, lambda: [torch.nn.Parameter(torch.ones(1, 3).double())]),
        "float8": (
            ValueError,
            lambda: [torch.nn.Parameter(torch.ones(1, 3).to(torch.float8_e5m2))],
        ),
        "sparse": (ValueError, lambda: [torch.nn.Parameter(torch.eye(3).to_sparse())]),
        "overlapping": (
            ValueError,
            lambda: [torch.nn.Parameter(torch.ones(1, 3).expand(4, 3))],
        ),
    }


def test_messages_of_parameters(assert_expected_inline: Callable[[str, str], None]) -> None:
    """Ours: the others are torch's, and of the types that the table says."""
    messages = {
        name: message(error, lambda make=make: AdamW8bit(make()))
        for name, (error, make) in bad_params().items()
    }
    lines = [f"{name}: {text}" for name, text in messages.items() if "params[" in text]
    assert_expected_inline(
        report(lines),
        """\
twice in a group: params[2]: expected each parameter once, got this one again, of shape [1,
    3]. Tied weights, as those of an embedding that is the output layer too, come up under two
    names where modules are listed one by one; model.parameters() has them once
twice with names: params[1]: expected each parameter once, got this one again, of shape [1,
    3]. Tied weights, as those of an embedding that is the output layer too, come up under two
    names where modules are listed one by one; model.parameters() has them once
in two groups: some parameters appear in more than one parameter group: params[0], of shape
    [1, 3], is parameter 0. Tied weights, as those of an embedding that is the output layer
    too, come up under two names where modules are listed one by one; model.parameters() has
    them once
complex: params[1]: expected a dense tensor of float32, bfloat16 or float16, got
    torch.complex64
float64: params[0]: expected a dense tensor of float32, bfloat16 or float16, got torch.float64
float8: params[0]: expected a dense tensor of float32, bfloat16 or float16, got
    torch.float8_e5m2
sparse: params[0]: expected a dense tensor of float32, bfloat16 or float16, got torch.float32
    in layout torch.sparse_coo
overlapping: params[0]: expected elements that do not share memory, got shape [4, 3] with
    strides [0, 1]""",
    )


@every_optimizer()
@pytest.mark.parametrize("name", [n for n in bad_params() if n not in ("empty list", "a tensor")])
def test_parameters_are_refused_in_a_later_group(
    case: OptimizerCase, name: str, device: str
) -> None:
    optimizer = trained(case, device)
    with torch.device(device):
        error, make = bad_params()[name]
        given = make()
    groups = given if isinstance(given[0], dict) else [{"params": given}]
    for group in groups[:-1]:
        optimizer.add_param_group(group)
    before = all_bits(optimizer)
    with pytest.raises(error):
        optimizer.add_param_group(groups[-1])
    assert all_bits(optimizer) == before
    train(optimizer, optimizer.param_groups[0]["params"], [1])


@every_optimizer()
def test_parameters_of_another_group(case: OptimizerCase, device: str) -> None:
    optimizer = trained(case, device)
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        optimizer.add_param_group({"params": optimizer.param_groups[0]["params"][3]})
    with pytest.raises(TypeError, match="must be a dict"):
        optimizer.add_param_group(make_params(seed=1, device=device))  # type: ignore[arg-type]
    assert all_bits(optimizer) == before


# -- gradients and steps -----------------------------------------------------------------------


def sparse(p: Tensor) -> Tensor:
    return torch.zeros_like(p).to_sparse()


def float64(p: Tensor) -> Tensor:
    p.grad_dtype = None
    return torch.ones_like(p, dtype=torch.float64)


@every_optimizer()
@pytest.mark.parametrize("bad_grad", [sparse, float64])
@pytest.mark.parametrize("at_first_step", [True, False])
def test_bad_gradients(
    case: OptimizerCase, bad_grad: Callable[[Tensor], Tensor], at_first_step: bool, device: str
) -> None:
    """One in the last group leaves the groups before it as they were."""
    params = make_params(device=device)
    optimizer = case.make([{"params": params[2:]}, {"params": params[:2]}], min_8bit_size=SMALL)
    if not at_first_step:
        train(optimizer, params, [0])
    set_grads(params, 1)
    params[1].grad = bad_grad(params[1])
    before = all_bits(optimizer)
    with pytest.raises(RuntimeError, match="gradient of parameter 7: expected a dense tensor"):
        optimizer.step()
    assert all_bits(optimizer) == before
    set_grads(params, 1)
    optimizer.step()


def test_messages_of_steps(assert_expected_inline: Callable[[str, str], None]) -> None:
    def with_grad(make: Callable[[Tensor], Tensor]) -> str:
        model = torch.nn.Linear(3, 2)
        optimizer = AdamW(model.named_parameters())
        model.weight.grad = make(model.weight)
        return message(RuntimeError, optimizer.step)

    def with_amsgrad_too_late() -> str:
        params = make_params(shapes=[(5,)])
        optimizer = AdamW(params)
        train(optimizer, params, [0])
        optimizer.param_groups[0]["amsgrad"] = True
        before = all_bits(optimizer)
        text = message(RuntimeError, optimizer.step)
        assert all_bits(optimizer) == before
        return text

    def with_a_swapped_parameter() -> str:
        optimizer = AdamW(make_params(shapes=[(5,)]))
        p = torch.nn.Parameter(torch.ones(5, dtype=torch.float64))
        p.grad = torch.ones_like(p)
        optimizer.param_groups[0]["params"] = [p]
        return message(ValueError, optimizer.step)

    lines = [
        with_grad(sparse),
        with_grad(float64),
        with_amsgrad_too_late(),
        with_a_swapped_parameter(),
    ]
    assert_expected_inline(
        report(lines),
        """\
AdamW: gradient of parameter 0 (weight): expected a dense tensor of float32, bfloat16 or
    float16, got torch.float32 in layout torch.sparse_coo. torch.optim.SparseAdam takes sparse
    ones.
AdamW: gradient of parameter 0 (weight): expected a dense tensor of float32, bfloat16 or
    float16, got torch.float64
AdamW: state of parameter 0: expected the keys ['step', 'exp_avg', 'exp_avg_sq',
    'max_exp_avg_sq'], got ['step', 'exp_avg', 'exp_avg_sq']. An option that decides which
    state there is, such as amsgrad, centered, percentile_clipping or use_muon, must be set
    before the first step.
params[0]: expected a dense tensor of float32, bfloat16 or float16, got torch.float64""",
    )


@every_optimizer()
def test_block_size_changed_after_the_first_step(case: OptimizerCase, device: str) -> None:
    """Nothing is written, in no group."""
    optimizer = trained(case, device, optim_bits=8)
    optimizer.param_groups[0]["block_size"] = 64
    train_params = optimizer.param_groups[0]["params"]
    optimizer.param_groups[0]["params"] = train_params[:5]
    before = all_bits(optimizer)
    with pytest.raises(RuntimeError, match="scale"):
        optimizer.step()
    assert all_bits(optimizer) == before


@every_optimizer()
@pytest.mark.parametrize(("before", "after"), [(8, 32), (32, 8)])
def test_optim_bits_changed_after_the_first_step(
    case: OptimizerCase, before: int, after: int, device: str
) -> None:
    """Refused in words, not accepted and ignored. Nothing has changed, the old value goes on."""
    optimizer = trained(case, device, optim_bits=before)
    optimizer.param_groups[0]["optim_bits"] = after
    bits = all_bits(optimizer)
    with pytest.raises(RuntimeError, match=f"has {before}-bit state.* now says optim_bits={after}"):
        optimizer.step()
    assert all_bits(optimizer) == bits
    optimizer.param_groups[0]["optim_bits"] = before
    optimizer.step()


@every_optimizer()
def test_min_8bit_size_changed_after_the_first_step(case: OptimizerCase, device: str) -> None:
    optimizer, least = trained(case, device, optim_bits=8), 10**9
    optimizer.param_groups[0]["min_8bit_size"] = least
    bits = all_bits(optimizer)
    with pytest.raises(RuntimeError, match=f"now says min_8bit_size={least}"):
        optimizer.step()
    assert all_bits(optimizer) == bits


@pytest.mark.parametrize("optim_bits", [8, 32])
@pytest.mark.parametrize(
    ("cls", "option", "old", "new"),
    [
        (AdamW, "amsgrad", False, True),
        (AdamW, "amsgrad", True, False),
        (AdamW, "percentile_clipping", 100, 50),
        (AdamW, "percentile_clipping", 50, 100),
        (RMSprop, "centered", False, True),
        (RMSprop, "centered", True, False),
        # (A momentum may come to be 0, and to be more again: see test_schedules.py.)
    ],
)
def test_an_option_that_adds_a_state_changed_after_the_first_step(
    cls: Any, option: str, old: Any, new: Any, optim_bits: int, device: str
) -> None:
    """Refused in words, with nothing changed, and the old value goes on."""
    params = make_params(device=device)
    optimizer = cls(params, min_8bit_size=SMALL, optim_bits=optim_bits, **{option: old})
    train(optimizer, params, [0])
    optimizer.param_groups[0][option] = new
    set_grads(params, 1)
    before = all_bits(optimizer)
    with pytest.raises(RuntimeError, match=r"state of parameter 0: expected the keys .*before the"):
        optimizer.step()
    assert all_bits(optimizer) == before
    optimizer.param_groups[0][option] = old
    optimizer.step()


def test_a_misspelled_group_option_is_named() -> None:
    for name, meant in {"optim_bit": "optim_bits", "blocksize": "block_size"}.items():
        with pytest.warns(UserWarning, match=f"'{name}' is no option.* did you mean '{meant}'"):
            AdamW8bit([{"params": make_params(), name: 32}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdamW8bit([{"params": make_params(), "initial_lr": 1.0, "max_lr": 1.0, "name": "all"}])


def test_paged_state_takes_cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "CUDA_EXTENSION_FILE", None)
    with pytest.raises(ValueError, match=r"is_paged: expected False, or .* parameters on cuda:1"):
        paging._new_pages(torch.device("cuda:1"), "", 4096)


# -- checkpoints -------------------------------------------------------------------------------


def bad_checkpoints() -> dict[str, Callable[[dict[str, Any]], None]]:
    """Each spoils a checkpoint of AdamW8bit; all but the parameters 5 and 7 are in 8 bits."""

    def change(index: int, key: str, value: Callable[[Tensor], Any]) -> Callable[..., None]:
        def apply(saved: dict[str, Any]) -> None:
            saved["state"][index][key] = value(saved["state"][index][key])

        return apply

    def drop(saved: dict[str, Any]) -> None:
        del saved["state"][3]["exp_avg_scale"]

    def group_less(saved: dict[str, Any]) -> None:
        saved["param_groups"].append(saved["param_groups"][0])

    def parameter_less(saved: dict[str, Any]) -> None:
        saved["param_groups"][0]["params"].pop()

    return {
        "key missing": drop,
        "key too many": lambda saved: saved["state"][5].update(max_exp_avg_sq=torch.zeros(5)),
        "codes cast": change(1, "exp_avg_codes", lambda t: t.float()),
        "codes int8": change(4, "exp_avg_sq_codes", lambda t: t.to(torch.int8)),
        "codes of another shape": change(0, "exp_avg_sq_codes", lambda t: t[:, :-1]),
        "scale in half precision": change(2, "exp_avg_scale", lambda t: t.half()),
        "scale of another layout": change(3, "exp_avg_scale", lambda t: t.flatten()),
        "moment cast": change(5, "exp_avg", lambda t: t.bfloat16()),
        "moment of another shape": change(7, "exp_avg", lambda t: t.reshape(1)),
        "moment no tensor": change(5, "exp_avg", lambda t: t.tolist()),
        "moment sparse": change(5, "exp_avg", lambda t: t.to_sparse()),
        "step of two": change(5, "step", lambda t: torch.tensor([1.0, 1.0])),
        "group too many": group_less,
        "parameter too few": parameter_less,
    }


def test_messages_of_checkpoints(assert_expected_inline: Callable[[str, str], None]) -> None:
    lines = []
    for name, spoil in bad_checkpoints().items():
        optimizer = trained(ADAMS[3])
        saved = copy.deepcopy(optimizer.state_dict())
        spoil(saved)
        text = message(ValueError, lambda o=optimizer, s=saved: o.load_state_dict(s))
        if not text.startswith("loaded state dict"):  # torch's own
            lines.append(f"{name}: {text}")
    assert_expected_inline(
        report(lines),
        """\
key missing: state of parameter 3: expected the keys ['step', 'exp_avg_codes',
    'exp_avg_scale', 'exp_avg_sq_codes', 'exp_avg_sq_scale'], got ['step', 'exp_avg_codes',
    'exp_avg_sq_codes', 'exp_avg_sq_scale']
key too many: state of parameter 5: expected the keys ['step', 'exp_avg', 'exp_avg_sq'], got
    ['step', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq']. It was saved with amsgrad=True.
codes cast: exp_avg_codes of parameter 1: expected torch.uint8 of shape [40, 70], got
    torch.float32 of shape [40, 70]
codes int8: exp_avg_sq_codes of parameter 4: expected torch.uint8 of shape [2, 3, 400], got
    torch.int8 of shape [2, 3, 400]
codes of another shape: exp_avg_sq_codes of parameter 0: expected torch.uint8 of shape [3,
    300], got torch.uint8 of shape [3, 299]
scale in half precision: exp_avg_scale of parameter 2: expected torch.float32 of shape [3],
    got torch.float16 of shape [3]
scale of another layout: exp_avg_scale of parameter 3: expected torch.float32 of shape [4, 2],
    got torch.float32 of shape [8]
moment cast: exp_avg of parameter 5: expected torch.float32 of shape [5], got torch.bfloat16
    of shape [5]
moment of another shape: exp_avg of parameter 7: expected torch.float32 of shape [], got
    torch.float32 of shape [1]
moment no tensor: exp_avg of parameter 5: expected torch.float32 of shape [5], got list
moment sparse: exp_avg of parameter 5: expected torch.float32 of shape [5], got torch.float32
    in layout torch.sparse_coo of shape [5]
step of two: step of parameter 5: expected torch.float32 of shape [], got torch.float32 of
    shape [2]""",
    )


@pytest.mark.parametrize("case", ADAMS[2:], ids=lambda case: case.cls.__name__)
@pytest.mark.parametrize("name", list(bad_checkpoints()))
def test_a_bad_checkpoint_changes_nothing(case: OptimizerCase, name: str, device: str) -> None:
    """Not the options, nor the state of the parameters before the bad one; and a good one loads."""
    optimizer = trained(case, device)
    params = optimizer.param_groups[0]["params"]
    good = copy.deepcopy(optimizer.state_dict())
    saved = copy.deepcopy(good)
    saved["param_groups"][0]["lr"] = 0.5
    bad_checkpoints()[name](saved)
    train(optimizer, params, [1])
    before = all_bits(optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(saved)
    assert all_bits(optimizer) == before
    assert not optimizer._optimizer_load_state_dict_pre_hooks
    optimizer.load_state_dict(good)
