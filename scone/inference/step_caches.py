"""Static caches that batches use again, with the CUDA graphs of the steps over them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from scone.models.captured_calls import CapturedCalls, lies_on_one_device
from scone.models.cuda_graphs import Captures
from scone.models.step_look_up import WARM_UP_CALLS

SHORTEST = 128
"""Positions of the shortest cache; others have twice as many as the one before."""
MOST_CACHES = 64
SHARE_OF_MEMORY = 0.125
"""Of the accelerator's, that the caches of one model may take."""
MOST_ORDINARY_BATCHES = 3
"""In a row, in which steps were not captured: then caches that grow are faster."""

_ONE_BATCH_AT_A_TIME = threading.RLock()
_USED: weakref.WeakSet[StepCaches] = weakref.WeakSet()
_USED_LOCK = threading.Lock()


def turn_on_a_gpu() -> AbstractContextManager[Any]:
    """To be held while a batch runs on a GPU, whichever: while a step is captured no other thread may draw random
    numbers there, and seeding seeds all GPUs. Where no engine captures, nobody has to wait.
    """
    with _USED_LOCK:
        captures = any(caches.may_capture for caches in _USED)
    return _ONE_BATCH_AT_A_TIME if captures else nullcontext()


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
        self._is_lent = False
        self._ordinary_batches = 0
        self._largest, self._place_bytes = 0, 0
        self._measure()
        with _USED_LOCK:
            _USED.add(self)

    @property
    def may_capture(self) -> bool:
        """Whether batches are captured, as far as is known."""
        return self._largest > 0

    @contextmanager
    def for_batch(self, num_rows: int, num_positions: int, num_steps: int) -> Iterator[StaticCache | None]:
        """An empty cache for a batch that ``generate`` will run inside the block, whose steps are captured then.

        None where that is not possible, or not worth it: the model is on no GPU or on several, or is to generate in a
        way of its own; its caches are of other kinds; the memory is not there; there are too few steps; a batch calls
        for another before it ends.
        """
        key = num_rows, _length(num_positions)
        if not self._is_lent and self._calls.forget_if_changed():
            self._caches.clear()
            self._measure()
        is_worth_it = num_steps > WARM_UP_CALLS + 1 and not _has_a_way_of_its_own(self._model)
        if self._is_lent or not (is_worth_it and self.may_capture and self._made_room(key)):
            yield None
            return
        cache = self._caches.pop(key, None)
        if cache is not None and not _may_be_written(cache):
            self._calls.forget(cache)
            cache = None
        if cache is None:
            cache = StaticCache(self._config, max_cache_len=key[1])
        self._caches[key] = cache  # the last used is last
        with torch.no_grad():
            cache.reset()
        ordinary_before = self._calls.num_ordinary
        try:
            with self._captured():
                yield cache
        finally:
            self._learn(key, cache, self._calls.num_ordinary > ordinary_before)

    @contextmanager
    def _captured(self) -> Iterator[None]:
        """Meanwhile ``generate`` captures this thread's steps here; those of other threads as ever."""
        model: Any = self._model
        usual: Callable[..., Any] = model.get_compiled_call
        was_set, thread = "get_compiled_call" in model.__dict__, threading.get_ident()
        model.get_compiled_call = lambda config: self._calls if threading.get_ident() == thread else usual(config)
        self._is_lent = True
        try:
            yield
        finally:
            self._is_lent = False
            if was_set:
                model.get_compiled_call = usual
            else:
                del model.get_compiled_call

    def _learn(self, key: tuple[int, int], cache: StaticCache, was_ordinary: bool) -> None:
        """What a batch showed: whether steps are captured, and how large its cache is."""
        self._ordinary_batches = self._ordinary_batches + 1 if was_ordinary else 0
        if self._ordinary_batches == MOST_ORDINARY_BATCHES:
            self.clear()
            self._largest = 0
        layers: list[Any] = [layer for layer in cache.layers if type(layer) is StaticLayer and layer.is_initialized]
        if layers:
            real = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
            self._place_bytes = -(-real // (key[0] * key[1]))

    def clear(self) -> None:
        """Give all of their memory back."""
        self._calls.forget()
        self._caches.clear()

    def _measure(self) -> None:
        """How much memory there is for caches, and, until one was measured, what a position of a row may take."""
        self._largest = 0
        if not _can_be_captured(self._model):
            return
        self._largest = int(SHARE_OF_MEMORY * torch.cuda.mem_get_info(self._model.device)[1])
        trunk: Any = getattr(self._model, "trunk", self._model)
        sizes = [getattr(self._config, name, None) or 0 for name in ("num_hidden_layers", "hidden_size")]
        self._place_bytes = 2 * sizes[0] * sizes[1] * trunk.dtype.itemsize

    def _made_room(self, key: tuple[int, int]) -> bool:
        """Whether there is room for the cache of ``key``, made by dropping those that were used longest ago."""
        if key in self._caches:
            return True
        wanted, kept = self._bytes(key), list(self._caches)
        dropped: list[tuple[int, int]] = []
        while kept and (sum(map(self._bytes, kept)) + wanted > self._largest or len(kept) == MOST_CACHES):
            dropped.append(kept.pop(0))
        if wanted > self._largest:
            return False
        if 2 * wanted > _free_bytes(self._model.device) + sum(map(self._bytes, dropped)):
            return False
        for oldest in dropped:
            self._calls.forget(self._caches.pop(oldest))
        return True

    def _bytes(self, key: tuple[int, int]) -> int:
        return key[0] * key[1] * self._place_bytes


def _may_be_written(cache: StaticCache) -> bool:
    """Not outside of the inference mode in which its memory was made."""
    first: Any = cache.layers[0]
    return torch.is_inference_mode_enabled() or not (first.is_initialized and first.keys.is_inference())


def _length(num_positions: int) -> int:
    """The size of the cache that so many positions go into."""
    length = SHORTEST
    while length < num_positions:
        length *= 2
    return length


def _free_bytes(device: torch.device) -> int:
    """What PyTorch could still take, or holds and does not use (a part of which only graphs can)."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def _has_a_way_of_its_own(model: PreTrainedModel) -> bool:
    """Whether the model's own settings ask ``generate`` for other caches, for drafts, or to compile nothing."""
    own = model.generation_config
    asked = ("cache_implementation", "prompt_lookup_num_tokens", "disable_compile", "assistant_early_exit")
    return own is not None and any(getattr(own, name, None) for name in asked)


def _can_be_captured(model: PreTrainedModel) -> bool:
    """As far as the model tells."""
    trunk: Any = getattr(model, "trunk", model)
    if model.device.type != "cuda" or not lies_on_one_device(model) or not trunk._can_compile_fullgraph:
        return False
    quantizer = getattr(model, "hf_quantizer", None) or getattr(trunk, "hf_quantizer", None)
    if Captures.gave_up or not (quantizer is None or quantizer.is_compileable):
        return False
    try:
        layers = StaticCache(trunk.config.get_text_config(decoder=True), max_cache_len=SHORTEST).layers
    except Exception:  # of a configuration that no such cache can be made of
        return False
    return all(type(layer) is StaticLayer for layer in layers)
