"""Long work: progress bars with an estimate, and threads that give results in order, few of them under way."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar


class Progress(Protocol):
    """What a progress bar can do."""

    def update(self, n: int, /) -> object: ...


@contextmanager
def progress(total: int | None, unit: str, description: str, quiet: bool = False) -> Iterator[Progress]:
    """A bar counting ``unit``s up to ``total`` (None: unknown).

    Silent when ``quiet``, or when the error stream is not a terminal (``SCONE_PROGRESS=1`` forces it).
    """
    from tqdm import tqdm

    hidden = quiet or not bars_are_visible()
    with tqdm(total=total, unit=unit, desc=description, unit_scale=True, disable=hidden, file=sys.stderr) as bar:
        yield bar


def bars_are_visible() -> bool:
    """Whether progress bars are drawn: on a terminal, or where ``SCONE_PROGRESS=1`` asks for them; never when quiet."""
    return not is_quiet() and (sys.stderr.isatty() or os.environ.get("SCONE_PROGRESS") == "1")


def is_quiet() -> bool:
    """Whether ``--quiet`` was given (or ``SCONE_PROGRESS=0`` is set): results and errors only."""
    return os.environ.get("SCONE_PROGRESS") == "0"


def hide_library_bars(quiet: bool = False) -> None:
    """Apply the same rule to the bars that transformers draws while it loads and saves weights."""
    from transformers.utils import logging

    if quiet or not bars_are_visible():
        logging.disable_progress_bar()


def available_cores() -> int:
    """How many cores this process may use: a container, or whoever started it, may leave it fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    work: Callable[[Item], Result], items: Iterable[Item], num_threads: int, **pool_options: Any
) -> Iterator[Result]:
    """``work`` of every item on ``num_threads`` threads, in the order of the items.

    ``ThreadPoolExecutor.map`` would take all items at once; here at most three a thread are taken and not yet handed
    on, which bounds memory. After an error, or when the caller stops, nothing new begins and what runs is let finish.
    ``pool_options`` go to the executor (``initializer`` and the like).
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(num_threads, **pool_options)
    try:
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * num_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
