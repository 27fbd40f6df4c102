"""Modules that train better with 8-bit optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """``torch.nn.Embedding`` with Xavier-uniform weights and a layer norm behind it.

    What section 2.3 of `8-bit Optimizers via Block-wise Quantization
    <https://arxiv.org/abs/2110.02861>`_ found to make language models train stably: no row is much
    larger than the others, and every output has the same variance. Its third part, 32-bit state for
    the weights, is an option of their parameter group: :func:`torchao8.param_groups` sets it.

    The arguments are those of ``torch.nn.Embedding``. Gradients must be dense for a step, so
    ``sparse`` must be False. The input has any shape (integers); the output has one more dimension,
    ``embedding_dim``, and the dtype of the weights.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            device=device,
            dtype=dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        normed: Tensor = self.norm(super().forward(input))
        return normed
