"""Tokenise a corpus once: resumable after a kill at any moment, with the same result either way."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import filelock
import numpy as np

import scone
from scone.configs.schema import SconeOptions
from scone.data.sources import ALL, SPLITS, Source, SplitGroup, empty_split, open_documents, open_source, plan
from scone.data.token_file import METADATA_NAME, TokenFile, TokenFileWriter, token_type
from scone.tokenization.tokenizers import (
    document_separator_id,
    load_tokenizer,
    one_thread_per_call,
    tokenizer_fingerprint,
    train_tokenizer,
    vocabulary_size,
)
from scone.utils.errors import SconeError, library_refusal
from scone.utils.files import fingerprint_of, read_json, write_json
from scone.utils.progress import available_cores, map_in_order, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
logger = logging.getLogger(__name__)

# One call encodes at most this much at once: the tokenizers library keeps some 100 bytes a token until it returns.
LONGEST_TEXT_CHARACTERS = 1 << 20
_BOUNDARY = re.compile(r"(?<=\S)(?= \S)|(?<=\S\n)(?=\S)")


class CorpusEncoder:
    """Encodes documents without special tokens, truncation or padding, whatever the tokenizer is set to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        self.dtype = token_type(vocabulary_size(tokenizer))
        self._slow = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = None
        if backend is not None:
            self._fast = Tokenizer.from_str(backend.to_str())  # a copy, so that the caller's settings stay
            self._fast.no_truncation()
            self._fast.no_padding()

    def encode(self, texts: list[str]) -> list[np.ndarray]:
        """Token ids of each text, uint16 or uint32; texts above 1 Mi characters go through ``short_pieces``.

        Raises SconeError where the tokenizer refuses a text: one without a token for what it does not know.
        """
        with library_refusal("the tokenizer refuses a text of the corpus", "give it an unk_token, or give another one"):
            if sum(map(len, texts)) <= LONGEST_TEXT_CHARACTERS:
                return self._encode(texts)
            return [np.concatenate([self._encode([piece])[0] for piece in short_pieces(text)]) for text in texts]

    def _encode(self, texts: list[str]) -> list[np.ndarray]:
        if self._fast is not None:
            encodings = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return [np.array(encoding.ids, self.dtype) for encoding in encodings]
        return [
            np.array(self._slow.encode(text, add_special_tokens=False, truncation=False, verbose=False), self.dtype)
            for text in texts
        ]

    def encode_batches(
        self, batches: Iterable[tuple[list[str], T]], num_threads: int
    ) -> Iterator[tuple[list[np.ndarray], T]]:
        """``encode`` of each batch's texts, with what came with the batch, in order; a few batches are under way."""
        with one_thread_per_call():
            yield from map_in_order(lambda batch: (self.encode(batch[0]), batch[1]), batches, num_threads)


def short_pieces(text: str) -> Iterator[str]:
    """``text`` in pieces of about 1 Mi characters, cut before single spaces or after single line ends where it can.

    There the usual pre-tokenizers cut too, so that the pieces' tokens are the whole text's.
    """
    start = 0
    while len(text) - start > LONGEST_TEXT_CHARACTERS:
        middle = start + LONGEST_TEXT_CHARACTERS // 2
        match = _BOUNDARY.search(text, middle, start + LONGEST_TEXT_CHARACTERS)
        end = match.start() if match else start + LONGEST_TEXT_CHARACTERS
        yield text[start:end]
        start = end
    yield text[start:]


BATCH_CHARACTERS = 1 << 18
COMMIT_CHARACTERS = 1 << 23  # what a kill loses at most, in text
LISTED_UNITS = 1000  # files that a token file's JSON names; it is read at every opening
RECIPE_VERSION = 1  # raised when the same source and tokenizer would give other tokens than before
JOURNAL_NAME = "journal.json"
RESULT_NAME = "corpus.json"


def default_cache_folder() -> Path:
    """``$SCONE_CACHE``, or ``~/.cache/scone``."""
    return Path(os.environ.get("SCONE_CACHE") or Path.home() / ".cache" / "scone").expanduser()


def prepare_corpus(
    dataset_name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dataset_config_name: str | None = None,
    text_column: str = "text",
    splits: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    num_threads: int | None = None,
    quiet: bool = False,
) -> dict[str, TokenFile]:
    """Token files of ``splits`` (None: every split that the source can give; ``("all",)``: all text as one).

    They lie in ``cache_dir`` under a key of the source's files, the column and the tokenizer, and are made only once.
    A run that was killed goes on where it was; two runs at once wait for each other. The tokens do not depend on
    interruptions or the number of threads (None: all cores).
    Raises SconeError for sources that cannot be read, splits that do not exist or are empty, and a full disk.
    """
    source = open_source(dataset_name, dataset_config_name, text_column)
    recipe = {
        "recipe_version": RECIPE_VERSION,
        "text_column": text_column,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "separator_id": document_separator_id(tokenizer),
    }
    found: dict[str, TokenFile] = {}
    for group in plan(source, splits):
        found |= _Job(source, group, tokenizer, recipe, _cache_folder(cache_dir)).run(
            lambda: not source.is_local or open_source(dataset_name, dataset_config_name, text_column) == source,
            num_threads or available_cores(),
            quiet,
        )
    for split in splits or ():
        if split not in found:
            raise SconeError(empty_split(source, split))
    if not found:
        raise SconeError(f"{dataset_name!r} holds no text; expected documents; give a corpus that is not empty")
    return {split: found[split] for split in splits or found}


def prepare_tokenizer(
    tokenizer_name: str,
    dataset_name: str,
    *,
    vocab_size: int,
    dataset_config_name: str | None = None,
    text_column: str = "text",
    cache_dir: str | Path | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer by name or folder, or for ``"train"`` one trained on the corpus's training split.

    A trained one is kept in ``cache_dir`` and made once per corpus and ``vocab_size``.
    """
    if tokenizer_name != "train":
        return load_tokenizer(tokenizer_name)
    source = open_source(dataset_name, dataset_config_name, text_column)
    facts = {
        "recipe_version": RECIPE_VERSION,
        "units": [unit.facts for unit in source.units],
        "text_column": text_column,
        "vocab_size": vocab_size,
    }
    folder = _cache_folder(cache_dir) / "tokenizers" / f"{_slug(dataset_name)}-{vocab_size}-{_key_of(facts)}"
    if not folder.is_dir():
        documents = open_documents(dataset_name, dataset_config_name, "train", text_column)
        with _making(folder):
            if not folder.is_dir():
                unfinished = folder.with_name(f".{folder.name}.part")
                shutil.rmtree(unfinished, ignore_errors=True)
                train_tokenizer(documents, vocab_size, unfinished)
                unfinished.rename(folder)
    return load_tokenizer(folder)


def prepare_training_corpus(
    options: SconeOptions, *, quiet: bool = False
) -> tuple[PreTrainedTokenizerBase, dict[str, TokenFile]]:
    """The tokenizer that ``options`` name, and the token files of their corpus by split, a train split among them.

    Raises SconeError as `prepare_corpus` and `prepare_tokenizer` do, and where nothing is for training.
    """
    data, model = options.data, options.model
    source: dict[str, Any] = {name: getattr(data, name) for name in ("dataset_config_name", "text_column", "cache_dir")}
    name = model.tokenizer or model.base_model_name
    tokenizer = prepare_tokenizer(name, data.dataset_name, vocab_size=model.vocab_size, **source)
    files = prepare_corpus(data.dataset_name, tokenizer, quiet=quiet, **source)
    if "train" not in files:
        raise SconeError(
            f"{data.dataset_name!r} has only the splits {', '.join(files)}; expected a train split; give another corpus"
        )
    return tokenizer, files


def splits_of_corpus(folder: Path) -> list[str]:
    """The splits of a prepared corpus, each a folder inside ``folder``. Raises SconeError when its list is damaged."""
    found = read_json(folder / RESULT_NAME)
    splits = found.get("splits") if isinstance(found, dict) else None
    if not isinstance(splits, list) or not all(split in (*SPLITS, ALL) for split in splits):
        raise SconeError(
            f"found {folder / RESULT_NAME} damaged: it lists no splits; delete its folder to make it again"
        )
    return splits


def _cache_folder(cache_dir: str | Path | None) -> Path:
    return Path(cache_dir).expanduser() if cache_dir else default_cache_folder()


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", Path(name).name).strip("-.")[:40] or "corpus"


def _key_of(facts: dict[str, Any]) -> str:
    return fingerprint_of(json.dumps(facts, sort_keys=True))[:16]


@contextmanager
def _making(folder: Path) -> Iterator[None]:
    """Hold the lock beside ``folder`` (the system releases it when its holder ends, however it ends), and report a full
    disk, a missing permission and the like as errors that the user can fix.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder.with_name(f".{folder.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            logger.warning("another process is making %s; waiting for it", folder)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()
    except OSError as error:
        raise SconeError(
            f"cannot write {folder} ({error.strerror or error}); make room or choose another folder by cache_dir, and "
            "run again to go on"
        ) from error


@dataclass(frozen=True)
class _Position:
    """How far a source was read: units before ``unit`` are done, and this many documents of it."""

    unit: int = 0
    document: int = 0


class _Job:
    """The tokenisation of one group of units into one folder.

    ``SPLIT/tokens.npy.part`` grow by appending; every 8 Mi characters they are synced and ``journal.json`` notes their
    lengths and the position in the source. After a kill they are cut back to the noted lengths. ``corpus.json`` is
    written last: where it is, the folder is complete.
    """

    def __init__(
        self, source: Source, group: SplitGroup, tokenizer: PreTrainedTokenizerBase, recipe: dict[str, Any], cache: Path
    ) -> None:
        self.source, self.group, self.tokenizer = source, group, tokenizer
        self.recipe = recipe | {"splits": list(group.splits), "units": [unit.facts for unit in group.units]}
        self.folder = cache / "tokens" / f"{_slug(source.name)}-{_key_of(self.recipe)}"

    def run(self, is_unchanged: Callable[[], bool], num_threads: int, quiet: bool) -> dict[str, TokenFile]:
        """The group's token files by split (those that got a document), made now or found.

        ``is_unchanged`` is asked after reading, whether the source still is what the key says.
        """
        if not self._is_complete():
            with _making(self.folder):
                if not self._is_complete():
                    self._make(is_unchanged, num_threads, quiet)
        return {split: TokenFile.open(self.folder / split) for split in splits_of_corpus(self.folder)}

    def _is_complete(self) -> bool:
        # A user who was told to delete a damaged token file's folder gets it made again.
        return (self.folder / RESULT_NAME).is_file() and all(
            (self.folder / split / METADATA_NAME).is_file() for split in splits_of_corpus(self.folder)
        )

    def _make(self, is_unchanged: Callable[[], bool], num_threads: int, quiet: bool) -> None:
        rule = self.group.rule()
        sizes = [unit.size_bytes for unit in self.group.units]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        uncommitted = 0
        with ExitStack() as opened, progress(total, "B", f"tokenise {self.source.name}", quiet) as bar:
            position, writers = self._open_writers(opened)
            batches = self._batches(position, bar.update)
            for arrays, (texts, position) in CorpusEncoder(self.tokenizer).encode_batches(batches, num_threads):
                for tokens, text in zip(arrays, texts, strict=True):
                    writers[rule(text)].add_document(tokens)
                uncommitted += sum(map(len, texts))
                if uncommitted >= COMMIT_CHARACTERS:
                    self._commit(position, writers)
                    uncommitted = 0
            self._commit(_Position(len(self.group.units)), writers)
            if not is_unchanged():
                shutil.rmtree(self.folder)
                raise SconeError(f"{self.source.name!r} changed while it was read; expected it to rest; run again")
            self._finish(writers)

    def _open_writers(self, opened: ExitStack) -> tuple[_Position, dict[str, TokenFileWriter]]:
        """Resume from the journal if it matches the files; otherwise start anew."""
        vocab_size, separator = vocabulary_size(self.tokenizer), self.recipe["separator_id"]

        def writer(split: str, tokens: int = 0, documents: int = 0) -> TokenFileWriter:
            return opened.enter_context(
                closing(TokenFileWriter(self.folder / split, vocab_size, separator, tokens, documents))
            )

        if (self.folder / JOURNAL_NAME).is_file():
            try:
                noted = read_json(self.folder / JOURNAL_NAME)
                position = _Position(**noted["position"])
                return position, {split: writer(split, *numbers) for split, numbers in noted["splits"].items()}
            except (SconeError, KeyError, TypeError, ValueError, AttributeError) as error:
                logger.warning("cannot resume from %s (%s); starting again", self.folder / JOURNAL_NAME, error)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        return _Position(), {split: writer(split) for split in self.group.splits}

    def _batches(
        self, start: _Position, count_bytes: Callable[[int], object]
    ) -> Iterator[tuple[list[str], tuple[list[str], _Position]]]:
        """Batches of documents from ``start`` on, each with the position after it."""
        texts: list[str] = []
        size = 0
        count_bytes(sum(unit.size_bytes or 0 for unit in self.group.units[: start.unit]))
        for index, unit in enumerate(self.group.units[start.unit :], start=start.unit):
            done = start.document if index == start.unit else 0
            for number, text in enumerate(unit.read(count_bytes), start=1):
                if number <= done or not text.strip():
                    continue
                texts.append(text)
                size += len(text)
                if size >= BATCH_CHARACTERS:
                    yield texts, (texts, _Position(index, number))
                    texts, size = [], 0
        if texts:
            yield texts, (texts, _Position(len(self.group.units)))

    def _commit(self, position: _Position, writers: dict[str, TokenFileWriter]) -> None:
        for writer in writers.values():
            writer.sync()
        splits = {split: [writer.num_tokens, writer.num_documents] for split, writer in writers.items()}
        write_json(self.folder / JOURNAL_NAME, {"position": vars(position), "splits": splits})

    def _finish(self, writers: dict[str, TokenFileWriter]) -> None:
        facts = {"dataset_name": self.source.name, "scone_version": scone.__version__} | self.recipe
        facts["units"] = facts["units"][:LISTED_UNITS]
        facts |= {"num_units": len(self.group.units), "key": self.folder.name}
        for split, writer in writers.items():
            if writer.num_documents:
                writer.finish(facts | {"split": split})
            else:
                writer.discard()
        splits = [split for split, writer in writers.items() if writer.num_documents]
        write_json(self.folder / RESULT_NAME, {"splits": splits})
        (self.folder / JOURNAL_NAME).unlink()
