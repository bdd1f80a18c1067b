"""The matcher on an accelerator: where table rows are within its reach too, a step need not wait for the host."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from scone.kernels.installed import triton_is_installed
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

LARGEST_SHARE = 0.02
"""Of an accelerator's memory that the index may take (about 15 bytes an f-gram): beyond it, the host matches."""


class DeviceMatcher:
    """Finds the longest f-gram that ends at each position, as `Matcher` does, on the device of the tokens.

    ``nbytes``: the accelerator memory that its index takes.
    """

    def __init__(self, vocabulary: FGramVocabulary, device: torch.device) -> None:
        assert vocabulary.keys.dtype == np.uint32, "nodes beyond 32 bits are matched on the host"
        index = vocabulary.index
        self._keys = _bits(vocabulary.keys, device)
        self._slots = _bits(index.slots, device)
        self._numbers = (index.rank_bits, index.max_probes, vocabulary.vocab_size, vocabulary.longest)
        self.nbytes = self._keys.nbytes + self._slots.nbytes

    @staticmethod
    def fits(vocabulary: FGramVocabulary, device: torch.device) -> bool:
        """Whether the index can and may lie on ``device``: a CUDA device with Triton, and memory to spare."""
        if device.type != "cuda" or not triton_is_installed() or vocabulary.keys.dtype != np.uint32:
            return False
        size = vocabulary.keys.nbytes + vocabulary.index.slots.nbytes
        return size <= LARGEST_SHARE * torch.cuda.get_device_properties(device).total_memory

    def match(self, tokens: Tensor, mask: Tensor | None = None, past: Tensor | None = None) -> Tensor:
        """Nodes int64 ``[B, T]`` of ``tokens`` int64 ``[B, T]``.

        Args:
            mask: ``[B, T]``, 0 at padding; padding is not there, wherever it is.
            past: int64 ``[B, P]``, the tokens before, as a `TokenHistory` keeps them.

        Tokens are not checked (the host would have to wait for that): one outside the vocabulary is in no f-gram.
        """
        from scone.kernels.longest_match_triton import match_positions_triton

        return match_positions_triton(self._keys, self._slots, *self._numbers, tokens, mask, past)


def _bits(array: np.ndarray, device: torch.device) -> Tensor:
    """uint32 as int32, which PyTorch does more with; the bits are the same."""
    return torch.from_numpy(array.view(np.int32).copy()).to(device)
