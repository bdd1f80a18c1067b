"""The unit of a corpus: a file, or a split of a hub dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from scone.data.readers import CountBytes


@dataclass(frozen=True)
class Unit:
    """A file, or a split of a hub dataset: something whose documents are read in order.

    ``facts`` identify its content without reading all of it; ``size_bytes`` is None when unknown.
    """

    name: str
    split: str | None
    size_bytes: int | None
    facts: dict[str, Any]
    read: Callable[[CountBytes], Iterator[str]] = field(compare=False)
