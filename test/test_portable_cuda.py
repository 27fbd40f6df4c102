"""The implementation in plain PyTorch operators on a GPU, against the kernels of the same GPU.

portable_steps.py has the bounds, and test_portable.py steps operator by operator on a GPU, too.
Here are tensors of many blocks, run operator by operator and compiled.
"""

import warnings

import pytest
import torch
from helpers import DEVICES, make_params, set_grads
from optim_table import OF_8_BITS, OptimizerCase, Options, every_8bit
from portable_steps import Differences, add_mulaw_states, copy_state, portable

import torchao8
from torchao8 import ops
from torchao8.portable import compiled

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="no GPU that this torch can use: run `make gpu` on a machine with one, and with nvcc",
)
SHAPES = ((512, 1024), (40, 700), (3, 50, 300), (20_001,))
SMALLEST = 1000


@pytest.fixture(autouse=True)
def _kernels() -> None:
    """There is a GPU: that nothing is compared must not look like success."""
    if DEVICE not in DEVICES:
        pytest.fail(f"torchao8 has no kernels for the GPU of this machine: {ops.CUDA_MISSING}")
    if ops.is_portable(torch.device(DEVICE)):
        pytest.fail("TORCHAO8_CUDA=portable chooses no kernels to compare with: unset it")


def compare_ten_steps(
    case: OptimizerCase, options: Options, dtype: torch.dtype, compiles: bool
) -> None:
    """Each from the same state, so that no error adds up. Of 10,000 codes at most one differs, and
    none by more than one."""
    of_kernels, of_operators = (make_params(dtype, SHAPES, device=DEVICE) for _ in range(2))
    theirs, ours = (
        case.make(ps, min_8bit_size=SMALLEST, **options) for ps in (of_kernels, of_operators)
    )
    unit = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps
    differences = Differences()
    for step in range(10):
        for params in (of_kernels, of_operators):
            set_grads(params, step)
        theirs.step()
        with portable(DEVICE, compiles):
            ours.step()
        for p, q in zip(of_kernels, of_operators, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4 + unit, atol=1e-5)
            for key, value in theirs.state[p].items():
                other = ours.state[q][key]
                if key.endswith("_codes"):
                    differences.add(value, other)
                elif "_mulaw" not in key:
                    torch.testing.assert_close(value, other, rtol=1e-4, atol=1e-30)
            add_mulaw_states(case, (theirs.state[p], ours.state[q]), differences)
        copy_state(theirs, ours)
    assert differences.codes >= 10 * 500_000
    differences.check()


@every_8bit()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state_format", ["dynamic", "mulaw"])
def test_operator_by_operator(case: OptimizerCase, dtype: torch.dtype, state_format: str) -> None:
    options = {"stochastic_rounding": dtype != torch.float32, "state_format": state_format}
    compare_ten_steps(case, options, dtype, False)


@pytest.mark.parametrize(
    "case", [c for c in OF_8_BITS if c.full], ids=lambda case: case.cls.__name__
)
def test_with_every_state(case: OptimizerCase) -> None:
    """With an eps: the first centered step of RMSprop gives all momenta one magnitude without it,
    and rounding decides whose sign the scale takes."""
    compare_ten_steps(case, {**case.full, "eps": 1e-2}, torch.float32, False)


ADAMW = next(case for case in OF_8_BITS if case.cls is torchao8.AdamW8bit)
COMPILED = [(case, torch.float32, "dynamic") for case in OF_8_BITS]
COMPILED += [(ADAMW, torch.bfloat16, "dynamic"), (ADAMW, torch.bfloat16, "mulaw")]


@pytest.mark.parametrize(
    ("case", "dtype", "state_format"),
    [pytest.param(c, d, s, id=f"{c.cls.__name__}-{d}-{s}") for c, d, s in COMPILED],
)
def test_compiled(
    case: OptimizerCase, dtype: torch.dtype, state_format: str, fresh_compiler: None
) -> None:
    """Really compiled: where that fails, the step warns, and runs operator by operator."""
    compiled._compiled.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torchao8")
        options = {"stochastic_rounding": dtype != torch.float32, "state_format": state_format}
        compare_ten_steps(case, options, dtype, True)
    assert compiled._compiled
