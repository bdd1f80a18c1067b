"""`count_f_grams`: checks, the work folder, one count, and the ranked vocabulary with its statistics."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from scone.configs.schema import DEFAULT_RANKING
from scone.tokenization.counting.blocks import TokenStream
from scone.tokenization.counting.engine import CountEngine
from scone.tokenization.counting.levels import FrequentNGrams, rank_survivors
from scone.tokenization.counting.plan import CountingPlan, CountTask, plan_count
from scone.tokenization.f_gram_vocabulary import FGramVocabulary
from scone.tokenization.ranking import rank_by_gain
from scone.utils.errors import SconeError
from scone.utils.files import fingerprint_of, translate_disk_full
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
    """Occurrences of the rarest f-gram, by frequency the last one; None where there is none."""
    levels: tuple[LevelStatistics, ...]
    ranking: str
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
    ranking: str = DEFAULT_RANKING,
    quiet: bool = False,
) -> CountResult:
    """The first ``max_f_grams`` n-grams of 2 … ``max_n`` tokens, with their exact counts.

    ``ranking``: "frequency" is by (count descending, length ascending, tokens lexicographic), "gain" by what they say
    about the next token (`rank_by_gain`). The result does not depend on the order of the corpora, the budget, the
    threads or an interruption. Reference implementations: ``count_n_grams``, ``ranked`` and ``ranked_by_gain``.

    Args:
        corpora: 1-D integer arrays of tokens below ``vocab_size`` (at most 2³² − 1); n-grams do not cross from one to
            the next, nor any of ``separator_ids``. Memory-mapped arrays are read from their files.
        min_freq: fewest occurrences. max_f_grams: None keeps all that reach ``min_freq``.
        memory_budget_bytes: how much resident memory may grow; what does not fit goes to files. None: half of the free
            memory.
        work_dir: where temporary files go and where a count that was interrupted finds the lengths that it finished
            (same tokens and options; budget and threads may differ); they go at the end. None: the system's temporary
            folder, and no resuming.
        num_threads: default all cores.

    Raises:
        SconeError: a token outside the vocabulary, a budget or a disk that is too small, a disk that fills up.
    """
    started = time.perf_counter()
    separators = tuple(sorted({int(separator) for separator in separator_ids}))
    task = CountTask(vocab_size, max_n, min_freq, max_f_grams, separators, tokenizer_fingerprint, ranking)
    stream = TokenStream(corpora, vocab_size)
    plan = plan_count(task, stream.num_positions, memory_budget_bytes, num_threads)
    _say(_intention(stream, plan, work_dir), quiet)
    with progress(stream.num_positions * (2 * task.longest - 1), "position", "counting", quiet) as bar:
        engine = CountEngine(stream, plan, task, bar)
        engine.read_tokens()
        # levels depend on nothing else: counts that rank the same candidates go on from one another
        options = [vocab_size, task.longest, min_freq, task.max_candidates, separators]
        key = fingerprint_of(json.dumps(options), str(engine.checksum))
        with work_folder(Path(work_dir) if work_dir else None, key, plan.temporary_bytes) as folder:
            facts = {name: getattr(plan, name) for name in ("on_disk", "temporary_bytes", "num_threads")}
            result = result_of_levels(task, *engine.count(folder), engine.token_counts, started, **facts)
    for note in result.statistics.notes:
        _say(note, quiet)
    return result


def result_of_levels(
    task: CountTask,
    token_of_id: np.ndarray,
    levels: list[FrequentNGrams],
    token_counts: np.ndarray,
    started: float,
    **facts: Any,
) -> CountResult:
    """Rank what survived of all levels, for any engine: ``token_of_id`` uint32 [K], ``levels[0]`` the bigrams,
    ``token_counts`` int64 [V].

    ``started`` by `time.perf_counter`; ``facts``: what else the statistics say. Empties ``levels``.
    """
    found = [(level.num_candidates, len(level.keys), level.floor) for level in levels]
    arrays = rank_survivors(token_of_id, levels, task.vocab_size, task.max_candidates)
    facts_of_task: dict[str, Any] = {
        name: getattr(task, name) for name in ("vocab_size", "separator_ids", "tokenizer_fingerprint")
    }
    num_tokens = int(token_counts.sum())
    if task.ranking == "gain":
        in_text = token_counts.copy()
        in_text[list(task.separator_ids)] = 0
        candidates = FGramVocabulary(*arrays, max_n=task.longest, **facts_of_task)  # not looked up in: needs no index
        vocabulary = rank_by_gain(candidates, in_text, task.max_n, task.max_f_grams)
    else:
        keys, counts = arrays[0], arrays[-1]
        vocabulary = FGramVocabulary.from_links(keys[:, 0], keys[:, 1], counts, max_n=task.max_n, **facts_of_task)
    counts = vocabulary.counts
    in_vocabulary = np.bincount(vocabulary.lengths, minlength=len(found) + 2)
    notes = []
    if task.max_f_grams is not None and 0 < len(counts) < task.max_f_grams:  # none at all is refused by who asks
        notes.append(
            f"found {len(counts):,} f-grams with at least {task.min_freq} occurrences; {task.max_f_grams:,} were asked "
            "for; a larger corpus, a lower min_freq or a larger max_n gives more"
        )
    statistics = CountStatistics(
        num_tokens=num_tokens,
        num_f_grams=len(counts),
        requested_f_grams=task.max_f_grams,
        count_at_cut=int(counts.min()) if len(counts) else None,
        levels=tuple(
            LevelStatistics(length, num_candidates, num_survivors, int(in_vocabulary[length]), floor)
            for length, (num_candidates, num_survivors, floor) in enumerate(found, start=2)
        ),
        ranking=task.ranking,
        notes=tuple(notes),
        seconds=time.perf_counter() - started,
        **facts,
    )
    return CountResult(vocabulary, statistics)


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
def work_folder(work_dir: Path | None, key: str, temporary_bytes: int) -> Iterator[Path | None]:
    """The folder of the count ``key`` inside ``work_dir``; removed when the count succeeds, left when it fails.

    Without ``work_dir``: a folder of the system's temporary directory that is always removed, or None when nothing
    goes to disk. Raises SconeError when the disk has less than ``temporary_bytes`` free beside what the folder already
    holds, fills up later, or another process is counting in the folder.
    """
    if work_dir is None:
        if not temporary_bytes:
            yield None
            return
        with tempfile.TemporaryDirectory(prefix="scone-count-") as name:
            _check_room(Path(name), temporary_bytes)
            with translate_disk_full(f"temporary files in {name}", "count again, with a work_dir to resume"):
                yield Path(name)
        return
    folder = work_dir / f"count-{key[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(work_dir / f".{folder.name}.lock")
    try:
        held = lock.acquire(timeout=0)
    except filelock.Timeout:
        raise SconeError(
            f"found another process counting in {folder}; expected one at a time; wait for it, or give another work_dir"
        ) from None
    with held, translate_disk_full(f"temporary files in {folder}", "run the same command again to go on from here"):
        _check_room(folder, temporary_bytes)
        yield folder
        shutil.rmtree(folder)


def _check_room(folder: Path, temporary_bytes: int) -> None:
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if free + held < temporary_bytes:
        raise SconeError(
            f"found {human_bytes(free)} free at {folder}; expected {human_bytes(temporary_bytes - held)} for temporary "
            "files; free some space, give a work_dir on another disk, or raise the memory budget"
        )
