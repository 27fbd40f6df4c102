"""The ops of the compiled extension: their loading, typed wrappers, and what tracing needs.

Importing this module loads ``torchao8/_C.abi3.so``, which registers the ops with torch's dispatcher
under ``torch.ops.torchao8`` and tells the names of the families of update rules (:data:`FAMILIES`).
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchao8._cuda_extension import load as load_cuda
from torchao8._families import Family, FamilyState, StateFormat
from torchao8._numbers import Number, all_numbers
from torchao8._numbers import number_dtype as number_dtype
from torchao8.block_layout import codes_shape, row_length, scale_shape

try:
    import torchao8._C as _C
except ImportError as error:
    raise ImportError(
        "torchao8: the compiled extension torchao8/_C could not be loaded "
        f"({error}). In a clone of the repository, build it with\n"
        "    pip install --no-build-isolation -e .\n"
        "which needs a C++ compiler and torch >= 2.10 in the same environment; "
        "`python -m torchao8` prints what was found."
    ) from error

# Where the ops came from, for bug reports.
EXTENSION_FILE = _C.__file__
# The same of the CUDA kernels: a file, or why there are none.
CUDA_EXTENSION_FILE, CUDA_MISSING = load_cuda()

# It reads the extension's tables of the codec.
from torchao8 import _implementation  # noqa: E402
from torchao8._implementation import is_portable as is_portable  # noqa: E402

_quantize = torch.ops.torchao8.quantize_blockwise.default
_dequantize = torch.ops.torchao8.dequantize_blockwise.default


FAMILIES = tuple(
    Family(name, step, find, tuple(FamilyState(*s) for s in states), numbers, flags, rules)
    for name, step, find, states, numbers, flags, rules in _C.FAMILIES
)
# The formats of state with scales; the ops take the number of one.
FORMATS = tuple(StateFormat(*fields) for fields in _C.FORMATS)
FORMAT_NUMBERS = {each.name: number for number, each in enumerate(FORMATS)}
NUMBERS = {family.step_op: family.numbers for family in FAMILIES}
STEP_OPS = tuple(NUMBERS)
_STEP_OPS = {op: getattr(torch.ops.torchao8, op).default for op in STEP_OPS}
_EXTREMES_OPS = {
    family.step_op: getattr(torch.ops.torchao8, family.extremes_op).default for family in FAMILIES
}
_count_step_ = torch.ops.torchao8.count_step_.default
_sum_squares = torch.ops.torchao8.sum_squares.default
_lamb_update_sums = torch.ops.torchao8.lamb_update_sums.default
_norms = torch.ops.torchao8.norms.default
_prefetch_pages_ = torch.ops.torchao8.prefetch_pages_.default
_allocate_managed = torch.ops.torchao8.allocate_managed.default
_free_managed = torch.ops.torchao8.free_managed.default

_implementation.set_up(FAMILIES, has_cuda_kernels=CUDA_EXTENSION_FILE is not None)

# Integers that an exact sum of squares consists of.
SUM_LIMBS = 18


def quantize_blockwise(
    input: Tensor, *, block_size: int = 256, signed: bool = True, state_format: str = "dynamic"
) -> tuple[Tensor, Tensor]:
    """Quantizes a tensor to 8 or 4 bits with one scale a block, to the nearest code.

    Args:
        input: float32, bfloat16 or float16, any shape and strides. With ``signed=False`` it is
            taken for a second moment: what is above 0 never gets the code of 0, what is below 0
            counts as 0.
        block_size: elements that share a scale, a power of two from 64 to 2048. Blocks lie inside
            rows, or go through the whole tensor where ``shape[1:]`` holds fewer than 16 elements.
        signed: which of the format's two maps.
        state_format: "dynamic", see :func:`dynamic_map`, "mulaw" or "4bit". A mu-law code of
            an unsigned number is ``16 * e + k``, of the value ``2**e * (1 + k / 16) - 1`` times the
            scale. A signed one has its sign in the highest bit, and that below. A 4-bit code of an
            unsigned number is ``2 * e + k``, of the value ``2**(e - 7) * (1 + k / 2)`` times the
            scale: there is no 0. A signed one, ``n``, has the value ``(n - 7) / 8`` times the
            scale.

    Returns:
        ``codes``, uint8, and ``scale``, float32 of the shape
        ``torchao8.block_layout.scale_shape(input.shape, block_size)``. Codes of 8 bits have the
        shape of ``input``. Codes of 4 bits have the shape
        ``torchao8.block_layout.codes_shape(input.shape, block_size, 4)``: two elements of a row
        share a byte, the first one in the low half.

        The scale is NaN where the block holds an element that is not finite, and 0 where it would
        be below the smallest normal float32. Else, in the dynamic format, it is the block's element
        of largest magnitude with its sign. In the mu-law format it is the least number at which
        that element has a code, rounded up: to a power of two, or, if signed, to 7 bits behind the
        point. In unsigned codes of 4 bits it is the least power of two of which that element is at
        most 1.5 times. In signed codes of 4 bits it has the sign of that element, and the least
        magnitude at which no element lies outside of -7 and 8 eighths: that of the element, or 8/7
        of the largest one of the other sign, rounded to 20 bits behind the point.

    Raises:
        ValueError: there is no such format.
        RuntimeError: wrong dtype, block size or device; the message names the argument.
    """
    number = _format_number("quantize_blockwise", state_format)
    codes, scale = _quantize(input, block_size=block_size, signed=signed, state_format=number)
    return codes, scale


def dequantize_blockwise(
    codes: Tensor,
    scale: Tensor,
    *,
    block_size: int = 256,
    signed: bool = True,
    dtype: torch.dtype = torch.float32,
    state_format: str = "dynamic",
    shape: Sequence[int] | None = None,
) -> Tensor:
    """The values that codes stand for: those at scale 1 times the scale of the block.

    Args:
        codes, scale: as :func:`quantize_blockwise` gives them.
        block_size, signed, state_format: as given to :func:`quantize_blockwise`.
        dtype: of the result: float32, bfloat16 or float16. The product is rounded to it once.
        shape: of the tensor that was quantized. Needed for codes of 4 bits alone: they do not tell
            it.

    Returns:
        A tensor of that shape; without it, of the shape of ``codes``, whose last dimension is twice
        as long for codes of 4 bits. A row of odd length then ends with one number that is none of
        the tensor.

    Raises:
        ValueError: there is no such format, or the codes are not those of the shape.
        RuntimeError: wrong dtype, shape, block size or device; the message names the argument.
    """
    op = "dequantize_blockwise"
    number = _format_number(op, state_format)
    if shape is not None:
        expected = codes_shape(shape, block_size, FORMATS[number].bits)
        if tuple(codes.shape) != expected:
            raise ValueError(
                f"{op}: codes must have shape {list(expected)} where shape is {list(shape)}, "
                f"got {list(codes.shape)}"
            )
    result: Tensor = _dequantize(
        codes, scale, block_size=block_size, signed=signed, dtype=dtype, state_format=number
    )
    if shape is None or result.shape == tuple(shape):
        return result
    return result[..., : row_length(shape, block_size)].reshape(tuple(shape)).contiguous()


def _format_number(op: str, name: str) -> int:
    if name not in FORMAT_NUMBERS:
        names = ", ".join(map(repr, FORMAT_NUMBERS))
        raise ValueError(f"{op}: state_format must be one of {names}, got {name!r}")
    return FORMAT_NUMBERS[name]


def dynamic_map(signed: bool = True) -> Tensor:
    """The codebook: the value of each of the 256 codes at scale 1, ascending, float32 on the CPU.

    The dynamic tree of `8-Bit Approximations for Parallelism in Deep Learning
    <https://arxiv.org/abs/1511.04561>`_ over seven decades, as in `8-bit Optimizers via Block-wise
    Quantization <https://arxiv.org/abs/2110.02861>`_. The signed map runs from -0.993 to 1 and has
    0 at code 127; the unsigned one runs from 0 at code 0 to 1.
    """
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    return dequantize_blockwise(codes, one, block_size=256, signed=signed)


class Arguments(NamedTuple):
    """What :func:`step_` and :func:`extremes` begin with, see there."""

    op: str
    params: list[Tensor]
    grads: list[Tensor]
    values: Sequence[list[Tensor]]
    scales: Sequence[list[Tensor]]
    steps: list[Tensor]
    lr: Tensor
    numbers: Tensor
    grad_scale: Tensor | None
    factors: list[Tensor]


def step_(
    op: str,
    params: list[Tensor],
    grads: list[Tensor],
    values: Sequence[list[Tensor]],
    scales: Sequence[list[Tensor]],
    steps: list[Tensor],
    lr: Tensor,
    numbers: Tensor,
    grad_scale: Tensor | None,
    factors: list[Tensor],
    extremes: list[Tensor],
    found_inf: Tensor | None,
    /,
    *,
    block_size: int = 256,
    stochastic_rounding: bool = True,
    stochastic_params: bool = False,
    count_steps: bool = False,
    state_format: int = 0,
    seed: int = 0,
    shard_offsets: Sequence[int] = (),
    shard_row_strides: Sequence[int] = (),
    **flags: bool,
) -> None:
    """One step of an update rule, in place, on tensors of one device and one state format.

    The i-th entries of all lists belong together. The dtype of the first state chooses the format:
    float32 values, with empty lists of scales, or uint8 codes with float32 scales, of the shapes
    that :func:`quantize_blockwise` gives. Squares are unsigned, all other states signed. Fresh
    state has scales of 0 and codes of 0; signed codes are 127 in the dynamic format, and bytes of
    119 in 4 bits. There a signed state is stored divided by the root of the stored second moment,
    or by 1 where the scale of that is 0, or the rule has none.

    Args:
        op: of :data:`STEP_OPS`; its rule, in csrc/rules, names the states and the flags.
        params, grads: float32, bfloat16 or float16, of any strides.
        values, scales: a list for each state, in the order of the rule; both are empty for a state
            that the options do without, as amsgrad's. A state that is one number of its parameter
            has 0-d float32 tensors among the values, and no list of scales.
        steps: 0-d float32 tensors, the steps made before this one.
        lr: 0-d, float32 or float64, on the device of the parameters or on the CPU. The optimizers
            make a float64 tensor of a number, and the dtype matters to the last bit.
        numbers: the other numbers of the rule, see :func:`rule_numbers`. Their ranges are checked
            on the CPU only.
        grad_scale: a number to divide the gradients by; none where None.
        factors: none, or for each parameter float64 of shape (2,), finite and not negative: what
            its gradient and what the learning rate is multiplied by. Where the first one is NaN,
            all elements of the gradient count as NaN: parameter and states keep their values.
        extremes: none, or for each parameter int64 of shape (number of states,), by which its
            states have one scale each, of shape (1,): rows of :func:`extremes` of the same
            arguments. Entries that are parts of one tensor have the same scales and the same
            extremes, the largest of their rows. Smaller ones give wrong codes, which differ
            between CPU paths.
        found_inf: where it is not 0, nothing changes at all.
        stochastic_rounding, stochastic_params: how states, and how bfloat16 parameters are
            rounded: stochastically, or to nearest. float32 parameters are not, and float16 ones
            are refused.
        state_format: of state with scales, the number of its format, its place in
            :data:`FORMATS`; 0 where state is float32.
        count_steps: adds 1 to each of ``steps`` behind the update. Else :func:`count_step_` does,
            of what is there in several entries.
        shard_offsets, shard_row_strides: of parameters that are shards, one number each: the flat
            index of the first element in the global tensor, and the elements of it from one local
            row to the next; a row of 32-bit state is the last dimension. The random numbers of
            stochastic rounding depend on them.
        flags: the op's own.

    Raises:
        RuntimeError: an argument does not fit the others; nothing has changed then.
    """
    if not params:  # an op chooses its device by its tensors
        return
    _STEP_OPS[op](
        params,
        grads,
        *values,
        *scales,
        steps,
        factors,
        extremes,
        lr,
        numbers,
        grad_scale,
        found_inf,
        block_size=block_size,
        stochastic_rounding=stochastic_rounding,
        stochastic_params=stochastic_params,
        count_steps=count_steps,
        state_format=state_format,
        seed=seed,
        shard_offsets=shard_offsets,
        shard_row_strides=shard_row_strides,
        **flags,
    )
    mark_modified(params)


def rule_numbers(op: str, numbers: Mapping[str, Number], device: torch.device) -> Tensor:
    """The numbers of a rule in one tensor, as its op takes them.

    Args:
        op: of :data:`STEP_OPS`.
        numbers: those that :data:`NUMBERS` names for the op; Python numbers, or tensors of one
            element on the CPU or on the device.
        device: of the parameters.

    Returns:
        float64 of shape (n,), on the device where one of the tensors is there, else on the CPU.
    """
    return all_numbers([numbers[name] for name in NUMBERS[op]], device)


def extremes(
    op: str,
    params: list[Tensor],
    grads: list[Tensor],
    values: Sequence[list[Tensor]],
    scales: Sequence[list[Tensor]],
    steps: list[Tensor],
    lr: Tensor,
    numbers: Tensor,
    grad_scale: Tensor | None,
    factors: list[Tensor],
    /,
    *,
    state_format: int = 0,
    **flags: bool,
) -> Tensor:
    """The element of largest magnitude of each state that a step would make, with its sign.

    What a step of tensors with one scale has to know before it writes its first code.

    Args:
        op: of :data:`STEP_OPS`.
        params, grads, values, scales, steps, lr, numbers, grad_scale, factors, state_format, flags:
            as in :func:`step_`; 8-bit state with scales of shape (1,).

    Returns:
        int64 of shape (len(params), number of states), from 0 to 2^32 - 1. Of rows of parts of a
        tensor, the row of the whole is the maximum.

    Raises:
        RuntimeError: an argument does not fit the others.
    """
    found: Tensor = _EXTREMES_OPS[op](
        params,
        grads,
        *values,
        *scales,
        steps,
        factors,
        lr,
        numbers,
        grad_scale,
        state_format=state_format,
        **flags,
    )
    return found


def takes_format(op: str, name: str, device: torch.device) -> bool:
    """Whether a step op steps state of a format on a device.

    Args:
        op: of :data:`STEP_OPS`.
        name: of :data:`FORMATS`.
    """
    number = FORMAT_NUMBERS[name]
    if number == 0 or device.type == "meta":  # every engine has the first; meta makes no steps
        return True
    return _takes_format(op, number, device.type, is_portable(device))


@functools.cache
def _takes_format(op: str, number: int, device_type: str, portable: bool) -> bool:
    """Asks the op, with a parameter of no elements. The same call in the first format, which every
    engine has, must pass: so a refusal is one of the format."""
    _step_nothing(op, 0, device_type)
    try:
        _step_nothing(op, number, device_type)
    except RuntimeError:
        return False
    return True


def _step_nothing(op: str, number: int, device_type: str) -> None:
    """A step of a parameter of no elements, whose state is of a format."""
    (family,) = (family for family in FAMILIES if family.step_op == op)
    empty = torch.empty(0, dtype=torch.float32, device=device_type)
    codes, scale, one = empty.to(torch.uint8), empty, empty.new_ones(())
    lr = torch.zeros((), dtype=torch.float64, device="cpu")
    states = [s for s in family.states if not s.optional]
    values = {s.name: [one if s.scalar else codes] for s in states}
    flags: dict[str, Any] = dict.fromkeys(family.flags, False)
    step_(
        op,
        [empty],
        [empty],
        [values.get(s.name, []) for s in family.states],
        [[scale] if s in states else [] for s in family.states if not s.scalar],
        [one],
        lr,
        lr.new_zeros(len(family.numbers)),
        None,
        [],
        [],
        None,
        state_format=number,
        **flags,
    )


def count_step_(steps: list[Tensor], found_inf: Tensor | None) -> None:
    """Adds 1 to each of the 0-d float32 tensors, of one device, unless ``found_inf`` is not 0.

    Raises:
        RuntimeError: an argument does not fit; nothing has changed then.
    """
    if steps:  # an op chooses its device by its tensors
        _count_step_(steps, found_inf)


def sum_squares(tensors: list[Tensor]) -> Tensor:
    """The exact sum of squares of each tensor, as integers that can be added in any order.

    The bits of the result depend on the elements alone: not on their order, on threads, on the
    device, or on how a tensor is cut into pieces whose rows are added. So for the norm over all
    tensors of all ranks, ``rows = sum_squares(grads).sum(0, keepdim=True)`` is all-reduced by an
    ordinary sum of int64, and ``norms(rows)`` is the same on every mesh.

    Elements that are NaN or infinite count as absent.

    Args:
        tensors: float32, bfloat16 or float16, of any shapes and strides, on one device.

    Returns:
        int64 of shape (len(tensors), 18). The sum of row ``r`` is the sum over k of ``r[k] *
        2**(32 * k - 298)``. The numbers are canonical: all but the last are from 0 to 2^32 - 1.
        There is room for 2^53 elements, and for adding up to 2^30 rows (of as many elements in
        all), after which they need not be canonical any more.

    Raises:
        RuntimeError: wrong dtype, layout or device; the message names the argument.
    """
    for i, t in enumerate(tensors):
        if t.layout is not torch.strided:
            raise RuntimeError(f"sum_squares: tensors[{i}] must be dense, got layout {t.layout}")
    if not tensors:  # an op chooses its device by its tensors
        return torch.zeros(0, SUM_LIMBS, dtype=torch.int64, device="cpu")
    sums: Tensor = _sum_squares(tensors)
    return sums


def lamb_update_sums(
    params: list[Tensor],
    grads: list[Tensor],
    values: Sequence[list[Tensor]],
    scales: Sequence[list[Tensor]],
    steps: list[Tensor],
    numbers: Tensor,
    grad_scale: Tensor | None,
    *,
    factors: Sequence[Tensor] = (),
    block_size: int = 256,
    block_wise: bool = True,
    state_format: int = 0,
    maximize: bool = False,
) -> Tensor:
    """The exact sums of squares of the updates that LAMB would make, which is looked at only.

    An update is ``m / (sqrt(v) + eps) + weight_decay * p`` with the new moments, bias-corrected,
    before they are rounded. Elements that a step would leave as they are count as absent.

    Args:
        params, grads, values, scales, steps, numbers, grad_scale, factors, block_size,
            state_format, maximize: as in :func:`step_` of "adam_step_"; of ``factors`` only those
            of gradients count.
        block_wise: False where 8-bit states have one scale each, of shape (1,).

    Returns:
        int64 of shape (len(params), 18), rows as of :func:`sum_squares`.

    Raises:
        RuntimeError: an argument does not fit the others.
    """
    sums: Tensor = _lamb_update_sums(
        params,
        grads,
        *values,
        *scales,
        steps,
        list(factors),
        numbers,
        grad_scale,
        block_size=block_size,
        block_wise=block_wise,
        state_format=state_format,
        maximize=maximize,
    )
    return sums


def norms(sums: Tensor) -> Tensor:
    """The 2-norms that exact sums of squares stand for.

    Args:
        sums: int64 of shape (n, 18), rows of :func:`sum_squares` or sums of such rows.

    Returns:
        float64 of shape (n,): the float64 nearest to each sum, ties to even, and of that the IEEE
        square root. NaN for a row that is negative. On devices that may lack float64, float32.

    Raises:
        RuntimeError: wrong dtype or shape; the message names the argument.
    """
    result: Tensor = _norms(sums)
    return result


def prefetch_pages_(pages: Sequence[list[Tensor]], now: Tensor) -> None:
    """Asks for the pages of tensors that are wanted soon, one list after the other.

    On a GPU the current stream waits until those of the list before are there. Then, when all that
    is queued on it by now is done, the next ones are brought by a stream of their own: for each
    call, the pages of the call after it. While a stream is captured nothing is done.

    Args:
        pages: paged state, on the device of ``now``; what is not paged is left alone. No value
            changes. The schema says that pages are written, so a compiler neither drops nor moves
            the op.
        now: a tensor of the call that comes next.
    """
    for tensors in pages:
        _prefetch_pages_(tensors, now)


def allocate_managed(device: torch.device, size: int) -> int:
    """The address of new memory that CUDA moves between a GPU and the host, as they touch it.

    Raises:
        RuntimeError: not a GPU, one that cannot page, or no memory.
    """
    address: int = _allocate_managed(torch.empty(0, dtype=torch.uint8, device=device), size)
    return address


def free_managed(address: int, device: torch.device) -> None:
    """Frees what :func:`allocate_managed` has given, when the GPU is done with it."""
    _free_managed(torch.empty(0, dtype=torch.uint8, device=device), address)


def cpu_capability() -> str:
    """The CPU code in use: "avx512", "avx2", "scalar", or "portable" for PyTorch operators.

    TORCHAO8_CPU=<one of them> forces one.
    """
    if is_portable(torch.device("cpu")):
        return "portable"
    return ("scalar", "avx2", "avx512")[torch.ops.torchao8.cpu_capability.default()]


def mark_modified(tensors: Sequence[Tensor]) -> None:
    """Tells autograd that an op wrote to the tensors, so that a stale backward raises.

    A traced graph does without: torch.compile counts the writes to its inputs itself.
    """
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


@torch.library.register_fake("torchao8::quantize_blockwise")
def _(
    input: Tensor, *, block_size: int = 256, signed: bool = True, state_format: int = 0
) -> tuple[Tensor, Tensor]:
    shape = codes_shape(input.shape, block_size, FORMATS[state_format].bits)
    codes = torch.empty(shape, dtype=torch.uint8, device=input.device)
    scale = torch.empty(
        scale_shape(input.shape, block_size), dtype=torch.float32, device=input.device
    )
    return codes, scale


@torch.library.register_fake("torchao8::dequantize_blockwise")
def _(
    codes: Tensor,
    scale: Tensor,
    *,
    block_size: int = 256,
    signed: bool = True,
    dtype: torch.dtype = torch.float32,
    state_format: int = 0,
) -> Tensor:
    shape = list(codes.shape)
    if FORMATS[state_format].bits == 4:
        shape[-1] *= 2
    return torch.empty(shape, dtype=dtype, device=codes.device)


def _fake_step(op: str) -> None:
    @torch.library.register_fake(f"torchao8::{op}")
    def _(params: list[Tensor], *others: list[Tensor] | Tensor | None, **options: object) -> None:
        check_devices(op, "params", params, *others)


def _fake_extremes(family: Family) -> None:
    op = family.extremes_op

    @torch.library.register_fake(f"torchao8::{op}")
    def _(params: list[Tensor], *others: Any, **options: object) -> Tensor:
        check_devices(op, "params", params, *others)
        values = others[1 : 1 + len(family.states)]  # behind the gradients
        states = sum(
            bool(tensors)
            for state, tensors in zip(family.states, values, strict=True)
            if not state.scalar
        )
        return torch.empty(len(params), states, dtype=torch.int64, device=params[0].device)


for _family in FAMILIES:
    _fake_step(_family.step_op)
    _fake_extremes(_family)


@torch.library.register_fake("torchao8::count_step_")
def _(steps: list[Tensor], found_inf: Tensor | None) -> None:
    check_devices("count_step_", "steps", steps)


@torch.library.register_fake("torchao8::prefetch_pages_")
def _(pages: list[Tensor], now: Tensor) -> None:
    check_devices("prefetch_pages_", "pages", [*pages, now])


@torch.library.register_fake("torchao8::sum_squares")
def _(tensors: list[Tensor]) -> Tensor:
    check_devices("sum_squares", "tensors", tensors)
    return torch.empty(len(tensors), SUM_LIMBS, dtype=torch.int64, device=tensors[0].device)


@torch.library.register_fake("torchao8::lamb_update_sums")
def _(params: list[Tensor], *others: list[Tensor] | Tensor | None, **options: object) -> Tensor:
    check_devices("lamb_update_sums", "params", params, *others)
    return torch.empty(len(params), SUM_LIMBS, dtype=torch.int64, device=params[0].device)


@torch.library.register_fake("torchao8::norms")
def _(sums: Tensor) -> Tensor:
    return torch.empty(sums.shape[0], dtype=number_dtype(sums.device), device=sums.device)


def check_devices(op: str, first: str, *arguments: list[Tensor] | Tensor | None) -> None:
    # Tensors on the meta device come to a fake too, and would pass for a step that was made.
    tensors = [t for argument in arguments if isinstance(argument, list) for t in argument]
    for t in tensors:
        if t.device != tensors[0].device:
            raise RuntimeError(
                f"{op}: expected all tensors on {tensors[0].device}, as {first}[0], "
                f"got one on {t.device}"
            )
