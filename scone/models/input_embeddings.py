"""The seam: input embedding layers take node ids and give vectors, in training and in serving alike.

e(node) = T(last token) + gain · normalised f-gram model(tokens of the node) + Σ learned rows over its suffix chain.
The gain and the rows start at zero, so an untrained SCONE is its trunk, bit for bit (docs/design.md, "The seam").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from scone.models.f_gram_model import FGramModel, unit_rms
from scone.models.learned_rows import LearnedRows


class FGramInputEmbedding(nn.Module):
    """The trainable layer: f-gram model, learned rows, or both.

    Args:
        f_gram_model: the paper's f-gram model, or None. Its vector is multiplied by a learned gain.
        rows: the learned rows, or None.
        width: D, the trunk's width.
        combination: "add" corrects the token embedding, from a gain of zero on; "replace" is the paper's literal form,
            in which a matched position takes the f-gram's vector instead of its token's, from ``token_scale`` on;
            "gate" adds each number of the vector times a factor of 0 … 2, 1 at the start, which token and vector
            decide: a function of the node like all else here, so the table still holds one row for it.
        token_scale: the scale of the trunk's token embeddings.
    """

    def __init__(
        self,
        f_gram_model: FGramModel | None,
        rows: LearnedRows | None,
        width: int,
        combination: str = "add",
        token_scale: float = 0.02,
    ) -> None:
        super().__init__()
        self.f_gram_model = f_gram_model
        self.rows = rows
        self.combination = combination
        self.initial_gain = token_scale if combination == "replace" else 0.0
        self.gain = None if f_gram_model is None else nn.Parameter(torch.empty(width))
        self.gate = nn.Linear(2 * width, width) if combination == "gate" else None
        self.init_weights()

    def init_weights(self) -> None:
        """Start at the plain trunk (rows are zero), or at random where f-grams' vectors replace their tokens'."""
        if self.f_gram_model is not None:
            self.f_gram_model.init_weights()
        if self.gain is not None:
            nn.init.constant_(self.gain, self.initial_gain)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)

    def forward(self, token_ids: Tensor, token_embedding: nn.Module, trie: Mapping[str, Any]) -> Tensor:
        """Vectors of a batch of positions.

        Args:
            token_ids: int64 ``[B, T]``.
            token_embedding: the trunk's own T.
            trie: the arrays of the batch's ``TrieBatch``.

        Returns:
            ``[B, T, D]``. Each distinct f-gram is computed once and spread to its positions.
        """
        vectors = token_embedding(token_ids)
        per_f_gram = self.f_gram_vectors(token_embedding, trie)
        spread = torch.cat([per_f_gram.new_zeros(1, per_f_gram.shape[1]), per_f_gram])
        added = nn.functional.embedding(trie["position_index"], spread).to(vectors.dtype)
        if self.combination != "replace":
            return vectors + added
        return torch.where((trie["position_index"] > 0)[..., None], added, vectors)

    def f_gram_vectors(self, token_embedding: nn.Module, trie: Mapping[str, Any]) -> Tensor:
        """What is added to (or replaces) the token embedding for each of the batch's M distinct f-grams, ``[M, D]``."""
        total: Tensor | None = None
        if self.f_gram_model is not None:
            token_vectors = self.f_gram_model.token_vectors(trie["tokens"], token_embedding)
            total = self.gain * self.f_gram_model(token_vectors, trie)
        if self.rows is not None:
            rows = self.rows(trie["row_ids"], trie["row_chains"])
            total = rows if total is None else total + rows
        assert total is not None, "an f-gram input embedding has an f-gram model, learned rows, or both"
        if self.gate is not None:
            last_tokens = token_embedding(trie["tokens"][trie["f_gram_index"]])
            seen = torch.cat([unit_rms(last_tokens), unit_rms(total)], dim=-1)
            total = total * (2 * torch.sigmoid(self.gate(seen)))
        return total
