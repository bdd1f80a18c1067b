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
_POSITIVE_LISTS = ("batch_sizes", "sequence_lengths")


def read_benchmark_config(path: str | Path) -> BenchmarkConfig:
    """Read and check the file. Raises SconeError: missing, not JSON, unknown or missing names, values of a wrong
    kind.
    """
    found = read_json(path)
    _check_names(found, BenchmarkConfig, str(path))
    values: dict[str, Any] = {}
    for name, value in found.items():
        where = f"{path}: {name}"
        if name in _ENTRIES:
            values[name] = tuple(_entry(_ENTRIES[name], item, where) for item in _list(value, where))
        elif name in _POSITIVE_LISTS:
            values[name] = tuple(_whole_number(item, where, minimum=1) for item in _list(value, where))
        else:
            values[name] = _whole_number(value, where, minimum=0 if name == "warmup_runs" else 1)
    config = BenchmarkConfig(**values)
    if not config.entries:
        raise SconeError(f"{path}: found no models; expected entries in model_configs or baseline_configs")
    names = [entry.name for entry in config.entries]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise SconeError(f"{path}: found the name {repeated[0]} twice; expected a name of its own for every model")
    return config


def _entry(kind: type, item: Any, where: str) -> Any:
    _check_names(item, kind, where)
    for field in dataclasses.fields(kind):
        value = item.get(field.name)
        required = field.default is dataclasses.MISSING
        if required and value is None:
            raise SconeError(f"{where}: found an entry without {field.name}; expected {', '.join(_names(kind))}")
        wanted = int if field.name == "max_f_grams" else str
        if value is not None and not isinstance(value, wanted):
            raise SconeError(f"{where}: {field.name}: found {value!r}; expected {wanted.__name__}")
    return kind(**item)


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _check_names(found: Any, kind: type, where: str) -> None:
    if not isinstance(found, dict):
        raise SconeError(f"{where}: found {type(found).__name__}; expected an object with {', '.join(_names(kind))}")
    for name in found:
        if name not in _names(kind):
            advice = did_you_mean(name, _names(kind)) or f"expected {', '.join(_names(kind))}"
            raise SconeError(f"{where}: found the unknown name {name}; {advice}")


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise SconeError(f"{where}: found {value!r}; expected a list")
    return value


def _whole_number(value: Any, where: str, minimum: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise SconeError(f"{where}: found {value!r}; expected a whole number of at least {minimum}")
    return value
