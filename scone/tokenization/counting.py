"""Count the most frequent n-grams of token arrays: exact, on all cores, within a memory budget, resumable."""

from __future__ import annotations

import errno
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scone.tokenization.counting_engine import CountEngine
from scone.tokenization.counting_levels import Survivors, rank_survivors
from scone.tokenization.counting_plan import CountingPlan, plan_count
from scone.tokenization.counting_tokens import TokenStream
from scone.tokenization.counting_work import CountJournal, work_folder
from scone.tokenization.f_gram_links import MAX_F_GRAM_LENGTH, MAX_VOCAB_SIZE
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of
from scone.utils.progress import progress
from scone.utils.text import human_bytes, human_count


@dataclass(frozen=True)
class LevelStatistics:
    """How one length fared. ``floor`` is the fewest occurrences that its last candidates needed."""

    length: int
    num_candidates: int
    num_survivors: int
    num_f_grams: int
    floor: int


@dataclass(frozen=True)
class CountStatistics:
    """What a count read and found. All but the last four are independent of budget, threads and corpus order."""

    num_tokens: int
    num_f_grams: int
    requested_f_grams: int | None
    count_at_cut: int | None
    """Occurrences of the last f-gram; None where there is none."""
    levels: tuple[LevelStatistics, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0
    on_disk: bool = False
    temporary_bytes: int = 0
    num_threads: int = 1

    def to_json(self) -> dict[str, Any]:
        """All of it, for a report."""
        return asdict(self)


@dataclass(frozen=True)
class CountResult:
    """The vocabulary, and how it came about."""

    vocabulary: FGramVocabulary
    statistics: CountStatistics


def count_f_grams(
    corpora: Sequence[np.ndarray],
    *,
    vocab_size: int,
    max_n: int,
    min_freq: int = 1,
    max_f_grams: int | None = None,
    separator_ids: Iterable[int] = (),
    memory_budget_bytes: int | None = None,
    work_dir: str | Path | None = None,
    num_threads: int | None = None,
    tokenizer_fingerprint: str = "",
    quiet: bool = False,
) -> CountResult:
    """The ``max_f_grams`` most frequent n-grams of 2 … ``max_n`` tokens, with their exact counts.

    Ranked by (count descending, length ascending, tokens lexicographic); the result does not depend on the order of the
    corpora, the budget, the threads or an interruption. Slow equal: ``reference_counting.count_n_grams``, ranked.

    Args:
        corpora: 1-D integer arrays of tokens below ``vocab_size`` (at most 2³² − 1); n-grams do not cross from one to
            the next, nor any of ``separator_ids``. Memory-mapped arrays are read from their files.
        min_freq: fewest occurrences. max_f_grams: None keeps all that reach ``min_freq``.
        memory_budget_bytes: how much resident memory may grow; what does not fit goes to files. None: half of the free
            memory.
        work_dir: where temporary files go and where an interrupted count finds its place again (same inputs, same
            options, same budget); removed at the end. None: the system's temporary folder, and no resuming.
        num_threads: default all cores.

    Raises:
        SconeError: a token outside the vocabulary, a budget or a disk that is too small, a disk that fills up.
    """
    started = time.perf_counter()
    separators = tuple(sorted({int(separator) for separator in separator_ids}))
    _check_options(vocab_size, max_n, min_freq, max_f_grams)
    stream = TokenStream(corpora, vocab_size)
    plan = plan_count(
        num_positions=stream.num_positions,
        vocab_size=vocab_size,
        max_n=max_n,
        min_freq=min_freq,
        max_f_grams=max_f_grams,
        memory_budget_bytes=memory_budget_bytes,
        num_threads=num_threads,
    )
    _say(_intention(stream, plan, work_dir), quiet)
    total = stream.num_positions * (2 * max_n if plan.token_table is False else 2 * max_n - 1)
    with progress(total, "position", "counting", quiet) as bar:
        engine = CountEngine(stream, plan, max_n, min_freq, max_f_grams, separators, bar)
        with engine:
            engine.read_tokens()
            options = {"max_n": max_n, "min_freq": min_freq, "max_f_grams": max_f_grams, "separators": separators}
            key = fingerprint_of(json.dumps([options, asdict(plan), vocab_size]), str(engine.checksum))
            with (
                _told_when_full(work_dir),
                work_folder(Path(work_dir) if work_dir else None, key, plan.temporary_bytes) as folder,
            ):
                token_of_id, levels = engine.count(CountJournal(folder), folder)
                result = result_of_levels(
                    token_of_id,
                    levels,
                    num_tokens=stream.num_tokens,
                    vocab_size=vocab_size,
                    max_n=max_n,
                    min_freq=min_freq,
                    max_f_grams=max_f_grams,
                    separator_ids=separators,
                    tokenizer_fingerprint=tokenizer_fingerprint,
                )
    statistics = replace(
        result.statistics,
        seconds=time.perf_counter() - started,
        on_disk=plan.on_disk,
        temporary_bytes=plan.temporary_bytes,
        num_threads=plan.num_threads,
    )
    for note in statistics.notes:
        _say(note, quiet)
    return CountResult(result.vocabulary, statistics)


def result_of_levels(
    token_of_id: np.ndarray,
    levels: list[Survivors],
    *,
    num_tokens: int,
    vocab_size: int,
    max_n: int,
    min_freq: int,
    max_f_grams: int | None,
    separator_ids: tuple[int, ...],
    tokenizer_fingerprint: str,
) -> CountResult:
    """Rank what survived of all levels, for any engine: ``token_of_id`` uint32 [K], ``levels[0]`` the bigrams."""
    prefixes, last_tokens, counts, lengths = rank_survivors(token_of_id, levels, vocab_size, max_f_grams)
    vocabulary = FGramVocabulary.from_links(
        prefixes,
        last_tokens,
        counts,
        vocab_size=vocab_size,
        max_n=max_n,
        separator_ids=separator_ids,
        tokenizer_fingerprint=tokenizer_fingerprint,
    )
    return CountResult(vocabulary, _statistics(num_tokens, max_f_grams, min_freq, levels, counts, lengths))


def _check_options(vocab_size: int, max_n: int, min_freq: int, max_f_grams: int | None) -> None:
    for name, value, least, most in (
        ("vocab_size", vocab_size, 1, MAX_VOCAB_SIZE),
        ("max_n", max_n, 1, MAX_F_GRAM_LENGTH),
        ("min_freq", min_freq, 1, None),
        ("max_f_grams", max_f_grams, 0, None),
    ):
        if value is not None and (value < least or (most is not None and value > most)):
            limits = f"at least {least}" if most is None else f"{least} … {most}"
            raise SconeError(f"found {name} = {value}; expected {limits}; choose a value in that range")


def _intention(stream: TokenStream, plan: CountingPlan, work_dir: str | Path | None) -> str:
    place = "in memory"
    if plan.on_disk:
        where = work_dir or "the system's temporary folder"
        place = f"with at most {human_bytes(plan.temporary_bytes)} of temporary files in {where}"
    return f"counting {human_count(stream.num_tokens)} tokens on {plan.num_threads} threads, {place}"


def _say(line: str, quiet: bool) -> None:
    if not quiet:
        print(line, file=sys.stderr)


@contextmanager
def _told_when_full(work_dir: str | Path | None) -> Iterator[None]:
    """Turn the system's "disk full" into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        resume = (
            "run the same command again to go on from here" if work_dir else "count again with a work_dir to resume"
        )
        raise SconeError(
            f"found no room for temporary files in {work_dir or 'the system temporary folder'} ({error.strerror}); "
            f"expected the size that was stated at the start; free some space and {resume}"
        ) from error


def _statistics(
    num_tokens: int,
    max_f_grams: int | None,
    min_freq: int,
    levels: list[Survivors],
    counts: np.ndarray,
    lengths: np.ndarray,
) -> CountStatistics:
    in_vocabulary = np.bincount(lengths, minlength=len(levels) + 2)
    notes = []
    if max_f_grams is not None and len(counts) < max_f_grams:
        notes.append(
            f"found {len(counts):,} f-grams with at least {min_freq} occurrences; {max_f_grams:,} were asked for; "
            "a larger corpus, a lower min_freq or a larger max_n gives more"
        )
    return CountStatistics(
        num_tokens=num_tokens,
        num_f_grams=len(counts),
        requested_f_grams=max_f_grams,
        count_at_cut=int(counts[-1]) if len(counts) else None,
        levels=tuple(
            LevelStatistics(length, level.num_candidates, len(level.keys), int(in_vocabulary[length]), level.floor)
            for length, level in enumerate(levels, start=2)
        ),
        notes=tuple(notes),
    )
