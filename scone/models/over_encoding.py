"""Over-encoding, the peer: token embeddings plus hashed 2- and 3-gram rows (arXiv 2501.16975)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from scone.models.configuration import OverEncodingConfig
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.learned_rows import LearnedRows
from scone.models.table_lookup import looked_up
from scone.models.token_history import TokenHistory, tensors_of
from scone.tokenization.matcher import CONTEXT, HashedGrams


class OverEncodingForCausalLM(EmbeddedTrunk):
    """A trunk behind e(i) = T(σᵢ) + R₂[hash(σᵢ₋₁ σᵢ)] + R₃[hash(σᵢ₋₂ σᵢ₋₁ σᵢ)], R rows together. It has no table to
    export: its hashed rows are one already.

    From the paper: the token's own embedding stays in the sum (it lost without), every 2- and 3-gram has a row whether
    it is frequent or not, and different ones may share a row.

    Different here, so that it is compared with learned rows at equal parameters and equal treatment: rows are as wide
    as the trunk (the paper cuts tables into narrow slices with other moduli, and maps them up by matrices); ids are
    mixed before the modulus; n-grams do not cross separators or padding; a step updates the rows of its batch alone, by
    the optimizer and learning rate of the learned rows; and rows start at zero.
    """

    config_class = OverEncodingConfig

    def __init__(self, config: OverEncodingConfig, trunk: PreTrainedModel | None = None) -> None:
        super().__init__(config, trunk)
        rows = LearnedRows(config.num_rows, self._token_weight().shape[1], getattr(torch, config.rows_dtype))
        self.hashed_embedding: Any = nn.ModuleDict({"rows": rows})
        self.grams = HashedGrams(config.num_rows, tuple(config.separator_ids))
        self.post_init()

    @torch.compiler.disable(reason="the number of distinct hashed rows of a batch depends on the tokens")
    def vectors_of(
        self, input_ids: Tensor, tokens: Tensor, history: TokenHistory | None, trie: dict[str, Any] | None
    ) -> Tensor:
        if trie is None:
            rows = looked_up(self.grams.rows, tokens, CONTEXT, *tensors_of(history))
            trie = self.grams.lookups(rows, lambda array: torch.from_numpy(array).to(input_ids.device))
        vectors = super().vectors_of(input_ids, tokens, history, trie)
        added = self.hashed_embedding.rows(trie["row_ids"], trie["row_chains"])
        return vectors + added.view_as(vectors).to(vectors.dtype)


AutoConfig.register("scone_over_encoding", OverEncodingConfig, exist_ok=True)
AutoModelForCausalLM.register(OverEncodingConfig, OverEncodingForCausalLM, exist_ok=True)
