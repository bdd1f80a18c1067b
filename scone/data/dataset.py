"""Blocks of consecutive tokens for training and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from scone.data.token_file import TokenFile
from scone.utils.errors import SconeError


def num_blocks(num_tokens: int, max_length: int, drop_last: bool) -> int:
    """How many blocks of ``max_length`` tokens there are; a last short one counts when it has at least two tokens."""
    whole, rest = divmod(num_tokens, max_length)
    return whole + (0 if drop_last or rest < 2 else 1)


class BlockDataset(Dataset):
    """Item i is ``{"input_ids": int64 [T]}``: tokens i·T … (i+1)·T−1 of the file, T = ``max_length``.

    ``drop_last`` leaves the last block out when it is short (training); otherwise it is kept if it has two tokens or
    more (evaluation: one token alone predicts nothing). ``max_tokens`` takes the file's beginning only (None: all of
    it). Blocks run on over document separators.
    Pickles as the file's path. Raises SconeError when the file does not fill one block.
    """

    def __init__(
        self, token_file: TokenFile, max_length: int, drop_last: bool = False, max_tokens: int | None = None
    ) -> None:
        if max_length < 2:
            raise SconeError(f"found max_length {max_length}; expected at least 2; give a larger --max_length")
        self.token_file = token_file
        self.max_length = max_length
        self.drop_last = drop_last
        self._available = min(token_file.num_tokens, token_file.num_tokens if max_tokens is None else max_tokens)
        self._length = num_blocks(self._available, max_length, drop_last)
        if not self._length:
            raise SconeError(
                f"{token_file.folder} has {self._available} tokens; expected at least one block of {max_length}; "
                "give more text or a smaller --max_length"
            )

    def __len__(self) -> int:
        return self._length

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks together."""
        return min(self._length * self.max_length, self._available)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -self._length <= index < self._length:
            raise IndexError(index)
        start = index % self._length * self.max_length
        block = self.token_file.tokens[start : min(start + self.max_length, self._available)]
        return {"input_ids": torch.from_numpy(block.astype(np.int64))}
