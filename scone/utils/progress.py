"""Progress bars with an estimate, on the terminal's error stream."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """What a progress bar can do."""

    def update(self, n: int, /) -> object: ...


@contextmanager
def progress(total: int | None, unit: str, description: str, quiet: bool = False) -> Iterator[Progress]:
    """A bar counting ``unit``s up to ``total`` (None: unknown).

    Silent when ``quiet``, or when the error stream is not a terminal (``SCONE_PROGRESS=1`` forces it).
    """
    from tqdm import tqdm

    visible = sys.stderr.isatty() or os.environ.get("SCONE_PROGRESS") == "1"
    with tqdm(
        total=total, unit=unit, desc=description, unit_scale=True, disable=quiet or not visible, file=sys.stderr
    ) as bar:
        yield bar
