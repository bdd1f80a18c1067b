"""Sizes and counts as people write and read them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from scone.utils.errors import SconeError

_BYTE_UNITS = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("", 1024), ("b", 1000), ("ib", 1024))
}


def parse_bytes(text: str | int) -> int:
    """Bytes in "4GiB", "500MB" (10⁶), "2g" (binary) or a plain number. Raises SconeError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", str(text))
    unit = match[2].lower() or "b" if match else ""
    if not match or unit not in _BYTE_UNITS:
        raise SconeError(f"found {text!r} for a size in bytes; expected a number with a unit; write for example 4GiB")
    return int(float(match[1]) * _BYTE_UNITS[unit])


def human_bytes(size: float) -> str:
    """1536 → "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def human_count(number: float) -> str:
    """1234567 → "1.23 M"."""
    for unit in ("", " k", " M", " G"):
        if abs(number) < 1000:
            return f"{number:.0f}" if unit == "" else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table whose first column is left, the others right; no line break at its end."""
    align = ["---"] + ["---:"] * (len(head) - 1)
    lines = [[str(cell).replace("|", "\\|") for cell in line] for line in (head, *rows)]
    first, *others = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first.replace("|  |", "| |"), f"|{'|'.join(align)}|", *others])
