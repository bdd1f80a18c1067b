"""The f-gram vocabulary: S ranked f-grams as nodes of one trie, stored in memory-mapped arrays."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from scone.kernels import f_gram_trie
from scone.kernels.f_gram_trie import ChildIndex, frozen
from scone.tokenization import f_gram_file
from scone.tokenization.f_gram_file import check_limits, node_dtype
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of


@dataclass(eq=False, repr=False)
class FGramVocabulary:
    """S ranked f-grams.

    Ranked by frequency: (count descending, length ascending, tokens lexicographic); or by gain, what they say about the
    next token (`ranking.rank_by_gain`), where counts do not fall along the ranks.

    Single tokens are nodes 0 … V − 1, the f-gram of rank r is node V + r. The vocabulary is closed: prefix and suffix
    of every f-gram are tokens or f-grams of lower rank, so its first S′ f-grams are a vocabulary too (`truncated`). All
    arrays are read-only. Make one by `from_links`, `from_ranked` or `load`.

    Attributes:
        vocab_size: V, at most 2³² − 1.
        max_n: N, the limit that was counted with, 1 … 255 (no f-gram is longer; perhaps all are shorter).
        separator_ids: tokens that no f-gram contains, ascending.
        tokenizer_fingerprint: of the tokenizer that made the tokens; "" when unknown.
        ranking: "frequency" or "gain".
        keys: [S, 2] prefix node and last token, side by side because lookups compare both.
        suffixes: [S] node of the f-gram without its first token.
        lengths: uint8 [S], tokens of the f-gram, 2 … N.
        counts: uint64 [S], occurrences in the counted corpus.

    Nodes are uint32 when V + S ≤ 2³², else uint64.
    """

    keys: np.ndarray
    suffixes: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray
    vocab_size: int
    max_n: int
    separator_ids: Sequence[int] = ()
    tokenizer_fingerprint: str = ""
    ranking: str = "frequency"
    path: Path | None = None
    _index: ChildIndex | None = None
    _fingerprint: str | None = None

    def __post_init__(self) -> None:
        for name in ("keys", "suffixes", "lengths", "counts"):
            setattr(self, name, frozen(getattr(self, name)))
        self.vocab_size, self.max_n = int(self.vocab_size), int(self.max_n)
        self.separator_ids = tuple(sorted(int(separator) for separator in self.separator_ids))

    # Making one

    @classmethod
    def from_links(
        cls,
        prefixes: np.ndarray,
        last_tokens: np.ndarray,
        counts: np.ndarray,
        *,
        vocab_size: int,
        max_n: int,
        separator_ids: Sequence[int] = (),
        tokenizer_fingerprint: str = "",
        ranking: str = "frequency",
    ) -> FGramVocabulary:
        """From the prefix node and last token of every f-gram, in rank order; derives and checks all else.

        Args:
            prefixes: integers [S], nodes; last_tokens: integers [S]; counts: integers [S].

        Raises:
            ValueError: when the ranking is not closed, by frequency not strict, or an f-gram is not allowed; names the
                rank.
        """
        check_limits(vocab_size, max_n, separator_ids, ranking)
        size = len(last_tokens)
        keys = np.empty((size, 2), node_dtype(vocab_size, size))
        keys[:, 0] = prefixes
        keys[:, 1] = last_tokens
        counts = np.asarray(counts).astype(np.uint64)
        if len(counts) != size:
            raise ValueError(f"{len(counts)} counts for {size} f-grams")
        suffixes, lengths, index = _link(keys, counts, vocab_size, max_n, separator_ids, ranking)
        facts = (vocab_size, max_n, separator_ids, tokenizer_fingerprint, ranking)
        return cls(keys, suffixes, lengths, counts, *facts, _index=index)

    @classmethod
    def from_ranked(
        cls,
        f_grams: Sequence[Sequence[int]],
        counts: np.ndarray | Sequence[int],
        *,
        vocab_size: int,
        max_n: int | None = None,
        **facts: Any,
    ) -> FGramVocabulary:
        """From the tokens of every f-gram, in rank order, with its count; ``max_n``: default the longest f-gram.

        ``facts``: the others of `from_links`. Raises ValueError as it does.
        """
        max_n = max(map(len, f_grams), default=1) if max_n is None else max_n
        rank_of: dict[tuple[int, ...], int] = {}
        prefixes = []
        for rank, gram in enumerate(map(tuple, f_grams)):
            if len(gram) < 2:
                raise ValueError(f"f-gram lengths are at least 2; that of rank {rank} is {len(gram)}")
            if min(gram) < 0 or max(gram) >= vocab_size:
                raise ValueError(f"the f-gram of rank {rank} has a token outside 0 … V − 1")
            prefix = gram[0] if len(gram) == 2 else vocab_size + rank_of.get(gram[:-1], rank)  # itself where none is
            prefixes.append(prefix)
            rank_of.setdefault(gram, rank)
        return cls.from_links(
            np.array(prefixes, np.uint64),
            np.array([gram[-1] for gram in f_grams], np.uint64),
            np.asarray(counts),
            vocab_size=vocab_size,
            max_n=max_n,
            **facts,
        )

    def truncated(self, num_f_grams: int) -> FGramVocabulary:
        """The vocabulary of the first ``num_f_grams`` f-grams (all, when it has fewer). Shares the arrays."""
        size = min(int(num_f_grams), self.num_f_grams)
        if size < 0:
            raise ValueError(f"cannot keep {num_f_grams} f-grams")
        if size == self.num_f_grams:
            return self
        dtype = node_dtype(self.vocab_size, size)
        return self._changed(
            keys=self.keys[:size].astype(dtype, copy=False),
            suffixes=self.suffixes[:size].astype(dtype, copy=False),
            lengths=self.lengths[:size],
            counts=self.counts[:size],
        )

    def resized(self, vocab_size: int) -> FGramVocabulary:
        """The same f-grams over another number of tokens: the f-gram of rank r becomes node ``vocab_size`` + r.

        Added tokens are in no f-gram. Which tokenizer they belong to is not known, so its fingerprint is left open.

        Raises:
            SconeError: an f-gram or a separator would lose its token.
        """
        if vocab_size == self.vocab_size:
            return self
        first_tokens = self.prefixes[self.lengths == 2]
        largest = int(max(self.last_tokens.max(initial=0), first_tokens.max(initial=0), *self.separator_ids))
        if vocab_size <= largest:
            raise SconeError(
                f"cannot go from {self.vocab_size} to {vocab_size} tokens: found token {largest} in an f-gram or as a "
                f"separator; expected none that goes away; keep at least {largest + 1} tokens"
            )
        check_limits(vocab_size, self.max_n, self.separator_ids)

        def renumbered(nodes: np.ndarray) -> np.ndarray:
            moved = nodes.astype(np.int64) + (nodes >= self.vocab_size) * (vocab_size - self.vocab_size)
            return moved.astype(node_dtype(vocab_size, self.num_f_grams))

        return self._changed(
            keys=renumbered(self.keys),
            suffixes=renumbered(self.suffixes),
            vocab_size=vocab_size,
            tokenizer_fingerprint="",
        )

    def _changed(self, **changes: Any) -> FGramVocabulary:
        """One that differs in ``changes``, and is indexed anew."""
        return replace(self, path=None, _index=None, _fingerprint=None, **changes)

    # Asking it

    @property
    def num_f_grams(self) -> int:
        """S."""
        return len(self.keys)

    @property
    def num_nodes(self) -> int:
        """V + S."""
        return self.vocab_size + self.num_f_grams

    @property
    def prefixes(self) -> np.ndarray:
        """[S] node of the f-gram without its last token."""
        return self.keys[:, 0]

    @property
    def last_tokens(self) -> np.ndarray:
        """[S]."""
        return self.keys[:, 1]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest f-gram, at least 1."""
        return int(self.lengths.max(initial=1))

    @property
    def index(self) -> ChildIndex:
        """The lookup index; built at first use if the vocabulary was made without one."""
        if self._index is None:
            self._index = ChildIndex.build(self.keys)
        return self._index

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of ranking, V and separators: equal for vocabularies that match alike and rank alike."""
        self._fingerprint = self._fingerprint or self._computed_fingerprint()
        return self._fingerprint

    def _computed_fingerprint(self) -> str:
        return fingerprint_of(json.dumps([self.vocab_size, self.separator_ids]), self.keys.reshape(-1))

    def __repr__(self) -> str:
        return (
            f"FGramVocabulary({self.num_f_grams} f-grams of up to {self.longest} tokens over {self.vocab_size} tokens)"
        )

    def tokens(self, node: int) -> tuple[int, ...]:
        """The tokens of ``node``, one for a token's own node. Raises ValueError for a number that is no node."""
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node {node} does not exist; expected 0 … {self.num_nodes - 1}")
        reversed_tokens = []
        while node >= self.vocab_size:
            prefix, last_token = self.keys[node - self.vocab_size]
            reversed_tokens.append(int(last_token))
            node = int(prefix)
        return (int(node), *reversed(reversed_tokens))

    def token_matrix(self, ranks: np.ndarray, padding: int = -1) -> np.ndarray:
        """Tokens of many f-grams, int64 [n, N′] with ``padding`` at the right; N′ is `longest`."""
        ranks = np.ascontiguousarray(ranks, np.int64)
        if len(ranks) and (ranks.min() < 0 or ranks.max() >= self.num_f_grams):
            raise ValueError(f"ranks are {ranks.min()} … {ranks.max()}; expected 0 … {self.num_f_grams - 1}")
        tokens = np.full((len(ranks), self.longest), padding, np.int64)
        f_gram_trie.unroll_f_grams(self.keys, self.lengths, self.vocab_size, ranks, tokens)
        return tokens

    def depth_first_order(self) -> np.ndarray:
        """All ranks in trie preorder, int64 [S]: every f-gram after its prefix, subtrees together.

        Subtrees come by first token, children by rank: so the order depends on the vocabulary alone. In a run of
        consecutive entries each f-gram's ancestors are in the run too, but for the ≤ N − 2 of its first entry.
        """
        bigrams = np.flatnonzero(self.lengths == 2)
        roots = bigrams[np.argsort(self.keys[bigrams, 0], kind="stable")]
        order = np.empty(self.num_f_grams, np.int64)
        written = f_gram_trie.depth_first_ranks(self.keys, self.vocab_size, roots, order)
        assert written == self.num_f_grams, (written, self.num_f_grams)
        return order

    # Files

    def save(self, path_or_folder: str | Path) -> Path:
        """Write the vocabulary (``f_grams.safetensors`` when given a folder), atomically; returns the file's path."""
        path = f_gram_file.file_of(path_or_folder)
        metadata = {
            "vocab_size": str(self.vocab_size),
            "max_n": str(self.max_n),
            "separator_ids": json.dumps(self.separator_ids),
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "fingerprint": self.fingerprint,
            "rank_bits": str(self.index.rank_bits),
            "max_probes": str(self.index.max_probes),
        }
        if self.ranking != "frequency":  # the only ranking there was: files without the entry are by frequency
            metadata["ranking"] = self.ranking
        # buckets on cache lines, then widest first so that each array is aligned
        arrays = {"slots": self.index.slots, "counts": self.counts, "keys": self.keys}
        arrays |= {"suffixes": self.suffixes, "lengths": self.lengths}
        f_gram_file.write_file(path, arrays, metadata)
        return path

    @classmethod
    def load(cls, path_or_folder: str | Path) -> FGramVocabulary:
        """Map a saved vocabulary into memory; pages are read when used, and shared between processes.

        Checks the header, the file's length, and that every node refers to an earlier one, so that nothing reads out of
        bounds later. Damage inside those limits is found by `verify`. Raises SconeError.
        """
        path = f_gram_file.file_of(path_or_folder)
        arrays, metadata = f_gram_file.open_file(path)
        keys, suffixes, lengths = arrays["keys"], arrays["suffixes"], arrays["lengths"]
        vocab_size, max_n = int(metadata["vocab_size"]), int(metadata["max_n"])
        rank = f_gram_trie.check_links(keys, suffixes, lengths, vocab_size, max_n)
        if rank != f_gram_trie.NO_F_GRAM:
            raise f_gram_file.damaged(path, f"the f-gram of rank {rank} has no place in the trie")
        index = ChildIndex(keys, arrays["slots"], int(metadata["rank_bits"]), int(metadata["max_probes"]))
        separators, tokenizer = json.loads(metadata["separator_ids"]), metadata["tokenizer_fingerprint"]
        facts = (vocab_size, max_n, separators, tokenizer, metadata.get("ranking", "frequency"))
        return cls(keys, suffixes, lengths, arrays["counts"], *facts, path, index, metadata["fingerprint"])

    def verify(self) -> None:
        """Check everything: the file's bytes, the ranking, closure, links, index and fingerprint (≈ 1 µs an f-gram).

        Raises:
            SconeError: names what is wrong.
        """
        name = self.path or "this f-gram vocabulary"
        if self.path is not None:
            arrays, metadata = f_gram_file.open_file(self.path)
            f_gram_file.check_data(self.path, arrays, metadata)
        try:
            facts = (self.vocab_size, self.max_n, self.separator_ids, self.ranking)
            suffixes, lengths, index = _link(self.keys, self.counts, *facts)
        except ValueError as error:
            raise SconeError(f"found {name} damaged: {error}; count or copy it again") from error
        intact = {
            "suffixes": np.array_equal(suffixes, self.suffixes),
            "lengths": np.array_equal(lengths, self.lengths),
            "index": np.array_equal(index.slots, self.index.slots) and index.max_probes == self.index.max_probes,
            "fingerprint": self.fingerprint == self._computed_fingerprint(),
        }
        wrong = [part for part, is_intact in intact.items() if not is_intact]
        if wrong:
            raise SconeError(
                f"found {name} damaged: its {', '.join(wrong)} do not fit its f-grams; count or copy it again"
            )

    def __reduce__(self) -> tuple:
        # A worker process maps the same file instead of receiving hundreds of megabytes.
        if self.path is not None:
            return _reopened, (self.path, self.fingerprint)
        return FGramVocabulary, tuple(getattr(self, each.name) for each in fields(self)[:9])  # all but what is derived


def _reopened(path: Path, fingerprint: str) -> FGramVocabulary:
    vocabulary = FGramVocabulary.load(path)
    if vocabulary.fingerprint != fingerprint:
        raise SconeError(
            f"found other f-grams in {path} than when this run opened it; expected the same; start it again"
        )
    return vocabulary


def _link(
    keys: np.ndarray, counts: np.ndarray, vocab_size: int, max_n: int, separator_ids: Sequence[int], ranking: str
) -> tuple[np.ndarray, np.ndarray, ChildIndex]:
    """Suffixes [S], lengths [S] and index of ranked ``keys`` [S, 2] with ``counts`` [S].

    Raises ValueError when they are no vocabulary (`f_gram_trie.link_f_grams` says what makes one); names the rank.
    """
    suffixes, lengths = np.empty(len(keys), keys.dtype), np.empty(len(keys), np.uint8)
    index = ChildIndex(frozen(keys), f_gram_trie.empty_slots(len(keys)), f_gram_trie.rank_bits(len(keys)), 0)
    separators = np.array(sorted(separator_ids), np.int64)
    outcome, rank, max_probes = f_gram_trie.link_f_grams(
        frozen(counts), ranking == "frequency", vocab_size, max_n, separators, suffixes, lengths, tuple(index)
    )
    if outcome != f_gram_trie.VALID:
        raise ValueError(f"the f-gram of rank {rank} {f_gram_trie.FAULTS[outcome]}")
    return suffixes, lengths, index._replace(slots=frozen(index.slots), max_probes=int(max_probes))
