"""The options as a flat list, and the conversion of one value to its option's type."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from dataclasses import dataclass
from typing import Any

from scone.configs import schema
from scone.configs.schema import OptionInfo
from scone.utils.errors import SconeError

_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_NONES = ("none", "null")


@dataclass(frozen=True)
class Entry:
    """One option: ``name`` is dotted ("model.f_gram.hidden_size"), ``type`` is bool, int, float or str."""

    name: str
    type: type
    optional: bool  # None is a value
    default: Any
    info: OptionInfo

    @property
    def section(self) -> str:
        return self.name.split(".", 1)[0]

    @property
    def flag(self) -> str:
        return "_".join(self.name.split(".")[1:])


@functools.cache
def entries() -> dict[str, Entry]:
    """Every option by its dotted name, in the order of the schema."""
    found: dict[str, Entry] = {}
    for section in schema.SECTIONS:
        _collect(typing.get_type_hints(schema.SconeOptions)[section], section, found)
    return found


def _collect(group: type, prefix: str, found: dict[str, Entry]) -> None:
    hints = typing.get_type_hints(group)
    for item in dataclasses.fields(group):
        name, hint = f"{prefix}.{item.name}", hints[item.name]
        info = schema.option_info(item)
        if info is None:
            _collect(hint, name, found)
            continue
        parts = [part for part in _union_parts(hint) if part is not type(None)]
        found[name] = Entry(name, parts[0], len(parts) < len(_union_parts(hint)), item.default, info)


def _union_parts(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def convert(entry: Entry, value: Any, shown_as: str, from_text: bool = False) -> Any:
    """``value`` as the option's type, within its bounds.

    ``shown_as`` names the option in errors ("--max_n", "base.yaml: data.max_n"); ``from_text`` says that the value
    was typed in a shell, where ``none`` is the only way to write None. Raises SconeError.
    """
    if from_text and entry.optional and isinstance(value, str) and value.lower() in _NONES:
        value = None
    if value is None and entry.optional:
        return None
    try:
        converted: Any = _CONVERTERS[entry.type](entry, value)
    except (TypeError, ValueError, OverflowError):
        raise _refusal(entry, value, shown_as) from None
    info, low, high = entry.info, entry.info.minimum, entry.info.maximum
    if converted is not None and (
        (info.choices is not None and converted not in info.choices)
        or (low is not None and converted < low)
        or (high is not None and converted > high)
    ):
        raise _refusal(entry, value, shown_as)
    if entry.info.check is not None and converted is not None:
        try:
            entry.info.check(converted)
        except SconeError as error:
            raise SconeError(f"{shown_as}: {error}") from None
    return converted


def expectation(entry: Entry) -> str:
    """What the option takes, in words: "a whole number of at least 2"."""
    info = entry.info
    if info.choices:
        return "one of " + ", ".join(info.choices)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[entry.type]
    if info.minimum is not None and info.maximum is not None:
        words += f" from {info.minimum:g} to {info.maximum:g}"
    elif info.minimum is not None:
        words += f" of at least {info.minimum:g}"
    return words + (" or none" if entry.optional else "")


def _refusal(entry: Entry, value: Any, shown_as: str) -> SconeError:
    meaning = entry.info.help + (f" ({entry.info.unit})" if entry.info.unit else "")
    hint = "; put it in quotes" if entry.type is str and not isinstance(value, (str, dict, list, type(None))) else ""
    return SconeError(f"{shown_as}: found {shown(value)}; expected {expectation(entry)}{hint}; meaning: {meaning}")


def shown(value: Any) -> str:
    """A value that was found, as a message shows it: never longer than a line."""
    if isinstance(value, str) and value and " " not in value:
        return shortened(value)
    try:
        return shortened(repr(value))
    except ValueError:  # a number that Python refuses to write out
        return f"a {type(value).__name__}"


def shortened(text: str) -> str:
    """``text``, its middle left out where it is longer than 200 characters."""
    return text if len(text) <= 200 else f"{text[:150]} … {text[-30:]}"


def _to_bool(entry: Entry, value: Any) -> bool:
    if str(value).lower() not in _BOOLEANS:
        raise ValueError(value)
    return _BOOLEANS[str(value).lower()]


def _to_int(entry: Entry, value: Any) -> int:
    if isinstance(value, (bool, bytes)):
        raise ValueError(value)
    if isinstance(value, int):
        return value
    if isinstance(value, str):
        try:
            return int(value)
        except ValueError:
            value = float(value)  # "1e6" is a whole number too
    if not isinstance(value, float) or value != math.floor(value):
        raise ValueError(value)
    return int(value)


def _to_float(entry: Entry, value: Any) -> float:
    if not isinstance(value, (int, float, str)) or isinstance(value, bool):
        raise ValueError(value)
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _to_text(entry: Entry, value: Any) -> str | None:
    if entry.info.bare is not None and isinstance(value, bool):
        return entry.info.bare if value else None  # `resume_from_checkpoint: true` in a file
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a configuration named 2020
    if not isinstance(value, str) or not value:
        raise ValueError(value)
    return value


_CONVERTERS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text}
