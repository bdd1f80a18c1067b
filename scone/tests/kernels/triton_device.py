"""Where Triton's kernels are tested: on a GPU, or interpreted (TRITON_INTERPRET=1) without one; else tests skip."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from scone.models.learned_rows import untouched_zeros

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no CUDA device (set TRITON_INTERPRET=1 to interpret the kernel)", allow_module_level=True)

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)


def zeros_beyond_31_bits(monkeypatch: pytest.MonkeyPatch, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows of ``width``, so many that the last one begins behind 2³¹ numbers; on the CPU they take no room."""
    if INTERPRETED:
        from triton.runtime import interpreter

        def leave(*_: Any) -> None:
            """Arguments on the CPU are what was worked on; copied onto themselves they would take all their room."""

        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", leave)
        return untouched_zeros(2**31 // width + 2, width, DEVICE, dtype)
    return torch.zeros(2**31 // width + 2, width, dtype=dtype, device=DEVICE)
