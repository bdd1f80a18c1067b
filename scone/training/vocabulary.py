"""The f-gram vocabulary of a training corpus: counted once, then read from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from scone.data.token_file import TokenFile
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of

CACHE_VERSION = 1


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
    """The vocabulary of ``tokens``, from ``cache_dir`` where these very options were counted before.

    Several processes may ask at once: one counts, the others wait for it. Raises SconeError when no n-gram occurs
    ``min_freq`` times.
    """
    key = fingerprint_of(
        f"{CACHE_VERSION} {tokens.fingerprint} {vocab_size} {max_n} {min_freq} {max_f_grams}",
        " ".join(map(str, sorted(separator_ids))),
        tokenizer_fingerprint,
    )[:24]
    folder = cache_dir / "vocabularies" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "f_grams.safetensors").exists():
            vocabulary = count_f_grams(
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
            ).vocabulary
            if not vocabulary.num_f_grams:
                raise SconeError(
                    f"found no n-gram of 2 to {max_n} tokens that occurs {min_freq} times in {tokens.num_tokens:,} "
                    "tokens; expected at least one f-gram; lower --min_freq or give more text"
                )
            vocabulary.save(folder)
    return FGramVocabulary.load(folder)
