"""What the host looks up for the tokens of a step, in one call: rows of a table, or hashed ones. And which tokens came
before a chunk, where vLLM does not say (CPUs alone).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from scone.inference.embedding_table import EmbeddingTable
from scone.models.table_lookup import Find, TableLookup, find_with
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import CONTEXT, HashedGrams, Matcher
from scone.utils.errors import SconeError


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


class Step(NamedTuple):
    """New tokens of a step, as `looked_up_in_line` takes them."""

    tokens: np.ndarray
    query_starts: np.ndarray
    before: np.ndarray


class SlotHistory:
    """One token for each slot of the KV cache: whoever wrote a slot's keys and values wrote its token.

    So what is read is right after chunks, prefix hits, forks, preemption, and refused drafts, whose slots are written
    again.
    """

    def __init__(self, context: int) -> None:
        """``context``: how many tokens before a request's new ones are asked for."""
        self._context = context
        self._tokens = np.full(0, -1, np.int32)
        self._layer = ""

    def step(self, metadata: Any, input_ids: Tensor, vllm_config: Any) -> Step:
        """Remember the tokens of a step, ``input_ids`` ``[P]`` (padding at the end), and say what was before them.

        ``metadata``: that of vLLM's attention on CPUs, by layer. Raises SconeError where it is of another kind.
        """
        ours = self._of_one_layer(metadata, vllm_config)
        block_table, lengths = _array(ours.block_table), _array(ours.seq_lens).astype(np.int64)
        query_starts = _array(ours.query_start_loc).astype(np.int64)
        num_tokens, num_requests = int(ours.num_actual_tokens), len(query_starts) - 1
        tokens, slots = _array(input_ids)[:num_tokens], _array(ours.slot_mapping)[:num_tokens]
        return self.exchange(
            tokens,
            slots,
            query_starts,
            lengths[:num_requests] - np.diff(query_starts),
            block_table[:num_requests],
            vllm_config.cache_config.block_size,
        )

    def exchange(
        self,
        tokens: np.ndarray,
        slots: np.ndarray,
        query_starts: np.ndarray,
        num_computed: np.ndarray,
        block_table: np.ndarray,
        block_size: int,
    ) -> Step:
        """Write ``tokens`` ``[P]`` to ``slots`` ``[P]``, and read what is before each of R requests.

        Args:
            query_starts: ``[R + 1]``; num_computed: ``[R]``, positions of each request before its new tokens;
            block_table: ``[R, …]``, the request's blocks of ``block_size`` slots.

        Raises SconeError where slots are not those of the blocks: a lookup would be silently wrong.
        """
        # the last column is the first new token: all that is asked of the blocks, at once
        at = num_computed[:, None] + np.arange(-self._context, 1)
        block = np.minimum(np.maximum(at, 0) // block_size, block_table.shape[1] - 1)
        asked = block_table[np.arange(len(at))[:, None], block].astype(np.int64) * block_size + at % block_size
        has_new = query_starts[1:] > query_starts[:-1]
        if (asked[has_new, -1] != slots[query_starts[:-1][has_new]]).any():
            raise SconeError(
                f"found KV slots that do not lie in blocks of {block_size}; expected them there, since their tokens "
                "are looked up by block; this release of scone does not know this vLLM: install one of 0.26 … 0.32"
            )
        highest = int(slots.max()) if len(slots) else -1
        if highest >= len(self._tokens):
            more = np.full(max(highest + 1, 2 * len(self._tokens)), -1, np.int32)
            more[: len(self._tokens)] = self._tokens
            self._tokens = more
        self._tokens[slots] = tokens
        exists = at[:, :-1] >= 0
        before = self._tokens.take(asked[:, :-1], mode="clip") if len(self._tokens) else at[:, :-1]
        before = np.where(exists, before, -1)
        if ((before < 0) & exists).any():
            raise SconeError("found KV slots that were filled without their tokens; expected those that this filled")
        return Step(tokens, query_starts, before)

    def _of_one_layer(self, metadata: Any, vllm_config: Any) -> Any:
        """Of a layer that keeps all positions, or at least those that are asked for."""
        if not isinstance(metadata, dict):
            raise _unknown(metadata)
        if not self._layer:
            layers = vllm_config.compilation_config.static_forward_context
            windows = {name: getattr(layers.get(name), "sliding_window", None) for name in metadata}
            name = max(windows, key=lambda name: windows[name] or 1 << 40)
            if (windows[name] or 1 << 40) <= self._context:
                raise SconeError(
                    f"found a trunk that keeps {windows[name]} positions; expected more than {self._context}, which "
                    "f-grams reach back; serve it with `scone serve`"
                )
            self._layer = name
        ours = metadata[self._layer]
        needed = ("block_table", "seq_lens", "query_start_loc", "num_actual_tokens", "slot_mapping")
        if not all(hasattr(ours, name) for name in needed):
            raise _unknown(ours)
        return ours


def _array(values: Tensor) -> np.ndarray:
    assert values.device == torch.device("cpu")
    return values.numpy()


def _unknown(found: Any) -> SconeError:
    return SconeError(
        f"found attention metadata of the kind {type(found).__name__}; expected that of vLLM's attention on CPUs; this "
        "release of scone does not know this vLLM: install one of 0.26 … 0.32"
    )
