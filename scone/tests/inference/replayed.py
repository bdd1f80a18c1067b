"""Captured steps without a GPU: what stands in for a CUDA graph calls the model again."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from scone.models import captured_calls
from scone.models.captured_calls import CapturedCalls


class RunAgain:
    """In place of a graph: replaying calls the model on what was captured, into the same memory."""

    def __init__(self, step: captured_calls._Step, model: Any) -> None:
        self._step, self._model = step, model

    def replay(self) -> None:
        table = getattr(self._model, "table_embedding", None)
        before = None if table is None else table.num_positions
        self._step.output.logits.copy_(self._model(**self._step._inputs).logits)
        if table is not None:
            assert table.num_positions == before, "what a graph does is counted outside of it"


def pretend(patch: pytest.MonkeyPatch, waits: list[str] | None = None) -> list[torch.Size]:
    """Let all steps on a CPU be taken for steps on a GPU. The list that is returned gets the shape of each captured
    step's tokens; ``waits`` is where every second call of a step waited.
    """
    captured: list[torch.Size] = []

    def capture(step: captured_calls._Step, model: Any) -> Any:
        captured.append(step._inputs["input_ids"].shape)
        step.output, step.graph = model(**step._inputs), RunAgain(step, model)  # type: ignore[assignment]
        return step.output

    patch.setattr(captured_calls, "_noted_waits", lambda: nullcontext(waits or []))
    patch.setattr(captured_calls._Step, "_capture", capture)
    patch.setattr(CapturedCalls, "_may_be_captured", lambda _, inputs: captured_calls.is_step(inputs))
    return captured
