"""Muon on plain tensors: against torch.optim.Muon, what it refuses, matrices of more dimensions,
gradients that are not finite."""

import math
from typing import Any

import pytest
import torch
from helpers import SMALL, all_bits, bits, make_params, reset_compiler, set_grads, train
from torch import Tensor

import torchao8
from torchao8 import Muon, Muon8bit

SHAPES = ((40, 70), (64, 32), (3, 300), (1, 7), (48, 48))
# "The Polar Express", with its factor of safety: without it, a rounding error may overshoot.
POLAR_EXPRESS = tuple(
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
        (3.3184196573706015, -2.488488024314874, 0.51004894012372),
        (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    )
)


def copied(params: list[Any], dtype: torch.dtype | None = None) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().to(dtype or p.dtype, copy=True)) for p in params]


def exact_steps(params: list[Tensor], lr: float, steps: int, match_rms: bool) -> list[Tensor]:
    """The same training in float64, as the formulas have it."""
    a, b, c = 3.4445, -4.775, 2.0315
    params = [p.detach().double() for p in params]
    buffers = [torch.zeros_like(p) for p in params]
    for step in range(steps):
        grads = make_params(shapes=SHAPES)
        set_grads(grads, step)
        for p, buffer, of in zip(params, buffers, grads, strict=True):
            grad = of.grad.to(torch.bfloat16).double()
            buffer.lerp_(grad, 0.05)
            x = grad.lerp(buffer, 0.95)
            x = x / x.norm()
            for _ in range(5):
                gram = x @ x.T
                x = a * x + (b * gram + c * gram @ gram) @ x
            rows, columns = p.shape
            of_shape = math.sqrt(max(1, rows / columns))
            rate = 0.2 * math.sqrt(max(rows, columns)) if match_rms else of_shape
            p.mul_(1 - lr * 0.1).sub_(x, alpha=lr * rate)
    return params


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_near_to_the_formulas_as_torch(dtype: torch.dtype, adjust: str) -> None:
    """50 steps. Both round all products to bfloat16; ours composes some, which rounds otherwise."""
    lr = 0.02
    start = make_params(torch.bfloat16, SHAPES)
    ours, theirs = copied(start, dtype), copied(start, dtype)
    options: dict[str, Any] = {"lr": lr, "adjust_lr_fn": adjust}
    optimizers = Muon(ours, **options), torch.optim.Muon(theirs, **options)
    for step in range(50):
        set_grads(ours, step)
        for p, q in zip(ours, theirs, strict=True):
            p.grad = p.grad.to(torch.bfloat16).to(dtype)
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    exact = exact_steps(start, lr, 50, adjust == "match_rms_adamw")
    for p, q, want, first in zip(ours, theirs, exact, start, strict=True):
        moved = (want - first.detach().double()).norm()
        off, of_torch = (float((x.detach().double() - want).norm() / moved) for x in (p, q))
        assert off <= 2.5 * of_torch + 0.01, (list(p.shape), off, of_torch)


def test_8_bits_are_near_32() -> None:
    many, few = make_params(shapes=SHAPES), make_params(shapes=SHAPES)
    train(Muon(many, lr=0.02), many, range(20))
    optimizer = Muon8bit(few, lr=0.02, min_8bit_size=SMALL)
    train(optimizer, few, range(20))
    assert "momentum_buffer_codes" in optimizer.state[few[0]]
    for p, q, first in zip(many, few, make_params(shapes=SHAPES), strict=True):
        assert float(((p - q).norm() / (p - first).norm()).detach()) < 0.1


# -- what is refused -------------------------------------------------------------------------------

REST = "Muon orthogonalizes matrices, AdamW trains the rest: "


def refused(make: Any) -> str:
    with pytest.raises(ValueError) as error:
        make()
    return str(error.value)


def test_parameters_that_are_no_matrices() -> None:
    matrix, vector, scalar, cube = make_params(shapes=((4, 5), (768,), (), (2, 3, 4)))
    named = [("0.weight", matrix), ("norm.weight", vector)]
    assert refused(lambda: Muon8bit(named)) == (
        f"Muon8bit: params[1] (norm.weight): expected a matrix, got the shape [768]. {REST}"
        "MuonAdamW8bit(torchao8.param_groups(model, muon=True))"
    )
    assert refused(lambda: torchao8.PagedMuon([scalar])) == (
        f"PagedMuon: params[0]: expected a matrix, got the shape []. {REST}"
        "PagedMuonAdamW(torchao8.param_groups(model, muon=True))"
    )
    message = refused(lambda: Muon([matrix, cube]))
    assert message.startswith("Muon: params[1]: expected a matrix, got the shape [2, 3, 4]. ")
    assert "higher_dims='batch' takes" in message
    assert "higher_dims='flatten' takes" in message
    optimizer = Muon([matrix])
    before = len(optimizer.param_groups)
    refused(lambda: optimizer.add_param_group({"params": [vector]}))
    assert len(optimizer.param_groups) == before
    optimizer.add_param_group({"params": [cube], "higher_dims": "batch"})
    optimizer.add_param_group({"params": [vector.requires_grad_(False)]})  # no step reads it


def test_parameters_that_fsdp1_flattened() -> None:
    (p,) = make_params(shapes=[(40,)])
    p._fsdp_flattened = True  # type: ignore[attr-defined]
    assert refused(lambda: Muon([("layer.weight", p)])) == (
        "Muon: params[0] (layer.weight): it was flattened by FSDP1, which does not tell where the "
        "shards of a matrix are; Muon needs all of it. Shard with fully_shard (FSDP2)"
    )


def test_parameters_that_are_no_matrices_any_more() -> None:
    """Put into a group, thawed, or of a group whose option has changed: nothing is changed then."""
    params = make_params(shapes=((4, 5), (2, 3, 4)))
    frozen = torch.nn.Parameter(torch.ones(5), requires_grad=False)
    groups = [{"params": params, "higher_dims": "batch"}, {"params": [frozen]}]
    optimizer = Muon(groups)
    train(optimizer, params, [0])
    before = all_bits(optimizer)["params"]
    optimizer.param_groups[0]["higher_dims"] = "refuse"
    set_grads(params, 1)
    assert refused(optimizer.step).startswith(
        "Muon: parameter 1: expected a matrix, got the shape [2, 3, 4]. higher_dims='batch' "
    )
    optimizer.param_groups[0]["higher_dims"] = "batch"
    frozen.requires_grad_(True)
    frozen.grad = torch.ones(5)
    assert refused(optimizer.step).startswith("Muon: parameter 2: expected a matrix, got the shape")
    optimizer.param_groups[1]["params"] = [torch.nn.Parameter(torch.ones(7))]
    assert refused(optimizer.step).startswith("Muon: parameter 2: expected a matrix, got the shape")
    assert all_bits(optimizer)["params"][:2] == before[:2]
    optimizer.param_groups.pop()
    optimizer.step()


def test_gradients_that_no_step_reads() -> None:
    p = torch.nn.Parameter(torch.randn(4, 5))
    optimizer = Muon([p])
    p.grad = torch.eye(4, 5).to_sparse()
    with pytest.raises(RuntimeError, match="gradient of parameter 0: expected a dense tensor"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"params\[0\]: expected a dense tensor of float32"):
        Muon([torch.nn.Parameter(torch.randn(4, 5, dtype=torch.complex64))])


# -- options ---------------------------------------------------------------------------------------


def moved(shape: tuple[int, ...], **options: Any) -> Tensor:
    (p,) = make_params(shapes=[shape])
    before = p.detach().clone()
    train(Muon([p], weight_decay=0.0, lr=1.0, **options), [p], [0])
    return (p - before).detach()


def test_matrices_of_more_dimensions() -> None:
    """Those of a batch are orthogonal each, and a flat one is one."""
    batch = moved((3, 20, 40), higher_dims="batch")
    flat = moved((20, 6, 9), higher_dims="flatten").reshape(20, 54)
    for matrix in (*batch, flat):
        values = torch.linalg.svdvals(matrix)
        assert 0.5 < float(values.min()) < float(values.max()) < 1.3
    assert torch.linalg.svdvals(batch.reshape(60, 40)).max() > 1.3


def test_a_triple_for_each_iteration() -> None:
    """As many times the same is the same, and other ones count."""
    triple = (3.4445, -4.775, 2.0315)
    same = moved((20, 30), ns_coefficients=[triple] * 4, ns_steps=4)
    assert bits(same) == bits(moved((20, 30), ns_steps=4)) != bits(moved((20, 30), ns_steps=5))
    other = moved((20, 30), ns_coefficients=POLAR_EXPRESS)
    assert bits(other) != bits(same)
    assert 0.5 < float(torch.linalg.svdvals(other).min()) <= float(other.norm()) < 1.3 * 20**0.5


def test_adjust_lr_fn_has_a_default_that_checkpoints_hold() -> None:
    (p,) = make_params(shapes=[(20, 10)])
    optimizer = Muon([{"params": [p], "adjust_lr_fn": None}])
    assert optimizer.param_groups[0]["adjust_lr_fn"] == optimizer.defaults["adjust_lr_fn"]
    ratio = moved((20, 10)).norm() / moved((20, 10), adjust_lr_fn="match_rms_adamw").norm()
    assert float(ratio) == pytest.approx(2**0.5 / (0.2 * 20**0.5), rel=1e-5)


# -- gradients that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"optim_bits": 32},
        {"percentile_clipping": 50},
        {"block_wise": False},
        {"state_format": "mulaw"},
    ],
    ids=str,
)
def test_a_bad_gradient_stays_in_its_matrix(bad: float, options: dict[str, Any]) -> None:
    """All of the matrix and its momentum stay; its step counts; the others do not see it."""
    runs = []
    for element in (bad, 0.5):
        params = make_params(shapes=SHAPES)
        optimizer = Muon8bit(params, lr=0.02, min_8bit_size=SMALL, **options)
        train(optimizer, params, range(2))
        before = bits(params[0]), optimizer.moments(params[0])["momentum_buffer"]
        set_grads(params, 2)
        params[0].grad[3, 5] = element
        optimizer.step()
        runs.append((before, params, optimizer))
    (before, params, optimizer), (_, others, finite) = runs
    assert bits(params[0]) == before[0] != bits(others[0])
    kept = optimizer.moments(params[0])["momentum_buffer"]
    # mu-law codes are written anew, with the scale of a step without a gradient: half of 1/16.
    rounding = 1 / 32 if options.get("state_format") == "mulaw" else 1e-6
    torch.testing.assert_close(kept, before[1], rtol=1.01 * rounding, atol=5e-3 * rounding)
    assert float(optimizer.state[params[0]]["step"]) == 3
    for p, q in zip(params[1:], others[1:], strict=True):
        assert bits(p) == bits(q)
        assert all(bits(v) == bits(finite.state[q][k]) for k, v in optimizer.state[p].items())


# -- torch.compile ---------------------------------------------------------------------------------


def test_a_compiled_step_checks_the_number_of_triples(fresh_compiler: None) -> None:
    params = make_params(shapes=SHAPES)
    optimizer = Muon8bit(params, ns_coefficients=POLAR_EXPRESS, ns_steps=len(POLAR_EXPRESS))
    set_grads(params, 0)
    optimizer.step()
    optimizer.param_groups[0]["ns_steps"] = 1
    before = all_bits(optimizer)
    with pytest.raises(ValueError, match="ns_steps: expected 5, the number"):
        torch.compile(optimizer.step, backend="eager")()
    assert all_bits(optimizer) == before


def test_one_graph_under_a_schedule(fresh_compiler: None) -> None:
    """The op of a whole step is one node; other learning rates and momenta compile nothing anew."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    runs = []
    for compiles in (False, True):
        params = make_params(shapes=SHAPES)
        optimizer = Muon8bit(params, min_8bit_size=SMALL)
        reset_compiler()
        step = torch.compile(optimizer.step, fullgraph=True, backend=backend)
        for i in range(5):
            set_grads(params, i)
            optimizer.param_groups[0].update(lr=0.1 / (i + 1), momentum=0.9 + i / 100)
            (step if compiles else optimizer.step)()
        runs.append(all_bits(optimizer))
    eager, compiled = runs
    assert (eager["params"], eager["states"]) == (compiled["params"], compiled["states"])
    assert len(graphs) <= 2  # the first step meets numbers, which then become inputs
    targets = [node.target for node in graphs[-1].graph.nodes]
    assert targets.count(torch.ops.torchao8.muon_update_.default) == 2  # 8 and 32 bits
