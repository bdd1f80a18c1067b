"""Which compilers for accelerators are there."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec


@cache
def triton_is_installed() -> bool:
    """Whether kernels for CUDA can be compiled; looked up once, since every step of a decoder asks."""
    return find_spec("triton") is not None
