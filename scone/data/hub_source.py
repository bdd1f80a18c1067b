"""Datasets of the Hugging Face hub, streamed by the ``datasets`` library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scone.data.readers import CorpusFile, CountBytes, split_articles, text_of_row, unknown_column
from scone.data.splits import SPLITS, split_of_name
from scone.utils.errors import SconeError
from scone.utils.hub import why_hub_is_unreachable


def describes_itself(folder: Path) -> bool:
    """Whether the folder is a dataset of the hub whose README says which files are which configuration and split."""
    from huggingface_hub import metadata_load

    try:
        described = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # anybody's README
        return False
    return bool(described.get("configs"))


def hub_units(
    dataset_name: str,
    dataset_config_name: str | None,
    text_column: str,
    local_facts: Mapping[str, Any] | None = None,
) -> tuple[CorpusFile, ...]:
    """One unit per split of a dataset. With ``HF_HUB_OFFLINE`` a copy in the ``datasets`` cache is used.

    ``local_facts`` say that the name is a folder on this machine, and what is in it. Raises SconeError when the hub
    cannot be reached, or has no such dataset, configuration or column.
    """
    import datasets

    problem = why_hub_is_unreachable() if local_facts is None else None
    if problem and problem != "HF_HUB_OFFLINE is set":
        raise SconeError(
            f"dataset {dataset_name!r} is not a local path, and the Hugging Face hub cannot be reached ({problem}); "
            "give a local file or folder by --dataset_name, or set HF_HUB_OFFLINE=1 to use a copy downloaded before"
        )
    try:
        builder = datasets.load_dataset_builder(dataset_name, dataset_config_name)
        split_names = list(builder.info.splits or datasets.get_dataset_split_names(dataset_name, dataset_config_name))
    except Exception as error:  # whatever network clients, file systems and builders raise
        reason = " ".join(str(error).split())
        raise SconeError(
            f"cannot open dataset {dataset_name!r}{_configuration(dataset_config_name)} ({reason}); check "
            "--dataset_name and --dataset_config_name, or give a local file or folder"
        ) from error
    columns = list(builder.info.features or ())
    if columns and text_column not in columns:
        raise SconeError(unknown_column(f"dataset {dataset_name!r}", text_column, columns))
    splits = _known_splits(split_names)
    facts = {"name": dataset_name, "config": dataset_config_name, "hash": builder.hash}
    if local_facts is not None:
        facts = {"config": dataset_config_name, **local_facts}
    return tuple(
        _split_unit(dataset_name, dataset_config_name, text_column, name, split, facts, builder.info.splits)
        for name, split in splits
    )


def _known_splits(names: list[str]) -> list[tuple[str, str | None]]:
    """Names mapped to the splits they mean; unknown names are dropped, unless all are unknown."""
    exact: list[tuple[str, str | None]] = [(name, name) for name in names if name in SPLITS]
    by_word: list[tuple[str, str | None]] = [(name, split) for name in names if (split := split_of_name(name))]
    return exact or by_word or [(name, None) for name in names]


def _configuration(name: str | None) -> str:
    return f" (configuration {name!r})" if name else ""


def _split_unit(
    dataset_name: str,
    dataset_config_name: str | None,
    text_column: str,
    split_name: str,
    split: str | None,
    facts: dict[str, Any],
    sizes: Any,
) -> CorpusFile:
    def rows(count_bytes: CountBytes) -> Iterator[str]:
        where = f"dataset {dataset_name!r}, split {split_name!r}"
        for row in _streamed(dataset_name, dataset_config_name, split_name, where):
            text = text_of_row(row, text_column, where)
            count_bytes(len(text))
            yield text

    def documents(count_bytes: CountBytes) -> Iterator[str]:
        if "wikitext" not in dataset_name.lower():
            return rows(count_bytes)
        # WikiText's rows are lines; empty ones have lost their line end.
        return split_articles(row if row.endswith("\n") else row + "\n" for row in rows(count_bytes))

    size = sizes[split_name].num_bytes if sizes and split_name in sizes else None
    return CorpusFile(split_name, split, size, facts | {"split": split_name}, documents)


def _streamed(dataset_name: str, config_name: str | None, split_name: str, where: str) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        yield from datasets.load_dataset(dataset_name, config_name, split=split_name, streaming=True)
    except Exception as error:  # whatever network clients, file systems and builders raise
        reason = " ".join(str(error).split())
        raise SconeError(f"{where} cannot be read ({reason}); check the network and run again to go on") from error
