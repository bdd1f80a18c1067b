"""The attention kernel against gathers and a masked softmax, in values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scone.kernels import ancestor_attention
from scone.kernels.ancestor_attention import padded_ancestor_attention
from scone.tests.kernels.reference import random_paths


def gradients_of(output: Tensor, inputs: list[Tensor], direction: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad(output, inputs, direction)]


@pytest.mark.parametrize(("dtype", "budget"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
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
    """All nodes or some of them, none too, in arrays of their own or as parts of one projection."""
    rng = np.random.default_rng(seed)
    ancestors = torch.from_numpy(random_paths(rng, num_nodes, max_n))
    projected = torch.from_numpy(rng.standard_normal((num_nodes, 3, heads, size))).to(dtype)
    parts = [part if packed else part.contiguous() for part in projected.unbind(1)]
    if share < 0.9:
        some = torch.from_numpy(np.flatnonzero(rng.random(num_nodes) < share))
        ancestors, parts[0] = ancestors[some], parts[0][some]
    ours = [part.detach().requires_grad_() for part in parts]
    exact = [part.detach().double().requires_grad_() for part in parts]
    direction = torch.from_numpy(rng.standard_normal(parts[0].shape)).to(dtype)
    found = gradients_of(ancestor_attention.ancestor_attention(*ours, ancestors), ours, direction)
    expected = gradients_of(padded_ancestor_attention(*exact, ancestors), exact, direction.double())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=50 * budget, rtol=50 * budget)


def test_any_number_of_threads_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(ancestor_attention, "VALUES_PER_THREAD", 1)
    rng = np.random.default_rng(0)
    ancestors = torch.from_numpy(random_paths(rng, 50, 4))
    *inputs, direction = torch.from_numpy(rng.standard_normal((4, 50, 6, 8))).float().unbind(0)
    inputs = [part.requires_grad_() for part in inputs]
    results = []
    for num_threads in (1, 2, 4, 9):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=num_threads: n)
        results.append(gradients_of(ancestor_attention.ancestor_attention(*inputs, ancestors), inputs, direction))
    for other in results[1:]:
        for ours, theirs in zip(results[0], other, strict=True):
            assert torch.equal(ours, theirs)
