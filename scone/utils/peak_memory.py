"""Memory of this process and of an accelerator: now, and at most inside a ``with`` block."""

from __future__ import annotations

import gc
from contextlib import suppress
from pathlib import Path
from typing import Any


def process_bytes(peak: bool = False) -> int | None:
    """Resident memory of this process, shared pages included, now or at its peak; None where the system is silent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    name = "VmHWM:" if peak else "VmRSS:"
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


class PeakMemory:
    """Most memory that a ``with`` block held: of this process (all of it, libraries too), and on a CUDA ``device``.

    ``growth_bytes``: the process's peak above what it held at the start. None for what the system does not tell.
    Process memory is sampled by the kernel, pages mapped from files included.
    """

    process_bytes: int | None = None
    growth_bytes: int | None = None
    accelerator_bytes: int | None = None

    def __init__(self, device: Any = None) -> None:
        self.device = device if device is not None and device.type == "cuda" else None

    def __enter__(self) -> PeakMemory:
        gc.collect()  # what was used before
        if self.device is not None:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak (VmHWM) to the present
        self._start = process_bytes()
        return self

    def __exit__(self, *_: object) -> None:
        self.process_bytes = process_bytes(peak=True)
        if self.process_bytes is not None and self._start is not None:
            self.growth_bytes = self.process_bytes - self._start
        if self.device is not None:
            import torch

            self.accelerator_bytes = int(torch.cuda.max_memory_allocated(self.device))
