"""Hypothesis strategies over the options: any valid value of any option."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from scone.configs.schema import Entry, entries

# Options that are checked together, or by a rule of their own, get values that always agree.
_SPECIAL: dict[str, st.SearchStrategy[Any]] = {
    "training.fp16": st.booleans(),
    "training.bf16": st.just(False),
    "training.max_steps": st.integers(1, 10**9) | st.just(-1),
    "training.num_epochs": st.floats(0, allow_infinity=False, exclude_min=True),
    "data.max_length": st.integers(1, 512),
    "data.memory_budget": st.sampled_from(["4GiB", "500MB", "1024", None]),
    "model.max_position_embeddings": st.integers(512, 1 << 20) | st.none(),
    "model.hidden_size": st.sampled_from([None, 384, 768]),
    "model.num_attention_heads": st.sampled_from([None, 1, 6, 12]),
    "model.f_gram.hidden_size": st.sampled_from([None, 384, 768]),
    "model.f_gram.num_attention_heads": st.sampled_from([None, 1, 6, 12]),
}


def values_of(entry: Entry) -> st.SearchStrategy[Any]:
    """Valid values of one option."""
    if entry.name in _SPECIAL:
        return _SPECIAL[entry.name]
    info = entry.info
    if info.choices:
        values: st.SearchStrategy[Any] = st.sampled_from(info.choices)
    elif entry.type is bool:
        values = st.booleans()
    elif entry.type is int:
        values = st.integers(int(info.minimum or 0), int(info.maximum) if info.maximum is not None else 1 << 40)
    elif entry.type is float:
        values = st.floats(info.minimum, info.maximum, allow_nan=False, allow_infinity=False)
    else:
        values = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
    return values | st.none() if entry.optional else values


option_values = st.fixed_dictionaries({}, optional={name: values_of(entry) for name, entry in entries().items()})
"""Some options with valid values, by dotted name."""
