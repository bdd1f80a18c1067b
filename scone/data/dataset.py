"""Blocks of consecutive tokens for training and evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from scone.data.token_file import TokenFile
from scone.data.training_order import Place
from scone.utils.errors import SconeError


def num_blocks(num_tokens: int, max_length: int, drop_last: bool) -> int:
    """How many blocks of ``max_length`` tokens there are; a last short one counts when it has at least two tokens."""
    whole, rest = divmod(num_tokens, max_length)
    return whole + (0 if drop_last or rest < 2 else 1)


class BlockDataset(Dataset):
    """Item i is ``{"input_ids": int64 [T]}``: tokens i·T … (i+1)·T−1 of the file, T = ``max_length``.

    Asked for a `Place` of the training order, an item also tells it, as ``"place"``.
    ``drop_last`` leaves the last block out when it is short (training); otherwise it is kept if it has two tokens or
    more (evaluation: one token alone predicts nothing). Blocks run on over document separators.
    Pickles as the file's path. Raises SconeError when the file does not fill one block.
    """

    def __init__(self, token_file: TokenFile, max_length: int, drop_last: bool = False) -> None:
        if max_length < 2:
            raise SconeError(f"found max_length {max_length}; expected at least 2; give a larger --max_length")
        self.token_file = token_file
        self.max_length = max_length
        self.drop_last = drop_last
        self._length = num_blocks(token_file.num_tokens, max_length, drop_last)
        if not self._length:
            raise SconeError(
                f"{token_file.folder} has {token_file.num_tokens} tokens; expected at least one block of {max_length}; "
                "give more text or a smaller --max_length"
            )

    def __len__(self) -> int:
        return self._length

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks together."""
        whole = self.token_file.num_tokens // self.max_length * self.max_length
        return whole if self._length * self.max_length == whole else self.token_file.num_tokens

    def __getitem__(self, index: int | Place) -> dict[str, Any]:
        if isinstance(index, Place):
            return self[index.block] | {"place": index}
        if not -self._length <= index < self._length:
            raise IndexError(index)
        start = index % self._length * self.max_length
        block = self.token_file.tokens[start : start + self.max_length]
        return {"input_ids": torch.from_numpy(block.astype(np.int64))}
