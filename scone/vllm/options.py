"""What a user of vLLM says of the table, and where the files of a model are. (No numba, no vLLM.)"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from scone.inference.stores import parse_placement
from scone.utils.errors import SconeError

TABLE_FILE = "embeddings.cache"
VOCABULARY_FILE = "f_grams.safetensors"


@dataclass(frozen=True)
class ServingOptions:
    """``--additional-config '{"scone": {...}}'`` of vLLM.

    Args:
        embedding_cache_path: the table, if it is not embeddings.cache in the model's folder.
        placement: where its rows are, see `EmbeddingTable.open`.
        check_weights: where the folder holds the weights that rows are made from, read them once at the start, to
            refuse another model's table.
    """

    embedding_cache_path: str | None = None
    placement: str = "ram"
    check_weights: bool = True


def serving_options(additional_config: Any) -> ServingOptions:
    """Of vLLM's ``additional_config``. Raises SconeError for what we do not know."""
    ours = additional_config.get("scone", {}) if isinstance(additional_config, dict) else {}
    types = {"embedding_cache_path": str, "placement": str, "check_weights": bool}
    assert set(types) == {field.name for field in fields(ServingOptions)}
    for name, value in ours.items() if isinstance(ours, dict) else [("", ours)]:
        if name not in types or not isinstance(value, types[name]):
            raise SconeError(
                f"found {name}={value!r} in the additional config of scone; expected some of "
                f"{', '.join(f'{known} ({kind.__name__})' for known, kind in types.items())}; write for example "
                """--additional-config '{"scone": {"placement": "mmap"}}'"""
            )
    options = ServingOptions(**ours)
    parse_placement(options.placement, 0, 1)
    return options


def shared_between_processes(additional_config: Any) -> Any:
    """vLLM's ``additional_config`` for several processes of a machine: rows that would be in RAM are there once."""
    options = serving_options(additional_config)
    places = [place.strip().partition(":") for place in options.placement.split(",")]
    placement = ",".join("".join(("shared" if kind == "ram" else kind, *size)) for kind, *size in places)
    others = additional_config if isinstance(additional_config, dict) else {}
    return others | {"scone": others.get("scone", {}) | {"placement": placement}}


def table_path(model: str, revision: str | None, options: ServingOptions) -> Path:
    """The model's table. Raises SconeError where there is none."""
    advice = "make it with `scone precompute`, or name it with --additional-config"
    if options.embedding_cache_path is not None:
        path = Path(options.embedding_cache_path)
        if not path.is_file():
            raise SconeError(f"found no table {path}; expected the embedding table of {model}; {advice}")
        return path
    return _file(model, revision, TABLE_FILE, f"its embedding table; {advice}")


def vocabulary_path(model: str, revision: str | None) -> Path:
    """The model's f-grams. Raises SconeError where they are not there."""
    return _file(model, revision, VOCABULARY_FILE, "the f-grams that it was trained with; copy the whole model folder")


def _file(model: str, revision: str | None, name: str, what: str) -> Path:
    """A file of a model's folder, or of a model on the hub."""
    try:
        path = cached_file(model, name, revision=revision)
    except OSError:
        path = None
    if path is None:
        raise SconeError(f"found no {name} in {model}; expected {what}")
    return Path(path)
