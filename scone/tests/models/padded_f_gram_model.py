"""The f-gram model as the paper runs it, each f-gram alone: reference of ours in tests, and its peer in benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scone.models.input_embeddings import FGramBlock, FGramModel, unit_rms


def padded_f_gram_model(model: FGramModel, token_vectors: Tensor, lengths: Tensor) -> Tensor:
    """Every f-gram runs alone, padded to N tokens.

    Args:
        model: the f-gram model.
        token_vectors: ``[M, N, D]`` trunk embeddings of each f-gram's tokens, anything beyond its length.
        lengths: int64 ``[M]``, tokens in each f-gram.

    Returns:
        ``[M, D]``, as ``FGramModel.forward``.
    """
    num_f_grams, max_n = token_vectors.shape[:2]
    hidden = model.map_in(token_vectors) + model.positions.weight[:max_n]
    for block in model.blocks:
        assert isinstance(block, FGramBlock)
        projected = block.attention_in(block.attention_norm(hidden))
        query, key, value = projected.view(num_f_grams, max_n, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + block.attention_out(mixed.transpose(1, 2).reshape(num_f_grams, max_n, -1))
        inner = nn.functional.gelu(block.feed_forward_in(block.feed_forward_norm(hidden)), approximate="tanh")
        hidden = hidden + block.feed_forward_out(inner)
    last = hidden[torch.arange(num_f_grams, device=hidden.device), lengths - 1]
    return unit_rms(model.map_out(last))
