"""The seam: input embedding layers take node ids and give vectors, in training and in serving alike.

e(node) = T(last token) + gain · normalised f-gram model(tokens of the node) + Σ learned rows over its suffix chain.
The gain and the rows start at zero, so an untrained SCONE is its trunk, bit for bit (docs/design.md, "The seam").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from scone.kernels.ancestor_attention import ancestor_attention
from scone.models.configuration import FGramModelConfig
from scone.models.learned_rows import LearnedRows


class FGramBlock(GradientCheckpointingLayer):
    """Pre-norm transformer block whose attention runs along the trie."""

    def __init__(self, config: FGramModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.attention_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.feed_forward_norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.feed_forward_in = nn.Linear(width, config.intermediate_size)
        self.feed_forward_out = nn.Linear(config.intermediate_size, width)

    def forward(self, hidden: Tensor, ancestors: Tensor, wanted: Tensor | None = None) -> Tensor:
        """``hidden`` [U, H] → [U, H], or [M, H] where only the nodes ``wanted`` [M] are needed.

        ``ancestors`` are those of the nodes that come out (see ``ancestor_attention``).
        """
        query, key, value = self._project(self.attention_norm(hidden), wanted)
        if wanted is not None:
            hidden = hidden[wanted]
        mixed = ancestor_attention(query, key, value, ancestors)
        hidden = hidden + self.attention_out(mixed.reshape(len(hidden), -1))
        inner = nn.functional.gelu(self.feed_forward_in(self.feed_forward_norm(hidden)), approximate="tanh")
        return hidden + self.feed_forward_out(inner)

    def _project(self, normed: Tensor, wanted: Tensor | None) -> tuple[Tensor, ...]:
        """Query [M, heads, d] of the wanted nodes, key and value [U, heads, d] of all."""
        heads, width = self.num_heads, normed.shape[1]
        if wanted is None or type(self.attention_in) is not nn.Linear:  # adapters put a layer of theirs in its place
            query, key, value = self.attention_in(normed).view(len(normed), 3, heads, -1).unbind(1)
            return query if wanted is None else query[wanted], key, value
        weight, bias = self.attention_in.weight, self.attention_in.bias
        query = nn.functional.linear(normed[wanted], weight[:width], bias[:width])
        pair = nn.functional.linear(normed, weight[width:], bias[width:])
        return query.view(len(query), heads, -1), *pair.view(len(pair), 2, heads, -1).unbind(1)


class FGramModel(nn.Module):
    """Embeds the f-grams of a trie batch.

    The paper (section 3) uses the trunk's architecture without its token embedding: the input is the trunk's own token
    embeddings plus learned absolute positions counted from the f-gram's start, the output the last token's vector.
    Linear maps lead in and out where the width differs from the trunk's. ``own_tokens`` are embeddings of the
    ``vocab_size`` tokens, in the model's own width.
    """

    def __init__(self, config: FGramModelConfig, trunk_width: int, max_n: int, vocab_size: int = 0) -> None:
        super().__init__()
        self.config = config
        same = config.hidden_size == trunk_width
        self.own_tokens = nn.Embedding(vocab_size, config.hidden_size) if config.own_tokens else None
        reads_as_is = same or config.own_tokens
        self.map_in = nn.Identity() if reads_as_is else nn.Linear(trunk_width, config.hidden_size, bias=False)
        self.positions = nn.Embedding(max_n, config.hidden_size)
        self.blocks = nn.ModuleList(FGramBlock(config) for _ in range(config.num_hidden_layers))
        self.map_out = nn.Identity() if same else nn.Linear(config.hidden_size, trunk_width, bias=False)

    def resize_tokens(self, vocab_size: int) -> None:
        """Where the model has token embeddings of its own: for another number of tokens, the first of them as before.

        No f-gram reads what is added.
        """
        if self.own_tokens is None:
            return
        old = self.own_tokens.weight
        self.own_tokens = nn.Embedding(vocab_size, old.shape[1], device=old.device, dtype=old.dtype)
        self.own_tokens.weight.requires_grad_(old.requires_grad)
        kept = min(vocab_size, len(old))
        with torch.no_grad():
            nn.init.normal_(self.own_tokens.weight, std=self.config.initializer_range)
            self.own_tokens.weight[:kept] = old[:kept]

    def forward(self, token_vectors: Tensor, trie: Mapping[str, Any]) -> Tensor:
        """Last hidden states ``[M, D]`` of the batch's distinct f-grams, normalised to a root mean square of one.

        Args:
            token_vectors: ``[U, D]`` embeddings of the nodes' last tokens, see ``token_vectors``.
            trie: the arrays of a ``TrieBatch``. Its last layer computes only the M nodes that positions read.
        """
        # a trunk that was made fp16 for inference speaks another type than an f-gram model that was left as it is
        hidden = self.map_in(token_vectors.to(self.positions.weight.dtype)) + self.positions(trie["depths"])
        ancestors, wanted = trie["ancestors"], trie["f_gram_index"]
        *blocks, last_block = self.blocks
        for block in blocks:
            hidden = block(hidden, ancestors)
        hidden = last_block(hidden, ancestors[wanted], wanted)
        return unit_rms(self.map_out(hidden))

    def token_vectors(self, tokens: Tensor, token_embedding: nn.Module) -> Tensor:
        """What the model reads for int64 ``tokens`` [U]: the trunk's embeddings, or its own, ``[U, D]``."""
        return token_embedding(tokens) if self.own_tokens is None else self.own_tokens(tokens)

    def init_weights(self) -> None:
        """GPT-2's scheme: normal weights, residual outputs scaled down by the depth."""
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                residual = name.endswith(("attention_out", "feed_forward_out"))
                scale = (2 * self.config.num_hidden_layers) ** -0.5 if residual else 1.0
                nn.init.normal_(module.weight, std=std * scale)
                bias = getattr(module, "bias", None)
                if bias is not None:
                    nn.init.zeros_(bias)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)


def unit_rms(hidden: Tensor) -> Tensor:
    """Each vector divided by its root mean square, computed in fp32 (or better, where it comes in better)."""
    return nn.functional.rms_norm(
        hidden.to(torch.promote_types(hidden.dtype, torch.float32)), hidden.shape[-1:], eps=1e-6
    )


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
