"""The compiled extension: importing it registers the ops under torch.ops.torchao8."""

# Each family of update rules, as csrc/rules names it: the fields of torchao8.ops.Family.
FAMILIES: tuple[
    tuple[
        str,
        str,
        str,
        tuple[tuple[str, bool, bool, bool, bool], ...],
        tuple[str, ...],
        tuple[str, ...],
        tuple[int, ...],
    ],
    ...,
]

# Each format of state with scales, by its number, as csrc/formats names it: the fields of
# torchao8.ops.StateFormat.
FORMATS: tuple[tuple[str, int], ...]

# What the codec looks up of the unsigned and of the signed map, float32: the codebook (256 values),
# and the starts (16) and lines (3 times 32) of stochastic rounding, see csrc/codec/dynamic_map.h.
DYNAMIC_MAPS: tuple[bytes, bytes]
