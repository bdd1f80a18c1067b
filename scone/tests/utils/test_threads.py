"""Mapping over threads keeps the order, takes few items ahead, and stops at an error or where its caller does."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.utils.progress import map_in_order


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 4))
def test_results_come_in_order_and_few_items_are_taken_before_they_are_asked_for(items, num_threads):
    taken = []

    def work(item: int) -> int:
        time.sleep(item / 2000)
        return item * item

    results = map_in_order(work, (taken.append(item) or item for item in items), num_threads)
    for number, result in enumerate(results, start=1):
        assert result == items[number - 1] ** 2
        assert len(taken) <= number + 3 * num_threads
    assert taken == items


def test_an_error_is_raised_and_nothing_new_begins_after_it() -> None:
    begun = []

    def work(item: int) -> int:
        begun.append(item)
        if item == 1:
            raise KeyError(item)
        if item > 1:
            time.sleep(0.3)
        return item

    found: list[int] = []
    with pytest.raises(KeyError):
        found.extend(map_in_order(work, range(1000), 1))
    assert found == [0]
    assert begun in ([0, 1], [0, 1, 2])  # the thread goes on to the next before the error is seen


def test_a_caller_that_stops_waits_for_what_runs() -> None:
    running = threading.Semaphore(0)

    def work(item: int) -> int:
        time.sleep(0.02)
        running.release()
        return item

    results = map_in_order(work, range(1000), 3)
    assert next(results) == 0
    results.close()
    done = 0
    while running.acquire(blocking=False):
        done += 1
    assert 1 <= done <= 12
    time.sleep(0.05)
    assert not running.acquire(blocking=False)
