"""What a person does between two steps: a step whose plan was kept does what a fresh one does.

After each change the optimizer is copied, and copies have no plan. Both make two steps with the
same gradients: the bits are the same, or both refuse with the same words and change nothing.
"""

import collections
import copy
import gc
import pickle
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from helpers import SMALL, all_bits, assert_same_training, make_params, set_grads, train
from optim_table import OptimizerCase, every_optimizer
from torch import Tensor

import torchao8
from torchao8.optim._step import plan as plan_module

SHAPES = ((3, 300), (40, 70), (5,), (300, 3), (70, 40))


def make(case: OptimizerCase, **options: Any) -> Any:
    """Two groups, one of them in bfloat16; the last parameter has no gradient at first."""
    params = make_params(shapes=SHAPES[:3]), make_params(torch.bfloat16, SHAPES[3:], seed=1)
    groups = [{"params": params[0], "weight_decay": 0.02}, {"params": params[1]}]
    return case.make(groups, min_8bit_size=SMALL, **{"weight_decay": 0.1, **options})


def params_of(optimizer: Any) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def new_grads(optimizer: Any, seed: int, keep: bool = False) -> None:
    """Gradients for all parameters but the last; ``keep``: those that a change has left are kept as
    they are, absent ones too."""
    params = params_of(optimizer)
    before = [p.grad for p in params]
    for p in params:
        p.grad = None
    set_grads([p for p in params if not p.is_meta], seed)
    for p, grad in zip(params, before, strict=True):
        if keep:
            p.grad = None
            if grad is not None:
                p.grad_dtype = None
                p.grad = grad
    if not keep:
        params[-1].grad = None


def first_key(optimizer: Any, name: str = "") -> tuple[dict[str, Any], str]:
    """The state of the second parameter, and the key of its first state."""
    state = optimizer.state[params_of(optimizer)[1]]
    keys = [k for k in state if k not in ("step", "grad_norms") and k.endswith(name)]
    if not keys:
        pytest.skip("SGD and LARS without momentum have no state")
    return state, keys[0]


# -- the table -------------------------------------------------------------------------------------


class Change(NamedTuple):
    """What happens between two steps.

    Attributes:
        make: does it; gets the optimizer.
        keeps: whether the plan goes on holding.
        refused: the words of the error of the next step, if there is one.
        keeps_grads: whether the gradients of the step after are those that the change has left.
        needs: options that the class must have.
    """

    make: Callable[[Any], Any]
    keeps: bool = False
    refused: str = ""
    keeps_grads: bool = False
    needs: tuple[str, ...] = ()


def set_option(name: str, value: Any, group: int = 0) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        optimizer.param_groups[group][name] = value

    return change


def set_data(new: Callable[[Tensor], Tensor], number: int = 1) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        p = params_of(optimizer)[number]
        p.grad = None
        p.data = new(p.data)

    return change


def set_grad(new: Callable[[Tensor], Tensor | None], number: int = 1) -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        new_grads(optimizer, 7)
        p = params_of(optimizer)[number]
        grad = None if p.grad is None else new(p.grad)
        p.grad = None
        p.grad_dtype = None
        p.grad = grad

    return change


def set_state(new: Callable[[Tensor], Any], name: str = "") -> Callable[[Any], None]:
    def change(optimizer: Any) -> None:
        state, key = first_key(optimizer, name)
        state[key] = new(state[key])

    return change


def gradient_comes(optimizer: Any) -> None:
    new_grads(optimizer, 7)
    params_of(optimizer)[-1].grad = torch.full((70, 40), 0.01, dtype=torch.bfloat16)


def half_gradients(optimizer: Any) -> None:
    for p in params_of(optimizer)[:3]:
        p.grad = None
        p.grad_dtype = None
    set_grads(params_of(optimizer)[:3], 7, dtype=torch.bfloat16)
    params_of(optimizer)[-1].grad = None


def all_to_bfloat16(optimizer: Any) -> None:
    """As Module.to does it, gradients included."""
    for p in params_of(optimizer):
        grad, p.grad = p.grad, None
        p.data = p.data.to(torch.bfloat16)
        p.grad_dtype = None
        p.grad = None if grad is None else grad.to(torch.bfloat16)


def replaced_param(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params[1] = torch.nn.Parameter(params[1].detach() + 1)


def swapped_params(optimizer: Any) -> None:
    params = optimizer.param_groups[0]["params"]
    params[0], params[1] = params[1], params[0]


def moved_param(optimizer: Any) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.append(first.pop())


def removed_param(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop(0)


def same_params_in_a_new_list(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        group["params"] = list(group["params"])


def new_group(optimizer: Any) -> None:
    optimizer.add_param_group({"params": make_params(shapes=[(7, 70)], seed=3), "lr": 0.5})


def removed_group(optimizer: Any) -> None:
    optimizer.param_groups.pop(0)


def copied_group(optimizer: Any) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])


def loaded(optimizer: Any) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def loaded_from_another_run(optimizer: Any) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] += 5
        for key in state:
            if key != "step" and key != "grad_norms":
                state[key] = state[key].roll(1)
    optimizer.load_state_dict(saved)


def copied_state_dicts(optimizer: Any) -> None:
    for p in list(optimizer.state):
        optimizer.state[p] = dict(optimizer.state[p])


def cloned_state(optimizer: Any) -> None:
    """As tools do it that take state off a GPU and bring it back."""
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def new_order_of_state(optimizer: Any) -> None:
    first = next(iter(optimizer.state))
    optimizer.state[first] = optimizer.state.pop(first)


def new_order_of_keys(optimizer: Any) -> None:
    state = optimizer.state[params_of(optimizer)[1]]
    state["step"] = state.pop("step")


def keys_exchange_values(optimizer: Any) -> None:
    """Two states of one shape change places, in the dict's own order."""
    state, _ = first_key(optimizer)
    keys = [k for k, v in state.items() if v.shape == (40, 70)]
    if len(keys) < 2:
        pytest.skip("the class has one state")
    values = [state[k] for k in keys]
    items = list(state.items())
    names = dict(zip(keys, [*keys[1:], keys[0]], strict=True))
    state.clear()
    state.update({names.get(k, k): v for k, v in items})
    assert [state[names[k]] is v for k, v in zip(keys, values, strict=True)]


def data_of_state_swapped(optimizer: Any) -> None:
    state, key = first_key(optimizer)
    state[key].data = state[key].data.clone()


def other_data_of_state(new: Callable[[Tensor], Tensor], number: int = 1) -> Callable[[Any], None]:
    """As tools do it that release memory: the tensor stays, what is behind it does not."""

    def change(optimizer: Any) -> None:
        state = optimizer.state[params_of(optimizer)[number]]
        keys = [k for k in state if k not in ("step", "grad_norms")]
        if not keys:
            pytest.skip("SGD and LARS without momentum have no state")
        state[keys[0]].data = new(state[keys[0]].data)

    return change


def tensor_in_betas(optimizer: Any) -> None:
    """A tensor that changes inside of a tuple that stays."""
    group = optimizer.param_groups[0]
    group["betas"] = (torch.tensor(0.5), *group["betas"][1:])
    optimizer.step()
    group["betas"][0].fill_(0.7)


def grad_of_other_dtype_stays(optimizer: Any) -> None:
    """A parameter becomes bfloat16, its gradient stays float32."""
    new_grads(optimizer, 7)
    p = params_of(optimizer)[1]
    grad, p.grad = p.grad, None
    p.data = p.data.to(torch.bfloat16)
    p.grad_dtype = None
    p.grad = grad


def popped_state(optimizer: Any) -> None:
    optimizer.state.pop(params_of(optimizer)[1])


def cleared_state(optimizer: Any) -> None:
    optimizer.state.clear()


def removed_key(optimizer: Any) -> None:
    state, key = first_key(optimizer)
    del state[key]


def one_state_too_many(optimizer: Any) -> None:
    """One that another class of this library has."""
    name = "sum" if "exp_avg" in optimizer._op_states else "exp_avg"
    optimizer.state[params_of(optimizer)[1]][name] = torch.zeros(40, 70)


def foreign_key(optimizer: Any) -> None:
    for p in params_of(optimizer):
        optimizer.state[p]["slow_weights"] = p.detach().clone()


def foreign_key_on_one(optimizer: Any) -> None:
    optimizer.state[params_of(optimizer)[1]]["note"] = torch.ones(2)


def strange_owner_of_state(optimizer: Any) -> None:
    optimizer.state["of a logger"] = {"loss": torch.tensor(1.0)}


def other_steps(optimizer: Any) -> None:
    optimizer.state[params_of(optimizer)[1]]["step"] = torch.tensor(100.0)


def steps_in_place(optimizer: Any) -> None:
    optimizer.state[params_of(optimizer)[1]]["step"].fill_(100.0)


def frozen(optimizer: Any) -> None:
    new_grads(optimizer, 7)
    params_of(optimizer)[1].requires_grad_(False).grad = None


def schedule(optimizer: Any) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()


def lr_and_decay(optimizer: Any) -> None:
    """Two options that are one object, before and after."""
    group = optimizer.param_groups[0]
    group["lr"] = group["weight_decay"] = 0.3
    optimizer.step()
    group["lr"] = group["weight_decay"] = 0.5


def other_betas(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["betas"] = tuple(beta / 2 for beta in group["betas"])


def betas_in_a_list(optimizer: Any) -> None:
    """A list of numbers that changes and stays the same list."""
    group = optimizer.param_groups[0]
    group["betas"] = list(group["betas"])
    optimizer.step()
    group["betas"][0] = 0.5


def lr_in_place(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = torch.tensor(0.01)
    optimizer.step()
    group["lr"].mul_(3)


def renamed_option(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    value = group.pop("maximize")
    group["maximise"] = value


CHANGES = {
    "nothing": Change(lambda optimizer: None, keeps=True),
    "the same gradients": Change(lambda o: new_grads(o, 7), keeps=True, keeps_grads=True),
    "a gradient in place": Change(
        lambda o: params_of(o)[1].grad.mul_(2), keeps=True, keeps_grads=True
    ),
    "a gradient comes": Change(gradient_comes, keeps_grads=True),
    "a gradient goes": Change(set_grad(lambda g: None), keeps_grads=True),
    "gradients of another dtype": Change(half_gradients, keeps_grads=True),
    "a gradient of other strides": Change(
        set_grad(lambda g: g.t().contiguous().t()), keeps=True, keeps_grads=True
    ),
    "a sparse gradient": Change(
        set_grad(lambda g: g.to_sparse()), refused="expected a dense tensor", keeps_grads=True
    ),
    "data swapped": Change(set_data(torch.clone), keeps=True),
    "data of other strides": Change(set_data(lambda t: t.t().contiguous().t()), keeps=True),
    "data of another dtype": Change(set_data(lambda t: t.to(torch.bfloat16))),
    "data of another shape": Change(
        set_data(lambda t: t[:39].clone()), refused="is of shape [39, 70] now"
    ),
    "data of another shape and as many elements": Change(
        set_data(lambda t: t.view(70, 40)), refused="is of shape [70, 40] now"
    ),
    "data of the last group of another shape": Change(
        set_data(lambda t: t.view(30, 30), 3), refused="is of shape [30, 30] now"
    ),
    "data of another dtype than the gradient": Change(grad_of_other_dtype_stays, keeps_grads=True),
    "a model to bfloat16": Change(all_to_bfloat16),
    "a parameter is replaced": Change(replaced_param),
    "two parameters change places": Change(swapped_params),
    "a parameter moves to the other group": Change(moved_param),
    "a parameter is removed": Change(removed_param),
    "the list of parameters is replaced": Change(same_params_in_a_new_list, keeps=True),
    "a parameter is frozen": Change(frozen, keeps_grads=True),
    "a new group": Change(new_group),
    "a group is removed": Change(removed_group),
    "a group is copied": Change(copied_group),
    "a load": Change(loaded),
    "a load of another run": Change(loaded_from_another_run),
    "state dicts are copied": Change(copied_state_dicts, keeps=True),
    "state is cloned": Change(cloned_state),
    "state in another order": Change(new_order_of_state),
    "keys in another order": Change(new_order_of_keys),
    "keys exchange their values": Change(keys_exchange_values),
    "a state tensor is cloned": Change(set_state(torch.clone)),
    "a state tensor changes in place": Change(set_state(lambda t: t.add_(1)), keeps=True),
    "data of a state are swapped": Change(data_of_state_swapped, keeps=True),
    "data of a state of another shape": Change(
        other_data_of_state(lambda t: t[:39].clone()), refused="its state of shape [39, 70]"
    ),
    "data of a state of the last group of another shape": Change(
        other_data_of_state(lambda t: t[:299].clone(), 3), refused="its state of shape [299, 3]"
    ),
    "data of a state are released": Change(
        other_data_of_state(lambda t: t.new_empty(0)), refused="its state of shape [0]"
    ),
    "a state of another shape": Change(set_state(lambda t: t[:39].clone()), refused="[39, 70]"),
    "a state of another dtype": Change(set_state(lambda t: t.to(torch.float16)), refused="float16"),
    "a state with other strides": Change(
        set_state(lambda t: t.t().contiguous().t()), refused="contiguous"
    ),
    "a state of one parameter is popped": Change(popped_state),
    "all state is removed": Change(cleared_state),
    "a key is removed": Change(removed_key, refused="expected the keys"),
    "a state of ours too many": Change(
        one_state_too_many,
        refused="expected the keys",
    ),
    "a key of others": Change(foreign_key),
    "a key of others for one parameter": Change(foreign_key_on_one),
    "state that belongs to no parameter": Change(strange_owner_of_state),
    "other steps": Change(other_steps),
    "other steps in place": Change(steps_in_place, keeps=True),
    "lr": Change(set_option("lr", 0.5), keeps=True),
    "lr and weight_decay, one number": Change(lr_and_decay, keeps=True),
    "lr as a tensor": Change(set_option("lr", torch.tensor(0.5)), keeps=True),
    "lr in place": Change(lr_in_place, keeps=True),
    "lr that is infinite": Change(
        set_option("lr", float("inf"), 1), keeps=True, refused="lr must be finite"
    ),
    "lr that is no number": Change(set_option("lr", "0.1"), refused="lr: expected"),
    "a schedule": Change(schedule, keeps=True),
    "weight_decay": Change(set_option("weight_decay", 0.5), keeps=True),
    "betas": Change(other_betas, keeps=True, needs=("betas",)),
    "betas in a list": Change(betas_in_a_list, keeps=True, needs=("betas",)),
    "a tensor in betas": Change(tensor_in_betas, keeps=True, needs=("betas",)),
    "betas out of range": Change(
        set_option("betas", (0.5, 1.0)), refused="betas", needs=("betas",)
    ),
    "maximize": Change(set_option("maximize", True), keeps=True),
    "seed": Change(set_option("seed", 5), keeps=True),
    "state_rounding": Change(set_option("state_rounding", "nearest"), keeps=True),
    "stochastic_rounding": Change(set_option("stochastic_rounding", True, 1)),
    "an option of no use": Change(set_option("initial_lr", 0.5), keeps=True),
    "an option is renamed": Change(renamed_option, refused="maximize"),
    "amsgrad": Change(set_option("amsgrad", True), refused="expected the keys", needs=("amsgrad",)),
    "centered": Change(
        set_option("centered", True), refused="expected the keys", needs=("centered",)
    ),
    "percentile_clipping": Change(
        set_option("percentile_clipping", 5), refused="expected the keys"
    ),
    "min_8bit_size": Change(set_option("min_8bit_size", 10**6), refused="min_8bit_size"),
    "block_size": Change(set_option("block_size", 64), refused="block_size"),
    "is_paged": Change(set_option("is_paged", True)),  # no parameter is large enough here
}


def copied(optimizer: Any) -> Any:
    """A copy, with the gradients, which copy.deepcopy leaves out."""
    twin = copy.deepcopy(optimizer)
    for p, q in zip(params_of(optimizer), params_of(twin), strict=True):
        if p.grad is not None:
            q.grad_dtype = None
            q.grad = p.grad.clone()
    return twin


def outcome(optimizer: Any, change: Change) -> str:
    """The error of two more steps, or none."""
    for seed in (7, 8):
        new_grads(optimizer, seed, keep=change.keeps_grads)
        before = all_bits(optimizer) if change.refused else {}
        try:
            optimizer.step()
        except Exception as error:
            assert all_bits(optimizer) == before
            return f"{type(error).__name__}: {error}"
    return ""


# Changes that 32-bit state, or none, does not see.
ONLY_8BIT = ("min_8bit_size", "block_size")


@every_optimizer()
@pytest.mark.parametrize("name", CHANGES)
def test_a_kept_plan_does_what_a_fresh_one_does(case: OptimizerCase, name: str) -> None:
    change = CHANGES[name]
    optimizer = make(case)
    if any(option not in optimizer.defaults for option in change.needs):
        pytest.skip("the class has no such option")
    for seed in range(2):
        new_grads(optimizer, seed)
        optimizer.step()
    kept = optimizer._plan
    change.make(optimizer)
    twin = copied(optimizer)
    assert twin._plan is None
    expected, got = outcome(twin, change), outcome(optimizer, change)
    assert got == expected
    has_8bit = optimizer.defaults["optim_bits"] == 8 and bool(case.states)
    if change.refused and (name not in ONLY_8BIT or has_8bit):
        assert change.refused in got
    else:
        assert got == ""
        assert (optimizer._plan is kept) == change.keeps
    assert all_bits(optimizer) == all_bits(twin)


# -- the rest --------------------------------------------------------------------------------------


def test_momentum_that_begins_late() -> None:
    """A buffer is made, and the plan with it."""
    optimizer = torchao8.SGD(make_params(shapes=SHAPES), lr=0.1)
    train(optimizer, params_of(optimizer), [0, 1])
    optimizer.param_groups[0]["momentum"] = 0.9
    twin = copy.deepcopy(optimizer)
    for each in (optimizer, twin):
        train(each, params_of(each), [2, 3])
        assert all("momentum_buffer" in each.state[p] for p in params_of(each))
    assert_same_training(optimizer, twin)


def test_a_parameter_that_is_trained_from_now_on() -> None:
    """It gets state at the next step, though it has no gradient yet: no checkpoint is partial."""
    params = make_params(shapes=SHAPES)
    params[1].requires_grad_(False)
    optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL)
    rest = [p for p in params if p is not params[1]]
    train(optimizer, rest, [0, 1])
    assert params[1] not in optimizer.state
    params[1].requires_grad_(True)
    train(optimizer, rest, [2])
    assert "step" in optimizer.state[params[1]]


@pytest.mark.parametrize(
    "name", ["state is cloned", "a state tensor is cloned", "data of a state are swapped"]
)
def test_state_that_leaves_its_pages(name: str) -> None:
    optimizer = torchao8.PagedAdamW8bit(make_params(shapes=[(5,), (400, 512)]))
    train(optimizer, params_of(optimizer), [0, 1])
    CHANGES[name].make(optimizer)
    set_grads(params_of(optimizer), 2)
    before = all_bits(optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="already has state that is not paged"):
            optimizer.step()
    assert all_bits(optimizer) == before


@pytest.mark.parametrize("lost", ["read", "of others", "cleared"])
def test_state_that_is_missing_is_made(lost: str) -> None:
    """Of a parameter without a gradient, too: then no checkpoint is partial."""
    params = make_params(shapes=SHAPES)
    params[1].requires_grad_(lost == "cleared")
    optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL)
    if lost == "of others":
        optimizer.state[params[1]]["seen"] = torch.ones(1)
    rest = [p for p in params if p is not params[1]]
    train(optimizer, rest, [0, 1])
    state = optimizer.state[params[1]]  # which is a defaultdict
    if lost == "cleared":
        state.clear()
    train(optimizer, rest, [2])
    params[1].requires_grad_(True)
    train(optimizer, rest, [3])
    assert "step" in optimizer.state[params[1]]


def test_momentum_that_begins_late_beside_an_error() -> None:
    """Nothing is made for the first group if the second one is refused."""
    groups = [{"params": make_params(shapes=[shape])} for shape in SHAPES[:2]]
    optimizer = torchao8.SGD(groups, lr=0.1)
    train(optimizer, params_of(optimizer), [0])
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.param_groups[1]["weight_decay"] = -1.0
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match="weight_decay"):
        optimizer.step()
    assert all_bits(optimizer) == before


def test_state_in_another_mapping() -> None:
    optimizer, other = (
        torchao8.AdamW8bit(make_params(shapes=SHAPES), min_8bit_size=SMALL) for _ in range(2)
    )
    train(optimizer, params_of(optimizer), [0])
    for p in params_of(optimizer):
        optimizer.state[p] = collections.UserDict(optimizer.state[p])
    train(optimizer, params_of(optimizer), [1, 2])
    train(other, params_of(other), [0, 1, 2])
    assert_same_training(optimizer, other)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_make_their_own_plan(duplicate: Callable[[Any], Any]) -> None:
    optimizer = torchao8.AdamW8bit(make_params(shapes=SHAPES), min_8bit_size=SMALL)
    train(optimizer, params_of(optimizer), [0, 1])
    other = duplicate(optimizer)
    assert other._plan is None
    train(other, params_of(other), [2, 3])
    train(optimizer, params_of(optimizer), [2, 3])
    assert_same_training(optimizer, other)


def test_threads() -> None:
    """One optimizer in each thread, and one that goes from thread to thread."""
    makers = [lambda: torchao8.AdamW8bit(make_params(shapes=SHAPES), min_8bit_size=SMALL)] * 4
    alone, apart = [m() for m in makers], [m() for m in makers]

    def run(optimizer: Any, seeds: range) -> None:
        for seed in seeds:
            optimizer.param_groups[0]["lr"] = 0.01 * (seed + 1)
            train(optimizer, params_of(optimizer), [seed])

    threads = [threading.Thread(target=run, args=(o, range(20))) for o in apart]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for optimizer in alone:
        run(optimizer, range(20))
    passed_on = makers[0]()
    for seed in range(20):
        thread = threading.Thread(target=run, args=(passed_on, range(seed, seed + 1)))
        thread.start()
        thread.join()
    for optimizer in (*apart, passed_on):
        assert_same_training(optimizer, alone[0])


def test_a_plan_keeps_no_state_and_no_gradient_alive() -> None:
    """Tools take state off a GPU between two phases, and zero_grad() frees gradients."""
    params = make_params(shapes=SHAPES)
    optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL)
    train(optimizer, params, [0, 1])
    gone = [weakref.ref(p.grad) for p in params]
    gone += [weakref.ref(t) for state in optimizer.state.values() for t in state.values()]
    for state in optimizer.state.values():
        for key in state:
            state[key] = state[key].clone()
    optimizer.zero_grad()
    assert not any(ref() is not None for ref in gone)  # at once, without the garbage collector


def test_a_plan_keeps_no_parameter_alive() -> None:
    """Gaussian splatting replaces parameters; a memory of groups is emptied between two phases."""
    optimizer = torchao8.AdamW8bit(make_params(shapes=SHAPES), min_8bit_size=SMALL)
    train(optimizer, params_of(optimizer), [0, 1])
    gone = weakref.ref(params_of(optimizer)[1])
    optimizer.state.pop(gone())
    optimizer.param_groups[0]["params"][1] = torch.nn.Parameter(torch.ones(4, 70))
    assert gone() is None
    rest = list(map(weakref.ref, params_of(optimizer)))
    optimizer.param_groups.clear()
    optimizer.state.clear()
    assert not any(ref() is not None for ref in rest)


def test_nothing_is_alive_after_the_optimizer() -> None:
    params = make_params(shapes=SHAPES)
    optimizer = torchao8.AdamW8bit(params, min_8bit_size=SMALL)
    train(optimizer, params, [0, 1])
    gone = [weakref.ref(optimizer._plan), *map(weakref.ref, params)]
    del optimizer, params
    gc.collect()  # of torch's own cycles
    assert not any(ref() is not None for ref in gone)


@pytest.mark.parametrize("cls", [torchao8.AdamW, torchao8.AdamW8bit])
def test_memory_of_a_plan(cls: Any) -> None:
    """Less than a kilobyte for each parameter."""
    params = make_params(shapes=[(4, 64)] * 500)
    optimizer = cls(params, min_8bit_size=SMALL)
    train(optimizer, params, [0])
    optimizer._plan = None
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    optimizer._plan, works = plan_module.plan_step(optimizer, None)
    del works
    gc.collect()
    size = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert 0 < size < 1000 * len(params)
