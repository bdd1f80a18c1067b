"""Copies to an accelerator that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` (on the host) on ``device``; to a CUDA device by way of page-locked memory.

    From other memory a copy would first wait for all that runs there.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
