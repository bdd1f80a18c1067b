"""Attention of trie nodes to their ancestors, as an operator; on the CPU one pass over the nodes each way.

At a few ancestors a node, plain tensor operations spend their time on gathered copies; here every key and value is read
where it lies. Each thread works on heads of its own, so nothing is summed by two threads and the result does not depend
on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor

from scone.kernels.common import run_in_parts, triton_is_installed

VALUES_PER_THREAD = 1 << 17
"""Below this many query values a further thread costs more than it saves."""

# sums may be reordered into vector registers; NaN and infinity keep their meaning
_FAST = {"reassoc", "contract", "arcp", "nsz"}


@njit(cache=True, nogil=True, fastmath=_FAST)
def _forward(queries, keys, values, ancestors, scale, output, weights, first_head, last_head):
    (query, query_step), (key, key_step), (value, value_step) = queries, keys, values
    size = output.shape[1] // weights.shape[1]
    zero = scale - scale
    for node in range(len(output)):
        own = ancestors[node, -1]
        for head in range(first_head, last_head):
            low = head * size
            its_query = query[node * query_step + low : node * query_step + low + size]
            row = weights[node, head]
            places, highest = 0, zero
            for depth in range(ancestors.shape[1]):
                ancestor = ancestors[node, depth]
                its_key = key[ancestor * key_step + low : ancestor * key_step + low + size]
                score = zero
                for i in range(size):
                    score += its_query[i] * its_key[i]
                score *= scale
                row[depth] = score
                highest = score if depth == 0 else max(highest, score)
                places += 1
                if ancestor == own:
                    break
            total = zero
            for depth in range(places):
                row[depth] = np.exp(row[depth] - highest)
                total += row[depth]
            its_output = output[node, low : low + size]
            its_output[:] = zero
            for depth in range(places):
                row[depth] /= total
                start = ancestors[node, depth] * value_step + low
                its_value, weight = value[start : start + size], row[depth]
                for i in range(size):
                    its_output[i] += weight * its_value[i]


@njit(cache=True, nogil=True, fastmath=_FAST)
def _backward(
    gradients, queries, keys, values, weights, ancestors, scale, grad_query, grad_key, grad_value, first_head, last_head
):
    (query, query_step), (key, key_step), (value, value_step) = queries, keys, values
    grad_output, grad_step = gradients
    size = grad_query.shape[1] // weights.shape[1]
    zero = scale - scale
    grad_scores = np.empty(ancestors.shape[1], weights.dtype)
    for node in range(len(grad_query)):
        own = ancestors[node, -1]
        for head in range(first_head, last_head):
            low = head * size
            gradient = grad_output[node * grad_step + low : node * grad_step + low + size]
            row = weights[node, head]
            places, inner = 0, zero
            for depth in range(ancestors.shape[1]):
                ancestor = ancestors[node, depth]
                its_value = value[ancestor * value_step + low : ancestor * value_step + low + size]
                its_grad_value, weight = grad_value[ancestor, low : low + size], row[depth]
                score = zero
                for i in range(size):
                    score += gradient[i] * its_value[i]
                    its_grad_value[i] += weight * gradient[i]
                grad_scores[depth] = score
                inner += weight * score
                places += 1
                if ancestor == own:
                    break
            its_query = query[node * query_step + low : node * query_step + low + size]
            its_grad_query = grad_query[node, low : low + size]
            its_grad_query[:] = zero
            for depth in range(places):
                ancestor = ancestors[node, depth]
                share = row[depth] * (grad_scores[depth] - inner) * scale
                its_key = key[ancestor * key_step + low : ancestor * key_step + low + size]
                its_grad_key = grad_key[ancestor, low : low + size]
                for i in range(size):
                    its_grad_query[i] += share * its_key[i]
                    its_grad_key[i] += share * its_query[i]


def ancestor_attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> Tensor:
    """Scaled dot-product attention of M trie nodes to their ancestors and themselves, which are among U nodes.

    Args:
        query: ``[M, heads, d]``; key and value: ``[U, heads, d]``.
        ancestors: int64 ``[M, N]``, node m's ancestor at depth j for j below its own depth, its own place from there.

    Returns:
        ``[M, heads, d]``. The memory kept for the backward pass is the inputs and the weights ``[M, heads, N]``.
    """
    if query.device.type != "cpu" and not _has_triton_kernel(query):
        return padded_ancestor_attention(query, key, value, ancestors)
    output, _ = torch.ops.scone.ancestor_attention(query, key, value, ancestors)
    return output


def padded_ancestor_attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> Tensor:
    """The same on devices without a kernel, and the kernels' reference: gathers N places of every node, masks those
    beyond its depth.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("uhd,ujhd->uhj", query.to(wide), key[ancestors].to(wide)) * query.shape[-1] ** -0.5
    beyond = torch.nn.functional.pad(ancestors.diff(dim=1) == 0, (1, 0))  # a node's own place once more
    weights = torch.softmax(scores.masked_fill(beyond[:, None, :], float("-inf")), dim=-1)
    return torch.einsum("uhj,ujhd->uhd", weights, value[ancestors].to(wide)).to(value.dtype)


def _run(kernel: Any, query: Tensor, flat: Iterable[Tensor], whole: Iterable[Tensor], out: Iterable[Tensor]) -> None:
    """Call ``kernel`` with the memory of the tensors ``flat``, other inputs, the scale, and ``out``; heads in parts."""
    arguments = [*map(_memory_of, flat), *(tensor.numpy() for tensor in whole)]
    scale = query.numpy().dtype.type(query.shape[2] ** -0.5)
    parts = min(torch.get_num_threads(), query.numel() // VALUES_PER_THREAD)
    run_in_parts(kernel, [*arguments, scale, *(tensor.numpy() for tensor in out)], query.shape[1], parts)


def _memory_of(tensor: Tensor) -> tuple[np.ndarray, int]:
    """The memory of ``tensor`` [rows, heads, d] from its first value on, and the values from row to row.

    Rows may lie apart (queries, keys and values come out of one projection), which a compiler that sees a strided
    array would take as a reason not to vectorise.
    """
    rows, heads, size = tensor.shape
    if not tensor.numel():
        return tensor.flatten().numpy(), 0
    step = tensor.stride(0)
    return tensor.as_strided(((rows - 1) * step + heads * size,), (1,)).numpy(), step


@torch.library.custom_op("scone::ancestor_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the weights ``[M, heads, N]`` for the backward pass, 0 beyond a node's depth."""
    dtype = query.dtype
    query, key, value = _with_whole_heads(query, key, value)
    if _has_triton_kernel(query):
        from scone.kernels.ancestor_attention_triton import attention_forward_triton

        return attention_forward_triton(query, key, value, ancestors)
    output = torch.empty(query.shape, dtype=query.dtype)
    weights = torch.zeros((*query.shape[:2], ancestors.shape[1]), dtype=query.dtype)
    _run(_forward, query, (query, key, value), (ancestors,), (output.flatten(1), weights))
    return output.to(dtype), weights


@torch.library.custom_op("scone::ancestor_attention_backward", mutates_args=())
def _attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, ancestors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    dtype = query.dtype
    inputs = [*_with_whole_heads(grad_output, query, key, value), weights, ancestors]
    if _has_triton_kernel(query):
        from scone.kernels.ancestor_attention_triton import attention_backward_triton

        return attention_backward_triton(*inputs)
    gradients = [torch.zeros(tensor.shape, dtype=tensor.dtype) for tensor in inputs[1:4]]
    _run(_backward, inputs[1], inputs[:4], inputs[4:], [gradient.flatten(1) for gradient in gradients])
    return gradients[0].to(dtype), gradients[1].to(dtype), gradients[2].to(dtype)


@_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape), value.new_empty((*query.shape[:2], ancestors.shape[1]), dtype=wide)


@_attention_backward.register_fake
def _(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, ancestors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ancestors = inputs
    ctx.save_for_backward(query, key, value, output[1], ancestors)


def _differentiate(ctx: Any, grad_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *torch.ops.scone.ancestor_attention_backward(grad_output, *ctx.saved_tensors), None


_attention.register_autograd(_differentiate, setup_context=_keep_for_backward)


def _has_triton_kernel(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and tensor.dtype != torch.float64 and triton_is_installed()


def _with_whole_heads(*tensors: Tensor) -> Any:
    """As kernels read them: rows may lie apart, their heads must be contiguous; on the CPU no half precision."""
    size = tensors[0].shape[2]
    if tensors[0].device.type == "cpu":
        tensors = tuple(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors)
    return [tensor if tensor.stride()[1:] == (size, 1) else tensor.contiguous() for tensor in tensors]
