"""Looking up on an accelerator that finds f-grams and reads the rows by itself: no step waits for the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scone.kernels.installed import triton_is_installed
from scone.kernels.reachable_rows import ReachableRows
from scone.models.token_history import StaticTokenHistory, TokenHistory
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

LARGEST_SHARE = 0.02
"""Of an accelerator's memory that the index may take (about 15 bytes an f-gram): beyond it, the host matches."""


class DeviceLookUp:
    """Finds the longest f-gram that ends at each position, as `Matcher` does, and reads its row, on one device.

    Attributes: ``rows``, those it reads; ``nbytes``, the accelerator memory that its index of f-grams takes;
    ``num_found``, int64 ``[1]`` on the device, rows read so far.
    """

    def __init__(self, vocabulary: FGramVocabulary, rows: ReachableRows, device: torch.device) -> None:
        from scone.kernels.table_look_up_triton import TableLookUp

        assert vocabulary.keys.dtype == np.uint32, "nodes beyond 32 bits are matched on the host"
        index = vocabulary.index
        keys, slots = _bits(vocabulary.keys, device), _bits(index.slots, device)
        numbers = (index.rank_bits, index.max_probes, vocabulary.vocab_size, vocabulary.longest)
        self._is_empty = not len(vocabulary.keys)  # for which Triton compiles no kernel
        self._kernel = TableLookUp(keys, slots, *numbers, rows)
        self.rows = rows
        self.nbytes = keys.nbytes + slots.nbytes
        self.num_found = self._kernel.num_found

    @staticmethod
    def fits(vocabulary: FGramVocabulary, device: torch.device) -> bool:
        """Whether the index can and may lie on ``device``: a CUDA device with Triton, and memory to spare."""
        if device.type != "cuda" or not triton_is_installed() or vocabulary.keys.dtype != np.uint32:
            return False
        size = vocabulary.keys.nbytes + vocabulary.index.slots.nbytes
        return size <= LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory

    def write(
        self, vectors: Tensor, tokens: Tensor, mask: Tensor | None = None, history: TokenHistory | None = None
    ) -> None:
        """Write rows over the vectors of the positions at which f-grams end.

        Args:
            vectors: ``[B, T, D]``, contiguous: the token embeddings.
            tokens: int64 ``[B, T]``. They are not checked (the host would have to wait for that): one outside the
                vocabulary is in no f-gram.
            mask: ``[B, T]``, 0 at padding; padding is not there, wherever it is.
            history: the tokens before. To one of fixed size the new ones are added.
        """
        if self._is_empty:
            return
        past = None if history is None else history.all()
        if isinstance(history, StaticTokenHistory):
            self._kernel.write(vectors, tokens, mask, past, history.places, history.count)
            history.is_written = True
        else:
            self._kernel.write(vectors, tokens, mask, past)


def _bits(array: np.ndarray, device: torch.device) -> Tensor:
    """uint32 as int32, which PyTorch does more with; the bits are the same."""
    return torch.from_numpy(array.view(np.int32).copy()).to(device)
