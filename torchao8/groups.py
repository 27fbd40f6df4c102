"""The parameter groups that people write by hand."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from torchao8 import hidden_matrices
from torchao8.optim.options import check_flag

Options = Mapping[str, Any]


def param_groups(
    model: nn.Module,
    *,
    decay_vectors: bool = False,
    embeddings_in_32bit: bool = True,
    muon: bool = False,
    patterns: Mapping[str, Options] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: as few as there are different options.

    >>> groups = torchao8.param_groups(model, patterns={"head.*": {"lr": 1e-4}})
    >>> optimizer = torchao8.AdamW8bit(groups, lr=1e-3, weight_decay=0.1)

    With Muon for the hidden matrices, and AdamW for the rest:

    >>> groups = torchao8.param_groups(model, muon=True)
    >>> optimizer = torchao8.MuonAdamW8bit(groups, lr=1e-3, weight_decay=0.1)

    Frozen parameters are in none. A parameter that the model has in two places counts once, under
    its first name.

    Args:
        model: whose parameters, by name, go into the groups; a sharded one after ``fully_shard``.
        decay_vectors: False gives biases, norms and other parameters of fewer than two dimensions
            weight_decay=0.
        embeddings_in_32bit: True gives the weights of ``nn.Embedding``, and of its subclasses,
            optim_bits=32: their gradients are sparse, a row being used now and then ("8-bit
            Optimizers via Block-wise Quantization", section 2.3). A vocabulary of 50,000 tokens and
            a model of 124M parameters: 39M of them.
        muon: True says of each parameter whether Muon trains it, by ``use_muon``, as the classes of
            :class:`torchao8.MuonAdamW` want it: True for the hidden matrices. These are parameters
            of two dimensions, each of 16 or more, whose names end in ``weight``, without embeddings
            and heads. An embedding is one by its class, or by a name with "embed" in it. A head is
            what ``get_output_embeddings()`` of the model returns; a linear layer with as many
            outputs as an embedding has rows, unless it is in a numbered block; and what is in a
            module named lm_head, head, heads, output, classifier, score, fc or embed_out, in no
            numbered block. A pattern decides otherwise: ``{"decoder.*": {"use_muon": False}}``, or,
            for matrices of experts in one parameter of three dimensions, ``{"*.experts.*":
            {"use_muon": True, "higher_dims": "batch"}}``.
        patterns: shell patterns of names, as ``"blocks.*.attention.*"``, and the options of those
            that match. They hold before those above, a later one before an earlier one.

    Returns:
        Groups of ``params``, a list of (name, parameter) pairs, and options.

    Raises:
        TypeError: ``model`` is no module, or ``patterns`` no mapping.
        ValueError: a pattern that matches no parameter, or one that gives ``params``; ``muon`` is
            neither True nor False.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model: expected an nn.Module, whose parameters have names, got {type(model).__name__}"
        )
    check_flag("muon", muon)
    patterns = {} if patterns is None else patterns
    if not isinstance(patterns, Mapping):
        raise TypeError(
            "patterns: expected a mapping of names to options, as "
            f"{{'head.*': {{'lr': 1e-4}}}}, got {type(patterns).__name__}"
        )
    embeddings = embedding_weights(model)
    hidden = hidden_matrices.of_model(model) if muon else set()
    unused = set(patterns)
    groups: dict[str, dict[str, Any]] = {}
    for name, p in model.named_parameters():
        matching = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        unused -= set(matching)
        if not p.requires_grad:
            continue
        options = _options(p, decay_vectors, embeddings_in_32bit and id(p) in embeddings)
        if muon:
            options["use_muon"] = name in hidden
        for pattern in matching:
            options.update(patterns[pattern])
        if "params" in options:
            raise ValueError("patterns: expected options of a group, got 'params' among them")
        key = repr(sorted(options.items()))
        groups.setdefault(key, {"params": [], **options})["params"].append((name, p))
    if unused:
        raise ValueError(f"patterns: {sorted(unused)} match the name of no parameter")
    return list(groups.values())


def embedding_weights(model: nn.Module) -> set[int]:
    """The weights of ``nn.Embedding`` and of its subclasses, by their ``id``."""
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _options(p: Tensor, decay_vectors: bool, in_32bit: bool) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if p.ndim < 2 and not decay_vectors:
        options["weight_decay"] = 0.0
    if in_32bit:
        options["optim_bits"] = 32
    return options
