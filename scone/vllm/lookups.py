"""What is looked up for the tokens of a step: rows of a table, hashed rows, or nothing; on the host, in one call."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scone.inference.embedding_table import EmbeddingTable
from scone.models.table_lookup import Find, TableLookup, find_with
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import CONTEXT, HashedGrams, Matcher


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


def looked_up_in_line(
    find: Find, tokens: np.ndarray, query_starts: np.ndarray, before: np.ndarray, vocab_size: int
) -> np.ndarray:
    """What ``find`` says of the new tokens of R requests, ``[E, …]``; one call, whatever their number.

    Args:
        find: as `table_lookup.looked_up` takes it; here all that it gets has one dimension.
        tokens: integers ``[P]``, one request behind another. One outside 0 … ``vocab_size`` − 1 is in no n-gram.
        query_starts: integers ``[R + 1]``, where each request begins, and where the last one ends, E ≤ P; what is
            behind it is padding.
        before: integers ``[R, C]``, the C tokens before each request's first new one, -1 where there are none.

    Reference implementation: ``find`` of each request's whole text.
    """
    lengths = np.diff(query_starts)
    num_requests, context = before.shape
    end = int(query_starts[-1])
    # request r is shifted by the context of its own and of those in front of it
    shifts = context * np.arange(1, num_requests + 1)
    places = np.arange(end) + np.repeat(shifts, lengths)
    line = np.empty(end + context * num_requests, np.int64)
    line[places] = tokens[:end]
    begins = query_starts[:-1] + shifts - context
    line[begins[:, None] + np.arange(context)] = before
    valid = (line >= 0) & (line < vocab_size)
    starts = np.zeros(len(line), bool)
    starts[begins[lengths > 0] if context == 0 else begins] = True
    return find(np.where(valid, line, 0), valid, starts)[places]
