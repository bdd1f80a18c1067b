"""Where Triton's kernels are tested: on a GPU, or interpreted (TRITON_INTERPRET=1) without one; else tests skip."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no CUDA device (set TRITON_INTERPRET=1 to interpret the kernel)", allow_module_level=True)

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
