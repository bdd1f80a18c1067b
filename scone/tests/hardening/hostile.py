"""Hostile content: Hypothesis strategies for damaged bytes and forged JSON, and the rule that every reader keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from scone.utils.errors import SconeError

HOSTILE_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**31, 2**63, 2**64, 10**18, -(10**30), 1e308, float("nan"), float("inf")),
    *("", "x", "-1", "0", "9" * 18, "9" * 5000, "../../../etc/passwd", "/etc/passwd", "\0", "ä\u2028", "nan", "1e9"),
    *([], [[]], [-1], [2**63], {}, {"x": {}}, [0] * 100),
)


def refused_or_read(read: Callable[[], Any]) -> Any:
    """What ``read`` gives, or None where it refuses with one line; anything else that it raises is a defect."""
    try:
        return read()
    except SconeError as error:
        line = str(error)
    assert 10 < len(line) < 20_000, line[:200]
    return None


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """``content`` with up to three damages: flipped, replaced, cut out, doubled, inserted, truncated, zeroed."""
    result = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(result) - 1)))
        size = draw(st.integers(1, 40))
        kind = draw(st.sampled_from(["flip", "replace", "remove", "double", "insert", "cut", "zero"]))
        if kind == "flip" and result:
            result[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "replace":
            result[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "remove":
            del result[at : at + size]
        elif kind == "double":
            result[at:at] = result[at : at + size]
        elif kind == "insert":
            result[at:at] = draw(st.binary(max_size=size))
        elif kind == "cut":
            del result[at:]
        else:
            result[at : at + size] = bytes(size)
    return bytes(result)


@st.composite
def forged(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with one or two of its parts removed, renamed or replaced by something hostile."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 2))):
        places = list(_places(result))
        if not places:
            return draw(st.sampled_from(HOSTILE_VALUES))
        parent, key = draw(st.sampled_from(places))
        kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
        if kind == "replace":
            parent[key] = copy.deepcopy(draw(st.sampled_from(HOSTILE_VALUES)))
        elif kind == "rename" and isinstance(parent, dict):
            parent[draw(st.sampled_from(["x", "", "../x", "__class__"]))] = parent.pop(key)
        else:
            del parent[key]
    return result


def _places(value: Any) -> Any:
    """(container, key) of everything inside ``value``."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from _places(value[key])


def deep_json(depth: int = 100_000) -> str:
    """JSON nested deeper than any parser's stack."""
    return "[" * depth + "]" * depth
