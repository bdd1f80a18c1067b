"""What a result was made with: versions, machine, commit; written beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import scone

_LIBRARIES = ("torch", "transformers", "accelerate", "tokenizers", "safetensors", "datasets", "numpy", "numba")


def environment() -> dict[str, Any]:
    """Versions, machine and commit as a JSON value; what is not known is None. No names of users or hosts."""
    return {
        "scone": scone.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "accelerators": _accelerators(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
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


def _accelerators() -> list[str]:
    torch = sys.modules.get("torch")  # where nothing imported it, nothing used it
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
