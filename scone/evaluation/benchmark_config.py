"""The benchmark's JSON: which models, baselines and data sets to measure, and on which grid."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scone.utils.command_line import did_you_mean
from scone.utils.errors import SconeError
from scone.utils.files import read_json


@dataclass(frozen=True)
class ModelEntry:
    """A SCONE model. ``f_gram_model_size`` and ``max_f_grams`` only describe it in the results."""

    name: str
    model_path: str
    embedding_cache_path: str | None = None
    f_gram_model_size: str | None = None
    max_f_grams: int | None = None


@dataclass(frozen=True)
class BaselineEntry:
    """A plain causal language model, by folder or hub name."""

    name: str
    model_name: str


@dataclass(frozen=True)
class DatasetEntry:
    """A split to measure perplexity on."""

    name: str
    dataset_name: str
    dataset_config_name: str | None = None
    text_column: str = "text"
    split: str = "test"


@dataclass(frozen=True)
class BenchmarkConfig:
    """The whole file. Speeds are medians of ``num_runs`` runs after ``warmup_runs``."""

    model_configs: tuple[ModelEntry, ...] = ()
    baseline_configs: tuple[BaselineEntry, ...] = ()
    dataset_configs: tuple[DatasetEntry, ...] = ()
    batch_sizes: tuple[int, ...] = (1, 4, 8)
    sequence_lengths: tuple[int, ...] = (512, 1024)
    num_runs: int = 5
    warmup_runs: int = 2

    @property
    def entries(self) -> tuple[ModelEntry | BaselineEntry, ...]:
        """All models, then all baselines."""
        return (*self.model_configs, *self.baseline_configs)


_ENTRIES = {"model_configs": ModelEntry, "baseline_configs": BaselineEntry, "dataset_configs": DatasetEntry}


def read_benchmark_config(path: str | Path) -> BenchmarkConfig:
    """Read and check the file. Raises SconeError: missing, not JSON, unknown or missing names, values of a wrong
    kind.
    """
    config: BenchmarkConfig = _checked(read_json(path), BenchmarkConfig, str(path))
    if not config.entries:
        raise SconeError(f"{path}: found no models; expected entries in model_configs or baseline_configs")
    names = [entry.name for entry in config.entries]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SconeError(f"{path}: found the name {repeated[0]} twice; expected a name of its own for every model")
    return config


def _checked(found: Any, kind: Any, where: str) -> Any:
    """``found`` as the dataclass ``kind``; ``where`` names the place in errors."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    if not isinstance(found, dict):
        raise SconeError(f"{where}: found {type(found).__name__}; expected an object with {', '.join(fields)}")
    for name in found:
        if name not in fields:
            advice = did_you_mean(name, fields) or f"expected {', '.join(fields)}"
            raise SconeError(f"{where}: found the unknown name {name}; {advice}")
    values = {}
    for name, field in fields.items():
        value, place = found.get(name), f"{where}: {name}"
        if value is None and field.default is dataclasses.MISSING:
            raise SconeError(f"{where}: found an entry without {name}; expected {', '.join(fields)}")
        if isinstance(field.default, tuple) and name in found:
            if not isinstance(value, list):
                raise SconeError(f"{place}: found {value!r}; expected a list")
            entry = _ENTRIES.get(name)
            value = tuple(_checked(item, entry, place) if entry else _number(item, place, 1) for item in value)
        elif isinstance(field.default, int) and name in found:
            value = _number(value, place, 0 if name == "warmup_runs" else 1)
        elif value is not None and not isinstance(value, wanted := int if name == "max_f_grams" else str):
            raise SconeError(f"{place}: found {value!r}; expected {wanted.__name__}")
        if name in found:
            values[name] = value
    return kind(**values)


def _number(value: Any, where: str, minimum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise SconeError(f"{where}: found {value!r}; expected a whole number of at least {minimum}")
    return value
