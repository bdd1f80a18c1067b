"""Which accelerator work is started on, and copies there that the host does not wait for."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def launching_on(device: torch.device) -> AbstractContextManager[object]:
    """Kernels of Triton start on PyTorch's current device; inside, that is ``device``."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """``values`` (on the host) on ``device``; to a CUDA device by way of page-locked memory.

    From other memory a copy would first wait for all that runs there.
    """
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
