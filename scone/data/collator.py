"""Training batches: token blocks, their labels, and the trie batch of their f-grams, made in the loader's workers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from scone.kernels.trie_batch import build_trie_batch
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.matcher import Matcher

IGNORED_LABEL = -100


class Collator:
    """Stacks blocks of tokens into a batch; with a vocabulary, matches them and adds the batch's trie.

    Args:
        vocabulary: the f-grams, or None for a plain model.
        num_rows: how many f-grams have a learned row.
        pad_token_id: fills blocks that are shorter than the longest; any id does, padding is masked.
        round_sizes: fill tries up to one of few sizes, for code that is compiled for a shape.
    """

    def __init__(
        self,
        vocabulary: FGramVocabulary | None,
        num_rows: int = 0,
        pad_token_id: int = 0,
        round_sizes: bool = False,
    ) -> None:
        self.matcher = Matcher(vocabulary) if vocabulary is not None else None
        self.num_rows = num_rows
        self.pad_token_id = pad_token_id
        self.round_sizes = round_sizes

    def __call__(self, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Items with ``input_ids`` int64 [≤ T] → ``input_ids`` and ``labels`` [B, T], ``attention_mask`` [B, T] only
        where a block is short (without one, attention takes its fastest path), and ``trie`` (see ``TrieBatch``).
        """
        blocks = [np.asarray(item["input_ids"], dtype=np.int64) for item in items]
        longest = max(len(block) for block in blocks)
        tokens = np.full((len(blocks), longest), self.pad_token_id, np.int64)
        mask = np.zeros(tokens.shape, bool)
        for row, block in enumerate(blocks):
            tokens[row, : len(block)] = block
            mask[row, : len(block)] = True
        labels = np.where(mask, tokens, IGNORED_LABEL)
        labels[:, 0] = IGNORED_LABEL  # nothing predicts it; the trainer counts labels to normalise the loss
        batch: dict[str, Any] = {"input_ids": torch.from_numpy(tokens), "labels": torch.from_numpy(labels)}
        if not mask.all():
            batch["attention_mask"] = torch.from_numpy(mask.astype(np.int64))
        if self.matcher is not None:
            batch["trie"] = self._trie(tokens, mask)
        return batch

    def _trie(self, tokens: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        assert self.matcher is not None
        vocabulary = self.matcher.vocabulary
        # one thread: the workers already share out the cores, and a forked worker must not start a thread pool
        trie = build_trie_batch(
            self.matcher.match(tokens, mask, num_threads=1),
            vocabulary.keys,
            vocabulary.suffixes,
            vocabulary.vocab_size,
            vocabulary.max_n,
            self.num_rows,
            self.round_sizes,
        )
        return trie.fields(torch.from_numpy)
