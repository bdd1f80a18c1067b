"""Muon (Jordan et al., 2024): the steps of matrices are made orthogonal, all those of one shape at once.

`torch.optim.Muon` goes from matrix to matrix. Of a trunk of 92 M weights the 77 of them took 34 of a step's 139 ms (one
H100, compiled, 65,536 tokens a step): thousands of kernels that fill a tenth of the GPU each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton–Schulz iteration: they bring all singular values to 0.7 to 1.2 in five rounds."""
ROUNDS = 5
SMALLEST_NORM = 1e-7
RMS_OF_ADAMW = 0.2
"""Steps are as large as AdamW's mostly are, so that one learning rate serves both (Liu et al., arXiv 2502.16982)."""
LARGEST_STACK = 2**24
"""Numbers in a stack of matrices: more would only take memory, since these fill a GPU."""


def orthogonal(stack: Tensor) -> Tensor:
    """Each matrix of ``stack`` [m, rows, columns] with all its singular values brought near 1, bfloat16."""
    a, b, c = COEFFICIENTS
    matrices = stack.bfloat16()
    is_tall = matrices.shape[1] > matrices.shape[2]
    if is_tall:
        matrices = matrices.mT
    matrices = matrices / matrices.flatten(1).norm(dim=1).clamp(min=SMALLEST_NORM)[:, None, None]
    for _ in range(ROUNDS):
        gram = matrices @ matrices.mT
        matrices = torch.baddbmm(matrices, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), matrices, beta=a)
    return matrices.mT if is_tall else matrices


@torch.no_grad()
def muon_step(group: dict[str, Any], state: dict[Tensor, dict[str, Any]]) -> None:
    """One step, with Nesterov momentum and decoupled weight decay, of the matrices in ``group["params"]``.

    ``state`` keeps the ``momentum_buffer`` of each, of its shape and type.
    """
    learning_rate, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
    for parameters in stacks([parameter for parameter in group["params"] if parameter.grad is not None]):
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum_buffer" not in state[parameter]:
                state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - MOMENTUM)
        steps = orthogonal(torch.stack(torch._foreach_lerp(gradients, buffers, MOMENTUM)))
        size = learning_rate * RMS_OF_ADAMW * max(steps.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, kept)
        torch._foreach_add_(parameters, steps.to(parameters[0].dtype).unbind(), alpha=-size)


def stacks(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """``parameters`` by shape, type and device, in lists of at most ``LARGEST_STACK`` numbers, or of one."""
    alike = dict[Any, list[Tensor]]()
    for parameter in parameters:
        alike.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(parameter)
    sizes = [(group, max(1, LARGEST_STACK // group[0].numel())) for group in alike.values()]
    return [group[first : first + size] for group, size in sizes for first in range(0, len(group), size)]
