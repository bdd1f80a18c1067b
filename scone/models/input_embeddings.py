"""The seam: input embedding layers take node ids and give vectors, in training and in serving alike.

e(node) = T(last token) + gain · normalised f-gram model(tokens of the node) + Σ learned rows over its suffix chain.
The gain and the rows start at zero, so an untrained SCONE is its trunk, bit for bit (DESIGN.md, section 4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from scone.kernels.reachable_rows import ReachableRows
from scone.kernels.transfer import to_device
from scone.models.device_look_up import DeviceLookUp
from scone.models.f_gram_config import FGramModelConfig
from scone.models.f_gram_model import FGramModel, unit_rms
from scone.models.learned_rows import LearnedRows
from scone.models.token_history import TokenHistory
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

COMBINATIONS = ("add", "replace", "gate")


class FGramInputEmbedding(nn.Module):
    """The trainable layer: f-gram model, learned rows, or both.

    Args:
        f_gram_model: the paper's f-gram model, or None. Its configuration says how it starts: with a gain of zero;
            at random, a vector of ``token_scale`` (where it is not normalised, as it comes); or as the identity.
        rows: the learned rows, or None.
        width: D, the trunk's width.
        combination: "add" corrects the token embedding; "replace" is the paper's literal form, in which a matched
            position takes the f-gram's vector instead of its token's; "gate" adds each number of the vector times a
            factor of 0 … 2, 1 at the start, which token and vector decide: a function of the node like all else here,
            so the table still holds one row for it.
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
        assert combination in COMBINATIONS, combination
        self.f_gram_model = f_gram_model
        self.rows = rows
        self.combination = combination
        self.scale_at_start = (
            1.0 if f_gram_model is None else scale_at_start(f_gram_model.config, combination, token_scale)
        )
        has_gain = f_gram_model is not None and f_gram_model.config.output_gain
        self.gain = nn.Parameter(torch.empty(width)) if has_gain else None
        self.gate = nn.Linear(2 * width, width) if combination == "gate" else None
        self.init_weights()

    def init_weights(self) -> None:
        """Start at the plain trunk, or as the f-gram model's configuration says."""
        if self.f_gram_model is not None:
            self.f_gram_model.init_weights()
        if self.gain is not None:
            nn.init.constant_(self.gain, self.scale_at_start)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
            nn.init.zeros_(self.gate.bias)
        if self.rows is not None:
            self.rows.reset()

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
            gain = self.scale_at_start if self.gain is None else self.gain
            total = gain * self.f_gram_model(token_vectors, trie)
        if self.rows is not None:
            rows = self.rows(trie["row_ids"], trie["row_chains"])
            total = rows if total is None else total + rows
        assert total is not None, "an f-gram input embedding has an f-gram model, learned rows, or both"
        if self.gate is not None:
            last_tokens = token_embedding(trie["tokens"][trie["f_gram_index"]])
            seen = torch.cat([unit_rms(last_tokens), unit_rms(total)], dim=-1)
            total = total * (2 * torch.sigmoid(self.gate(seen)))
        return total


def scale_at_start(config: FGramModelConfig, combination: str, token_scale: float) -> float:
    """By what the f-gram model's vector is multiplied at the start: its gain's first value, or what stands for one.

    Raises ValueError for a start that cannot be, with what to do.
    """
    can_be_zero = config.output_gain and combination != "replace"
    start = config.start or ("zero" if can_be_zero else "random")
    if start == "zero" and not can_be_zero:
        raise ValueError(
            "found the start zero without a gain, or with the combination replace, which would leave matched positions "
            "without a vector; expected the start random or identity"
        )
    if start == "identity" and (config.output_norm or config.own_tokens or combination != "replace"):
        raise ValueError(
            "found the start identity with an output norm, own token embeddings, or a combination other than replace; "
            "expected none of them, so that an f-gram's vector starts as its last token's embedding"
        )
    if start == "zero":
        return 0.0
    return token_scale if config.output_norm else 1.0


class RowSource(Protocol):
    """What the model needs of an embedding table: any placement, any row type."""

    num_rows: int
    width: int

    def rows(self, ranks: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``[n, D]`` for int64 ranks ``[n]`` on the host."""
        ...

    def within_reach(self, device: torch.device) -> ReachableRows | None:
        """The rows, where kernels on ``device`` read them by themselves; None where the host has to."""
        ...


class TableInputEmbedding(nn.Module):
    """The serving layer: a matched position reads one precomputed row, any other its token's own embedding.

    Attributes: ``num_positions``, looked up so far, padding too.
    """

    def __init__(self, table: RowSource) -> None:
        super().__init__()
        self.table = table
        self._look_ups: dict[torch.device, DeviceLookUp | None] = {}
        self.num_positions = 0
        self._num_rows = 0

    def forward(self, token_ids: Tensor, node_ids: Tensor, token_embedding: nn.Module, vocab_size: int) -> Tensor:
        """``token_ids`` int64 [B, T] on the trunk's device → [B, T, D].

        ``node_ids``: int64 [B, T] on the host, which gathers the rows.
        """
        vectors = token_embedding(token_ids)
        flat = vectors.reshape(-1, vectors.shape[-1])
        nodes = node_ids.reshape(-1)
        positions = (nodes >= vocab_size).nonzero().squeeze(1)
        if len(positions):
            rows = self.table.rows(nodes[positions] - vocab_size, flat.dtype)
            flat = flat.index_copy(0, to_device(positions, flat.device), rows.to(flat.device))
        self.num_positions += len(nodes)
        self._num_rows += len(positions)
        return flat.view_as(vectors)

    def on_device(
        self,
        look_up: DeviceLookUp,
        token_ids: Tensor,
        token_embedding: nn.Module,
        mask: Tensor | None,
        history: TokenHistory | None,
    ) -> Tensor:
        """The same without the host: ``look_up`` (of `look_up_on`) finds the nodes, and knows the other arguments."""
        vectors = token_embedding(token_ids).contiguous()
        self.num_positions += token_ids.numel()
        if not vectors.requires_grad:
            look_up.write(vectors, token_ids, mask, history)
            return vectors
        # NaN is no row's, so it tells the positions that read none; gradients reach the embeddings of these alone
        rows = torch.full_like(vectors, torch.nan)
        look_up.write(rows, token_ids, mask, history)
        return torch.where(rows.isnan(), vectors, rows)

    def look_up_on(self, device: torch.device, vocabulary: FGramVocabulary) -> DeviceLookUp | None:
        """What looks up on ``device`` by itself, made when it is first wanted; None where the host has to."""
        rows = self.table.within_reach(device)
        if rows is None:
            return None
        if device not in self._look_ups:
            fits = DeviceLookUp.fits(vocabulary, device)
            self._look_ups[device] = DeviceLookUp(vocabulary, rows, device) if fits else None
        return self._look_ups[device]

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes look-ups of its own: they hold compiled kernels, which cannot be copied."""
        return self.__dict__ | {"_look_ups": {}}

    @property
    def accelerator_index_bytes(self) -> int:
        """Accelerator memory that finding f-grams takes there: 0 where the host does it."""
        return sum(look_up.nbytes for look_up in self._look_ups.values() if look_up is not None)

    def reads(self) -> tuple[int, list[Tensor | int]]:
        """Positions looked up so far, padding too, and the rows that were read, in parts that are to be added up.

        Parts only become more; the first is the host's, the others int64 ``[1]`` on accelerators, which are not waited
        for.
        """
        on_devices = [look_up.num_found.clone() for look_up in self._look_ups.values() if look_up is not None]
        return self.num_positions, [self._num_rows, *on_devices]
