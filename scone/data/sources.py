"""Where documents come from (local files, a Hugging Face dataset, the standard library), and to which split they go."""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import Any

import yaml

from scone.data.readers import (
    COMPRESSIONS,
    FORMATS,
    CountBytes,
    kind_of,
    read_documents,
    split_articles,
    text_of_row,
    unknown_column,
)
from scone.utils.errors import SconeError, library_refusal
from scone.utils.hub import refuse_missing_path, refuse_unreachable_dataset

STDLIB = "python-stdlib"
"""The built-in corpus: the sources of the running interpreter's standard library, which are on every machine."""

SPLITS = ("train", "validation", "test")
ALL = "all"  # every document of a source, whatever its split

SMALL_CORPUS = 10_000  # documents: below this, held-out documents are counted out one by one
SMALL_SHARE = 50  # a fiftieth of the text for each held-out split of a small corpus
LARGE_SHARE = 100  # a hundredth of the documents for each held-out split of a large one

_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",  # as the hub reads it
    "evaluation": "test",
}
_HASH_RANGE = 1 << 64

_IGNORED_NAMES = re.compile(r"(readme|licen[cs]e|copying|notice|attribution)\b", re.IGNORECASE)
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class CorpusFile:
    """A file, or a split of a hub dataset: its documents are read in order.

    ``facts`` identify its content without reading all of it; ``size_bytes`` is None when unknown.
    """

    name: str
    split: str | None
    size_bytes: int | None
    facts: dict[str, Any]
    read: Callable[[CountBytes], Iterator[str]] = field(compare=False)


@dataclass(frozen=True)
class Source:
    """A resolved corpus: its units in a fixed order."""

    name: str
    units: tuple[CorpusFile, ...]
    is_local: bool = False


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
    if splits is not None and ALL in splits:
        if list(splits) != [ALL]:
            raise SconeError(f"found splits {', '.join(splits)}; expected {ALL!r} alone or some of {', '.join(SPLITS)}")
        return [SplitGroup(source.units, (ALL,))]
    by_split = {split: tuple(unit for unit in source.units if unit.split == split) for split in SPLITS}
    named = tuple(split for split in SPLITS if by_split[split])
    if named in ((), ("train",)):
        groups = [SplitGroup(by_split["train"] or source.units, SPLITS)]
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
    if dataset_name == STDLIB:
        return _stdlib_source()
    if kind_of(path):
        raise SconeError(f"found no file {dataset_name!r}; expected a corpus there; check the path")
    refuse_missing_path(dataset_name, "a corpus")
    refuse_unreachable_dataset(
        f"dataset {dataset_name!r} is not a local path", "give a local file or folder by --dataset_name"
    )
    return Source(dataset_name, hub_units(dataset_name, dataset_config_name, text_column))


# ---------------------------------------------------------------------- local files


def _local_source(name: str, path: Path, config_name: str | None, text_column: str) -> Source:
    if path.is_file():
        return Source(name, (_file_unit(path, path.name, split_of_single_file(path.name), text_column),), True)
    card = _dataset_card(path)
    if config_name and (path / config_name).is_dir() and "configs" not in card:
        path, card = path / config_name, {}
    if card:
        facts = {"files": [_file_facts(file, file.relative_to(path).as_posix()) for file in _readable_files(path)]}
        return Source(name, hub_units(str(path), config_name, text_column, facts), True)
    files = _readable_files(path)
    if any(file.suffix == ".arrow" and (file.parent / "state.json").is_file() for file in files):
        raise SconeError(
            f"found {name!r}, which the datasets library saved by save_to_disk; expected files of text, JSON lines or "
            "parquet; load each split by load_from_disk and write it by its to_parquet"
        )
    readable = {file.relative_to(path): file for file in files if kind_of(file)}
    if not readable:
        endings = sorted({"".join(file.suffixes[-2:]) or file.name for file in files})
        raise SconeError(
            f"found {', '.join(endings[:8]) or 'no files'} in {name!r}; expected {' '.join(FORMATS)}, each also with "
            f"{' '.join(COMPRESSIONS)}; convert the files or give another path"
        )
    splits = [split_of_path(each) for each in readable]
    if None in splits:  # names say something about splits only where every name does: test.py beside main.py does not
        splits = [None] * len(splits)
    units = zip(readable.items(), splits, strict=True)
    return Source(
        name, tuple(_file_unit(file, each.as_posix(), split, text_column) for (each, file), split in units), True
    )


def _readable_files(folder: Path) -> list[Path]:
    """The files under a folder, sorted by relative path; hidden files, read-mes and licences are no corpus."""
    found: list[Path] = []
    for parent, subfolders, names in os.walk(folder, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        found += [Path(parent, name) for name in names if not name.startswith(".") and not _IGNORED_NAMES.match(name)]
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


# ---------------------------------------------------------------------- datasets of the hub, streamed by `datasets`


def _dataset_card(folder: Path) -> dict[str, Any]:
    """What a copy of a hub dataset says of itself, at the head of its README or beside it; empty for other folders."""
    from huggingface_hub import metadata_load

    try:
        card = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):  # anybody's README
        card = {}
    return card | ({"infos": True} if (folder / "dataset_infos.json").is_file() else {})


def hub_units(
    dataset_name: str,
    config_name: str | None,
    text_column: str,
    local_facts: dict[str, Any] | None = None,
) -> tuple[CorpusFile, ...]:
    """One unit per split of a dataset, by name or folder. With ``HF_HUB_OFFLINE`` a copy in the cache is used.

    ``local_facts``: what is in the folder. Raises SconeError when there is no such dataset, configuration or column.
    """
    import datasets

    what = f"cannot open dataset {dataset_name!r}" + (f" (configuration {config_name!r})" if config_name else "")
    with library_refusal(what, "check --dataset_name and --dataset_config_name, or give a local file or folder"):
        builder = datasets.load_dataset_builder(dataset_name, config_name)
        names = list(builder.info.splits or datasets.get_dataset_split_names(dataset_name, config_name))
    columns = list(builder.info.features or ())
    if columns and text_column not in columns:
        raise SconeError(unknown_column(f"dataset {dataset_name!r}", text_column, columns))
    # names of another kind ("unsupervised") are left out, unless there are no others
    known = {name: name for name in names if name in SPLITS} or {
        name: split for name in names if (split := split_of_name(name))
    }
    facts = {"config": config_name} | (local_facts or {"name": dataset_name, "hash": builder.hash})

    def unit(name: str, split: str | None) -> CorpusFile:
        where = f"dataset {dataset_name!r}, split {name!r}"

        def rows(count_bytes: CountBytes) -> Iterator[str]:
            with library_refusal(f"{where} cannot be read", "check the network and run again to go on"):
                for row in datasets.load_dataset(dataset_name, config_name, split=name, streaming=True):
                    text = text_of_row(row, text_column, where)
                    count_bytes(len(text))
                    yield text

        def documents(count_bytes: CountBytes) -> Iterator[str]:
            if "wikitext" not in dataset_name.lower():
                return rows(count_bytes)
            # WikiText's rows are lines; empty ones have lost their line end.
            return split_articles(row if row.endswith("\n") else row + "\n" for row in rows(count_bytes))

        sizes = builder.info.splits or {}
        return CorpusFile(
            name, split, sizes[name].num_bytes if name in sizes else None, facts | {"split": name}, documents
        )

    return tuple(unit(name, split) for name, split in (known or dict.fromkeys(names)).items())


# ---------------------------------------------------------------------- the standard library


def stdlib_files() -> list[Path]:
    """The ``.py`` files of the standard library in a fixed order, without tests and installed packages.

    Raises SconeError when the interpreter came without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"}
    # build settings differ from machine to machine and say nothing; they live in config-* and _sysconfigdata*
    build_settings = ("config-", "_sysconfigdata", "__phello__")
    files = [
        path
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix())
        if not any(part in skipped or part.startswith(build_settings) for part in path.relative_to(root).parts)
    ]
    if not files:
        raise SconeError(
            f"found no .py files in {root}; expected the standard library; give a corpus by --dataset_name"
        )
    return files


def _stdlib_source() -> Source:
    files = stdlib_files()
    digest = hashlib.sha256()
    size = 0
    for path in files:
        content = path.read_bytes()
        size += len(content)
        digest.update(len(content).to_bytes(8, "little") + content)

    def read(count_bytes: CountBytes) -> Iterator[str]:
        for path in files:
            yield from read_documents(path, "", count_bytes)

    facts = {"name": STDLIB, "files": len(files), "size": size, "sha256": digest.hexdigest()}
    return Source(STDLIB, (CorpusFile(STDLIB, None, size, facts, read),))


# ---------------------------------------------------------------------- splits, by name or by content


def split_of_name(name: str) -> str | None:
    """The split that a dataset's split name or a file's stem means ("wiki.valid" → "validation"), or None."""
    return next((_NAMES[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _NAMES), None)


def split_of_single_file(name: str) -> str | None:
    """The split that one file given alone says at the end of its name ("wiki.test.tokens"; not "test-results.txt")."""
    words = re.findall(r"[a-z]+", re.split(r"\.(?:txt|text|md|tokens|py|jsonl?|parquet)\b", name.lower())[0])
    words = [word for word in words if word != "of"]  # part numbers: validation-00000-of-00008
    return _NAMES.get(words[-1]) if words else None


def split_of_path(relative_path: PurePath) -> str | None:
    """The split that a file's name says, else the nearest folder whose whole name is a split's, or None."""
    folders = (_NAMES.get(folder.lower()) for folder in reversed(relative_path.parts[:-1]))
    return split_of_name(relative_path.name) or next(filter(None, folders), None)


def content_hash(text: str) -> int:
    """64 bits of a document's content; equal documents have equal hashes on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8, person=b"scone-split").digest(), "big")


def split_rule(documents: Iterable[str], held_out: Sequence[str]) -> Callable[[str], str]:
    """A function from a document to ``"train"`` or one of the ``held_out`` splits, by its content alone.

    So equal documents land in the same split, and the order and the number of files do not matter. At most the first
    10,000 documents are read here. A corpus of fewer counts its held-out documents out: in the order of their hashes,
    until each held-out split has a fiftieth of the text and at least one document (of two documents in all the second
    split gets none, of one the first neither). A larger one gives a document to a held-out split when its hash falls
    into that split's hundredth.
    """
    sizes: dict[int, int] = {}
    for number, text in enumerate(documents, start=1):
        sizes[content_hash(text)] = len(text)
        if number == SMALL_CORPUS:
            split_of_range, width = dict(enumerate(held_out)), _HASH_RANGE // LARGE_SHARE
            return lambda text: split_of_range.get(content_hash(text) // width, "train")
    owners = _owners_in_small_corpus(sizes, held_out)
    return lambda text: owners.get(content_hash(text), "train")


def _owners_in_small_corpus(sizes: Mapping[int, int], held_out: Sequence[str]) -> dict[int, str]:
    """Hash → held-out split, for documents of these ``sizes`` by hash."""
    target = sum(sizes.values()) / SMALL_SHARE
    waiting = sorted(sizes)
    owners: dict[int, str] = {}
    for split in held_out:
        taken = 0
        # A document far above the target would leave training short of text: such ones are held out only when no
        # other is left to be the split's first.
        for value in sorted(waiting, key=lambda value: sizes[value] > 2 * target):
            if len(waiting) < 2 or taken >= target or (taken and sizes[value] > 2 * target):
                break
            owners[value] = split
            waiting.remove(value)
            taken += sizes[value]
    return owners
