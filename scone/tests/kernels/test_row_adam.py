"""Adam on rows against its plain reference."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels import reference, row_adam


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_rows=st.integers(1, 30),
    width=st.integers(1, 9),
    share=st.floats(0, 1),
    step=st.integers(1, 1000),
)
def test_row_update_equals_its_plain_reference(seed, num_rows, width, share, step):
    rng = np.random.default_rng(seed)
    touched = np.flatnonzero(rng.random(num_rows) < share)
    rng.shuffle(touched)
    gradients = rng.standard_normal((len(touched), width)).astype(np.float32)
    ours = [rng.standard_normal((num_rows, width)).astype(np.float32) for _ in range(2)]
    ours.append(rng.random((num_rows, width)).astype(np.float32))
    theirs, before = [array.astype(np.float64) for array in ours], [array.copy() for array in ours]
    numbers = {"learning_rate": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "step": step}
    row_adam.update_rows(1, *ours, touched, gradients, **numbers)
    reference.adam_rows(*theirs, touched, gradients.astype(np.float64), **numbers)
    untouched = np.setdiff1d(np.arange(num_rows), touched)
    for our, their, old in zip(ours, theirs, before, strict=True):
        np.testing.assert_allclose(our, their, atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(our[untouched], old[untouched])


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(row_adam, "VALUES_PER_THREAD", 1)
    rng = np.random.default_rng(0)
    touched, gradients = rng.permutation(50)[:20], rng.standard_normal((20, 8)).astype(np.float32)
    results = []
    for num_threads in (1, 2, 7):
        arrays = [np.ones((50, 8), np.float32) for _ in range(3)]
        numbers = {"learning_rate": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "step": 3}
        row_adam.update_rows(num_threads, *arrays, touched, gradients, **numbers)
        results.append(np.stack(arrays))
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
