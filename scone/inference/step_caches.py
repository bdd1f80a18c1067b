"""Static caches that batches use again, with the CUDA graphs of the steps over them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from scone.models.captured_calls import CapturedCalls, lies_on_one_device
from scone.models.cuda_graphs import Captures
from scone.models.step_look_up import WARM_UP_CALLS

SHORTEST = 128
"""Positions of the shortest cache; others have twice as many as the one before."""
MOST_CACHES = 16
SHARE_OF_MEMORY = 0.125
"""Of the accelerator's, that caches may take when they wait for their next batch."""

ONE_BATCH_AT_A_TIME = threading.RLock()
"""Held while a batch runs that may be captured: meanwhile no other thread may use that device's random numbers."""


class StepCaches:
    """For one model on a CUDA device: caches of fixed size, by number of rows and of positions.

    Steps are captured as the model is, not compiled: they are ready after three of them, and a new number of rows or
    positions costs no more than these.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._calls = CapturedCalls(model, compiles=False, most_caches=MOST_CACHES)
        self._caches: dict[tuple[int, int], StaticCache] = {}
        trunk: Any = getattr(model, "trunk", model)
        self._config = trunk.config.get_text_config(decoder=True)
        self._itemsize = trunk.dtype.itemsize
        self._largest = 0
        if _can_be_captured(model):
            self._largest = int(SHARE_OF_MEMORY * torch.cuda.mem_get_info(model.device)[1])

    @contextmanager
    def for_batch(self, num_rows: int, num_positions: int, num_steps: int) -> Iterator[StaticCache | None]:
        """An empty cache for a batch that ``generate`` will run inside the block, whose steps are captured then.

        None where that is not possible, or not worth it: the model is on no GPU or on several, its caches are of other
        kinds, the memory is not there, there are too few steps.
        """
        key = num_rows, _length(num_positions)
        if num_steps <= WARM_UP_CALLS + 1 or not self._has_room(key):
            yield None
            return
        cache = self._caches.pop(key, None)
        if cache is None:
            cache = StaticCache(self._config, max_cache_len=key[1])
        with torch.no_grad():
            cache.reset()
        model: Any = self._model
        model.get_compiled_call = lambda _: self._calls
        ordinary_before = self._calls.num_ordinary
        try:
            yield cache
        finally:
            del model.get_compiled_call
            self._caches[key] = cache  # the last used is last
            if self._calls.num_ordinary > ordinary_before:  # they are faster over a cache that grows
                self.clear()
                self._largest = 0

    def clear(self) -> None:
        """Give all of their memory back."""
        self._calls.forget()
        self._caches.clear()

    def _has_room(self, key: tuple[int, int]) -> bool:
        """Whether the cache of ``key`` may be there, after those were dropped that were used longest ago."""
        wanted = self._bytes(key)
        if wanted > self._largest:
            return False
        if key in self._caches:
            return True
        held = sum(self._bytes(other) for other in self._caches)
        while held + wanted > self._largest or len(self._caches) == MOST_CACHES:
            oldest = next(iter(self._caches))
            self._calls.forget(self._caches.pop(oldest))
            held -= self._bytes(oldest)
        return 2 * wanted <= _free_bytes(self._model.device)

    def _bytes(self, key: tuple[int, int]) -> int:
        config, (num_rows, length) = self._config, key
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(2 * config.num_hidden_layers * heads * width * num_rows * length * self._itemsize)


def _length(num_positions: int) -> int:
    """The size of the cache that so many positions go into."""
    length = SHORTEST
    while length < num_positions:
        length *= 2
    return length


def _free_bytes(device: torch.device) -> int:
    """What PyTorch could still take, or holds and does not use."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _can_be_captured(model: PreTrainedModel) -> bool:
    """As far as the model tells."""
    trunk: Any = getattr(model, "trunk", model)
    if model.device.type != "cuda" or not lies_on_one_device(model) or not trunk._can_compile_fullgraph:
        return False
    if Captures.gave_up:
        return False
    return all(type(layer) is StaticLayer for layer in StaticCache(trunk.config, max_cache_len=SHORTEST).layers)
