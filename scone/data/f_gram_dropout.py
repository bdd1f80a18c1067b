"""F-gram dropout and length warm-up: which matches of a training batch are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scone.data.training_order import BlockIndex
from scone.tokenization.f_gram_vocabulary import FGramVocabulary


@dataclass(frozen=True)
class FGramDropout:
    """Drops matches from training batches; which ones depends only on where the blocks stand in the run.

    So it is the same in whatever batch, worker or process a block is prepared, and after a resume.

    Args:
        seed: the run's.
        dropout: probability, below 1, with which a position uses its token in place of its f-gram.
        length_warmup_steps: optimizer steps over which the longest f-gram that is used grows from 2 to N tokens.
    """

    seed: int
    dropout: float = 0.0
    length_warmup_steps: int = 0

    def used(
        self, nodes: np.ndarray, tokens: np.ndarray, places: Sequence[BlockIndex], vocabulary: FGramVocabulary
    ) -> np.ndarray:
        """What ``tokens`` [B, T] matched, ``nodes`` int64 [B, T], sequences at ``places`` → the nodes to train with."""
        if any(place.step < self.length_warmup_steps for place in places):
            longest = [self.longest(place.step, vocabulary.max_n) for place in places]
            nodes = shortened(nodes, np.array(longest)[:, None], vocabulary)
        if self.dropout:
            draws = np.stack([self._draws(place, nodes.shape[1]) for place in places])
            nodes = np.where(draws < self.dropout, tokens, nodes)
        return nodes

    def longest(self, step: int, max_n: int) -> int:
        """Tokens of the longest f-gram that is used at ``step``: 2 … N − 1 in equal stages, then N."""
        if step >= self.length_warmup_steps:
            return max_n
        return 2 + step * max(max_n - 2, 0) // self.length_warmup_steps

    def _draws(self, place: BlockIndex, length: int) -> np.ndarray:
        """A number in [0, 1) for each position of a block, another one in each epoch, float64 [T].

        Philox counts: block and epoch are high words of its counter, so no two blocks meet.
        """
        bits = np.random.Philox(key=self.seed, counter=[0, 0, place.block, place.epoch])
        return np.random.Generator(bits).random(length)


def shortened(nodes: np.ndarray, longest: np.ndarray | int, vocabulary: FGramVocabulary) -> np.ndarray:
    """Every node, int64 of any shape, or its suffix of ``longest`` ≥ 1 tokens (broadcast to it) where it has more."""
    if not vocabulary.num_f_grams:
        return nodes
    while True:
        ranks = np.maximum(nodes - vocabulary.vocab_size, 0)
        too_long = (nodes >= vocabulary.vocab_size) & (vocabulary.lengths[ranks] > longest)
        if not too_long.any():
            return nodes
        nodes = np.where(too_long, vocabulary.suffixes[ranks].astype(np.int64), nodes)
