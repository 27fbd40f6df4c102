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
