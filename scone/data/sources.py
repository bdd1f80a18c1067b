"""Where documents come from: local files, a Hugging Face dataset, or the standard library's sources."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from scone.data import stdlib_corpus
from scone.data.hub_source import describes_itself, hub_units
from scone.data.readers import COMPRESSIONS, FORMATS, CorpusFile, CountBytes, kind_of, read_documents
from scone.data.splits import ALL, SPLITS, is_shard, split_of_path, split_of_single_file, split_rule
from scone.utils.errors import SconeError

_IGNORED_NAMES = re.compile(r"(readme|licen[cs]e|copying|notice|attribution)\b", re.IGNORECASE)
_HUB_METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json")
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Source:
    """A resolved corpus: its units in a fixed order."""

    name: str
    units: tuple[CorpusFile, ...]
    is_local: bool = False

    @property
    def named_splits(self) -> tuple[str, ...]:
        """The splits that the source itself names."""
        return tuple(split for split in SPLITS if any(unit.split == split for unit in self.units))


@dataclass(frozen=True)
class SplitGroup:
    """Units that are read together, and the splits that their documents go to (train or a held-out one by hash)."""

    units: tuple[CorpusFile, ...]
    splits: tuple[str, ...]

    def documents(self) -> Iterator[str]:
        """The documents of all units in order, blank ones left out."""
        texts = chain.from_iterable(unit.read(lambda n: None) for unit in self.units)
        return (text for text in texts if text.strip())

    def rule(self) -> Callable[[str], str]:
        """The split of a document (reads at most the first 10,000 documents when there are several splits)."""
        if len(self.splits) == 1:
            return lambda text: self.splits[0]
        return split_rule(self.documents(), [split for split in self.splits if split != "train"])


def open_documents(
    dataset_name: str,
    dataset_config_name: str | None = None,
    split: str = "train",
    text_column: str = "text",
) -> Iterator[str]:
    """The documents of one split (or of ``"all"``) in the source's order, streamed.

    Raises SconeError when the source cannot be found or read, lacks the split or the column, or holds no text.
    """
    source = open_source(dataset_name, dataset_config_name, text_column)
    (group,) = plan(source, [split])
    rule = group.rule()
    found = False
    for text in group.documents():
        if rule(text) == split:
            found = True
            yield text
    if not found:
        raise SconeError(empty_split(source, split))


def empty_split(source: Source, split: str) -> str:
    """The one-line error for a split without documents."""
    return f"{source.name!r} gives no document to its {split!r} split; give more text, or choose another split"


def plan(source: Source, splits: Sequence[str] | None) -> list[SplitGroup]:
    """What has to be read for ``splits`` (None: every split that the source can give).

    A source that names no splits, or only train, is divided by the content of its documents into train, validation
    and test. One that names train and test gives its validation split from train. Otherwise splits are what the
    source says. Raises SconeError for a split that is not there.
    """
    named = source.named_splits
    by_split = {split: tuple(unit for unit in source.units if unit.split == split) for split in named}
    if splits is not None and ALL in splits:
        if list(splits) != [ALL]:
            raise SconeError(f"found splits {', '.join(splits)}; expected {ALL!r} alone or some of {', '.join(SPLITS)}")
        return [SplitGroup(source.units, (ALL,))]
    if not named or named == ("train",):
        groups = [SplitGroup(by_split.get("train", source.units), SPLITS)]
    elif named == ("train", "test"):
        groups = [SplitGroup(by_split["train"], ("train", "validation")), SplitGroup(by_split["test"], ("test",))]
    else:
        groups = [SplitGroup(by_split[split], (split,)) for split in named]
    available = [split for group in groups for split in group.splits]
    wanted = available if splits is None else list(splits)
    for split in wanted:
        if split not in available:
            raise SconeError(
                f"{source.name!r} has no {split!r} split; it has {', '.join(available)}; choose one of these or {ALL!r}"
            )
    return [group for group in groups if set(group.splits) & set(wanted)]


def open_source(dataset_name: str, dataset_config_name: str | None = None, text_column: str = "text") -> Source:
    """Resolve a name: an existing path is local, ``python-stdlib`` is built in, all else is asked of the hub.

    Raises SconeError when nothing is found under the name.
    """
    path = Path(dataset_name).expanduser()
    if path.exists():
        return _local_source(dataset_name, path, dataset_config_name, text_column)
    if dataset_name == stdlib_corpus.NAME:
        return _stdlib_source()
    looks_like_path = dataset_name.startswith((".", "/", "~")) or dataset_name.count("/") > 1 or kind_of(path)
    if looks_like_path:
        raise SconeError(f"found no file or folder {dataset_name!r}; expected a corpus there; check the path")

    return Source(dataset_name, hub_units(dataset_name, dataset_config_name, text_column))


def _local_source(name: str, path: Path, config_name: str | None, text_column: str) -> Source:
    if config_name and (path / config_name).is_dir() and not describes_itself(path):
        path = path / config_name  # configurations as the hub keeps them: a folder each
    root = path if path.is_dir() else path.parent
    files = _readable_files(path) if path.is_dir() else [path]
    if path.is_dir() and describes_itself(path):
        found = {"files": [_file_facts(file, file.relative_to(root).as_posix()) for file in files]}
        return Source(name, hub_units(str(path), config_name, text_column, found), is_local=True)
    if any(file.suffix == ".arrow" and (file.parent / "state.json").is_file() for file in files):
        raise SconeError(
            f"found {name!r}, which the datasets library saved by save_to_disk; expected files of text, JSON lines or "
            "parquet; load each split by load_from_disk and write it by its to_parquet"
        )
    readable = [file for file in files if kind_of(file)]
    if not readable:
        endings = sorted({"".join(file.suffixes[-2:]) or file.name for file in files})
        raise SconeError(
            f"found {', '.join(endings[:8]) or 'no files'} in {name!r}; expected {' '.join(FORMATS)}, each also with "
            f"{' '.join(COMPRESSIONS)}; convert the files or give another path"
        )
    relative = [file.relative_to(root) for file in readable]
    splits = [split_of_path(each) for each in relative] if path.is_dir() else [split_of_single_file(path.name)]
    if None in splits and all(split or is_shard(file.name) for split, file in zip(splits, readable, strict=True)):
        # a dataset of the hub with splits of other names ("unsupervised"), which are left out as there
        kept = [place for place, split in enumerate(splits) if split is not None] or range(len(splits))
        relative, splits = [relative[place] for place in kept], [splits[place] for place in kept]
        readable = [readable[place] for place in kept]
    if None in splits:  # names say something about splits only where every name does: test.py beside main.py does not
        splits = [None] * len(splits)
    return Source(
        name,
        tuple(
            _file_unit(file, each.as_posix(), split, text_column)
            for file, each, split in zip(readable, relative, splits, strict=True)
        ),
        is_local=True,
    )


def _readable_files(folder: Path) -> list[Path]:
    """The files under a folder, sorted by relative path; hidden files, read-mes and licences are no corpus."""
    found: list[Path] = []
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(parent, name) for name in names if not name.startswith(".") and not _IGNORED_NAMES.match(name)]
    if any(file.parent == folder and file.name in _HUB_METADATA for file in found):
        # as the hub gives it: a description of the data, and sometimes the program that once read it
        found = [file for file in found if file.name not in _HUB_METADATA and file.suffix != ".py"]
    return sorted(found, key=lambda file: file.relative_to(folder).as_posix())


def _file_unit(path: Path, relative_name: str, split: str | None, text_column: str) -> CorpusFile:
    facts = _file_facts(path, relative_name)
    return CorpusFile(
        relative_name, split, facts["size"], facts, lambda count_bytes: read_documents(path, text_column, count_bytes)
    )


def _file_facts(path: Path, relative_name: str) -> dict[str, Any]:
    """What identifies a file's content: size, time, hash of both ends. Raises SconeError."""
    try:
        status = path.stat()
        with path.open("rb") as file:
            head = file.read(_SAMPLE_BYTES)
            file.seek(max(0, status.st_size - _SAMPLE_BYTES))
            sample = hashlib.sha256(head + file.read()).hexdigest()[:32]
    except OSError as error:
        raise SconeError(f"cannot read {path} ({error.strerror}); check the path and its permissions") from error
    return {"name": relative_name, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "sample": sample}


def _stdlib_source() -> Source:
    files = stdlib_corpus.stdlib_files()
    digest = hashlib.sha256()
    size = 0
    for path in files:
        content = path.read_bytes()
        size += len(content)
        digest.update(len(content).to_bytes(8, "little") + content)

    def read(count_bytes: CountBytes) -> Iterator[str]:
        for path in files:
            yield from read_documents(path, "", count_bytes)

    facts = {"name": stdlib_corpus.NAME, "files": len(files), "size": size, "sha256": digest.hexdigest()}
    return Source(stdlib_corpus.NAME, (CorpusFile(stdlib_corpus.NAME, None, size, facts, read),))
