"""The token history of a KV cache: what the matcher needs to continue any sequence, carried by the cache itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer


def hidden(token_ids: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens ``[B, T]`` with those at padding (0 in ``mask`` [B, T]) as their complement, -1 - token.

    Tokens and mask in one array are one transfer from an accelerator.
    """
    return token_ids if mask is None else torch.where(mask.bool(), token_ids, ~token_ids)


class TokenHistory(DynamicLayer):
    """One more layer of the cache, whose states, ``[B, P, 1]``, are the cached token ids.

    A cache applies cropping, beam reordering, repetition and selection to all of its layers, so the history can never
    disagree with the keys and values, whoever drives the decoding (``generate``, assisted decoding, or code by hand).
    """

    # A cache can be compiled for if all of its layers can. Attention masks ask that (they keep the mask of a static
    # cache, whose unused places must stay hidden); the trunk never sees the history, so the others decide.
    is_compileable = True

    def append(self, token_ids: Tensor, mask: Tensor | None) -> None:
        """Add int64 tokens ``[B, T]``; ``mask`` [B, T] is 0 at padding."""
        tokens = hidden(token_ids, mask).unsqueeze(-1)
        if self.keys is None:
            self.lazy_initialization(tokens, tokens)
            self.keys = tokens.clone()  # whoever gave them may write over them
        else:
            self.keys = torch.cat([self.keys, tokens], dim=1)
        # the second array that a cache operates on; one of its own would be concatenated in every step
        self.values = self.keys

    def reset(self) -> None:
        """Forget all tokens: zeros in their place would be tokens too."""
        self.keys = self.values = None
        self.is_initialized = False

    def all(self) -> Tensor:
        """All tokens, int64 ``[B, P]``, as `hidden` writes them."""
        assert self.keys is not None
        return self.keys.squeeze(-1)

    def last(self, count: int) -> Tensor:
        """The last ``count`` tokens (fewer if there are fewer), int64 ``[B, ≤ count]``, as `hidden` writes them."""
        tokens = self.all()
        return tokens[:, max(tokens.shape[1] - count, 0) :]


class StaticTokenHistory(TokenHistory):
    """The history of a static cache, in memory that stays where it is: steps of a CUDA graph read it and write it.

    Attributes: ``places``, int64 ``[]``, the positions that the cache holds, as its layers count them on their device;
    ``count``, int64 ``[]``, how many of them came with tokens. The others are padding here.
    """

    def __init__(self, layer: StaticLayer) -> None:
        super().__init__()
        self._layer = layer
        self.count = torch.zeros_like(layer.cumulative_length)
        self.is_written = False
        """Whether a look-up wrote the tokens of this forward pass already."""

    @property
    def places(self) -> Tensor:
        return self._layer.cumulative_length

    def append(self, token_ids: Tensor, mask: Tensor | None) -> None:
        """Add int64 tokens ``[B, T]``, whose keys and values the cache holds by now."""
        if self.is_written:
            self.is_written = False
            return
        num_sequences, length = token_ids.shape
        if self.keys is None:
            self.dtype, self.device = token_ids.dtype, token_ids.device
            self.keys = token_ids.new_full((num_sequences, self._layer.max_cache_len, 1), -1)
            self.is_initialized = True
        at = torch.arange(-length, 0, device=token_ids.device) + self.places
        self.keys.index_copy_(1, at, hidden(token_ids, mask).unsqueeze(-1).to(self.keys.dtype))
        self.count.add_(length)
        self.values = self.keys

    def get_seq_length(self) -> Any:
        """How many tokens it holds: on the device, as a static layer answers; 0 before the first."""
        return self.count if self.is_initialized else 0

    def reset(self) -> None:
        """Forget all tokens, and keep the memory."""
        self.count.zero_()
        self.is_written = False
        if self.keys is not None:
            self.keys.fill_(-1)

    def last(self, count: int) -> Tensor:
        end = int(self.places)
        return self.all()[:, max(end - count, 0) : end]

    def window(self, new: Tensor, count: int) -> Tensor:
        """What `unpacked` reads, int64 ``[B, 2 + count + T]`` on the device, of the last ``count`` tokens and ``new``
        int64 [B, T], as `hidden` writes them.
        """
        at = torch.arange(-count, 0, device=new.device) + self.places
        before = self.all()[:, at.clamp(min=0)]
        counts = torch.stack([self.places, self.count]).expand(len(new), 2)
        return torch.cat([counts, before, new], dim=1)

    @staticmethod
    def unpacked(window: np.ndarray, count: int) -> tuple[np.ndarray, int]:
        """The last ``count`` tokens, fewer if there are fewer, and the new ones, ``[B, ≤ count + T]``; and how many
        positions the cache holds. Raises ValueError when it holds positions without tokens.
        """
        past, known = int(window[0, 0]), int(window[0, 1])
        if known != past:
            raise _unknown(past, known)
        return window[:, 2 + max(count - past, 0) :], past


def token_history(cache: Cache | None) -> TokenHistory | None:
    """The history that ``cache`` carries, if any."""
    if cache is None:
        return None
    layers = cache.layers
    if layers and isinstance(layers[-1], TokenHistory):  # where it is, unless layers were added later
        return layers[-1]
    return next((layer for layer in layers if isinstance(layer, TokenHistory)), None)


def known_past(cache: Cache | None, may_wait: bool = True) -> TokenHistory | None:
    """The tokens of the positions that ``cache`` holds; None where it holds none.

    A static cache counts its positions on the accelerator. Unless this ``may_wait`` for all that runs there, the
    history of such a cache is taken at its word.

    Raises ValueError for a cache without the history of its tokens.
    """
    if cache is None:
        return None
    history = token_history(cache)
    if not may_wait and isinstance(history, StaticTokenHistory):
        return history if history.is_initialized else None
    past = cache.get_seq_length()
    if not past:
        return None
    found = history.get_seq_length() if history else 0
    if history is None or found != past:
        raise _unknown(past, found)
    return history


def _unknown(past: int, found: int) -> ValueError:
    return ValueError(
        f"the cache holds {past} positions but the tokens of {found}; a SCONE model continues only caches that it "
        "filled from input_ids"
    )


def extend_history(cache: Cache, token_ids: Tensor, mask: Tensor | None) -> None:
    """Record the tokens of a forward pass in ``cache``, after the trunk has recorded its keys and values."""
    history = token_history(cache)
    if history is None:
        # layers of a sliding window do not keep a place for every token
        static = next((layer for layer in cache.layers if type(layer) is StaticLayer), None)
        history = TokenHistory() if static is None else StaticTokenHistory(static)
        cache.layers.append(history)
    history.append(token_ids, mask)
