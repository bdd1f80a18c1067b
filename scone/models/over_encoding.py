"""Over-encoding, the peer: token embeddings plus hashed 2- and 3-gram rows (arXiv 2501.16975)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scone.models.configuration import OverEncodingConfig
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.learned_rows import LearnedRows
from scone.models.token_history import TokenHistory
from scone.tokenization.matcher import CONTEXT, HashedGrams


class OverEncodingEmbedding(nn.Module):
    """e(i) = T(σᵢ) + R₂[hash(σᵢ₋₁ σᵢ)] + R₃[hash(σᵢ₋₂ σᵢ₋₁ σᵢ)], R rows together.

    From the paper: the token's own embedding stays in the sum (it lost without), every 2- and 3-gram has a row whether
    it is frequent or not, and different ones may share a row.

    Different here, so that it is compared with learned rows at equal parameters and equal treatment: rows are as wide
    as the trunk (the paper cuts tables into narrow slices with other moduli, and maps them up by matrices); ids are
    mixed before the modulus; n-grams do not cross separators or padding; a step updates the rows of its batch alone, by
    the optimizer and learning rate of the learned rows; and rows start at zero.
    """

    def __init__(self, config: OverEncodingConfig, width: int) -> None:
        super().__init__()
        self.rows = LearnedRows(config.num_rows, width, getattr(torch, config.rows_dtype))

    def forward(self, token_ids: Tensor, token_embedding: nn.Module, lookups: Mapping[str, Any]) -> Tensor:
        """``token_ids`` int64 [B, T] and what ``HashedGrams.lookups`` found for them → ``[B, T, D]``."""
        vectors = token_embedding(token_ids)
        added = self.rows(lookups["row_ids"], lookups["row_chains"])
        return vectors + added.view_as(vectors).to(vectors.dtype)


class OverEncodingForCausalLM(EmbeddedTrunk):
    """A trunk behind an over-encoding layer. It has no table to export: its hashed rows are one already."""

    config_class = OverEncodingConfig

    def __init__(self, config: OverEncodingConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config, trunk)
        width = self._token_weight().shape[1]
        self.hashed_embedding = OverEncodingEmbedding(config, width)
        self.grams = HashedGrams(config.num_rows, tuple(config.separator_ids))
        self.post_init()

    @torch.compiler.disable(reason="the number of distinct hashed rows of a batch depends on the tokens")
    def vectors_of(
        self, input_ids: Tensor, tokens: Tensor, history: TokenHistory | None, trie: dict[str, Any] | None
    ) -> Tensor:
        """See the base class."""
        if trie is None:
            rows = self.look_up(self.grams.rows, tokens, history, CONTEXT)
            device = input_ids.device
            trie = self.grams.lookups(rows, lambda array: torch.from_numpy(array).to(device))
        return self.hashed_embedding(input_ids, self.get_input_embeddings(), trie)


AutoConfig.register("scone_over_encoding", OverEncodingConfig, exist_ok=True)
AutoModelForCausalLM.register(OverEncodingConfig, OverEncodingForCausalLM, exist_ok=True)
