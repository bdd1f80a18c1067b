"""Around a run: versions, machine, commit; memory now and at most in a ``with`` block."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import scone
from scone.utils.progress import available_cores

_LIBRARIES = (
    *("torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "numpy", "numba"),
    *("bitsandbytes", "polars", "duckdb", "pyspark", "pyarrow", "lmdb"),
)


def environment() -> dict[str, Any]:
    """Versions, machine and commit as a JSON value; what is not known is None. No names of users or hosts."""
    torch = sys.modules.get("torch")  # where nothing imported it, nothing used it
    gpus = torch.cuda.device_count() if torch is not None and torch.cuda.is_available() else 0
    return {
        "scone": scone.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "libraries": {name: version for name in _LIBRARIES if (version := version_of(name)) is not None},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": available_cores(),
        "threads": None if torch is None else torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": [torch.cuda.get_device_name(index) for index in range(gpus)] if torch is not None else [],
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def version_of(name: str) -> str | None:
    """The version of an installed package, None where it is not installed."""
    with suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with ``-dirty`` where it was changed; None outside one."""
    repository = Path(scone.__file__).parents[1]
    if not (repository / ".git").exists():
        return None
    command = ["git", "-C", str(repository), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


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
