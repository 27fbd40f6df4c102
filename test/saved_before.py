"""Short runs of every optimizer, whose results earlier versions left in test/data/saved_before.

A run is a dict of plain values, and is kept in its file, so that a later change of a table or of
this module does not change what the file means:

    class    the name of the optimizer
    options  arguments of its constructor
    groups   options of each parameter group; its params are pairs of a dtype and a shape

A file is a torch.save file, compressed by xz, of a dict of such a run, what made it
(``made_with``) and ``after``: for each of STEPS the parameters, and what
``torch.save(optimizer.state_dict())`` holds.

make_saved_before.py makes the files, test_saved_before.py reads them.
"""

import io
import lzma
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from helpers import bits, through_file
from torch import Tensor
from torch.optim import Optimizer

import torchao8

FOLDER = Path(__file__).resolve().parent / "data" / "saved_before"
# A small run of these two is there in other formats too: Optimizer objects as pickles, and so on.
OTHER_FORMATS = FOLDER / "other_formats"
STEPS = (3, 5)

Run = dict[str, Any]


# -- values that no version of torch and no processor changes ------------------------------------


def whole_numbers(count: int, stream: int) -> Tensor:
    """int64 numbers in [-2^20, 2^20] of many magnitudes, a thirteenth of them 0.

    Integer arithmetic alone: torch's random numbers may change with its version, and logarithms
    and powers differ between processors.
    """
    prime = 2**31 - 1  # squares of smaller numbers fit into int64
    place = torch.arange(count, dtype=torch.int64)
    number = (place * 48271 + stream * 1_000_003 + 1) % prime
    for addend in (12345, 678910, 1112131):
        number = (number * number + place + addend) % prime
    mantissa = number % 2**21 - 2**20
    shift = number // 2**21 % 11
    return torch.where((place + stream) % 13 == 0, 0, mantissa >> shift)


def values(shape: Sequence[int], dtype: torch.dtype, stream: int, exponent: int = 0) -> Tensor:
    """Numbers in [-1, 1] times a power of two. Of a tensor that is large enough to be paged only
    the last row is not zero, so that its file is small."""
    count = torch.Size(shape).numel()
    # Exact in float32; the conversion to the other dtypes rounds to nearest everywhere.
    exact = whole_numbers(count, stream).to(torch.float32) * 2.0 ** (exponent - 20)
    if count >= 100_000:
        exact[: -shape[-1]] = 0
    return exact.reshape(tuple(shape)).to(dtype)


def set_grads(params: Sequence[Tensor], step: int) -> None:
    """The gradients of a step, from 1 on. They grow, so that percentile_clipping has what to clip.

    In the second step one parameter has none, and one has elements that are not finite.
    """
    for i, p in enumerate(params):
        p.grad = None
        if (i, step) == (1, 2):
            continue
        grad = values(p.shape, p.dtype, 1000 * (i + 1) + step, exponent=step - 3)
        if (i, step) == (0, 2):
            grad.view(-1)[5:7] = torch.tensor([float("nan"), float("-inf")])
        p.grad = grad.to(p.device)


# -- runs ----------------------------------------------------------------------------------------


def make_params(run: Run, device: str = "cpu") -> list[list[torch.nn.Parameter]]:
    """The parameters of each group before the first step."""
    groups: list[list[torch.nn.Parameter]] = []
    number = 0
    for group in run["groups"]:
        groups.append([])
        for dtype, shape in group["params"]:
            start = values(shape, getattr(torch, dtype), 1000 * (number + 1))
            groups[-1].append(torch.nn.Parameter(start.to(device)))
            number += 1
    return groups


def make_optimizer(run: Run, prefix: str = "", device: str = "cpu") -> Optimizer:
    """The optimizer of a run before its first step.

    Args:
        prefix: "Paged" for the class with paged state.
    """
    groups = [
        {**group, "params": params}
        for group, params in zip(run["groups"], make_params(run, device), strict=True)
    ]
    cls = getattr(torchao8, prefix + run["class"])
    optimizer: Optimizer = cls(groups, **run["options"])
    return optimizer


def named(run: Run, device: str = "cpu") -> tuple[torch.nn.Module, Optimizer]:
    """A model of the parameters of a run, w0, w1, ..., and its optimizer, which knows the names."""
    groups = make_params(run, device)
    names = {f"w{i}": p for i, p in enumerate(p for params in groups for p in params)}
    model = torch.nn.ParameterDict(names)
    of_param = {id(p): name for name, p in model.items()}
    with_names = [
        {**group, "params": [(of_param[id(p)], p) for p in params]}
        for group, params in zip(run["groups"], groups, strict=True)
    ]
    optimizer: Optimizer = getattr(torchao8, run["class"])(with_names, **run["options"])
    return model, optimizer


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def train(optimizer: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        set_grads(params_of(optimizer), step)
        optimizer.step()


def ending(optimizer: Optimizer) -> dict[str, Any]:
    """What is kept of an optimizer after a step."""
    params = [p.detach().clone() for p in params_of(optimizer)]
    return {"params": params, "optimizer": through_file(optimizer.state_dict())}


# -- files ---------------------------------------------------------------------------------------


def file_of(name: str, folder: Path = FOLDER) -> Path:
    return folder / f"{name}.pt.xz"


def write(path: Path, content: dict[str, Any]) -> None:
    plain = io.BytesIO()
    torch.save(content, plain)
    path.write_bytes(lzma.compress(plain.getvalue(), preset=9))


def read(path: Path) -> dict[str, Any]:
    """A file, with tensors of its own: an optimizer takes over those that it loads."""
    plain = io.BytesIO(lzma.decompress(path.read_bytes()))
    content: dict[str, Any] = torch.load(plain, weights_only=True)
    return content


# -- comparison ----------------------------------------------------------------------------------


def differences(optimizer: Optimizer, saved: dict[str, Any], but: Sequence[str] = ()) -> list[str]:
    """Where an optimizer is not, to the bit, what was saved by :func:`ending`; a line for each.

    Options that the saved groups lack may be there: a later version has more of them.

    Args:
        but: options that are not compared.
    """
    found: list[str] = []
    params, state_dict, then = params_of(optimizer), optimizer.state_dict(), saved["optimizer"]
    for i, (p, value) in enumerate(zip(params, saved["params"], strict=True)):
        label = f"parameter {i} ({p.dtype}, {list(p.shape)})"
        found += _difference(label, p.detach(), value)
        state, state_then = state_dict["state"].get(i, {}), then["state"].get(i, {})
        if set(state) != set(state_then):
            found.append(f"{label}: has the state {sorted(state)}, had {sorted(state_then)}")
        for key in sorted(set(state) & set(state_then)):
            found += _difference(f"{key} of {label}", state[key], state_then[key])
    groups = zip(state_dict["param_groups"], then["param_groups"], strict=True)
    for number, (group, group_then) in enumerate(groups):
        for name, value in group_then.items():
            if name in but:
                continue
            now = group.get(name, "nothing")
            if type(now) is not type(value) or now != value:
                found.append(f"option {name} of group {number}: is {now!r}, was {value!r}")
    return found


def _difference(label: str, now: Tensor, then: Tensor) -> list[str]:
    now = now.cpu()
    kinds = [f"{x.dtype} {list(x.shape)}" for x in (now, then)]
    if kinds[0] != kinds[1]:
        return [f"{label}: is {kinds[0]}, was {kinds[1]}"]
    if bits(now) == bits(then):
        return []
    size = now.element_size()
    pairs = [x.contiguous().reshape(-1, 1).view(torch.uint8).reshape(-1, size) for x in (now, then)]
    places = (pairs[0] != pairs[1]).any(1).nonzero().flatten().tolist()
    here = places[0]
    first = [x.reshape(-1)[here].item() for x in (now, then)]
    return [
        f"{label}: {len(places)} of {now.numel()} elements differ, the first is element {here}: "
        f"{first[0]}, was {first[1]}"
    ]
