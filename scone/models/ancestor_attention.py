"""Causal attention over a trie: each node attends to its own prefixes and itself; nothing is padded.

Both directions are operators of torch's own kind, so that compiled models treat them as one step: a fused kernel on the
CPU and, where Triton is installed, on CUDA. Elsewhere places are gathered and padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from scone.kernels.ancestor_attention import attention_backward, attention_forward
from scone.kernels.common import triton_is_installed


def ancestor_attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> Tensor:
    """Scaled dot-product attention of M trie nodes to their ancestors and themselves, which are among U nodes.

    Args:
        query: ``[M, heads, d]``.
        key: ``[U, heads, d]``.
        value: ``[U, heads, d]``.
        ancestors: int64 ``[M, N]``, node m's ancestor at depth j for j below its own depth, its own place from there.

    Returns:
        ``[M, heads, d]``. Reference implementation: ``padded_ancestor_attention``. Gathers are recomputed in the
        backward pass, so the memory kept for it is the inputs and the weights ``[M, heads, N]``.
    """
    if query.device.type != "cpu" and not _has_triton_kernel(query):
        return padded_ancestor_attention(query, key, value, ancestors)
    output, _ = torch.ops.scone.ancestor_attention(query, key, value, ancestors)
    return output


def padded_ancestor_attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> Tensor:
    """Reference of ``ancestor_attention``: gathers N places of every node, masks those beyond its depth."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("uhd,ujhd->uhj", query.to(wide), key[ancestors].to(wide)) * query.shape[-1] ** -0.5
    beyond = torch.nn.functional.pad(ancestors.diff(dim=1) == 0, (1, 0))  # a node's own place once more
    weights = torch.softmax(scores.masked_fill(beyond[:, None, :], float("-inf")), dim=-1)
    return torch.einsum("uhj,ujhd->uhd", weights, value[ancestors].to(wide)).to(value.dtype)


@torch.library.custom_op("scone::ancestor_attention", mutates_args=())
def _attention(query: Tensor, key: Tensor, value: Tensor, ancestors: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the weights ``[M, heads, N]`` as the implementation's own backward pass wants them."""
    dtype = query.dtype
    query, key, value = _with_whole_heads(query, key, value)
    if _has_triton_kernel(query):
        from scone.kernels.ancestor_attention_triton import attention_forward_triton

        return attention_forward_triton(query, key, value, ancestors)
    arrays = [tensor.numpy() for tensor in (query, key, value, ancestors)]
    output, weights = map(torch.from_numpy, attention_forward(torch.get_num_threads(), *arrays))
    return output.to(dtype), weights


@torch.library.custom_op("scone::ancestor_attention_backward", mutates_args=())
def _attention_backward(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, ancestors: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    inputs: Any = [*_with_whole_heads(grad_output, query, key, value), weights, ancestors]
    if _has_triton_kernel(query):
        from scone.kernels.ancestor_attention_triton import attention_backward_triton

        return attention_backward_triton(*inputs)
    gradients = attention_backward(torch.get_num_threads(), *(tensor.numpy() for tensor in inputs))
    of_query, of_key, of_value = (torch.from_numpy(gradient).to(query.dtype) for gradient in gradients)
    return of_query, of_key, of_value


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
