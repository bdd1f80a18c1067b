"""Captured steps without a GPU: what stands in for a CUDA graph does the same operations on the same memory again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from scone.models import captured_calls, cuda_graphs, step_look_up
from scone.models.captured_calls import CapturedCalls


class Recorder(TorchDispatchMode):
    """Notes every operator with the tensors that it read and returned."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.operations.append((operator, args, kwargs or {}, result))
        return result


class Replayed:
    """In place of a graph: no Python of the model runs again, so what the host would decide anew stays as it was.

    Capturing does the work too, which it should not, so the first replay does nothing.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        with Recorder() as recorder:
            self.output = work()
        self._operations = recorder.operations
        self._is_first = True

    def replay(self) -> None:
        if not self._is_first:
            with torch.no_grad():
                for operator, args, kwargs, result in self._operations:
                    self._again(operator, args, kwargs, result)
        self._is_first = False

    @staticmethod
    def _again(operator: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Results go where they lay the first time; those that are views of arguments are there already."""
        read = {_memory(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for now, then in zip(tree_leaves(operator(*args, **kwargs)), tree_leaves(result), strict=True):
            if isinstance(then, Tensor) and then.numel() and _memory(then) not in read:
                then.copy_(now)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def pretend(patch: pytest.MonkeyPatch, waits: list[str] | None = None) -> list[torch.Size]:
    """Let all steps on a CPU be taken for steps on a GPU. The list that is returned gets the shape of each captured
    step's logits; ``waits`` is where every second call of a step waited.
    """
    captured: list[torch.Size] = []

    def capture(device: torch.device, work: Callable[[], Any]) -> tuple[Replayed, Any]:
        graph = Replayed(work)
        if graph.output is not None:  # not of a look-up
            captured.append(graph.output.logits.shape)
        return graph, graph.output

    patch.setattr(cuda_graphs, "noted_waits", lambda: nullcontext(waits or []))
    patch.setattr(cuda_graphs, "capture", capture)
    patch.setattr(step_look_up, "capture", capture)
    patch.setattr(CapturedCalls, "_may_be_captured", lambda _, inputs: captured_calls.is_step(inputs))
    return captured
