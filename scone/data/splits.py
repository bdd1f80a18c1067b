"""Which split a file or a document belongs to: by its name, or by a hash of its content."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePath

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
