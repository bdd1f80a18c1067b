"""How long a step's parts take in a worker that serves: methods that `vllm serve --worker-extension-cls` adds to it."""

from __future__ import annotations

from time import thread_time
from typing import Any


class StepTimes:
    """Called over HTTP (``/collective_rpc``, in vLLM's mode for developers)."""

    _steps: list[tuple[int, float, float]]

    def watch_steps(self) -> None:
        """From now on, time the model's forward pass and its trunk's within it, in seconds of this thread's own: it is
        not their fault if others use the core.
        """
        model: Any = self.get_model()  # type: ignore[attr-defined]
        whole, trunk, of_trunk = model.forward, model.trunk.forward, [0.0]
        self._steps = []

        def timed_trunk(*inputs: Any, **named: Any) -> Any:
            started = thread_time()
            output = trunk(*inputs, **named)
            of_trunk[0] = thread_time() - started
            return output

        def timed_whole(*inputs: Any, **named: Any) -> Any:
            started = thread_time()
            output = whole(*inputs, **named)
            seconds = thread_time() - started
            self._steps.append((len(output), seconds - of_trunk[0], seconds))
            return output

        model.forward, model.trunk.forward = timed_whole, timed_trunk

    def step_times(self) -> list[tuple[int, float, float]]:
        """Tokens, seconds of all but the trunk, and seconds of both, of each step since the last call."""
        steps, self._steps = self._steps, []
        return steps
