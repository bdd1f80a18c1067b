"""Ablation controls: f-grams take the vectors of other f-grams, to separate knowledge from mere capacity."""

from __future__ import annotations

import numpy as np

from scone.tokenization.f_gram_vocabulary import FGramVocabulary

CONTROLS = ("none", "shuffled", "single")
SHUFFLE_SEED = 0


def permuted_nodes(vocabulary: FGramVocabulary, control: str, num_rows: int = 0) -> np.ndarray | None:
    """The node whose vector each f-gram takes under ``control``, int64 ``[S]``; None for "none".

    * "shuffled": another f-gram of the same length, by a permutation with a fixed seed. Among the f-grams with a
      learned row (rank < ``num_rows``) and among the others apart, so rows, parameters, match rate and match lengths
      stay. What goes is every relation between f-grams: a vector is no longer a correction to its suffix's, and the
      f-gram model reads tokens that are not there. An f-gram still has a row of its own: without back-off, rows would
      only be renamed.
    * "single": the first f-gram for all. The model learns that some f-gram ends here, and not which.
    """
    assert control in CONTROLS, control
    if control == "none" or not vocabulary.num_f_grams:
        return None
    nodes = np.full(vocabulary.num_f_grams, vocabulary.vocab_size, np.int64)
    if control == "single":
        return nodes
    rng = np.random.default_rng(SHUFFLE_SEED)
    has_row = np.arange(vocabulary.num_f_grams) < num_rows
    for length in np.unique(vocabulary.lengths):
        for part in (has_row, ~has_row):
            ranks = np.flatnonzero((vocabulary.lengths == length) & part)
            nodes[ranks] = vocabulary.vocab_size + rng.permutation(ranks)
    return nodes


def replaced(nodes: np.ndarray, vocab_size: int, stand_in: np.ndarray | None) -> np.ndarray:
    """``nodes`` (any shape) with every f-gram replaced by its stand-in; tokens stay."""
    if stand_in is None:
        return nodes
    return np.where(nodes >= vocab_size, stand_in[np.maximum(nodes - vocab_size, 0)], nodes)
