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

    hidden = quiet or not bars_are_visible()
    with tqdm(total=total, unit=unit, desc=description, unit_scale=True, disable=hidden, file=sys.stderr) as bar:
        yield bar


def bars_are_visible() -> bool:
    """Whether progress bars are drawn: on a terminal, or where ``SCONE_PROGRESS=1`` asks for them; never when quiet."""
    return not is_quiet() and (sys.stderr.isatty() or os.environ.get("SCONE_PROGRESS") == "1")


def is_quiet() -> bool:
    """Whether ``--quiet`` was given (or ``SCONE_PROGRESS=0`` is set): results and errors only."""
    return os.environ.get("SCONE_PROGRESS") == "0"


def hide_library_bars(quiet: bool = False) -> None:
    """Apply the same rule to the bars that transformers draws while it loads and saves weights."""
    from transformers.utils import logging

    if quiet or not bars_are_visible():
        logging.disable_progress_bar()
