"""The orthogonal factor that Muon's step takes of a matrix, against the iteration in float64."""

from typing import Any

import pytest
import torch
from helpers import bits
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from torchao8 import matrix_shape
from torchao8.optim._muon import newton_schulz
from torchao8.optim._muon.newton_schulz import Triple, orthogonalize_, stack_size

MUON = (3.4445, -4.7750, 2.0315)
EPS = 1e-7
# Made as table 1 of "The Polar Express" (arXiv 2505.16932) says: it starts steeply and ends at the
# iteration that no longer moves a singular value of 1.
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]


def exact(x: Tensor, coefficients: list[Triple]) -> Tensor:
    """The same iteration in float64."""
    x = x.double()
    if x.shape[0] > x.shape[1]:
        return exact(x.T, coefficients).T
    x = x / x.norm().clamp(min=EPS)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def plain(x: Tensor, coefficients: list[Triple]) -> Tensor:
    """The same iteration in bfloat16, as torch.optim.Muon has it but for the coefficients."""
    x = x / x.norm().clamp(min=EPS)
    for a, b, c in coefficients:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def ours(x: Tensor, coefficients: list[Triple]) -> Tensor:
    stack = x.unsqueeze(0).clone()
    orthogonalize_(stack, coefficients, EPS)
    return stack[0]


def distance(x: Tensor, reference: Tensor) -> float:
    return float((x.double() - reference).norm() / reference.norm())


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).bfloat16()


def like_a_momentum(rows: int, columns: int) -> Tensor:
    """A normal matrix and four directions that are much larger."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, 4, generator=generator) for n in (rows, columns))
    return (normal(rows, columns).float() + left @ right.T).bfloat16()


# Of panels, of composed iterations, of both, of neither; tall ones; and what has few rows.
SIZES = [(400, 401), (64, 200), (390, 800), (255, 257), (17, 1000), (1, 50), (1, 1)]
SIZES += [(401, 400), (200, 64), (800, 390), (50, 1)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("make", [normal, like_a_momentum])
def test_as_near_to_float64_as_torch(make, size):
    x = make(*size)
    reference = exact(x, [MUON] * 5)
    of_torch = distance(_zeropower_via_newtonschulz(x.clone(), MUON, 5, EPS), reference)
    assert distance(ours(x, [MUON] * 5), reference) <= 2.5 * of_torch + 0.03


@pytest.mark.parametrize("size", [(64, 200), (800, 390), (200, 220)], ids=str)
def test_singular_values_are_in_the_same_range(size):
    x = like_a_momentum(*size)
    of_torch = _zeropower_via_newtonschulz(x.clone(), MUON, 5, EPS).double()
    least, largest = torch.linalg.svdvals(of_torch).aminmax()
    values = torch.linalg.svdvals(ours(x, [MUON] * 5).double())
    assert values.min() > least - 0.03
    assert values.max() < largest + 0.03


@pytest.mark.parametrize("ns_steps", range(1, 8))
def test_every_number_of_iterations(ns_steps):
    x = like_a_momentum(40, 100)
    coefficients = [MUON] * ns_steps
    reference = exact(x, coefficients)
    of_plain = distance(plain(x, coefficients), reference)
    assert distance(ours(x, coefficients), reference) <= 2.5 * of_plain + 0.01


@pytest.mark.parametrize("size", [(64, 200), (200, 220)], ids=str)
def test_a_triple_for_each_iteration(size):
    x = like_a_momentum(*size)
    reference = exact(x, POLAR_EXPRESS)
    of_plain = distance(plain(x, POLAR_EXPRESS), reference)
    assert distance(ours(x, POLAR_EXPRESS), reference) <= 1.5 * of_plain + 0.001


def lengths(rows, columns, coefficients):
    return [len(triples) for triples in newton_schulz._plan(rows, columns, coefficients)]


def test_which_iterations_are_composed():
    assert lengths(10, 20, [MUON] * 5) == [1, 2, 2]
    assert lengths(20, 10, [MUON] * 4) == [1, 2, 1]
    assert lengths(10, 20, [MUON] * 2) == [1, 1]
    assert lengths(10, 19, [MUON] * 5) == [1] * 5  # composing would cost more than it saves
    assert lengths(10, 20, POLAR_EXPRESS) == [1] * 5
    assert lengths(10, 20, [(5.0, -9.0, 5.0)] * 5) == [1] * 5  # too steep


def test_symmetric_products_are_mirrored():
    """The second half of a product that is known to be symmetric is the first one's bits."""
    x = normal(800, 810)
    products = newton_schulz._Products(x.unsqueeze(0), composes=True)
    assert products.edges == [0, 200, 400, 600, 800]
    products.gram_of(x)
    check_symmetric(products, x @ x.T)
    products = newton_schulz._Products(x.T.unsqueeze(0), composes=True)
    products.gram_of(x.T.contiguous())
    check_symmetric(products, x @ x.T)


def check_symmetric(products, expected):
    gram = products.gram.matrix
    blocks = gram.unflatten(0, (4, 200)).unflatten(2, (4, 200))
    assert all(torch.equal(blocks[i, :, j], blocks[j, :, i].T) for i in range(4) for j in range(i))
    assert distance(gram, expected.double()) < 2**-8


@pytest.mark.parametrize("size", [(24, 100), (100, 24), (40, 41)], ids=str)
def test_a_matrix_has_the_same_bits_whatever_shares_its_stack(size):
    count = stack_size(*size, "cpu")
    matrices = [normal(*size, seed=seed) for seed in range(count)]
    full = torch.stack(matrices)
    orthogonalize_(full, [MUON] * 5, EPS)
    for i in (0, 3, count - 1):
        alone = torch.zeros(count, *size, dtype=torch.bfloat16)
        alone[0] = matrices[i]
        orthogonalize_(alone, [MUON] * 5, EPS)
        assert bits(alone[0]) == bits(full[i])
        assert not alone[1:].any()


def test_the_same_bits_at_each_call():
    """On several threads, and wherever the memory lies."""
    for rows, columns in ((390, 800), (800, 390), (24, 100)):
        count = stack_size(rows, columns, "cpu")
        x = torch.stack([normal(rows, columns, seed) for seed in range(count)])
        room = torch.empty(x.numel() + 5, dtype=torch.bfloat16)
        results = set()
        for offset in (0, 5):
            stack = room[offset : offset + x.numel()].view_as(x).copy_(x)
            orthogonalize_(stack, [MUON] * 5, EPS)
            results.add(bits(stack))
        assert len(results) == 1


def test_a_bad_matrix_leaves_its_stack_alone():
    x = torch.stack([normal(24, 100, seed) for seed in range(16)])
    bad = x.clone()
    bad[2, 3, 4] = torch.nan
    bad[5, 1, 1] = torch.inf
    orthogonalize_(x, [MUON] * 5, EPS)
    orthogonalize_(bad, [MUON] * 5, EPS)
    assert bad[2].isnan().all()
    assert bad[5].isnan().any()
    good = [i for i in range(16) if i not in (2, 5)]
    assert bits(bad[good]) == bits(x[good])


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-12, 1e15, 1e30])
def test_matrices_of_any_magnitude(scale):
    for x in (normal(20, 50), normal(20, 1) @ normal(1, 50), normal(1, 50).expand(20, 50)):
        factor = ours((x.float() * scale).bfloat16(), [MUON] * 5)
        assert factor.isfinite().all()
        assert torch.linalg.svdvals(factor.float()).max() < 1.3
        if scale < 1e30:  # where the norm is no float32 any more, the factor is 0, as torch's
            assert factor.any() == (scale > 0)


def test_nothing_to_do():
    for shape in ((16, 0, 5), (0, 3, 5)):
        orthogonalize_(torch.empty(shape, dtype=torch.bfloat16), [MUON] * 5, EPS)


def test_autocast_and_gradients_do_not_matter():
    x = normal(24, 100).expand(16, -1, -1)
    expected = x.clone()
    orthogonalize_(expected, [MUON] * 5, EPS)
    got = x.clone()
    with torch.autocast("cpu", dtype=torch.float16), torch.enable_grad():
        orthogonalize_(got, [MUON] * 5, EPS)
    assert bits(got) == bits(expected)
    assert got.dtype == torch.bfloat16
    assert not got.requires_grad


class _Made(TorchDispatchMode):
    """The storages that operators make, kept so that no address comes twice."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in [out] if isinstance(out, Tensor) else []:
            storage = made.untyped_storage()
            self.storages[storage.data_ptr()] = storage
        return out


@pytest.mark.parametrize("shape", [(1, 512, 512), (1, 256, 512), (1, 600, 512), (16, 96, 40)])
def test_three_times_a_stack_is_what_it_needs_beside_it(shape: tuple[int, int, int]):
    stack = normal(*shape[1:]).repeat(shape[0], 1, 1)
    with _Made() as made:
        orthogonalize_(stack, [MUON] * 5, EPS)
    made.storages.pop(stack.data_ptr(), None)
    held = sum(storage.nbytes() for storage in made.storages.values())
    assert held <= 3.1 * stack.nbytes


def test_stacks_on_the_cpu_and_elsewhere():
    assert stack_size(255, 256, "cpu") == 16
    assert stack_size(256, 256, "cpu") == 1
    assert stack_size(0, 5, "cpu") == 16
    assert stack_size(16, 16, "cuda") == 64
    assert stack_size(768, 768, "cuda") == 8
    assert stack_size(768, 3072, "cuda") == 2
    assert stack_size(2048, 4096, "cuda") == 1
    assert stack_size(8192, 8192, "cuda") == 1


def test_which_matrices_a_shape_holds():
    assert matrix_shape.of((3, 5)) == (1, 3, 5)
    assert matrix_shape.of((3, 5), "batch") == matrix_shape.of((3, 5), "flatten") == (1, 3, 5)
    assert matrix_shape.of((2, 4, 3, 5), "batch") == (8, 3, 5)
    assert matrix_shape.of((2, 4, 3, 5), "flatten") == (1, 2, 60)


@pytest.mark.parametrize(
    ("shape", "higher_dims", "message"),
    [
        ((5,), "batch", r"expected a matrix, got the shape \[5\]$"),
        ((), "flatten", r"expected a matrix, got the shape \[\]$"),
        ((2, 3, 4), "refuse", r"shape \[2, 3, 4\]\. higher_dims='batch' .*; higher_dims='flatten'"),
        ((2, 3), "experts", r"higher_dims: expected one of 'refuse', .*, got 'experts'"),
    ],
)
def test_shapes_that_hold_none(shape, higher_dims, message):
    with pytest.raises(ValueError, match=message):
        matrix_shape.of(shape, higher_dims)
