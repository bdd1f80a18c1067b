"""Captured steps without a GPU: what stands in for a CUDA graph does the work again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from scone.models import captured_calls, cuda_graphs, step_look_up
from scone.models.captured_calls import CapturedCalls


class RunAgain:
    """In place of a graph: replaying does the work and writes what comes of it into the memory of the first time.

    Capturing does the work too, which it should not, so the first replay does nothing.
    """

    def __init__(self, work: Callable[[], Any]) -> None:
        self._work, self.output = work, work()
        self._is_first = True

    def replay(self) -> None:
        if not self._is_first:
            output = self._work()
            if output is not None:
                self.output.logits.copy_(output.logits)
        self._is_first = False


def pretend(patch: pytest.MonkeyPatch, waits: list[str] | None = None) -> list[torch.Size]:
    """Let all steps on a CPU be taken for steps on a GPU. The list that is returned gets the shape of each captured
    step's logits; ``waits`` is where every second call of a step waited.
    """
    captured: list[torch.Size] = []

    def capture(device: torch.device, work: Callable[[], Any]) -> tuple[RunAgain, Any]:
        graph = RunAgain(work)
        if graph.output is not None:  # not of a look-up
            captured.append(graph.output.logits.shape)
        return graph, graph.output

    patch.setattr(cuda_graphs, "noted_waits", lambda: nullcontext(waits or []))
    patch.setattr(cuda_graphs, "capture", capture)
    patch.setattr(step_look_up, "capture", capture)
    patch.setattr(CapturedCalls, "_may_be_captured", lambda _, inputs: captured_calls.is_step(inputs))
    return captured
