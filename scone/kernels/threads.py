"""Share a range out over plain threads, which forked data loading workers survive, unlike parallel loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def run_in_parts(kernel: Callable[..., Any], arguments: Sequence[Any], size: int, parts: int) -> None:
    """Call ``kernel(*arguments, first, last)`` on ``parts`` ranges that cover ``size`` places, side by side.

    The kernel has to release the interpreter's lock; one part, or none, runs in the caller's thread.
    """
    parts = max(1, min(parts, size))
    if parts == 1:
        kernel(*arguments, 0, size)
        return
    cuts = [size * part // parts for part in range(parts + 1)]
    with ThreadPoolExecutor(parts - 1) as threads:
        others = [threads.submit(kernel, *arguments, cuts[part], cuts[part + 1]) for part in range(1, parts)]
        kernel(*arguments, cuts[0], cuts[1])
        for other in others:
            other.result()
