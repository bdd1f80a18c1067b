"""The fingerprint by which a table knows the weights that its rows were made from (no numba)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from scone.utils.files import fingerprint_of


def weights_fingerprint(token_embedding: Tensor, f_gram_embedding: Mapping[str, Tensor]) -> str:
    """Of what a table's rows depend on: the trunk's T ``[V, D]`` and the input embedding layer's state, by name."""
    parts: list[str | np.ndarray] = ["token embedding", _bytes_of(token_embedding)]
    for name, tensor in sorted(f_gram_embedding.items()):
        parts += [name, _bytes_of(tensor)]
    return fingerprint_of(*parts)


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """The tensor's bytes, whatever its type (NumPy has no bfloat16)."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)
