"""The token history of a KV cache: what the matcher needs to continue any sequence, carried by the cache itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from scone.kernels.longest_match import FIRST_BIT

# The name that transformers has for the cache, of arguments and in outputs: from 5.24 on the first.
CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"


def marked(token_ids: Tensor, mask: Tensor | None, starts: Tensor | None = None) -> Tensor:
    """Tokens int64 ``[B, T]`` as lookups and histories read them: all that decides f-grams, in one array.

    Those at padding (0 in ``mask`` [B, T]) are their complement, -1 - token; those that begin an example (``starts``
    [B, T]) have `FIRST_BIT` set.
    """
    token_ids = token_ids.long()
    if starts is not None:
        token_ids = torch.where(starts, token_ids | FIRST_BIT, token_ids)
    if mask is not None:
        token_ids = torch.where(mask.bool(), token_ids, ~token_ids)
    return token_ids


def starts_of_examples(position_ids: Tensor, mask: Tensor | None, has_past: bool) -> Tensor:
    """Where the examples of packed sequences begin, bool ``[B, T]``: at tokens that do not follow the one before.

    As attention of transformers has it, for which a step between positions that is not 1 begins another example. A
    step over padding may also be as long as the padding. After a cached past, position 0 begins one.

    Args:
        position_ids: int64 ``[B, T]``, or ``[1, T]`` for all sequences.
        mask: ``[B, T]``, 0 at padding, whose positions say nothing.
    """
    opening = position_ids == 0 if has_past else torch.zeros_like(position_ids, dtype=torch.bool)
    if position_ids.shape[1] == 1:
        return opening
    if mask is None:
        return torch.cat([opening[:, :1], position_ids.diff(dim=1) != 1], dim=1)
    position_ids, opening = position_ids.expand(mask.shape), opening.expand(mask.shape)
    columns = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    last = torch.where(mask.bool(), columns, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)  # the last token that is no padding; -1: none
    step = position_ids - position_ids.gather(1, before.clamp(min=0))
    return torch.where(before < 0, opening, (step != 1) & (step != columns - before))


class TokenHistory(DynamicLayer):
    """One more layer of the cache, whose states, ``[B, P, 1]``, are the cached token ids, as `marked` writes them.

    A cache applies cropping, beam reordering, repetition and selection to all of its layers, so the history can never
    disagree with the keys and values, whoever drives the decoding (``generate``, assisted decoding, or code by hand).
    """

    # A cache can be compiled for if all of its layers can. Attention masks ask that (they keep the mask of a static
    # cache, whose unused places must stay hidden); the trunk never sees the history, so the others decide.
    is_compileable = True
    places: Tensor | None = None
    count: Tensor | None = None
    first: CacheLayerMixin | None = None

    def prefetch(self) -> None:
        """A cache that keeps its layers on the host asks for the one behind the last: to it, that is the ``first``."""
        if self.first is not None:
            self.first.prefetch()

    def append(self, tokens: Tensor) -> None:
        """Add int64 tokens ``[B, T]``, as `marked` writes them."""
        tokens = tokens.unsqueeze(-1)
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
        """All tokens, int64 ``[B, P]``; of a static history, all its places."""
        assert self.keys is not None
        return self.keys.squeeze(-1)


class StaticTokenHistory(TokenHistory):
    """The history of a static cache, in memory that stays where it is, so that compiled steps read it and write it.

    Attributes: ``places``, int64 ``[]``, the positions that the cache holds, as its layers count them on their device;
    ``count``, int64 ``[]``, how many of them came with tokens. The others are padding here.
    """

    def __init__(self, layer: StaticLayer) -> None:
        super().__init__()
        self._layer = layer
        self.count = torch.zeros_like(layer.cumulative_length)

    @property
    def places(self) -> Tensor:  # type: ignore[override]
        return self._layer.cumulative_length

    def append(self, tokens: Tensor) -> None:
        """Add int64 tokens ``[B, T]``, whose keys and values the cache holds by now."""
        num_sequences, length = tokens.shape
        if self.keys is None:
            self.dtype, self.device = tokens.dtype, tokens.device
            self.keys = tokens.new_full((num_sequences, self._layer.max_cache_len, 1), -1)
            self.values = self.keys
            self.is_initialized = True
            if not torch.compiler.is_compiling():  # as static layers do, so that CUDA graphs may write to them
                torch._dynamo.mark_static_address(self.keys)
                torch._dynamo.mark_static_address(self.count)
        at = torch.arange(-length, 0, device=tokens.device) + self.places
        self.keys.index_copy_(1, at, tokens.unsqueeze(-1))
        assert self.count is not None
        self.count.add_(length)

    def get_seq_length(self) -> Any:
        """How many tokens it holds: on the device, as a static layer answers; 0 before the first."""
        return self.count if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Take back so many tokens, of a number below 0 as cached layers have it: later ones are written over them."""
        assert self.count is not None
        self.count.sub_(abs(tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens, and keep the memory."""
        assert self.count is not None
        self.count.zero_()
        if self.keys is not None:
            self.keys.fill_(-1)


def tensors_of(history: TokenHistory | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What lookups take of it (see `table_lookup.looked_up`): the past, its places and its count; None for none."""
    return (None, None, None) if history is None else (history.all(), history.places, history.count)


def token_history(cache: Cache | None) -> TokenHistory | None:
    """The history that ``cache`` carries, if any."""
    if cache is None:
        return None
    layers = cache.layers
    if layers and isinstance(layers[-1], TokenHistory):  # where it is, unless layers were added later
        return layers[-1]
    return next((layer for layer in layers if isinstance(layer, TokenHistory)), None)


def known_past(cache: Cache | None) -> TokenHistory | None:
    """The tokens of the positions that ``cache`` holds; None where it holds none.

    A static cache counts its positions on the accelerator, so its history is taken at its word here: lookups by the
    host compare (`check_count`).

    Raises ValueError for a cache without the history of its tokens.
    """
    history = token_history(cache)
    if isinstance(history, StaticTokenHistory):
        return history if history.is_initialized else None
    past = 0 if cache is None else cache.get_seq_length()
    found = history.get_seq_length() if history is not None else 0
    if found != past:
        check_count(int(past), found)
    return history if past else None


def check_count(past: int, found: int) -> None:
    """Raise ValueError where a cache holds the tokens of ``found`` positions, and not of all ``past``."""
    if found != past:
        raise ValueError(
            f"the cache holds {past} positions but the tokens of {found}; a SCONE model continues only caches that it "
            "filled from input_ids"
        )


def extend_history(cache: Cache, tokens: Tensor) -> None:
    """Record the tokens of a forward pass in ``cache``, after the trunk has recorded its keys and values."""
    history = token_history(cache)
    if history is None:
        # layers of a sliding window do not keep a place for every token
        static = next((layer for layer in cache.layers if type(layer) is StaticLayer), None)
        history = TokenHistory() if static is None else StaticTokenHistory(static)
        history.first = next((layer for layer in cache.layers if isinstance(layer, DynamicLayer | StaticLayer)), None)
        cache.layers.append(history)
    history.append(tokens)
