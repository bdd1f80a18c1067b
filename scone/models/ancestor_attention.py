"""Causal attention over a trie: each node attends to its own prefixes and itself; nothing is padded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def ancestor_attention(
    query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, depth_offsets: list[int]
) -> Tensor:
    """Scaled dot-product attention of U trie nodes to their ancestors and themselves.

    Args:
        query: ``[U, heads, d]``.
        key: ``[U, heads, d]``.
        value: ``[U, heads, d]``.
        ancestors: int64 ``[U, N]``, node u's ancestor at depth j for j below its own depth.
        depth_offsets: N + 1 numbers; the nodes of depth ≥ j are ``depth_offsets[j]:``.

    Returns:
        ``[U, heads, d]``. Its slow equal is ``padded_ancestor_attention``; gathers are recomputed in the backward pass,
        so the memory kept for it is the inputs and the weights ``[U, heads, N]``.
    """
    return _AncestorAttention.apply(query, key, value, ancestors, depth_offsets)


def padded_ancestor_attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, depths: Tensor) -> Tensor:
    """The plain equal of ``ancestor_attention``: gathers N places of every node, masks those beyond its depth."""
    keys, values = key[ancestors], value[ancestors]  # [U, N, heads, d]
    scores = torch.einsum("uhd,ujhd->uhj", query, keys) * query.shape[-1] ** -0.5
    beyond = torch.arange(ancestors.shape[1], device=depths.device) > depths[:, None]
    scores = scores.masked_fill(beyond[:, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=_at_least_fp32(query.dtype)).to(value.dtype)
    return torch.einsum("uhj,ujhd->uhd", weights, values)


class _AncestorAttention(torch.autograd.Function):
    """Loops over the N - 1 ancestor depths; at depth j only the nodes below it take part (they are a slice)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, offsets: list[int]) -> Tensor:
        scale, wide = query.shape[-1] ** -0.5, _at_least_fp32(query.dtype)
        # column 0 is the node itself, column 1 + j its ancestor at depth j; -inf where there is none
        scores = query.new_full((*query.shape[:2], len(offsets) - 1), float("-inf"), dtype=wide)
        scores[..., 0] = (query * key).sum(-1, dtype=wide)
        levels = list(_levels(offsets, len(query)))
        for depth, start in levels:
            picked = key.index_select(0, ancestors[start:, depth])
            scores[start:, :, 1 + depth] = (query[start:] * picked).sum(-1, dtype=wide)
        weights = torch.softmax(scores.mul_(scale), dim=-1).to(value.dtype)
        output = weights[..., :1] * value
        for depth, start in levels:
            picked = value.index_select(0, ancestors[start:, depth])
            output[start:].addcmul_(weights[start:, :, 1 + depth, None], picked)
        ctx.save_for_backward(query, key, value, weights, ancestors)
        ctx.levels, ctx.scale = levels, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, ancestors = ctx.saved_tensors
        grad_output = gradients[0]
        wide = _at_least_fp32(query.dtype)
        grad_weights = torch.zeros_like(weights, dtype=wide)
        grad_weights[..., 0] = (grad_output * value).sum(-1, dtype=wide)
        # several nodes share an ancestor: their gradients are summed in fp32 whatever the compute type
        grad_value = (weights[..., :1] * grad_output).to(wide)
        for depth, start in ctx.levels:
            ancestor = ancestors[start:, depth]
            picked = value.index_select(0, ancestor)
            grad_weights[start:, :, 1 + depth] = (grad_output[start:] * picked).sum(-1, dtype=wide)
            grad_value.index_add_(0, ancestor, (weights[start:, :, 1 + depth, None] * grad_output[start:]).to(wide))
        inner = (grad_weights * weights).sum(-1, keepdim=True)
        grad_scores = (weights * (grad_weights - inner)).mul_(ctx.scale).to(query.dtype)
        grad_query = grad_scores[..., :1] * key
        grad_key = (grad_scores[..., :1] * query).to(wide)
        for depth, start in ctx.levels:
            ancestor = ancestors[start:, depth]
            share = grad_scores[start:, :, 1 + depth, None]
            grad_query[start:].addcmul_(share, key.index_select(0, ancestor))
            grad_key.index_add_(0, ancestor, (share * query[start:]).to(wide))
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None, None


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _levels(offsets: list[int], num_nodes: int) -> list[tuple[int, int]]:
    """(ancestor depth j, first node deeper than j) for the depths that have such nodes."""
    return [(depth, offsets[depth + 1]) for depth in range(len(offsets) - 2) if offsets[depth + 1] < num_nodes]
