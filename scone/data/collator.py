"""Training batches: token blocks, labels, and what the input vectors need, looked up in the loader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from scone.kernels.trie_batch import build_trie_batch
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.hashed_grams import HashedGrams
from scone.tokenization.matcher import Matcher

IGNORED_LABEL = -100


class Collator:
    """Stacks blocks of tokens into a batch; with a vocabulary, matches them and adds the batch's trie.

    Args:
        vocabulary: the f-grams, or None for a plain model.
        num_rows: how many f-grams have a learned row.
        pad_token_id: fills blocks that are shorter than the longest; any id does, padding is masked.
        round_sizes: fill tries up to one of few sizes, for code that is compiled for a shape.
        hashed: the hashed n-grams of an over-encoding model, in place of a vocabulary.
    """

    def __init__(
        self,
        vocabulary: FGramVocabulary | None,
        num_rows: int = 0,
        pad_token_id: int = 0,
        round_sizes: bool = False,
        *,
        hashed: HashedGrams | None = None,
    ) -> None:
        assert vocabulary is None or hashed is None, "a batch has f-grams or hashed n-grams"
        self.matcher = Matcher(vocabulary) if vocabulary is not None else None
        self.num_rows = num_rows
        self.pad_token_id = pad_token_id
        self.round_sizes = round_sizes
        self.hashed = hashed

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Items with ``input_ids`` int64 [≤ T] → a batch.

        An item of several examples has ``position_ids`` too, which start again with each; so has the batch then.
        It has ``input_ids`` and ``labels`` [B, T], ``attention_mask`` [B, T] only where a block is short (without one,
        attention takes its fastest path), and ``trie`` (see ``TrieBatch``; of hashed n-grams what
        ``HashedGrams.lookups`` gives).
        """
        blocks = [np.asarray(item["input_ids"], dtype=np.int64) for item in items]
        longest = max(len(block) for block in blocks)
        tokens = np.full((len(blocks), longest), self.pad_token_id, np.int64)
        mask = np.zeros(tokens.shape, bool)
        for index, block in enumerate(blocks):
            tokens[index, : len(block)] = block
            mask[index, : len(block)] = True
        labels = np.where(mask, tokens, IGNORED_LABEL)
        labels[:, 0] = IGNORED_LABEL  # nothing predicts it; the trainer counts labels to normalise the loss
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        starts = None
        if any("position_ids" in item for item in items):
            positions = np.zeros_like(tokens)
            for index, item in enumerate(items):
                length = len(blocks[index])
                positions[index, :length] = item.get("position_ids", range(length))
            batch["position_ids"] = torch.from_numpy(positions)
            starts = np.diff(positions, axis=1, prepend=positions[:, :1] - 1) != 1
        if self.matcher is not None:
            batch["trie"] = self._trie(tokens, mask, starts)
        elif self.hashed is not None:
            batch["trie"] = self.hashed.lookups(self.hashed.rows(tokens, mask, starts), torch.from_numpy)
        return batch

    def _trie(self, tokens: np.ndarray, mask: np.ndarray, starts: np.ndarray | None) -> dict[str, Any]:
        assert self.matcher is not None
        vocabulary = self.matcher.vocabulary
        # one thread: the workers already share out the cores, and a forked worker must not start a thread pool
        nodes = self.matcher.match(tokens, mask, num_threads=1, starts=starts)
        trie = build_trie_batch(
            nodes,
            vocabulary.keys,
            vocabulary.suffixes,
            vocabulary.vocab_size,
            vocabulary.max_n,
            self.num_rows,
            self.round_sizes,
        )
        return trie.fields(torch.from_numpy)
