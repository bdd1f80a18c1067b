"""One way to spread work over threads: results in order, and never more than a few items under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

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
