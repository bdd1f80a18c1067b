"""Attention of trie nodes to their ancestors on a CUDA device (Triton): keys and values are read where they lie."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from scone.kernels.common import launching_on

_NODES = 16
"""Nodes of one program; each works on one head of them."""


def attention_forward_triton(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """Output ``[M, heads, d]`` and fp32 weights ``[M, heads, N]``, 0 beyond a node's depth, as `ancestor_attention`.

    Query, key and value are fp32, fp16 or bf16, their last two dimensions contiguous; sums are fp32.
    """
    num_nodes, heads, size = query.shape
    output = query.new_empty(query.shape)
    weights = query.new_empty((num_nodes, heads, ancestors.shape[1]), dtype=torch.float32)
    if output.numel():
        with launching_on(query.device):
            _forward[(triton.cdiv(num_nodes, _NODES), heads)](
                *(query, key, value, ancestors, output, weights),
                *(query.stride(0), key.stride(0), value.stride(0)),
                *(num_nodes, heads, size, size**-0.5),
                max_n=ancestors.shape[1],
                nodes_at_once=_NODES,
                block=triton.next_power_of_2(size),
            )
    return output, weights


def attention_backward_triton(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, ancestors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query ``[M, heads, d]``, key and value ``[U, heads, d]``.

    Nodes that share an ancestor add to its gradients in fp32, in no fixed order.
    """
    num_nodes, heads, size = query.shape
    grad_query = query.new_empty(query.shape)
    grad_key = torch.zeros(key.shape, dtype=torch.float32, device=key.device)
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    if grad_query.numel():
        with launching_on(query.device):
            _backward[(triton.cdiv(num_nodes, _NODES), heads)](
                *(grad_output, query, key, value, weights, ancestors, grad_query, grad_key, grad_value),
                *(grad_output.stride(0), query.stride(0), key.stride(0), value.stride(0)),
                *(num_nodes, heads, size, size**-0.5),
                max_n=ancestors.shape[1],
                nodes_at_once=_NODES,
                block=triton.next_power_of_2(size),
            )
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


@triton.jit
def _forward(
    query,
    key,
    value,
    ancestors,
    output,
    weights,
    query_step,
    key_step,
    value_step,
    num_nodes,
    heads,
    size,
    scale,
    max_n: tl.constexpr,
    nodes_at_once: tl.constexpr,
    block: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64) * nodes_at_once + tl.arange(0, nodes_at_once)
    head = tl.program_id(1)
    i = tl.arange(0, block)
    there = node < num_nodes
    inside = there[:, None] & (i < size)[None, :]
    column = head * size + i[None, :]
    its_query = tl.load(query + node[:, None] * query_step + column, mask=inside, other=0.0).to(tl.float32)
    # first the softmax's maximum and sum, as the scores come; then the weights, with the keys still in the cache
    highest = tl.full((nodes_at_once,), float("-inf"), tl.float32)
    total = tl.zeros((nodes_at_once,), tl.float32)
    before = tl.full((nodes_at_once,), -1, tl.int64)
    for depth in range(max_n):
        place = tl.load(ancestors + node * max_n + depth, mask=there, other=0)
        # beyond its own depth a node's place repeats
        used = place != before
        picked = tl.load(key + place[:, None] * key_step + column, mask=inside & used[:, None], other=0.0)
        score = tl.where(used, tl.sum(its_query * picked.to(tl.float32), 1) * scale, float("-inf"))
        peak = tl.maximum(highest, score)
        total = total * tl.exp(highest - peak) + tl.exp(score - peak)
        highest = peak
        before = place
    mixed = tl.zeros((nodes_at_once, block), tl.float32)
    before = tl.full((nodes_at_once,), -1, tl.int64)
    for depth in range(max_n):
        place = tl.load(ancestors + node * max_n + depth, mask=there, other=0)
        used = place != before
        wanted = inside & used[:, None]
        picked = tl.load(key + place[:, None] * key_step + column, mask=wanted, other=0.0)
        score = tl.sum(its_query * picked.to(tl.float32), 1) * scale
        weight = tl.where(used, tl.exp(score - highest) / total, 0.0)
        tl.store(weights + (node * heads + head) * max_n + depth, weight, mask=there)
        picked = tl.load(value + place[:, None] * value_step + column, mask=wanted, other=0.0)
        mixed += weight[:, None] * picked.to(tl.float32)
        before = place
    tl.store(output + node[:, None] * (heads * size) + column, mixed.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_output,
    query,
    key,
    value,
    weights,
    ancestors,
    grad_query,
    grad_key,
    grad_value,
    grad_step,
    query_step,
    key_step,
    value_step,
    num_nodes,
    heads,
    size,
    scale,
    max_n: tl.constexpr,
    nodes_at_once: tl.constexpr,
    block: tl.constexpr,
):
    node = tl.program_id(0).to(tl.int64) * nodes_at_once + tl.arange(0, nodes_at_once)
    head = tl.program_id(1)
    i = tl.arange(0, block)
    there = node < num_nodes
    inside = there[:, None] & (i < size)[None, :]
    column = head * size + i[None, :]
    its_query = tl.load(query + node[:, None] * query_step + column, mask=inside, other=0.0).to(tl.float32)
    its_grad = tl.load(grad_output + node[:, None] * grad_step + column, mask=inside, other=0.0).to(tl.float32)
    # the softmax subtracts the mean of the weights' gradients
    mean = tl.zeros((nodes_at_once,), tl.float32)
    for depth in range(max_n):
        place = tl.load(ancestors + node * max_n + depth, mask=there, other=0)
        weight = tl.load(weights + (node * heads + head) * max_n + depth, mask=there, other=0.0)
        wanted = inside & (weight != 0.0)[:, None]
        picked = tl.load(value + place[:, None] * value_step + column, mask=wanted, other=0.0)
        mean += weight * tl.sum(its_grad * picked.to(tl.float32), 1)
    query_sum = tl.zeros((nodes_at_once, block), tl.float32)
    for depth in range(max_n):
        place = tl.load(ancestors + node * max_n + depth, mask=there, other=0)
        weight = tl.load(weights + (node * heads + head) * max_n + depth, mask=there, other=0.0)
        wanted = inside & (weight != 0.0)[:, None]
        picked = tl.load(value + place[:, None] * value_step + column, mask=wanted, other=0.0)
        share = weight * (tl.sum(its_grad * picked.to(tl.float32), 1) - mean) * scale
        picked = tl.load(key + place[:, None] * key_step + column, mask=wanted, other=0.0)
        query_sum += share[:, None] * picked.to(tl.float32)
        target = place[:, None] * (heads * size) + column
        tl.atomic_add(grad_key + target, share[:, None] * its_query, mask=wanted, sem="relaxed")
        tl.atomic_add(grad_value + target, weight[:, None] * its_grad, mask=wanted, sem="relaxed")
    tl.store(
        grad_query + node[:, None] * (heads * size) + column, query_sum.to(grad_query.dtype.element_ty), mask=inside
    )
