"""Decoding steps as CUDA graphs: a step is launched as one, however many kernels it has."""

from __future__ import annotations

import logging
import threading
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.configuration_utils import CompileConfig

from scone.models.token_history import StaticTokenHistory, token_history

logger = logging.getLogger(__name__)

WARM_UP_CALLS = 2
"""Ordinary calls before one is captured: they compile, and make what libraries make at their first use."""


class CapturedCalls:
    """Calls a model. Steps that can be captured are, from the third alike on; all others are ordinary calls.

    A step can be captured when it has one new token a row on a CUDA device, with gradients off, over a cache whose
    memory stays where it is, and when the model does not wait for the host in it (which its owner has to know; a step
    that turns out to wait stays an ordinary call). What a replayed step returns lies in memory that the next one writes
    over. Graphs are kept, and with them their cache, for the cache that was used last.

    The trunk is compiled for these steps (``compile_options``: as `torch.compile` takes them), as ``generate`` of
    transformers compiles any model over a static cache. While one is captured, no other thread may call the model.
    """

    def __init__(self, model: PreTrainedModel, **compile_options: Any) -> None:
        self._model = model
        self.compile_options = compile_options
        self._trunk: PreTrainedModel = getattr(model, "trunk", model)
        self._compiled = torch.compile(self._trunk.forward, **({"dynamic": False} | compile_options))
        self._lock = threading.RLock()
        self.forget()

    def forget(self) -> None:
        """Let go of all graphs, and of the cache that they belong to."""
        with self._lock:
            self.cache: Cache | None = None
            self._memory: tuple[Hashable, ...] = ()
            self._steps: dict[Hashable, _Step] = {}

    def __call__(self, **inputs: Any) -> Any:
        """As the model's own call, by keyword."""
        tokens = inputs.get("input_ids")
        if tokens is None or tokens.device.type != "cuda" or torch.is_grad_enabled():
            return self._model(**inputs)
        if not is_step(inputs) or _asks_for_more(self._trunk.config):
            return self._model(**inputs)
        with self._lock:
            return self._call(inputs)

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        cache: Cache = inputs["past_key_values"]
        memory = self._memory_of(cache)
        if cache is not self.cache or memory != self._memory:
            self.forget()
            self.cache, self._memory = cache, memory
        key = (self._model.training, torch.is_inference_mode_enabled(), *_facts(inputs))
        step = self._steps.get(key)
        if step is None:
            step = self._steps[key] = _Step(inputs)
        step.take(inputs)
        if step.graph is None:
            with self._compiled_trunk():
                return step.begin(self._model)
        table = getattr(self._model, "table_embedding", None)
        if table is not None:
            table.num_positions += inputs["input_ids"].numel()
        step.graph.replay()
        return step.output

    def _memory_of(self, cache: Cache) -> tuple[Hashable, ...]:
        """Where everything lies that a graph reads and writes."""
        layers: list[Any] = cache.layers
        weight: Any = self._model.get_input_embeddings().weight
        table = getattr(self._model, "table_embedding", None)
        return (id(table), weight.data_ptr(), weight.dtype, *(layer.keys.data_ptr() for layer in layers))

    @contextmanager
    def _compiled_trunk(self) -> Iterator[None]:
        usual = self._trunk.__dict__.get("forward")
        self._trunk.forward = self._compiled
        try:
            yield
        finally:
            if usual is None:
                del self._trunk.forward
            else:
                self._trunk.forward = usual


def is_step(inputs: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments is a step that can be captured, as far as they tell."""
    tokens, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if tokens is None or tokens.ndim != 2 or tokens.shape[1] != 1 or cache is None:
        return False
    # not those of a sliding window, which count on the host
    if not all(type(layer) in (StaticLayer, StaticTokenHistory) and layer.is_initialized for layer in cache.layers):
        return False
    # a mask of two dimensions is cut by how full the cache is
    if any(mask.ndim != 4 for _, mask in _tensors(inputs.get("attention_mask"))):
        return False
    return not (inputs.get("output_hidden_states") or inputs.get("output_attentions"))


def _asks_for_more(config: Any) -> bool:
    """Whether a step returns what ``generate`` keeps as it is, and the next step would write over."""
    return bool(getattr(config, "output_hidden_states", False) or getattr(config, "output_attentions", False))


def lies_on_one_device(model: PreTrainedModel) -> bool:
    """Whether all weights do: a graph belongs to one."""
    return len({parameter.device for parameter in model.parameters()}) == 1


def options_within_a_graph(config: CompileConfig | None) -> dict[str, Any]:
    """What ``generate`` was told about compiling (None: its defaults), for what is captured by ourselves."""
    given = (CompileConfig() if config is None else config).to_dict()
    modes = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
    given["mode"] = modes.get(given["mode"], given["mode"])
    return {name: value for name, value in given.items() if value is not None}


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors among arguments, those in mappings too (a mask for each kind of layer), by name."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}")


def _facts(inputs: Mapping[str, Any]) -> Iterator[Hashable]:
    """What of its arguments a graph is made for."""
    for name, value in inputs.items():
        if isinstance(value, Tensor | dict):
            for inner, tensor in _tensors(value, name):
                yield inner, tensor.shape, tensor.dtype, tensor.device
        else:
            yield name, value if isinstance(value, Hashable) else id(value)


def _with(value: Any, kept: Mapping[str, Tensor], name: str = "") -> Any:
    """Arguments with ``kept`` in place of their tensors."""
    if isinstance(value, Tensor):
        return kept[name]
    if isinstance(value, dict):
        return {key: _with(inner, kept, f"{name}.{key}") for key, inner in value.items()}
    return value


class _Step:
    """One kind of step: counted until it is captured, replayed from then on. All calls read the same memory, so that
    what is compiled in the first ones is what is captured.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        self._calls = 0
        self._kept = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for name, tensor in _tensors(inputs)
        }
        self._inputs: dict[str, Any] = _with(inputs, self._kept)

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Copy what the next call reads to where it reads it."""
        for name, tensor in _tensors(inputs):
            self._kept[name].copy_(tensor, non_blocking=True)

    def begin(self, model: PreTrainedModel) -> Any:
        """An ordinary call, or the one that is captured, and then replayed for the first time."""
        self._calls += 1
        if self._calls != WARM_UP_CALLS + 1:
            return model(**self._inputs)
        device = self._inputs["input_ids"].device
        graph = torch.cuda.CUDAGraph()
        try:
            # on a stream of that device, and other threads may go on with work of their own
            stream = torch.cuda.Stream(device)
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self.output = model(**self._inputs)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            logger.warning("a decoding step cannot be captured as a CUDA graph and stays an ordinary call: %s", reason)
            history = token_history(self._inputs["past_key_values"])
            if isinstance(history, StaticTokenHistory):
                history.is_written = False  # nothing of what was captured has run
            return model(**self._inputs)
        self.graph = graph
        graph.replay()
        return self.output
