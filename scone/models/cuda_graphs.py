"""Capturing CUDA graphs, and what has to be known before: whether the work waits for the accelerator."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class CaptureError(Exception):
    """A graph could not be captured; nothing of the work has run."""


class Captures:
    """Attributes: ``gave_up``, whether one failed in this process: PyTorch cannot begin another one then (pytorch issue
    180395).
    """

    gave_up = False


def capture(device: torch.device, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The graph of ``work`` on ``device``, which has not run yet, and what ``work`` returned: memory that the graph
    will write to. Raises CaptureError.
    """
    graph = torch.cuda.CUDAGraph()
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    state = generator.get_state()
    try:
        # Captured on a stream of that device, and other threads may go on with work of their own. The outer block
        # is for a failure, after which the inner one leaves its stream as the current one.
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
            stream = torch.cuda.Stream(device)
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                result = work()
    except RuntimeError as error:
        Captures.gave_up = True
        # random numbers would still be taken for a part of the graph
        fresh = torch.Generator(device)
        fresh.set_state(state)
        generator.graphsafe_set_state(fresh.graphsafe_get_state())
        reason = str(error).partition("\n")[0]
        says_ordinary(reason)
        raise CaptureError(reason) from error
    return graph, result


def wait_for(device: torch.device) -> None:
    """Wait for the work of this thread's stream."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


@contextmanager
def noted_waits() -> Iterator[list[str]]:
    """Where this thread waits for the accelerator meanwhile, as far as PyTorch knows of it."""
    waits: list[str] = []
    thread, before = threading.get_ident(), torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        show = warnings.showwarning

        def note(message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: object) -> None:
            if "synchronizing CUDA" not in str(message):
                show(message, category, filename, lineno, *more)  # type: ignore[arg-type]
            elif threading.get_ident() == thread:
                waits.append(f"{filename}:{lineno}")

        warnings.showwarning = note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)


def says_ordinary(reason: str) -> None:
    """Tell the user why decoding is slower than it could be."""
    logger.warning("a decoding step cannot be captured as a CUDA graph and stays an ordinary call: %s", reason)
