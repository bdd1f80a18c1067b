"""What is looked up for the tokens of a step: rows of a table, hashed rows, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scone.inference.embedding_table import EmbeddingTable
from scone.models.table_lookup import TableLookup, find_with
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import CONTEXT, HashedGrams, Matcher
from scone.vllm.ragged_lookup import looked_up_in_line


class Lookup(Protocol):
    """``context``: how many tokens before a position decide what is found there."""

    context: int

    def put(self, vectors: Tensor, tokens: np.ndarray, query_starts: np.ndarray, before: np.ndarray) -> None:
        """Make input vectors of the token embeddings ``vectors`` ``[P, D]``, in place. The host looks up; the others
        are those of `looked_up_in_line`.
        """
        ...


class TableRows:
    """A table's rows in place of the token embeddings where f-grams end.

    Attributes: ``on_device``, what looks up on an accelerator by itself; None where the host has to.
    """

    def __init__(self, vocabulary: Path, table: EmbeddingTable) -> None:
        """Raises SconeError where the vocabulary's file is damaged."""
        f_grams = FGramVocabulary.load(str(vocabulary))
        self._lookup = TableLookup(table, Matcher(f_grams))
        self.context = f_grams.max_n - 1
        self.on_device = self._lookup.on_device

    def put(self, vectors: Tensor, tokens: np.ndarray, query_starts: np.ndarray, before: np.ndarray) -> None:
        """See `Lookup`."""
        matcher = self._lookup.matcher
        nodes = looked_up_in_line(find_with(matcher), tokens, query_starts, before, matcher.vocabulary.vocab_size)
        self._lookup.put_rows(nodes, vectors)


class HashedRows(nn.Module):
    """Over-encoding: the hashed rows of the 2- and the 3-gram that end at a position, added to its token embedding."""

    context = CONTEXT

    def __init__(self, num_rows: int, width: int, separator_ids: tuple[int, ...], vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_rows, width), requires_grad=False)
        self._grams, self._vocab_size = HashedGrams(num_rows, separator_ids), vocab_size

    def put(self, vectors: Tensor, tokens: np.ndarray, query_starts: np.ndarray, before: np.ndarray) -> None:
        """See `Lookup`."""
        found = looked_up_in_line(self._grams.rows, tokens, query_starts, before, self._vocab_size)
        places, column = np.nonzero(found >= 0)
        ranks = torch.from_numpy(found[places, column]).to(vectors.device)
        added = torch.zeros_like(vectors)  # the sum of both comes first, as it does in training
        added.index_add_(0, torch.from_numpy(places).to(vectors.device), self.weight[ranks])
        vectors += added
