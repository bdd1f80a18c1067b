"""Launch a Triton kernel again and again at the cost of a plain call: what was compiled for the first time is kept."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import triton
from triton.compiler import CompiledKernel

_IS_CALLED_AS_COMPILED = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 5)
"""Since then a compiled kernel takes the arguments of its source, constants included."""


class KeptLaunch:
    """Launches one kernel.

    For each launch Triton looks at every argument anew, to find out for which types, alignments and constants it has to
    be compiled. Here the caller says with ``key`` what can change among these. With the interpreter, and where Triton
    is older than 3.5, every launch is an ordinary one.
    """

    def __init__(self, kernel: Any, **options: Any) -> None:
        """``options``: as Triton takes them beside the arguments, such as ``num_warps``."""
        self._kernel = kernel
        self._options = options
        self._compiled: dict[Hashable, CompiledKernel] = {}

    def __call__(self, key: Hashable, num_programs: int, *arguments: Any) -> None:
        """Start ``num_programs`` programs on the current device and stream.

        Args:
            key: equal for two launches only if they agree in all that the kernel is compiled for: device, types,
                constants, and alignments and numbers that it specializes on.
            arguments: all of the kernel's, in order, constants too.
        """
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[num_programs, 1, 1](*arguments)
            return
        compiled = self._kernel[num_programs, 1, 1](*arguments, **self._options)
        if _IS_CALLED_AS_COMPILED and isinstance(compiled, CompiledKernel):
            self._compiled[key] = compiled
