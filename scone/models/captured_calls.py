"""Decoding steps as CUDA graphs: a step is launched as one, however many kernels it has."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.configuration_utils import CompileConfig

from scone.models.token_history import StaticTokenHistory

WARM_UP_CALLS = 2
"""Ordinary calls before one is captured: they compile, and make what libraries make at their first use."""


class CapturedCalls:
    """Calls a model. Steps that can be captured are, from the third alike on; all others are ordinary calls.

    A step can be captured when it has one new token a row on a CUDA device, with gradients off, over a cache whose
    memory stays where it is, and when the model does not wait for the host in it (which its owner has to know). What a
    replayed step returns lies in memory that the next one writes over. Graphs are kept for the cache that was used
    last; whoever moves the weights or reorders the cache gets new ones.

    The trunk is compiled for these steps (``compile_options``: as `torch.compile` takes them), as ``generate`` of
    transformers compiles any model over a static cache.
    """

    def __init__(self, model: PreTrainedModel, **compile_options: Any) -> None:
        self._model = model
        self.compile_options = compile_options
        self._trunk: PreTrainedModel = getattr(model, "trunk", model)
        self._compiled = torch.compile(self._trunk.forward, **({"dynamic": False} | compile_options))
        self._graphs: dict[Hashable, _Step] = {}
        self._memory: list[Any] = []

    def __call__(self, **inputs: Any) -> Any:
        """As the model's own call, by keyword."""
        if not can_capture(inputs):
            return self._model(**inputs)
        memory = self._memory_of(inputs["past_key_values"])
        if len(memory) != len(self._memory) or any(a is not b for a, b in zip(memory, self._memory, strict=True)):
            self._graphs.clear()
            self._memory = memory
        key = tuple(_facts(name, value) for name, value in inputs.items())
        step = self._graphs.get(key)
        if step is None:
            step = self._graphs[key] = _Step(inputs)
        step.take(inputs)
        if step.graph is None:
            with self._compiled_trunk():
                return step.begin(self._model)
        table = getattr(self._model, "table_embedding", None)
        if table is not None:
            table.num_positions += inputs["input_ids"].numel()
        step.graph.replay()
        return step.output

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedCalls:
        return CapturedCalls(copy.deepcopy(self._model, memo), **self.compile_options)

    def _memory_of(self, cache: Cache) -> list[Any]:
        """Everything that a graph reads and writes where it was when it was captured."""
        table = getattr(self._model, "table_embedding", None)
        weight = self._model.get_input_embeddings().weight
        layers: list[Any] = cache.layers
        return [cache, table, weight, *(layer.keys for layer in layers)]

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


def can_capture(inputs: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments is a step that can be captured, as far as they tell."""
    tokens, cache = inputs.get("input_ids"), inputs.get("past_key_values")
    if tokens is None or tokens.device.type != "cuda" or tokens.ndim != 2 or tokens.shape[1] != 1:
        return False
    if cache is None or torch.is_grad_enabled():
        return False
    if not all(isinstance(layer, StaticLayer | StaticTokenHistory) and layer.is_initialized for layer in cache.layers):
        return False
    mask = inputs.get("attention_mask")
    return mask is None or mask.ndim == 4  # one of two dimensions is cut by how full the cache is


def _facts(name: str, value: Any) -> Hashable:
    """What of an argument a graph is made for."""
    if isinstance(value, Tensor):
        return name, tuple(value.shape), value.dtype, value.device
    return name, value if isinstance(value, Hashable) else id(value)


def options_within_a_graph(config: CompileConfig | None) -> dict[str, Any]:
    """What ``generate`` was told about compiling (None: its defaults), for what is captured by ourselves."""
    given = (CompileConfig() if config is None else config).to_dict()
    modes = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
    given["mode"] = modes.get(given["mode"], given["mode"])
    return {name: value for name, value in given.items() if value is not None}


class _Step:
    """One kind of step: counted until it is captured, replayed from then on. All calls read the same memory, so that
    what is compiled in the first ones is what is captured.
    """

    def __init__(self, inputs: Mapping[str, Any]) -> None:
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        self._calls = 0
        self._inputs = dict(inputs)
        self._tensors = {
            name: torch.empty(value.shape, dtype=value.dtype, device=value.device)
            for name, value in inputs.items()
            if isinstance(value, Tensor)
        }
        self._inputs |= self._tensors

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Copy what the next call reads to where it reads it."""
        for name, kept in self._tensors.items():
            kept.copy_(inputs[name], non_blocking=True)

    def begin(self, model: PreTrainedModel) -> Any:
        """An ordinary call, or the one that is captured, and then replayed for the first time."""
        self._calls += 1
        if self._calls <= WARM_UP_CALLS:
            return model(**self._inputs)
        graph = torch.cuda.CUDAGraph()
        # other threads may go on with work of their own
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.output = model(**self._inputs)
        self.graph = graph
        graph.replay()
        return self.output
