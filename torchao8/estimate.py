"""How much memory training takes, from shapes alone: state of 32 bits against 8 and 4.

Nothing is allocated and no process group is needed. The optimizer classes tell which states there
are, :mod:`torchao8.state_bits` which of them keep 32 bits, and :mod:`torchao8.shard_layout` how
much of them lies on a rank. An optimizer asks the same functions, so that both have the same
answers.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from torchao8 import _tables, hidden_matrices, matrix_shape, sharding
from torchao8.block_layout import Scales
from torchao8.groups import embedding_weights
from torchao8.optim import classes
from torchao8.optim._params import PARAM_DTYPES
from torchao8.optim._state.formats import FLOAT32, FORMATS, FOUR_BIT, Format
from torchao8.optim._state.spec import beside_states
from torchao8.optim.contract import OptimizerContract, bare_name, defaults_of, states_under
from torchao8.optim.options import clips
from torchao8.shard_layout import block_rows, shard_indices, split_dim
from torchao8.state_bits import OPTION, why_32bit

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

Shape: TypeAlias = Sequence[int]
ModelOrShapes: TypeAlias = "nn.Module | Mapping[str, Shape | Tensor] | Iterable[Shape | Tensor]"


@dataclass(frozen=True)
class Bytes:
    """What training keeps from one step to the next, in bytes."""

    parameters: int
    gradients: int
    state_32bit: int
    state_8bit: int
    state_4bit: int | None


@dataclass(frozen=True, repr=False)
class Estimate:
    """The memory of training, in bytes; printed, it is a table.

    Attributes:
        optimizer: the name of the class with 32-bit state.
        ranks: over which the parameters lie.
        tensors, elements: of the whole model, frozen parameters included.
        parameters, gradients: on the rank that holds most; gradients as wide as their parameters.
        state_32bit: of that class on that rank: for :class:`torchao8.AdamW` two float32 moments an
            element and a float32 step count a tensor. ``torch.optim.AdamW`` keeps the same for
            float32 parameters, and moments of the parameter's own width for narrower ones.
        state_8bit: of the class with 8-bit state, as :class:`torchao8.AdamW8bit`, on that rank.
            Paged state has as many bytes, but for the rest of each tensor's last page, and they may
            be elsewhere.
        state_4bit: of the class with 4-bit state, as :class:`torchao8.AdamW4bit`; None where the
            optimizer has none, and with ``block_wise=False``, which 4 bits do without.
        checkpoint_32bit, checkpoint_8bit, checkpoint_4bit: the optimizer's state dict, every
            element once.
        total: summed over all ranks, replicas included.
        kept_32bit: the names of parameters that keep 32-bit state in an 8-bit optimizer, by reason.
        muon: the names of the parameters that Muon trains in :class:`torchao8.MuonAdamW`.
    """

    optimizer: str
    ranks: int
    tensors: int
    elements: int
    parameters: int
    gradients: int
    state_32bit: int
    state_8bit: int
    state_4bit: int | None
    checkpoint_32bit: int
    checkpoint_8bit: int
    checkpoint_4bit: int | None
    total: Bytes
    kept_32bit: dict[str, tuple[str, ...]]
    muon: tuple[str, ...] = ()

    def __repr__(self) -> str:  # what a notebook shows
        return str(self)

    def __str__(self) -> str:
        return "\n".join([_heading(self), *_table(self), *_kept_lines(self), *_rule_lines(self)])


def estimate(
    model_or_shapes: ModelOrShapes,
    mesh: int | tuple[int, ...] | DeviceMesh | None = None,
    *,
    dtype: torch.dtype | None = None,
    optimizer: str = "AdamW",
    min_8bit_size: int = 4096,
    block_size: int | None = None,
    state_format: str = "dynamic",
    block_wise: bool = True,
    percentile_clipping: int = 100,
    embeddings_in_32bit: bool | Collection[str] = False,
    **rule_options: Any,
) -> Estimate:
    """The memory of parameters, gradients and the state of an optimizer, in 32, 8 and 4 bits.

    >>> print(torchao8.estimate(model, mesh=(8, 64)))
    >>> print(torchao8.estimate(model, optimizer="SGD", momentum=0.9))

    Activations, the temporary buffers of FSDP and the rounding up of an allocator are not counted.

    Args:
        model_or_shapes: a module, which may be on the meta device; or shapes, or a mapping from
            names to shapes, all trainable. Tensors may stand in place of shapes. Frozen parameters
            (``nn.Parameter`` with ``requires_grad`` False) have neither gradient nor state.
            DTensors are counted as they are placed, plain tensors beside them as whole on every
            rank.
        mesh: how FSDP2's ``fully_shard`` is to shard plain parameters, by rows: a number of ranks;
            or (replicas, shards) for HSDP; or a DeviceMesh of one or two dimensions. A scalar,
            which FSDP2 does not take, counts as whole on every rank. None: nothing is sharded.
        dtype: float32, bfloat16 or float16, in place of the dtype of every floating-point
            parameter; shapes are float32 unless it is given.
        optimizer: the name of a class of this library. With 8bit or 4bit at its end or without, all
            of them are told; and with Paged before it, the same.
        block_size: of 8-bit and of 4-bit state; None for the defaults of the classes, 256 and 64.
        min_8bit_size, state_format, block_wise, percentile_clipping: as in
            :class:`torchao8.AdamW8bit`.
        embeddings_in_32bit: False for an optimizer of ``model.parameters()``. True for one of
            ``torchao8.param_groups(model)``, which gives the weights of ``nn.Embedding`` 32-bit
            state. Shapes do not tell which of them are embeddings: give the names of these, as
            ``["embed_tokens.weight"]``. In a list of shapes, ``"[0]"`` is the name of the first.
        rule_options: of the optimizer, where they add states: ``amsgrad``, ``centered``,
            ``momentum``; and ``higher_dims`` of Muon. Of "MuonAdamW", Muon trains what
            ``param_groups(model, muon=True)`` says. Of shapes, the names decide, and where there
            are none, every matrix with sides of 16 and more is trained by Muon.

    Raises:
        TypeError: not a module or shapes; a mesh that is none of these; an option that no optimizer
            has.
        ValueError: an optimizer that is not there or has no such option; an option or a shape out
            of range; a name in ``embeddings_in_32bit`` that no parameter has; a trainable parameter
            of a dtype that the optimizers refuse; a mesh for parameters that are DTensors already.
    """
    if dtype is not None and dtype not in PARAM_DTYPES:
        raise ValueError(
            f"dtype: expected torch.float32, torch.bfloat16 or torch.float16, got {dtype!r}"
        )
    common = {
        "min_8bit_size": min_8bit_size,
        "block_size": _BLOCK_SIZES[8] if block_size is None else block_size,
        "state_format": state_format,
        "block_wise": block_wise,
        "percentile_clipping": percentile_clipping,
    }
    cls, options = _class_and_options(optimizer, common, rule_options)
    tensors = list(_tensors(model_or_shapes, _mesh_shape(mesh), dtype))
    in_32bit = _embeddings(model_or_shapes, tensors, embeddings_in_32bit)
    hidden = _hidden(cls, model_or_shapes, tensors, in_32bit)
    _check_shapes(cls, tensors, options)
    kept_of = [_kept(cls, {**options, **kind}) for kind in cls._kinds]  # which checks the options
    formats = {32: FLOAT32, 8: FORMATS[state_format]}
    if cls._has_4bit and block_wise:
        formats[4] = FOUR_BIT
    ranks = max([1, *(math.prod(t.mesh_shape) for t in tensors)])
    # What lies on the rank that holds most, of everything once, and on all ranks.
    views: tuple[Counter[str], ...] = (Counter(), Counter(), Counter())
    kept: dict[str, list[str]] = {}
    for t in tensors:
        for view, elements in zip(views, _elements(t, ranks), strict=True):
            view["parameters"] += elements * t.dtype.itemsize
            view["gradients"] += elements * t.dtype.itemsize * t.trainable
        states, beside = kept_of[0 if t.name in hidden else -1]
        for bits, own in formats.items() if t.trainable else ():
            scales = Scales(block_size or _BLOCK_SIZES[bits], block_wise)
            where = (t.shape, t.mesh_shape, t.placements, scales.block_size, min_8bit_size, bits)
            reason = None
            if bits < 32:
                reason = OPTION if t.name in in_32bit else why_32bit(*where)
            found = own if reason is None else FLOAT32
            for view, nbytes in zip(views, _state_bytes(t, found, scales, ranks), strict=True):
                view[f"state_{bits}bit"] += states * nbytes
            for view, copies in zip(views, (1, 1, ranks), strict=True):
                view[f"state_{bits}bit"] += beside * copies
            if bits == 8 and reason is not None and states:
                kept.setdefault(reason, []).append(t.name)
    rank, once, total = (_bytes(view, formats) for view in views)
    return Estimate(
        optimizer=cls.__name__,
        ranks=ranks,
        tensors=len(tensors),
        elements=sum(math.prod(t.shape) for t in tensors),
        **vars(rank),
        checkpoint_32bit=once.state_32bit,
        checkpoint_8bit=once.state_8bit,
        checkpoint_4bit=once.state_4bit,
        total=total,
        kept_32bit={reason: tuple(names) for reason, names in kept.items()},
        muon=tuple(t.name for t in tensors if t.trainable and t.name in hidden),
    )


# The defaults of the classes.
_BLOCK_SIZES = {bits: defaults_of(bits)["block_size"] for bits in (32, 8, 4)}


def _elements(t: _Tensor, ranks: int) -> tuple[int, int, int]:
    """Of a tensor: on the first rank, once, and on all ranks."""
    whole = math.prod(t.shape)
    return _local(t), whole, whole * ranks // _shards(t)


def _state_bytes(t: _Tensor, found: Format, scales: Scales, ranks: int) -> tuple[int, int, int]:
    """Of a state that is no scalar: on the first rank, once, and on all ranks."""
    shards = _shards(t)
    whole = found.codes_shape(t.shape, scales.block_size), scales.shape(t.shape)
    codes, count = map(math.prod, whole)
    # The ranks share each copy, but the one scale of a tensor lies on all.
    copies = codes * ranks // shards, count * ranks // (shards if scales.block_wise else 1)
    sizes = (_local_state(t, found, scales), (codes, count), copies)
    rank, once, on_all = (found.nbytes(*size) for size in sizes)
    return rank, once, on_all


def _bytes(view: Mapping[str, int], formats: Collection[int]) -> Bytes:
    """Without 4 bits where they are not among the formats."""
    names = ("parameters", "gradients", "state_32bit", "state_8bit")
    state_4bit = view["state_4bit"] if 4 in formats else None
    return Bytes(**{name: view[name] for name in names}, state_4bit=state_4bit)


# -- the parameters --------------------------------------------------------------------------------


class _Tensor(NamedTuple):
    """A parameter; ``mesh_shape`` and ``placements`` are empty for one that is no DTensor."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    mesh_shape: tuple[int, ...] = ()
    placements: tuple[Placement, ...] = ()


def _tensors(
    model_or_shapes: Any, mesh_shape: tuple[int, ...], dtype: torch.dtype | None
) -> Iterator[_Tensor]:
    placements = _fsdp_placements(mesh_shape)
    for name, value in _named(model_or_shapes):
        t = _tensor(name, value, dtype)
        if t.trainable and t.dtype not in PARAM_DTYPES:
            raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {t.dtype}")
        if mesh_shape and t.mesh_shape:
            raise ValueError(f"mesh: expected None, as {name} is a DTensor and has a mesh already")
        if mesh_shape and t.shape:
            t = t._replace(mesh_shape=mesh_shape, placements=placements)
        elif mesh_shape:
            t = t._replace(mesh_shape=mesh_shape, placements=_replicated(len(mesh_shape)))
        yield t


def _named(model_or_shapes: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(model_or_shapes, nn.Module):
        yield from model_or_shapes.named_parameters()
    elif isinstance(model_or_shapes, Mapping):
        yield from ((str(name), value) for name, value in model_or_shapes.items())
    elif isinstance(model_or_shapes, Iterable) and not isinstance(model_or_shapes, (str, Tensor)):
        yield from ((f"[{i}]", value) for i, value in enumerate(model_or_shapes))
    else:
        got = type(model_or_shapes).__name__
        raise TypeError(f"model_or_shapes: expected a module or shapes, got {got}")


def _tensor(name: str, value: Any, dtype: torch.dtype | None) -> _Tensor:
    if isinstance(value, Tensor):
        own = dtype if dtype is not None and value.dtype.is_floating_point else value.dtype
        # A tensor that is no parameter, as of a state dict, stands for a shape.
        frozen = isinstance(value, nn.Parameter) and not value.requires_grad
        return _Tensor(name, tuple(value.shape), own, not frozen, *sharding.placement_of(value))
    if isinstance(value, int):
        raise TypeError(
            "model_or_shapes: expected a list of shapes, as [(4096, 1024), (1024,)], got numbers"
        )
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(
            f"model_or_shapes: expected a shape, as [4096, 1024], for {name}, got {value!r}"
        )
    if len(value) == 2 and isinstance(value[0], str):
        raise TypeError(
            "model_or_shapes: expected a module, shapes or a mapping, got pairs; "
            "put dict() around them"
        )
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value):
        raise ValueError(f"{name}: expected a shape of whole numbers >= 0, got {list(value)}")
    return _Tensor(name, tuple(value), dtype or torch.float32, True)


def _embeddings(model_or_shapes: Any, tensors: Sequence[_Tensor], chosen: Any) -> Collection[str]:
    """The names of the parameters that ``embeddings_in_32bit`` chooses."""
    names = {t.name for t in tensors}
    if isinstance(chosen, bool):
        if not chosen:
            return ()
        if not isinstance(model_or_shapes, nn.Module):
            raise TypeError(
                "embeddings_in_32bit: shapes do not tell which of them are embeddings. Expected "
                "the names of these in place of True, or a module in place of the shapes"
            )
        weights = embedding_weights(model_or_shapes)
        return {name for name, p in model_or_shapes.named_parameters() if id(p) in weights}
    if isinstance(chosen, str) or not isinstance(chosen, Collection):
        raise TypeError(
            f"embeddings_in_32bit: expected True, False or a list of names, got {chosen!r}"
        )
    unknown = [name for name in chosen if name not in names]
    if unknown:
        example = f", as {tensors[0].name!r}" if tensors else ""
        raise ValueError(
            f"embeddings_in_32bit: expected names of parameters{example}, got {unknown}"
        )
    return chosen


def _mesh_shape(mesh: Any) -> tuple[int, ...]:
    if mesh is None:
        return ()
    shape = (mesh,) if isinstance(mesh, int) else getattr(mesh, "shape", mesh)
    shape = tuple(shape) if isinstance(shape, list) else shape
    if not isinstance(shape, tuple) or not all(type(n) is int for n in shape):
        raise TypeError(
            f"mesh: expected a number of ranks, (replicas, shards) or a DeviceMesh, got {mesh!r}"
        )
    if len(shape) not in (1, 2) or min(shape) < 1:
        raise ValueError(f"mesh: expected one or two numbers >= 1, got {shape}")
    return shape


def _fsdp_placements(mesh_shape: tuple[int, ...]) -> tuple[Placement, ...]:
    """Those of ``fully_shard``: the last dimension of the mesh shards rows."""
    if not mesh_shape:
        return ()
    from torch.distributed.tensor import Shard

    return (*_replicated(len(mesh_shape) - 1), Shard(0))


def _replicated(dims: int) -> tuple[Placement, ...]:
    from torch.distributed.tensor import Replicate

    return (Replicate(),) * dims


def class_names() -> list[str]:
    """Of the classes with resident 32-bit state: one for each rule and kind of decay."""
    return [n for n, cls in vars(classes).items() if isinstance(cls, type) and n == bare_name(n)]


def _class_and_options(
    optimizer: Any, common: dict[str, Any], rule_options: Mapping[str, Any]
) -> tuple[type[OptimizerContract], dict[str, Any]]:
    """The class with 32-bit state, and what its constructor is to be called with."""
    names = class_names()
    name = bare_name(optimizer) if isinstance(optimizer, str) else ""
    if name not in names:
        raise ValueError(f"optimizer: expected one of {', '.join(names)}, got {optimizer!r}")
    cls = getattr(classes, name)
    options = dict(common)
    for option, value in rule_options.items():
        if option in inspect.signature(cls).parameters:
            options[option] = value
        elif not any(option in inspect.signature(getattr(classes, n)).parameters for n in names):
            raise TypeError(f"estimate() got an unexpected keyword argument {option!r}")
        elif value:
            raise ValueError(f"{option}: {name} has no such option, leave it out")
    return cls, options


def _is_mixed(cls: type[OptimizerContract]) -> bool:
    """Whether Muon trains some of the parameters, and another rule the rest."""
    return len(cls._kinds) > 1


def _kept(cls: type[OptimizerContract], options: dict[str, Any]) -> tuple[int, int]:
    """How many states as large as their parameter there are, and bytes beside them."""
    all_states = states_under(cls, options)
    states = sum(not state.is_scalar for state in all_states)
    beside = sum(spec.nbytes for spec in beside_states(clips(options)).values())
    return states, beside + torch.float32.itemsize * (len(all_states) - states)


# A shape without a name: of a list, or on the command line.
_NUMBERED = re.compile(r"\[\d+\]|\d+: .*")


def _hidden(
    cls: type[OptimizerContract],
    model_or_shapes: Any,
    tensors: Sequence[_Tensor],
    embeddings: Collection[str],
) -> Collection[str]:
    """The names of the parameters that Muon trains in a class of two rules."""
    if not _is_mixed(cls):
        return ()
    if isinstance(model_or_shapes, nn.Module):
        return hidden_matrices.of_model(model_or_shapes)

    def is_hidden(t: _Tensor) -> bool:
        if _NUMBERED.fullmatch(t.name):
            return hidden_matrices.is_matrix(t.shape) and not t.name.endswith(":embedding")
        return hidden_matrices.is_hidden(t.name, t.shape)

    return {t.name for t in tensors if t.name not in embeddings and is_hidden(t)}


def _check_shapes(
    cls: type[OptimizerContract], tensors: Sequence[_Tensor], options: Mapping[str, Any]
) -> None:
    """Raises ValueError for a shape that an optimizer of matrices does not take."""
    arguments = inspect.signature(cls).parameters
    if "higher_dims" not in arguments or _is_mixed(cls):
        return
    higher_dims = options.get("higher_dims", arguments["higher_dims"].default)
    matrix_shape.of((1, 1), higher_dims)  # raises where the option itself is wrong
    for t in tensors:
        if t.trainable:
            try:
                matrix_shape.of(t.shape, higher_dims)
            except ValueError as error:
                raise ValueError(
                    f"{t.name}: {error}. The optimizer MuonAdamW trains the rest by AdamW"
                ) from None


# -- what of them lies where -----------------------------------------------------------------------


def _shards(t: _Tensor) -> int:
    """The number of ranks that share one copy of a tensor."""
    split = (split_dim(placement) is not None for placement in t.placements)
    return math.prod(n for n, is_split in zip(t.mesh_shape, split, strict=True) if is_split)


def _local(t: _Tensor) -> int:
    """Elements on the first rank, which no other exceeds: chunks are cut so that none grows."""
    first = (0,) * len(t.mesh_shape)
    return math.prod(
        len(shard_indices(t.shape, t.mesh_shape, first, t.placements, dim))
        for dim in range(len(t.shape))
    )


def _local_state(t: _Tensor, found: Format, scales: Scales) -> tuple[int, int]:
    """Codes, or numbers of 32 bits, and scales on the first rank, of a tensor that keeps its
    blocks."""
    whole = found.codes_shape(t.shape, scales.block_size), scales.shape(t.shape)
    if not t.mesh_shape:
        return math.prod(whole[0]), math.prod(whole[1])
    if not found.is_quantized:
        return _local(t), 0
    first = (0,) * len(t.mesh_shape)
    sizes = scales.block_size, found.bits
    rows = block_rows(t.shape, t.mesh_shape, first, t.placements, *sizes)
    assert rows is not None
    count = rows.scale_shape if scales.block_wise else whole[1]
    return math.prod(rows.codes_shape(found.bits)), math.prod(count)


# -- the table -------------------------------------------------------------------------------------


def _heading(e: Estimate) -> str:
    counts = ((e.tensors, "tensor"), (e.elements, "element"), (e.ranks, "rank"))
    return ", ".join([*(_tables.count(n, word) for n, word in counts), e.optimizer])


def _table(e: Estimate) -> list[str]:
    """Bytes of the largest rank, and of all of them, in 32, 8 and 4 bits."""
    every_bits = (32, 8) if e.state_4bit is None else (32, 8, 4)
    names_of = [f"{bits}-bit" for bits in every_bits]
    rows: list[tuple[str, ...]] = [("", *names_of)]
    columns: list[Estimate | Bytes] = [e]
    if e.ranks > 1:
        rows = [("", f"a rank: {names_of[0]}", *names_of[1:], f"all ranks: {names_of[0]}")]
        rows[0] += tuple(names_of[1:])
        columns.append(e.total)
    for label, names in (
        ("parameters", ("parameters",)),
        ("gradients", ("gradients",)),
        ("optimizer state", ("state",)),
        ("together", ("parameters", "gradients", "state")),
    ):
        cells = [_tables.size(_together(c, names, bits)) for c in columns for bits in every_bits]
        rows.append((label, *cells))
    checkpoints = [_tables.size(getattr(e, f"checkpoint_{bits}bit")) for bits in every_bits]
    blank = [""] * (len(every_bits) * (len(columns) - 1))
    rows.append(("optimizer checkpoint", *blank, *checkpoints))
    return _tables.columns(rows)


def _together(column: Estimate | Bytes, names: Iterable[str], bits: int) -> int:
    total: int = sum(
        getattr(column, f"state_{bits}bit" if name == "state" else name) for name in names
    )
    return total


def _rule_lines(e: Estimate) -> Iterator[str]:
    if e.muon:
        example = f"{e.muon[0]}, ..." if len(e.muon) > 1 else e.muon[0]
        yield f"Muon: {len(e.muon):,} of {e.tensors:,} ({example}); AdamW: the others"


def _kept_lines(e: Estimate) -> Iterator[str]:
    for reason, names in e.kept_32bit.items():
        yield f"32 bits in {e.optimizer}8bit too: {_tables.kept(reason, names, e.tensors)}"
