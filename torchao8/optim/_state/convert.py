"""State in another format or in other blocks, through float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchao8.block_layout import Scales
from torchao8.optim._state import blocks
from torchao8.optim._state.blocks import Portion
from torchao8.optim._state.formats import FLOAT32, Format, form_of, format_in
from torchao8.optim._state.sealed import SCALE_LIMIT, check_values, part_of, scalar_tensor
from torchao8.optim._state.spec import BESIDE_STATES, NORMS, Layout, State, is_own
from torchao8.sharding import is_dtensor, is_placed_as, like, local, shard_rows


def convert(
    label: str,
    p: Tensor,
    layout: Layout,
    states: Sequence[State],
    saved: dict[str, Any],
    scales: Scales,
    saved_scales: Scales,
) -> dict[str, Tensor]:
    """What this rank holds of saved state after its conversion, through float32.

    8 and 4 bits become 32 without loss, 32 become 8 or 4 rounded to nearest, and other blocks, or
    codes of another format, both. Sharded state is converted where it lies if it is placed as ``p``
    and in whole blocks; if not, it is gathered, a collective, a parameter at a time. One scale for
    all of a sharded parameter is a collective as well.

    Args:
        saved: of a form that :func:`check_form` has let pass.

    Raises:
        ValueError: a number that no step could have left; after the collectives.
    """
    own, found = format_in(states, layout), format_in(states, saved)
    form = form_of(layout, p.shape, states, found, saved_scales)
    keys = [key for key in form if key not in BESIDE_STATES and not form[key].is_scalar]
    sharded_keys = [k for k in keys if saved_scales.block_wise or not form[k].is_scale]
    here = is_dtensor(p) and all(
        is_dtensor(saved[key]) and is_placed_as(p, saved[key]) for key in sharded_keys
    )
    if here and is_dtensor(p):
        used = ((scales, own), (saved_scales, found))
        here = all(
            shard_rows(p, each.block_size, its_format.bits) is not None
            for each, its_format in used
            if its_format.is_quantized and each.block_wise
        )
    scalars = {key: scalar_tensor(key, saved[key]) for key in form if form[key].is_scalar}
    values = {
        key: local(saved[key]) if here and key in sharded_keys else _whole(saved[key]).detach()
        for key in keys
    }
    parts = {"step": scalars["step"]}
    portion_of = Portion.of if here else Portion.whole
    if NORMS in form:
        parts[NORMS] = _whole(saved[NORMS]).detach()
    tensors = [state for state in states if not state.is_scalar]
    moments: dict[str, Tensor] = {}
    extremes: dict[str, Tensor] = {}
    refusal: ValueError | None = None
    saved_portion = portion_of(p, saved_scales)
    try:
        for key, value in values.items():
            check_values(label, key, form[key], value)
        found.check(label, tensors, values, saved_portion)
        moments = found.decode(tensors, values, saved_portion)
        if own.is_quantized:
            _check_size(label, own, moments)
    except ValueError as error:
        # Raised after the collective below; else the other ranks would wait for this one.
        refusal = error
    if own.is_quantized and not scales.block_wise:
        names = [state.name for state in tensors]
        extremes = blocks.extreme_elements(saved_portion.p, moments, names, local(p).device)
    if refusal is not None:
        raise refusal
    portion = portion_of(p, scales, extremes)
    for key, value in own.encode(tensors, moments, portion).items():
        parts[key] = value if here else part_of(p, layout[key], value)
    return {key: scalars[key] if key in scalars else parts[key] for key in layout}


def _check_size(label: str, own: Format, moments: dict[str, Tensor]) -> None:
    """Raises ValueError where a moment is of a size that no step on quantized state keeps."""
    for name, moment in moments.items():
        large = moment.abs() >= SCALE_LIMIT
        if bool(large.any()):
            raise ValueError(
                f"{name} of {label}: expected numbers below 2^126, as it is rounded to {own.bits} "
                f"bits, got {float(moment[large][0])}; optim_bits=32 keeps it"
            )


def in_32bit(
    p: Tensor, states: Sequence[State], saved: dict[str, Any], scales: Scales
) -> dict[str, Any]:
    """The state of a parameter in 32 bits, sharded as it is; ``saved`` itself where it is so."""
    found = format_in(states, saved)
    if found is FLOAT32:
        return saved
    tensors = [state for state in states if not state.is_scalar]
    values = {key: local(saved[key]) for state in tensors for key in found.keys(state)}
    moments = found.decode(tensors, values, Portion.of(p, scales))
    converted = {k: v for k, v in saved.items() if k in BESIDE_STATES or not is_own(k)}
    for state in states:
        name = state.name
        converted[name] = saved[name] if state.is_scalar else like(p, moments[name], p.shape)
    return converted


def _whole(value: Any) -> Any:
    return value.full_tensor() if is_dtensor(value) else value
