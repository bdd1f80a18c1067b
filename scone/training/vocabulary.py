"""The f-gram vocabulary of a training corpus: counted once, then cached."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from scone.data.token_file import TokenFile
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_file import FILE_NAME
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of, write_json

CACHE_VERSION = 2
STATISTICS_FILE = "counting.json"


def prepare_vocabulary(
    tokens: TokenFile,
    *,
    vocab_size: int,
    max_n: int,
    min_freq: int,
    max_f_grams: int,
    separator_ids: Sequence[int],
    tokenizer_fingerprint: str,
    cache_dir: Path,
    memory_budget_bytes: int | None = None,
    quiet: bool = False,
) -> FGramVocabulary:
    """The vocabulary of ``tokens``; from ``cache_dir`` where it was counted before, or one that it is the beginning of.

    Several processes may ask at once: one counts, the others wait for it. Raises SconeError when no n-gram occurs
    ``min_freq`` times.
    """
    key = fingerprint_of(
        f"{CACHE_VERSION} {tokens.fingerprint} {vocab_size} {max_n}",
        " ".join(map(str, sorted(separator_ids))),
        tokenizer_fingerprint,
    )[:24]
    shelf = cache_dir / "vocabularies" / key
    folder = shelf / f"{min_freq}-{max_f_grams}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(shelf / "lock"):
        if not (folder / FILE_NAME).exists():
            vocabulary = truncate_cached_vocabulary(shelf, min_freq, max_f_grams)
            if vocabulary is None:
                counted = count_f_grams(
                    [tokens.tokens],
                    vocab_size=vocab_size,
                    max_n=max_n,
                    min_freq=min_freq,
                    max_f_grams=max_f_grams,
                    separator_ids=separator_ids,
                    memory_budget_bytes=memory_budget_bytes,
                    work_dir=folder / "work",
                    tokenizer_fingerprint=tokenizer_fingerprint,
                    quiet=quiet,
                )
                vocabulary = counted.vocabulary
                write_json(folder / STATISTICS_FILE, counted.statistics.to_json())
            if not vocabulary.num_f_grams:
                raise SconeError(
                    f"found no n-gram of 2 to {max_n} tokens that occurs {min_freq} times in {tokens.num_tokens:,} "
                    "tokens; expected at least one f-gram; lower --min_freq or give more text"
                )
            vocabulary.save(folder)
            remove_empty_folder(folder / "work")
    return FGramVocabulary.load(folder)


def remove_empty_folder(folder: Path) -> None:
    """Remove the working folder that counting leaves empty."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def truncate_cached_vocabulary(shelf: Path, min_freq: int, max_f_grams: int) -> FGramVocabulary | None:
    """The vocabulary cut from one on the shelf that was counted with a lower floor and a higher limit, or None.

    Of one ranking, the f-grams that occur ``min_freq`` times are a beginning, and so are the first ``max_f_grams``.
    """
    for file in sorted(shelf.glob(f"*-*/{FILE_NAME}")):
        floor, limit = map(int, file.parent.name.split("-"))
        if floor > min_freq:
            continue
        larger = FGramVocabulary.load(file)
        if limit >= max_f_grams or larger.num_f_grams < limit:  # the latter holds all that reach its floor
            return larger.truncated(min(max_f_grams, int((larger.counts >= min_freq).sum())))
    return None
