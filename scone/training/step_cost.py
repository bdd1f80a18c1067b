"""What training costs: a SCONE step in plain steps, predicted and measured, and the operations of a whole run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from scone.models.accounting import input_embedding_flops, training_flops, trunk_forward_flops
from scone.models.configuration import SconeConfig
from scone.models.embedded_trunk import EmbeddedTrunk
from scone.models.language_model import SconeForCausalLM


class StepCost:
    """Adds up, between two log lines, the f-gram model's nodes and the time that forward passes took.

    The measured cost compares whole forward passes with what they would take without the input embedding layer; the
    backward pass costs both in the same proportion. Accelerators are timed by events, so nothing waits for them.
    """

    def __init__(self, model: SconeForCausalLM) -> None:
        assert model.f_gram_embedding is not None
        self.model = model
        self._trunk_flops: dict[int, float] = {}
        self._whole = _Stopwatch(model)
        self._embedding = _Stopwatch(model.f_gram_embedding)
        self._start_over()

    def _start_over(self) -> None:
        self._flops = {"trunk": 0.0, "f-grams": 0.0}

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Add the operations of a training batch."""
        positions, length = inputs["input_ids"].numel(), inputs["input_ids"].shape[1]
        if length not in self._trunk_flops:
            self._trunk_flops[length] = trunk_forward_flops(self.model.trunk.config, length)
        self._flops["trunk"] += positions * self._trunk_flops[length]
        trie = inputs["trie"]
        nodes, f_grams = _by_depth(trie["depth_offsets"]), _by_depth(trie["f_gram_offsets"])
        self._flops["f-grams"] += input_embedding_flops(_config(self.model), nodes, f_grams)

    def figures(self) -> dict[str, float]:
        """The costs since the last call, plain steps = 1; nothing where nothing was counted."""
        whole, embedding = self._whole.seconds(), self._embedding.seconds()
        flops = self._flops
        self._start_over()
        if not flops["trunk"] or whole <= embedding:
            return {}
        return {
            "predicted_step_cost": round(1 + flops["f-grams"] / flops["trunk"], 4),
            "measured_step_cost": round(whole / (whole - embedding), 4),
        }


class RunCost:
    """Adds up over a whole run what its batches made the model compute; of several processes, those of this one."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.positions = 0
        self.length = 0
        self._matched: torch.Tensor | int = 0
        self._nodes: list[float] = []
        self._f_grams: list[float] = []

    def count(self, inputs: Mapping[str, Any]) -> None:
        """Add a training batch. Matches stay on the device, so that nothing waits for it."""
        self.positions += inputs["input_ids"].numel()
        self.length = max(self.length, inputs["input_ids"].shape[1])
        if isinstance(self.model, SconeForCausalLM):
            trie = inputs["trie"]
            self._matched = self._matched + trie["position_index"].count_nonzero()
            self._nodes = _sum(self._nodes, _by_depth(trie["depth_offsets"]))
            self._f_grams = _sum(self._f_grams, _by_depth(trie["f_gram_offsets"]))

    def counts(self) -> dict[str, Any]:
        """What was added up so far, JSON-ready: for a checkpoint."""
        counted = {"positions": self.positions, "length": self.length, "matched": int(self._matched)}
        return counted | {"nodes": self._nodes, "f_grams": self._f_grams}

    def go_on_from(self, counts: Mapping[str, Any]) -> None:
        """Go on from the `counts` of a checkpoint."""
        self.positions, self.length, self._matched = (counts[name] for name in ("positions", "length", "matched"))
        self._nodes, self._f_grams = list(counts["nodes"]), list(counts["f_grams"])

    def to_dict(self, recomputed: bool = False) -> dict[str, Any]:
        """Operations per token, and of a SCONE model what it matched and computed per position; JSON-ready.

        ``recomputed``: with gradient checkpointing. Serving costs the trunk's forward operations alone: the input
        embedding is a row read. Attention counts whole blocks, as ``trunk_forward_flops`` says.
        """
        model = self.model
        trunk_config: Any = model.trunk.config if isinstance(model, EmbeddedTrunk) else model.config
        trunk = trunk_forward_flops(trunk_config, self.length)
        figures: dict[str, Any] = {"inference_flops_per_token": trunk, "f_gram_flops_per_token": 0.0}
        if isinstance(model, SconeForCausalLM):
            nodes = [count / self.positions for count in self._nodes]
            f_grams = [count / self.positions for count in self._f_grams]
            figures["f_gram_flops_per_token"] = input_embedding_flops(_config(model), nodes, f_grams)
            figures |= {
                "match_rate": int(self._matched) / self.positions,
                "nodes_per_position": sum(nodes),
                "nodes_per_position_by_depth": nodes,
                "f_grams_per_position_by_depth": f_grams,
            }
        forward = trunk + figures["f_gram_flops_per_token"]
        return figures | {"training_flops_per_token": training_flops(forward, recomputed)}


def _config(model: SconeForCausalLM) -> SconeConfig:
    assert isinstance(model.config, SconeConfig)
    return model.config


def _sum(left: list[float], right: list[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)] if left else right


def _by_depth(offsets: list[int]) -> list[float]:
    return [float(after - before) for before, after in pairwise(offsets)]


class _Stopwatch:
    """Times the forward passes of a module in training mode, by hooks."""

    def __init__(self, module: nn.Module) -> None:
        self._marks: list[tuple[Any, Any]] = []
        self._begun: Any = None
        module.register_forward_pre_hook(self._start, with_kwargs=True)
        module.register_forward_hook(self._stop, with_kwargs=True)

    def _start(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module.training:
            self._begun = _now(module)

    def _stop(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if module.training:
            self._marks.append((self._begun, _now(module)))

    def seconds(self) -> float:
        """Time measured since the last call."""
        marks, self._marks = self._marks, []
        return sum(_seconds_between(start, stop) for start, stop in marks)


def _now(module: nn.Module) -> Any:
    parameter = next(module.parameters())
    if parameter.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds_between(start: Any, stop: Any) -> float:
    if isinstance(start, float):
        return stop - start
    stop.synchronize()
    return start.elapsed_time(stop) / 1000
