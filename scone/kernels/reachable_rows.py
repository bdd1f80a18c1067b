"""Table rows in memory that kernels on an accelerator read by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReachableRows:
    """All rows of a table as they are stored, uint8 ``[m, row_bytes]`` in at most two blocks.

    The rows from rank 0 on are ``near``, those that follow are ``far`` (None where ``near`` holds all): on the
    accelerator, or in page-locked memory of the host. ``width``: D; ``group_size``: 0 for row types that are floats.
    """

    near: Tensor
    far: Tensor | None
    row_type: str
    width: int
    group_size: int
