"""The Triton attention equals the padded one, gradients too: on a GPU, or interpreted (TRITON_INTERPRET=1)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from scone.kernels.ancestor_attention import ancestor_attention, padded_ancestor_attention
from scone.tests.kernels.reference import random_paths
from scone.tests.kernels.triton_device import DEVICE, INTERPRETED

from scone.kernels.ancestor_attention_triton import (  # isort: skip (where Triton is installed, as the last one says)
    attention_backward_triton,
    attention_forward_triton,
)


def random_trie(num_nodes: int, max_n: int, seed: int) -> Tensor:
    return torch.from_numpy(random_paths(np.random.default_rng(seed), num_nodes, max_n))


@pytest.mark.gpu
@pytest.mark.parametrize(("num_nodes", "max_n", "heads", "size"), [(1, 2, 1, 4), (37, 5, 3, 8), (50, 3, 2, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_attention_equals_padded(num_nodes: int, max_n: int, heads: int, size: int, dtype: torch.dtype) -> None:
    """All nodes as queries, and only some; query, key and value as views of one projection."""
    if INTERPRETED and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16 arithmetic to compare")
    ancestors = random_trie(num_nodes, max_n, seed=num_nodes).to(DEVICE)
    packed = torch.randn(num_nodes, 3, heads, size, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    query, key, value = packed.unbind(1)
    exact = [part.double().detach().requires_grad_() for part in (query, key, value)]
    wanted = torch.arange(num_nodes // 2, num_nodes, device=DEVICE)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for some in (torch.arange(num_nodes, device=DEVICE), wanted):
        expected = padded_ancestor_attention(exact[0][some], exact[1], exact[2], ancestors[some])
        output, weights = attention_forward_triton(query[some], key, value, ancestors[some])
        torch.testing.assert_close(output.double(), expected, **tolerance)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
        expected_gradients = torch.autograd.grad(expected, exact, grad.double())
        found = attention_backward_triton(grad, query[some], key, value, weights, ancestors[some])
        torch.testing.assert_close(found[0].double(), expected_gradients[0][some], **tolerance)
        torch.testing.assert_close(found[1].double(), expected_gradients[1], **tolerance)
        torch.testing.assert_close(found[2].double(), expected_gradients[2], **tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_model_uses_it_on_cuda_compiled_too() -> None:
    """The operator chooses the kernel on CUDA, and torch.compile sees the shapes that it returns."""
    ancestors = random_trie(60, 4, seed=0).cuda()
    inputs = [torch.randn(60, 2, 16, device="cuda", requires_grad=True) for _ in range(3)]
    expected = padded_ancestor_attention(*inputs, ancestors)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    for function in (ancestor_attention, torch.compile(ancestor_attention)):
        output = function(*inputs, ancestors)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        found = torch.autograd.grad(output.square().sum(), inputs)
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
