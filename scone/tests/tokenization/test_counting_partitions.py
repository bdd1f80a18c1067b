"""Counting through files: every partition path, going on after kill -9, and the memory budget.

That kills at any moment and full disks lose nothing is tested with all long jobs, in hardening/.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scone.tests.processes import forked
from scone.tokenization.counting import count_f_grams
from scone.tokenization.counting.count import work_folder
from scone.tokenization.counting.plan import CountTask, plan_count
from scone.utils.errors import SconeError

LIMITS: dict = {"vocab_size": 1000, "max_n": 4, "min_freq": 2, "max_f_grams": 500, "ranking": "frequency"}
OPTIONS: dict = LIMITS | {"separator_ids": [999], "quiet": True}


def skewed(length: int) -> np.ndarray:
    return np.minimum(np.random.default_rng(0).zipf(1.4, length) - 1, 999).astype(np.uint16)


def least_budget(length: int, **options: Any) -> int:
    """A little above the smallest budget for ``OPTIONS``, or for others."""
    low, high = 0, 1 << 30
    while high - low > 1000:
        middle = (low + high) // 2
        try:
            plan_count(CountTask(**(options or LIMITS)), length, middle, 2)
            high = middle
        except SconeError:
            low = middle
    return high


def assert_same(found, tokens):
    """What counting in memory gives."""
    whole = count_f_grams([tokens], **OPTIONS)
    assert not whole.statistics.on_disk
    assert found.vocabulary.counts.tolist() == whole.vocabulary.counts.tolist()
    assert found.vocabulary.fingerprint == whole.vocabulary.fingerprint
    # how far the floor has risen, and so what survives it, depends on budget and threads; what is counted does not
    levels = [[level.num_f_grams for level in count.statistics.levels] for count in (found, whole)]
    assert levels[0] == levels[1]


def left_in(work_dir: Path) -> list[Path]:
    """What a count left: nothing but its lock, which must not go (another process may wait for it)."""
    return [path for path in work_dir.rglob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("factor", [1, 1.5, 3])
@pytest.mark.parametrize(
    "tokens",
    [
        skewed(30_000),
        np.zeros(30_000, np.uint16),  # one partition holds everything: it comes in pieces
        np.tile(np.arange(3, dtype=np.uint16), 9_000),
        np.arange(30_000, dtype=np.uint32) % 999,
        np.full(5_000, 999, np.uint16),  # nothing but separators
    ],
    ids=["skewed", "one n-gram", "three tokens", "all tokens alike", "separators"],
)
def test_every_budget_gives_the_same_answer(tokens, factor, tmp_path):
    budget = int(factor * least_budget(len(tokens)))
    result = count_f_grams([tokens], memory_budget_bytes=budget, work_dir=tmp_path, num_threads=2, **OPTIONS)
    assert result.statistics.on_disk or factor > 1
    assert_same(result, tokens)
    assert left_in(tmp_path) == []


def test_memory_mapped_corpora_are_read_from_their_files(tmp_path):
    np.save(tmp_path / "tokens.npy", skewed(5000))
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    parts = [mapped[:1234], mapped[1234:1234], mapped[1234:], mapped[::2]]
    counts = [count_f_grams(shards, **OPTIONS).vocabulary for shards in (parts, [np.array(part) for part in parts])]
    assert counts[0].fingerprint == counts[1].fingerprint
    assert counts[0].counts.tolist() == counts[1].counts.tolist()


def arguments_of(folder: Path, tokens: np.ndarray) -> dict:
    """Of a count that goes through files."""
    np.save(folder / "tokens.npy", tokens)
    budget = {"memory_budget_bytes": least_budget(len(tokens)), "num_threads": 2}
    return OPTIONS | budget | {"tokens": str(folder / "tokens.npy"), "work_dir": str(folder / "work")}


def count_in_a_child(arguments: dict) -> None:
    options = {name: value for name, value in arguments.items() if name != "tokens"}
    count_f_grams([np.load(arguments["tokens"], mmap_mode="r")], **options)


def kill_when(arguments: dict, pattern: str) -> list[Path]:
    """Start a count, kill it as soon as its work folder has a file like ``pattern``; returns what files are left."""
    child = forked(count_in_a_child, arguments)
    work, deadline = Path(arguments["work_dir"]), time.monotonic() + 60
    while child.is_alive() and time.monotonic() < deadline:
        if list(work.glob(f"count-*/{pattern}")):
            child.kill()
            break
        time.sleep(0.0005)
    child.join()
    assert child.exitcode == -signal.SIGKILL, f"the count ended before {pattern} was seen"
    return sorted(path for path in left_in(work) if path.is_file())


def goes_on(arguments: dict, tokens: np.ndarray, **changes):
    """The same command again ends with the right counts, and leaves nothing."""
    options = {name: value for name, value in arguments.items() if name != "tokens"} | changes
    result = count_f_grams([tokens], **options)
    assert_same(result, tokens)
    assert left_in(Path(arguments["work_dir"])) == []
    return result


@pytest.mark.slow
def test_a_killed_count_goes_on_at_the_first_length_that_it_had_not_finished(tmp_path):
    tokens = skewed(150_000)
    arguments = arguments_of(tmp_path, tokens)
    budget = arguments["memory_budget_bytes"]
    plan = plan_count(CountTask(**LIMITS), len(tokens), budget, 2)
    inodes: dict[str, int] = {}
    for pattern in ("blocks/*-remainders.npy", "level-002.npz", "level-003.npz"):
        left = kill_when(arguments, pattern)
        assert sum(path.stat().st_size for path in left) <= plan.temporary_bytes
        found = {path.name: path.stat().st_ino for path in left if path.name.startswith("level")}
        assert inodes.items() <= found.items()  # what was finished before an earlier kill is not done again
        inodes = found
    assert set(inodes) == {"level-002.npz", "level-003.npz"}
    goes_on(arguments, tokens)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A count that was killed when it had the bigrams: its arguments, tokens, and the folder that it left."""
    folder, tokens = tmp_path_factory.mktemp("killed"), skewed(60_000)
    arguments = arguments_of(folder, tokens)
    kill_when(arguments, "level-002.npz")
    return arguments, tokens


CHANGES = {
    "another budget": {"memory_budget_bytes": 1 << 30},
    "fewer threads": {"num_threads": 1},
    "a byte": lambda content: content[:99] + bytes([content[99] ^ 1]) + content[100:],
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_killed_count_goes_on_with_another_budget_or_threads_and_counts_damaged_lengths_again(
    killed, change, tmp_path
):
    arguments, tokens = killed
    shutil.copytree(arguments["work_dir"], tmp_path / "work")
    level, arguments = next(tmp_path.glob("work/count-*/level-002.npz")), arguments | {"work_dir": tmp_path / "work"}
    if callable(CHANGES[change]):
        level.write_bytes(CHANGES[change](level.read_bytes()))
        goes_on(arguments, tokens)
        return
    with np.load(level) as saved:
        forged = dict(saved) | {"num_candidates": np.array(0)}
    np.savez(level, **forged)
    result = goes_on(arguments, tokens, **CHANGES[change])
    assert result.statistics.levels[0].num_candidates == 0  # so the bigrams were taken from the file


def test_a_killed_count_in_memory_keeps_the_lengths_that_it_finished(tmp_path):
    tokens = skewed(3_000_000)
    arguments = arguments_of(tmp_path, tokens) | {"memory_budget_bytes": 1 << 30}
    left = kill_when(arguments, "level-002.npz")
    assert {path.name for path in left} <= {"level-002.npz", "level-003.npz"}
    goes_on(arguments, tokens)


def test_a_work_folder_is_refused_where_the_disk_is_too_small_or_another_counts(tmp_path):
    small = pytest.raises(SconeError, match=r"free at .*; expected .* for temporary files")
    with small, work_folder(tmp_path, "key", 1 << 62):
        pass
    with work_folder(tmp_path, "key", 0):
        taken = pytest.raises(SconeError, match="another process counting")
        with taken, work_folder(tmp_path, "key", 0):
            pass


MEASURE = """
import json
import sys
from pathlib import Path
import numpy as np
from scone.tokenization.counting import count_f_grams
tokens = np.load(sys.argv[1], mmap_mode="r")
budget = int(sys.argv[2])
options = dict(vocab_size=1000, max_n=4, quiet=True, num_threads=2) | json.loads(sys.argv[3])
for warm_up in (30_000_000, 5_200_000)[:1 + (options["ranking"] == "frequency")]:  # load the code before measuring
    count_f_grams([np.array(tokens[:20_000])], **options, memory_budget_bytes=warm_up)
Path("/proc/self/clear_refs").write_text("5")
def resident(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name)) * 1024
start = resident("VmRSS")
result = count_f_grams([tokens], **options, memory_budget_bytes=budget)
print(result.statistics.on_disk, resident("VmHWM") - start)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("budget", [32 << 20, 96 << 20])
def test_memory_stays_within_the_budget(budget, tmp_path):
    on_disk, growth = measured(skewed(6_000_000), budget, tmp_path, ranking="frequency", max_f_grams=20_000)
    assert on_disk == (budget < 64 << 20)
    assert growth <= 1.05 * budget


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("options", [{"ranking": "gain", "max_f_grams": 100_000}, {"ranking": "frequency"}])
def test_memory_stays_within_the_least_budget_where_every_length_has_as_many(options, tmp_path):
    """A text that occurs twice: all its n-grams of every length do, and the lengths are ranked together."""
    once = np.random.default_rng(0).integers(0, 999, 400_000).astype(np.uint16)
    options = {"min_freq": 2, "max_f_grams": None} | options
    tokens = np.concatenate([once, once])
    budget = least_budget(len(tokens), **(LIMITS | options))
    _, growth = measured(tokens, budget, tmp_path, **options)
    assert growth <= 1.05 * budget


def measured(tokens: np.ndarray, budget: int, folder: Path, **options: Any) -> tuple[bool, int]:
    """Whether a count in a process of its own goes through files, and by how much its resident memory grows."""
    np.save(folder / "tokens.npy", tokens)
    command = [sys.executable, "-c", MEASURE, str(folder / "tokens.npy"), str(budget), json.dumps(options)]
    on_disk, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return on_disk == "True", int(growth)
