"""Which parameters of a model are hidden matrices, which Muon is for.

"Muon: An optimizer for hidden layers in neural networks" (Jordan et al., 2024) leaves embeddings,
heads and everything that is no matrix to AdamW. What is an embedding or a head, a module says by
its class, by what it is tied to, by its size, or by its name; shapes say it by their names alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

# A matrix with a shorter side has too few directions: Muon would move a few of them as far as all.
SMALLEST_SIDE = 16
_HEADS = {"lm_head", "head", "heads", "output", "classifier", "score", "fc", "embed_out"}
_EMBEDDINGS = {"wte", "wpe", "emb", "tok_emb", "pos_emb"}


def is_matrix(shape: Sequence[int]) -> bool:
    """Whether a shape alone would do for Muon."""
    return len(shape) == 2 and min(shape) >= SMALLEST_SIDE


def is_hidden(name: str, shape: Sequence[int]) -> bool:
    """Whether a parameter of this name and shape is a hidden matrix.

    >>> is_hidden("h.0.mlp.c_fc.weight", (768, 3072)), is_hidden("lm_head.weight", (50257, 768))
    (True, False)
    """
    *modules, own = name.split(".")
    if _is_head(modules) or any(map(_is_embedding, modules)):
        return False
    return own.endswith("weight") and is_matrix(shape)


def of_model(model: nn.Module) -> set[str]:
    """The names of its parameters that are hidden matrices."""
    modules = list(model.named_modules())
    others: list[nn.Module | None] = [m for _, m in modules if isinstance(m, _TABLES)]
    vocabularies = {m.num_embeddings for _, m in modules if isinstance(m, nn.Embedding)}
    for name, module in modules:
        if hasattr(module, "get_output_embeddings"):  # of transformers
            others.append(module.get_output_embeddings())
        # Inside of a block it is a hidden layer, as wide as a table of positions is long.
        if isinstance(module, nn.Linear) and not _is_in_block(name.split(".")):
            others += [module] if module.out_features in vocabularies else []
    # A head that is tied to an embedding is the same parameter.
    excluded = {id(getattr(module, "weight", None)) for module in others}
    return {
        name
        for name, p in model.named_parameters()
        if is_hidden(name, p.shape) and id(p) not in excluded
    }


_TABLES = (nn.Embedding, nn.EmbeddingBag)


def _is_embedding(module: str) -> bool:
    return "embed" in module or module in _EMBEDDINGS


def _is_head(modules: Sequence[str]) -> bool:
    """Of the parts of a module's name: blocks are numbered, and a head is in none."""
    return any(part in _HEADS for part in itertools.takewhile(_is_word, modules))


def _is_in_block(modules: Sequence[str]) -> bool:
    """A layer of a Sequential is numbered, too, but has no name behind its number."""
    return any(map(_is_word, itertools.dropwhile(_is_word, modules)))


def _is_word(part: str) -> bool:
    return not part.isdigit()
