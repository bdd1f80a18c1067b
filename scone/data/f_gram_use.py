"""Which of the f-grams that match a training batch are used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scone.data.training_order import Place


@dataclass(frozen=True)
class FGramUse:
    """Leaves out matches of training batches; what it leaves out depends on the blocks' places in the run alone.

    So it is the same in whatever batch, worker or process a block is prepared, and after a resume.

    Args:
        seed: the run's.
        dropout: probability, below 1, with which a position uses its token in place of its f-gram.
    """

    seed: int
    dropout: float = 0.0

    def used(self, nodes: np.ndarray, tokens: np.ndarray, places: Sequence[Place]) -> np.ndarray:
        """What ``tokens`` [B, T] matched, ``nodes`` int64 [B, T], rows at ``places`` → the nodes that training uses."""
        if not self.dropout:
            return nodes
        draws = np.stack([self._draws(place, nodes.shape[1]) for place in places])
        return np.where(draws < self.dropout, tokens, nodes)

    def _draws(self, place: Place, length: int) -> np.ndarray:
        """A number in [0, 1) for each position of a block, another one in each epoch, float64 [T].

        Philox counts: block and epoch are high words of its counter, so no two blocks meet.
        """
        bits = np.random.Philox(key=self.seed, counter=[0, 0, place.block, place.epoch])
        return np.random.Generator(bits).random(length)
