"""What ends at a position: the longest f-gram (its node), for batches and step by step, for people; hashed n-grams."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from scone.kernels import longest_match
from scone.kernels.common import run_in_parts
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError
from scone.utils.progress import available_cores

TOKENS_PER_THREAD = 1 << 17
"""Below this a further thread costs more than it saves; batches of this size stay on the caller's thread."""

_NO_MASK = np.zeros(0, np.bool_)
_NO_KINDS = np.zeros(0, np.uint8)


class Matcher:
    """Finds the longest f-gram that ends at each position.

    On plain threads (`run_in_parts`), which a forked data-loading worker survives.
    """

    def __init__(self, vocabulary: FGramVocabulary) -> None:
        self.vocabulary = vocabulary
        self._index = tuple(vocabulary.index)  # numba takes plain ones up faster than named ones
        self._longest = vocabulary.longest

    def __reduce__(self) -> tuple:
        return (Matcher, (self.vocabulary,))

    def match(
        self,
        tokens: Any,
        mask: Any | None = None,
        num_threads: int | None = None,
        *,
        starts: Any | None = None,
    ) -> np.ndarray:
        """Nodes of the longest f-grams that end at each position; a position without one gets its token's own node.

        Args:
            tokens: integers [B, T] or [T], each 0 … V − 1.
            mask: same shape, False or 0 at padding: such a position's node is its own token, no f-gram contains it.
            starts: same shape, True or 1 where an example begins, as in packed sequences: no f-gram reaches over it.
            num_threads: default all cores that the process may use; results do not depend on it.

        Returns:
            int64, same shape.

        Raises:
            SconeError: a token is not in the vocabulary.

        Reference implementation: `reference.longest_matches`.
        """
        array = _integers(tokens, "tokens")
        if array.ndim not in (1, 2):
            raise ValueError(f"tokens have shape {array.shape}; expected [B, T] or [T]")
        nodes = np.empty(array.shape, np.int64)
        flat, kinds = array.reshape(-1), _kinds_of(mask, starts, array.shape)
        arguments = (self._index, self.vocabulary.vocab_size, self._longest, flat, kinds, array.shape[-1])
        parts = min(num_threads or available_cores(), len(flat) // TOKENS_PER_THREAD)
        for position in run_in_parts(longest_match.match_positions, (*arguments, nodes.reshape(-1)), len(flat), parts):
            if position >= 0:
                raise self._foreign_token(flat[position])
        return nodes

    def step(self, states: Any, tokens: Any, mask: Any | None = None) -> np.ndarray:
        """Nodes of the next position of each sequence; they are the states for the step after.

        Args:
            states: integers [B], the node of the position before; -1 is a fresh start (nothing before it counts).
            tokens: integers [B].
            mask: [B], False or 0 at padding: the node is the token itself. Padding's node says nothing of the mask, so
                where a real token follows padding, give -1 for its state.

        Returns:
            int64 [B].

        Raises:
            SconeError: a token is not in the vocabulary.

        Reference implementation: `match` of the whole sequences, last column.
        """
        token_array = _integers(tokens, "tokens")
        state_array = _integers(states, "states")
        if token_array.ndim != 1 or token_array.shape != state_array.shape:
            raise ValueError(f"states have shape {state_array.shape}, tokens {token_array.shape}; expected [B] and [B]")
        nodes = np.empty(token_array.shape, np.int64)
        known = _mask_of(mask, token_array.shape)
        wrong = longest_match.match_step(
            *(self._index, self.vocabulary.suffixes, self.vocabulary.vocab_size),
            *(state_array, token_array, known, nodes),
        )
        if wrong >= 0:
            if not longest_match.FRESH <= state_array[wrong] < self.vocabulary.num_nodes:
                largest = self.vocabulary.num_nodes - 1
                raise ValueError(f"state {state_array[wrong]} is no node; expected -1 … {largest}")
            raise self._foreign_token(token_array[wrong])
        return nodes

    def _foreign_token(self, token: int) -> SconeError:
        vocab_size = self.vocabulary.vocab_size
        return SconeError(
            f"found token {int(token)}; expected 0 … {vocab_size - 1} (the f-gram vocabulary has {vocab_size} tokens); "
            "use the tokenizer that the f-grams were counted with"
        )


def _integers(values: Any, name: str) -> np.ndarray:
    array = np.asarray(values)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"{name} have type {array.dtype}; expected integers")
    return np.ascontiguousarray(array, np.int64)


def _mask_of(mask: Any | None, shape: tuple[int, ...]) -> np.ndarray:
    if mask is None:
        return _NO_MASK
    array = np.asarray(mask)
    if array.shape != shape:
        raise ValueError(f"the mask has shape {array.shape}; expected that of the tokens, {shape}")
    return np.ascontiguousarray(array != 0).reshape(-1)


def _kinds_of(mask: Any | None, starts: Any | None, shape: tuple[int, ...]) -> np.ndarray:
    """What `longest_match.match_positions` takes for a mask."""
    if starts is None:
        return _NO_KINDS if mask is None else _mask_of(mask, shape).view(np.uint8)
    kinds = np.where(_mask_of(starts, shape), np.uint8(longest_match.FIRST), np.uint8(1))
    return kinds if mask is None else kinds * _mask_of(mask, shape)


_PIECE = 1 << 22


@dataclass(frozen=True)
class InspectedToken:
    """One position and the longest f-gram that ends at it."""

    position: int
    token: int
    node: int
    match_length: int
    """Tokens of the node; 1 where no f-gram ends."""
    f_gram: tuple[int, ...]
    """The node's tokens: the f-gram, or the one token."""
    rank: int | None
    count: int | None
    """Occurrences in the counted corpus; None, as ``rank``, where no f-gram ends."""


def inspect_tokens(tokens: np.ndarray, matcher: Matcher) -> list[InspectedToken]:
    """One record per position of ``tokens``, integers [T]. Raises SconeError for a token outside the vocabulary."""
    vocabulary = matcher.vocabulary
    records = []
    for position, node in enumerate(matcher.match(tokens).tolist()):
        f_gram = vocabulary.tokens(node)
        rank = node - vocabulary.vocab_size if len(f_gram) > 1 else None
        count = None if rank is None else int(vocabulary.counts[rank])
        records.append(InspectedToken(position, f_gram[-1], node, len(f_gram), f_gram, rank, count))
    return records


def match_lengths(matcher: Matcher, tokens: np.ndarray) -> np.ndarray:
    """How many positions of ``tokens`` (integers [T], one sequence) have a longest match of n tokens, int64 [N + 1]; at
    n = 1 none ends there. In pieces, so that a memory-mapped corpus needs little memory.

    Raises SconeError for a token outside the vocabulary.
    """
    vocabulary = matcher.vocabulary
    found, reach = np.zeros(vocabulary.longest + 1, np.int64), vocabulary.longest - 1
    for start in range(0, len(tokens), _PIECE):
        first = max(start - reach, 0)  # what an f-gram that ends in this piece may begin with
        nodes = matcher.match(tokens[first : start + _PIECE])[start - first :]
        ranks = nodes[nodes >= vocabulary.vocab_size] - vocabulary.vocab_size
        found += np.bincount(vocabulary.lengths[ranks], minlength=len(found))
        found[1] += len(nodes) - len(ranks)
    return found


LENGTHS = (2, 3)
CONTEXT = max(LENGTHS) - 1
"""How many tokens before a position decide its rows."""

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio, as in Fibonacci hashing
_MIXER = np.uint64(0xBF58476D1CE4E5B9)  # one round of the finaliser of splitmix64
_SHIFT = np.uint64(31)


@dataclass(frozen=True)
class HashedGrams:
    """One table of ``num_rows`` rows: its first half for 2-grams, the rest for 3-grams.

    Grams that contain a separator or padding have no row, as f-grams do not.
    """

    num_rows: int
    separator_ids: tuple[int, ...] = ()

    def rows(self, tokens: np.ndarray, valid: np.ndarray | None = None, starts: np.ndarray | None = None) -> np.ndarray:
        """Rows of the 2-gram and the 3-gram that end at each position, int64 ``[..., T, 2]``; -1: none.

        Args:
            tokens: integers ``[..., T]``.
            valid: bool, same shape, False at padding.
            starts: bool, same shape, True where an example begins, over whose beginning no gram reaches.
        """
        usable = ~np.isin(tokens, self.separator_ids)
        if valid is not None:
            usable &= valid
        rows = np.full((*tokens.shape, len(LENGTHS)), -1, np.int64)
        first, key, whole = 0, tokens.astype(np.uint64), usable
        for column, length in enumerate(LENGTHS):
            size = self.num_rows // 2 if column == 0 else self.num_rows - self.num_rows // 2
            before = length - 1
            if tokens.shape[-1] <= before:
                break
            key = key[..., 1:] * _MULTIPLIER + tokens[..., :-before].astype(np.uint64) + np.uint64(1)
            whole = whole[..., 1:] & usable[..., :-before]
            if starts is not None:
                whole &= ~starts[..., 1 : starts.shape[-1] - before + 1]
            if size:  # of a single row, 2-grams get none
                mixed = (key ^ (key >> _SHIFT)) * _MIXER
                hashed = ((mixed ^ (mixed >> _SHIFT)) % np.uint64(size)).astype(np.int64)
                rows[..., before:, column] = np.where(whole, first + hashed, -1)
            first += size
        return rows

    def lookups(self, rows: np.ndarray, convert: Callable[[np.ndarray], Any]) -> dict[str, Any]:
        """What ``LearnedRows`` reads for ``rows`` ``[..., 2]``: distinct ``row_ids`` [R] on the host, and
        ``row_chains`` [P, 2], converted (to tensors), 1 + index into them; 0: none.
        """
        distinct, inverse = np.unique(rows.reshape(-1), return_inverse=True)
        missing = int(len(distinct) > 0 and distinct[0] < 0)
        chains = inverse.reshape(-1, len(LENGTHS)).astype(np.int64) + (1 - missing)
        return {"row_ids": distinct[missing:], "row_chains": convert(chains)}
