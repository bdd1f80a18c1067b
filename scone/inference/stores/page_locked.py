"""Host memory that an accelerator reads by itself, while it computes: the host neither gathers nor copies."""

from __future__ import annotations

import contextlib
import weakref

import numpy as np
import torch


class PageLock:
    """Keeps the pages of ``array`` in RAM, within the reach of CUDA devices, until it is released or collected."""

    def __init__(self, array: np.ndarray) -> None:
        """Raises OSError where the system or the driver refuses."""
        runtime = torch.cuda.cudart()
        pointer = array.ctypes.data
        status = int(runtime.cudaHostRegister(pointer, array.nbytes, 0))
        if status:
            raise OSError(f"the CUDA driver cannot lock {array.nbytes:,} bytes of memory (error {status})")
        # memory that were freed while it is registered could never be registered again
        self.release = weakref.finalize(self, runtime.cudaHostUnregister, pointer)


def page_lock(array: np.ndarray, device: torch.device) -> PageLock | None:
    """A lock on ``array``'s memory for ``device``; None where it is no CUDA device, or cannot be had."""
    if device.type != "cuda" or not array.nbytes:
        return None
    try:
        return PageLock(array)
    except (OSError, RuntimeError):
        _forget_last_error(device)
        return None


def _forget_last_error(device: torch.device) -> None:
    """CUDA keeps a refusal as its last error, which the next kernel's check would take for that kernel's own."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)
