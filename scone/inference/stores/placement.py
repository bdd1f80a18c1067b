"""Placements: the words by which a user says where a table's rows are."""

from __future__ import annotations

from dataclasses import dataclass

from scone.utils.errors import SconeError
from scone.utils.text import parse_bytes

_KINDS = {"gpu": "gpu", "ram": "ram", "shared": "shared", "mmap": "mmap", "direct": "direct", "disk": "direct"}
_COUNT_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class Tier:
    """``num_rows`` rows from ``first_row`` on are kept as ``kind`` says: gpu, ram, shared, mmap or direct."""

    kind: str
    first_row: int
    num_rows: int


def parse_placement(text: str, num_rows: int, row_bytes: int) -> list[Tier]:
    """Turn a placement into tiers that cover all rows of a table.

    ``ram``, ``shared`` (RAM, once for all processes that say so), ``mmap``, ``direct`` (or ``disk``) and ``gpu`` alone
    hold everything. A list gives each place but the last its number of rows, in order of rank:
    ``gpu:100k,ram:2M,disk``. k, M and G are thousands, millions and billions of rows; with B they are bytes
    (``ram:4GiB``). Tiers that are left without rows are dropped. Raises SconeError.
    """
    tiers: list[Tier] = []
    first = 0
    places = [place.strip() for place in text.split(",")]
    for number, place in enumerate(places):
        name, colon, size = place.partition(":")
        is_last = number == len(places) - 1
        if name not in _KINDS or bool(colon) == is_last:
            raise SconeError(
                f"found placement {text!r}; expected ram, shared, mmap, direct, gpu, or tiers with sizes but for the "
                "last; write for example ram, or gpu:100k,ram:2M,disk"
            )
        count = num_rows - first if is_last else min(_parse_rows(size, row_bytes, text), num_rows - first)
        if count or (is_last and not tiers):
            tiers.append(Tier(_KINDS[name], first, count))
        first += count
    return tiers


def _parse_rows(size: str, row_bytes: int, text: str) -> int:
    """Rows in "100k", or in as many bytes as "4GiB"."""
    if size[-1:].lower() == "b":
        return parse_bytes(size) // row_bytes
    factor = _COUNT_UNITS.get(size[-1:].lower(), 1)
    digits = size if factor == 1 else size[:-1]
    if not (digits.isascii() and digits.isdigit()):
        raise SconeError(f"found size {size!r} in placement {text!r}; expected rows or bytes; write 100k, 2M or 4GiB")
    return int(digits) * factor
