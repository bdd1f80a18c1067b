"""Causal attention over a trie: each node attends to its own prefixes and itself; nothing is padded.

Both directions are operators of torch's own kind, so that compiled models treat them as one step and choose the
implementation when they run: a fused kernel on the CPU and, where Triton is installed, on CUDA; slices and gathers
elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from scone.kernels.ancestor_attention import attention_backward, attention_forward
from scone.kernels.common import triton_is_installed


def ancestor_attention(
    query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, depth_offsets: list[int]
) -> Tensor:
    """Scaled dot-product attention of M trie nodes to their ancestors and themselves, which are among U nodes.

    Args:
        query: ``[M, heads, d]``, sorted by depth.
        key: ``[U, heads, d]``.
        value: ``[U, heads, d]``.
        ancestors: int64 ``[M, N]``, node m's ancestor at depth j for j below its own depth, its own place from there.
        depth_offsets: N + 1 numbers; the queries of depth ≥ j are ``depth_offsets[j]:``.

    Returns:
        ``[M, heads, d]``. Reference implementation: ``padded_ancestor_attention``. Gathers are recomputed in the
        backward pass, so the memory kept for it is the inputs and the weights ``[M, heads, N]``.
    """
    output, _ = torch.ops.scone.ancestor_attention(query, key, value, ancestors, depth_offsets)
    return output


def padded_ancestor_attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, depths: Tensor) -> Tensor:
    """Reference of ``ancestor_attention``: gathers N places of every node, masks those beyond its depth."""
    keys, values = key[ancestors], value[ancestors]  # [U, N, heads, d]
    scores = torch.einsum("uhd,ujhd->uhj", query, keys) * query.shape[-1] ** -0.5
    beyond = torch.arange(ancestors.shape[1], device=depths.device) > depths[:, None]
    scores = scores.masked_fill(beyond[:, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=_at_least_fp32(query.dtype)).to(value.dtype)
    return torch.einsum("uhj,ujhd->uhd", weights, values)


@torch.library.custom_op("scone::ancestor_attention", mutates_args=())
def _attention(
    query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, depth_offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """The output, and the weights ``[M, heads, N]`` as the implementation's own backward pass wants them."""
    if _has_triton_kernel(query):
        from scone.kernels.ancestor_attention_triton import attention_forward_triton

        query, key, value = _with_whole_heads(query, key, value)
        return attention_forward_triton(query, key, value, ancestors)
    if _has_kernel(query):
        query, key, value = _with_whole_heads(query, key, value)
        output, weights = attention_forward(torch.get_num_threads(), *_arrays(query, key, value, ancestors))
        return torch.from_numpy(output), torch.from_numpy(weights)
    return _sliced_forward(query, key, value, ancestors, depth_offsets)


@torch.library.custom_op("scone::ancestor_attention_backward", mutates_args=())
def _attention_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    ancestors: Tensor,
    depth_offsets: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    if _has_triton_kernel(query):
        from scone.kernels.ancestor_attention_triton import attention_backward_triton

        grad_output, query, key, value = _with_whole_heads(grad_output, query, key, value)
        return attention_backward_triton(grad_output, query, key, value, weights, ancestors)
    if _has_kernel(query):
        inputs = (*_with_whole_heads(grad_output, query, key, value), weights, ancestors)
        gradients = attention_backward(torch.get_num_threads(), *_arrays(*inputs))
        return torch.from_numpy(gradients[0]), torch.from_numpy(gradients[1]), torch.from_numpy(gradients[2])
    return _sliced_backward(grad_output, query, key, value, weights, ancestors, depth_offsets)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, depth_offsets: list[int]) -> tuple[Tensor, Tensor]:
    weights_type = torch.float32 if _has_triton_kernel(query) else value.dtype
    return query.new_empty(query.shape), value.new_empty((*query.shape[:2], ancestors.shape[1]), dtype=weights_type)


@_attention_backward.register_fake
def _(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    ancestors: Tensor,
    depth_offsets: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, depth_offsets = inputs
    query, key, value, ancestors = tensors
    ctx.save_for_backward(query, key, value, output[1], ancestors)
    ctx.depth_offsets = depth_offsets


def _differentiate(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.scone.ancestor_attention_backward(grad_output, *ctx.saved_tensors, ctx.depth_offsets)
    return *gradients, None, None


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _has_kernel(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def _has_triton_kernel(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64 and triton_is_installed()


def _arrays(*tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().numpy() for tensor in tensors]


def _with_whole_heads(*tensors: Tensor) -> list[Tensor]:
    """Rows may lie apart, their heads must be contiguous."""
    size = tensors[0].shape[2]
    return [tensor if tensor.stride()[1:] == (size, 1) else tensor.contiguous() for tensor in tensors]


def _sliced_forward(
    query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor, offsets: list[int]
) -> tuple[Tensor, Tensor]:
    """Loops over the N - 1 ancestor depths; at depth j only the nodes below it take part (they are a slice)."""
    scale, wide = query.shape[-1] ** -0.5, _at_least_fp32(query.dtype)
    own = ancestors[:, -1]
    # column 0 is the node itself, column 1 + j its ancestor at depth j; -inf where there is none
    scores = query.new_full((*query.shape[:2], ancestors.shape[1]), float("-inf"), dtype=wide)
    scores[..., 0] = (query * key.index_select(0, own)).sum(-1, dtype=wide)
    levels = _levels(offsets, len(query))
    for depth, start in levels:
        picked = key.index_select(0, ancestors[start:, depth])
        scores[start:, :, 1 + depth] = (query[start:] * picked).sum(-1, dtype=wide)
    weights = torch.softmax(scores.mul_(scale), dim=-1).to(value.dtype)
    output = weights[..., :1] * value.index_select(0, own)
    for depth, start in levels:
        picked = value.index_select(0, ancestors[start:, depth])
        output[start:].addcmul_(weights[start:, :, 1 + depth, None], picked)
    return output, weights


def _sliced_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weights: Tensor,
    ancestors: Tensor,
    offsets: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    wide, own = _at_least_fp32(query.dtype), ancestors[:, -1]
    levels = _levels(offsets, len(query))
    grad_weights = torch.zeros_like(weights, dtype=wide)
    grad_weights[..., 0] = (grad_output * value.index_select(0, own)).sum(-1, dtype=wide)
    # several nodes share an ancestor: their gradients are summed in fp32 whatever the compute type
    grad_value = torch.zeros_like(value, dtype=wide)
    grad_value.index_add_(0, own, (weights[..., :1] * grad_output).to(wide))
    for depth, start in levels:
        ancestor = ancestors[start:, depth]
        picked = value.index_select(0, ancestor)
        grad_weights[start:, :, 1 + depth] = (grad_output[start:] * picked).sum(-1, dtype=wide)
        grad_value.index_add_(0, ancestor, (weights[start:, :, 1 + depth, None] * grad_output[start:]).to(wide))
    inner = (grad_weights * weights).sum(-1, keepdim=True)
    grad_scores = (weights * (grad_weights - inner)).mul_(query.shape[-1] ** -0.5).to(query.dtype)
    grad_query = grad_scores[..., :1] * key.index_select(0, own)
    grad_key = torch.zeros_like(key, dtype=wide)
    grad_key.index_add_(0, own, (grad_scores[..., :1] * query).to(wide))
    for depth, start in levels:
        ancestor = ancestors[start:, depth]
        share = grad_scores[start:, :, 1 + depth, None]
        grad_query[start:].addcmul_(share, key.index_select(0, ancestor))
        grad_key.index_add_(0, ancestor, (share * query[start:]).to(wide))
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _levels(offsets: list[int], num_nodes: int) -> list[tuple[int, int]]:
    """(ancestor depth j, first node deeper than j) for the depths that have such nodes."""
    return [(depth, offsets[depth + 1]) for depth in range(len(offsets) - 2) if offsets[depth + 1] < num_nodes]
