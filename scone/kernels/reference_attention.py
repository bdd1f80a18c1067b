"""The plain equals of kernels/ancestor_attention.py: one node and head at a time, written as the formulas read."""

from __future__ import annotations

import numpy as np


def attention_forward(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, ancestors: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Output ``[M, heads, d]`` and weights ``[M, heads, N]``."""
    output = np.zeros(query.shape, query.dtype)
    weights = np.zeros((*query.shape[:2], ancestors.shape[1]), query.dtype)
    for node, head in np.ndindex(*query.shape[:2]):
        path = _path(ancestors[node])
        scores = key[path, head] @ query[node, head] / np.sqrt(query.shape[2])
        exponentials = np.exp(scores - scores.max())
        weights[node, head, : len(path)] = exponentials / exponentials.sum()
        output[node, head] = weights[node, head, : len(path)] @ value[path, head]
    return output, weights


def attention_backward(
    grad_output: np.ndarray,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    weights: np.ndarray,
    ancestors: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of query, key and value."""
    grad_query, grad_key, grad_value = (np.zeros(array.shape, array.dtype) for array in (query, key, value))
    for node, head in np.ndindex(*query.shape[:2]):
        path = _path(ancestors[node])
        weight, gradient = weights[node, head, : len(path)], grad_output[node, head]
        grad_weight = value[path, head] @ gradient
        grad_score = weight * (grad_weight - weight @ grad_weight) / np.sqrt(query.shape[2])
        grad_query[node, head] = grad_score @ key[path, head]
        grad_key[path, head] += np.outer(grad_score, query[node, head])
        grad_value[path, head] += np.outer(weight, gradient)
    return grad_query, grad_key, grad_value


def _path(ancestors: np.ndarray) -> list[int]:
    """The node's ancestors from depth 0 on, and itself."""
    depth = int(np.argmax(ancestors == ancestors[-1]))
    return ancestors[: depth + 1].tolist()
