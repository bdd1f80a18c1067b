"""Decoding steps as CUDA graphs: a step is launched as one, however many kernels it has."""

from __future__ import annotations

import logging
import threading
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation.configuration_utils import CompileConfig

from scone.models import cuda_graphs
from scone.models.cuda_graphs import CaptureError, Captures
from scone.models.step_look_up import WARM_UP_CALLS, StepLookUp
from scone.models.token_history import StaticTokenHistory, token_history

logger = logging.getLogger(__name__)

MOST_COMPILED = 8
"""Kinds of steps (batch sizes, lengths of caches) that a model's trunk is compiled for, which takes long each time."""


class CapturedCalls:
    """Calls a model. Steps that can be captured are, from the third alike on; all others are ordinary calls.

    A step can be captured when it has one new token a row on a CUDA device, with gradients off, over a cache whose
    memory stays where it is, and when nothing in it waits for the accelerator: the second call is watched for that, and
    a step that waits stays an ordinary call. What a replayed step returns lies in memory that the next one writes over.

    Where the host has to look up, it does so before each step, and all that follows is captured.

    Args:
        model: a causal language model, ours or a plain one.
        compiles: compile the trunk for each kind of step, as ``generate`` of transformers compiles any model over a
            static cache. Else what is captured is the model as it is: ready at once, and slower than compiled.
        most_caches: graphs are kept, and with them their caches, for so many caches that were used last.
        compile_options: as `torch.compile` takes them.

    Attributes: ``num_ordinary``, calls so far of kinds that no graph is made for, however often they come.

    While a step is captured, no other thread may call the model.
    """

    def __init__(
        self, model: PreTrainedModel, *, compiles: bool = True, most_caches: int = 1, **compile_options: Any
    ) -> None:
        self._model = model
        self.compile_options = compile_options
        self._compiles, self._most_caches = compiles, most_caches
        self._trunk: PreTrainedModel = getattr(model, "trunk", model)
        self._lock = threading.RLock()
        self._forwards: dict[Hashable, Callable[..., Any]] = {}
        self._kept: dict[Cache, _Kept] = {}
        self._known = self._weights_and_modules()
        self.num_ordinary = 0

    def forget(self, cache: Cache | None = None) -> None:
        """Let go of the graphs of ``cache``, or of all, and of what they keep."""
        with self._lock:
            if cache is None:
                self._kept.clear()
            else:
                self._kept.pop(cache, None)

    def forget_if_changed(self) -> bool:
        """`forget` all where a weight or module of the model is another, or lies elsewhere, than when this was last
        asked, and say so. A tenth of a step's time or more, so it is for the beginning of a text: steps look at less.

        Plain attributes of modules (what switches adapters off, say) are not seen: `forget` is for those.
        """
        known = self._weights_and_modules()
        changed = self._known != known
        self._known = known
        if changed:
            self.forget()
        return changed

    def _weights_and_modules(self) -> tuple[Hashable, ...]:
        weights = (*self._model.parameters(), *self._model.buffers())
        modules = ((id(one), len(one._forward_hooks), len(one._forward_pre_hooks)) for one in self._model.modules())
        return (*modules, *((weight.data_ptr(), weight.dtype, weight.device) for weight in weights))

    @property
    def caches(self) -> list[Cache]:
        """Those that graphs are kept for, the last used last."""
        return list(self._kept)

    @property
    def num_graphs(self) -> int:
        """Of all caches."""
        return sum(step.graph is not None for kept in self._kept.values() for step in kept.steps.values())

    def __call__(self, **inputs: Any) -> Any:
        """As the model's own call, by keyword."""
        if not self._may_be_captured(inputs):
            self.num_ordinary += 1
            return self._model(**inputs)
        with self._lock:
            return self._call(inputs)

    def _may_be_captured(self, inputs: Mapping[str, Any]) -> bool:
        tokens = inputs.get("input_ids")
        if tokens is None or tokens.device.type != "cuda" or torch.is_grad_enabled():
            return False
        if torch.is_autocast_enabled("cuda"):  # which keeps weights of its own, for a while
            return False
        return is_step(inputs) and not _asks_for_more(self._trunk.config)

    def _call(self, inputs: Mapping[str, Any]) -> Any:
        step = self._step_of(inputs)
        step.take(inputs)
        if step.graph is None:
            with self._trunk_calls(step.forward):
                output = step.begin()
            self.num_ordinary += step.stays_ordinary
            return output
        table = getattr(self._model, "table_embedding", None)
        if table is not None and step.look_up is None:
            table.num_positions += inputs["input_ids"].numel()
        step.graph.replay()
        return step.output

    def _step_of(self, inputs: Mapping[str, Any]) -> _Step:
        cache: Cache = inputs["past_key_values"]
        kept, memory = self._kept.pop(cache, None), self._memory_of(cache)
        if kept is None or kept.memory != memory:
            kept = _Kept(memory)
        self._kept[cache] = kept
        while len(self._kept) > self._most_caches:
            del self._kept[next(iter(self._kept))]
        key = (self._model.training, torch.is_inference_mode_enabled(), *_facts(inputs))
        step = kept.steps.get(key)
        if step is None:
            first: Any = cache.layers[0]
            step = kept.steps[key] = _Step(self._model, inputs, self._forward_for((first.keys.shape, *key)))
        return step

    def _memory_of(self, cache: Cache) -> tuple[Hashable, ...]:
        """Where the cache, the token embeddings and the table lie: what may change between two steps of a text. For all
        else that a graph reads see `forget_if_changed`.
        """
        layers: list[Any] = cache.layers
        weight: Any = self._model.get_input_embeddings().weight
        table = getattr(self._model, "table_embedding", None)
        return (table, weight.data_ptr(), weight.dtype, *(layer.keys.data_ptr() for layer in layers))

    def _forward_for(self, kind: Hashable) -> Callable[..., Any]:
        """The trunk's forward pass, compiled when it is first called, for one kind of step whatever its cache.

        As code of its own: for each piece of code, which all models of an architecture share, the compiler keeps eight
        compilations.
        """
        if not self._compiles:
            return self._trunk.forward
        if kind in self._forwards:
            return self._forwards[kind]
        if len(self._forwards) == MOST_COMPILED:
            return self._trunk.forward
        if len(self._forwards) == MOST_COMPILED - 1:
            logger.warning("%d kinds of decoding steps are compiled; further ones are only captured", MOST_COMPILED)
        forward = self._forwards[kind] = self._to_be_compiled()
        return forward

    def _to_be_compiled(self) -> Callable[..., Any]:
        forward = self._trunk.forward

        def call(*args: Any, **inputs: Any) -> Any:
            return forward(*args, **inputs)

        alone = types.FunctionType(call.__code__.replace(), call.__globals__, "forward", None, call.__closure__)
        return torch.compile(alone, **({"dynamic": False} | self.compile_options))

    @contextmanager
    def _trunk_calls(self, forward: Callable[..., Any]) -> Iterator[None]:
        usual = self._trunk.__dict__.get("forward")
        self._trunk.forward = forward
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
    if getattr(cache, "offloading", False):  # its layers come on streams of their own
        return False
    masks = inputs.get("attention_mask")
    # a mask of two dimensions is cut by how full the cache is, and those that are no tensors are new ones each time
    if not all(isinstance(mask, Tensor) and mask.ndim == 4 for mask in _values(masks) if mask is not None):
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


def _values(value: Any) -> Iterator[Any]:
    """What a mapping holds, those in it too; anything else is itself."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _values(inner)
    else:
        yield value


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
        if isinstance(value, Cache):
            continue  # of which there is one at a time
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


@dataclass
class _Kept:
    """What belongs to one cache: its steps by kind, and where all lay that they read and write."""

    memory: tuple[Hashable, ...]
    steps: dict[Hashable, _Step] = field(default_factory=dict)


class _Step:
    """One kind of step: counted until it is captured, replayed from then on. All calls read the same memory, so that
    what is compiled in the first ones is what is captured.
    """

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, Any], forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: Any = None
        self._model = model
        self._calls = 0
        self._waits = False
        self._kept = {
            name: torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            for name, tensor in _tensors(inputs)
        }
        self._inputs: dict[str, Any] = _with(inputs, self._kept)
        look_up = getattr(model, "step_look_up", None)  # a plain model looks nothing up
        self.look_up: StepLookUp | None = None if look_up is None else look_up(self._inputs)

    def take(self, inputs: Mapping[str, Any]) -> None:
        """Copy what the next call reads to where it reads it; the host's part of the look-up, if it has one."""
        for name, tensor in _tensors(inputs):
            self._kept[name].copy_(tensor, non_blocking=True)
        if self.look_up is not None:
            self.look_up.prepare()

    def begin(self) -> Any:
        """An ordinary call, or the one that is captured, and then replayed for the first time."""
        self._calls += 1
        if self._calls == WARM_UP_CALLS:
            with cuda_graphs.noted_waits() as waits:
                output = self._run()
            if waits:
                self._waits = True
                cuda_graphs.says_ordinary(f"it waits for the accelerator at {waits[0]}")
            return output
        if self._calls <= WARM_UP_CALLS or self.stays_ordinary:
            return self._run()
        return self._capture()

    @property
    def stays_ordinary(self) -> bool:
        """Whether none of its calls will be captured any more."""
        return self.graph is None and (self._waits or Captures.gave_up)

    def _run(self) -> Any:
        if self.look_up is None:
            return self._model(**self._inputs)
        return self._model(**self._inputs, inputs_embeds=self.look_up.vectors())

    def _capture(self) -> Any:
        table = getattr(self._model, "table_embedding", None)
        num_positions = None if table is None else table.num_positions
        try:
            self.graph, self.output = cuda_graphs.capture(self._inputs["input_ids"].device, self._run)
        except CaptureError:
            history = token_history(self._inputs["past_key_values"])
            if isinstance(history, StaticTokenHistory):
                history.is_written = False
            if table is not None:
                table.num_positions = num_positions
            return self._run()
        self.graph.replay()
        return self.output
