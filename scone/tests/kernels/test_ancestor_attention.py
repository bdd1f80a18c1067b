"""The attention kernel against its plain reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.kernels import ancestor_attention, reference


def random_paths(rng: np.random.Generator, num_nodes: int, max_n: int) -> np.ndarray:
    """Ancestors [U, N] of a random forest, parents before children."""
    ancestors = np.empty((num_nodes, max_n), np.int64)
    depths = np.zeros(num_nodes, np.int64)
    for node in range(num_nodes):
        parent = int(rng.integers(-1, node)) if node else -1
        if parent >= 0 and depths[parent] < max_n - 1:
            depths[node] = depths[parent] + 1
            ancestors[node] = ancestors[parent]
        ancestors[node, depths[node] :] = node
    return ancestors


@pytest.mark.parametrize(("dtype", "budget"), [(np.float32, 2e-5), (np.float64, 1e-12)])
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    num_nodes=st.integers(1, 40),
    max_n=st.integers(1, 5),
    heads=st.integers(1, 3),
    size=st.integers(1, 9),
    share=st.floats(0, 1),
    packed=st.booleans(),
)
def test_attention_kernel_equals_its_plain_reference(dtype, budget, seed, num_nodes, max_n, heads, size, share, packed):
    """All nodes or some of them, in arrays of their own or as parts of one projection."""
    rng = np.random.default_rng(seed)
    ancestors = random_paths(rng, num_nodes, max_n)
    projected = rng.standard_normal((num_nodes, 3, heads, size)).astype(dtype)
    query, key, value = (
        projected.transpose(1, 0, 2, 3) if packed else map(np.ascontiguousarray, projected.swapaxes(0, 1))
    )
    if share < 0.9:
        some = np.flatnonzero(rng.random(num_nodes) < share)
        ancestors, query = ancestors[some], query[some]
    output, weights = ancestor_attention.attention_forward(1, query, key, value, ancestors)
    expected = reference.attention_forward(query, key, value, ancestors)
    np.testing.assert_allclose(output, expected[0], atol=budget, rtol=budget)
    np.testing.assert_allclose(weights, expected[1], atol=budget, rtol=budget)
    gradient = rng.standard_normal(output.shape).astype(dtype)
    inputs = (gradient, query, key, value, expected[1], ancestors)
    for ours, theirs in zip(
        ancestor_attention.attention_backward(1, *inputs), reference.attention_backward(*inputs), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=50 * budget, rtol=50 * budget)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(ancestor_attention, "VALUES_PER_THREAD", 1)
    rng = np.random.default_rng(0)
    ancestors = random_paths(rng, 50, 4)
    query, key, value, gradient = rng.standard_normal((4, 50, 6, 8)).astype(np.float32)
    results = []
    for num_threads in (1, 2, 4, 9):
        output, weights = ancestor_attention.attention_forward(num_threads, query, key, value, ancestors)
        gradients = ancestor_attention.attention_backward(num_threads, gradient, query, key, value, weights, ancestors)
        results.append((output, weights, *gradients))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(ours, theirs)
