"""The options that every optimizer has, behind those of its rule."""

from __future__ import annotations

from typing import Any, TypedDict

COMMON: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "optim_bits": 32,
    "min_8bit_size": 4096,
    "block_size": 256,
    "state_rounding": "stochastic",
    "stochastic_rounding": False,
    "seed": 0,
    "percentile_clipping": 100,
    "block_wise": True,
    "is_paged": None,
    "page_dir": "",
}


class CommonOptions(TypedDict, total=False):
    """Keyword arguments of every optimizer, and options of its parameter groups.

    Attributes:
        maximize: ascend.
        foreach, capturable: hints for torch.optim, accepted and without effect: the step is always
            multi-tensor and capturable.
        differentiable: must be False.
        fused: the step is always fused; True also lets ``torch.amp.GradScaler`` leave unscaling and
            the skipping of a step to the op.
        optim_bits: 8 or 32, the bits of a state value; the default is that of the class.
        min_8bit_size: a parameter with fewer elements keeps 32-bit state, and so do scalars. Of
            DTensors so do vectors, and what has fewer than 16 elements in ``shape[1:]`` (a matrix
            of LoRA of rank 8): no block fits all the ways to shard them.
        block_size: elements that share a scale in 8 bits, a power of two from 64 to 2048.
        state_rounding: how averages and sums of squares are rounded to 8 bits, "stochastic" or
            "nearest". Other states say in their class how they are rounded.
        stochastic_rounding: write bfloat16 parameters back with stochastic rounding, in place of
            nearest, which loses updates of less than half a unit of a parameter's last place.
            float32 parameters need none and take none; float16 ones are refused.
        seed: of the stochastic rounding. The same seed, step and gradients give the same bits. The
            draws of a parameter are independent of each other; parameters of one seed share those
            of equal indices at equal steps.
        percentile_clipping: p scales a gradient down whose norm is larger than the p-th of its
            parameter's last 100, in ascending order, to that norm; 100 is off. As in bitsandbytes
            up to 0.45, but for the norm of the whole parameter where it is sharded, and for zeros
            before any other norm, which do not count. To be decided before the first step.
        block_wise: False gives each 8-bit state of a parameter one scale in place of one a block,
            as bitsandbytes up to 0.45 could: coarser, and a step reads everything twice.
            ``block_size`` then only says which parameters keep 8 bits and how they are rounded.
        is_paged: whether the state of parameters of 100,000 elements and more may leave the GPU, or
            RAM, when memory is short, and comes back for each step; the default is that of the
            class. On a GPU it lies in CUDA's managed memory, on the CPU in a file without a name,
            mapped into memory, whose space is reserved at the first step.
        page_dir: the folder of that file; "" is the temporary one, which may itself be in RAM. For
            parameters on the CPU. As is_paged, to be decided before the first step.
    """

    maximize: bool
    foreach: bool | None
    capturable: bool
    differentiable: bool
    fused: bool | None
    optim_bits: int
    min_8bit_size: int
    block_size: int
    state_rounding: str
    stochastic_rounding: bool
    seed: int
    percentile_clipping: int
    block_wise: bool
    is_paged: bool
    page_dir: str


def with_common(cls: type, own: dict[str, Any], common: CommonOptions, bits: int) -> dict[str, Any]:
    """The options of a group: those of the rule, and all common ones.

    Raises:
        TypeError: a name that is none of them, as of any unexpected argument.
    """
    for name in common:
        if name not in COMMON:
            raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {name!r}")
    return {**own, **COMMON, "optim_bits": bits, **common}
