"""Counting through files: every partition path, resuming after kill -9, full disks, and the memory budget."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scone.tokenization.counting import CountResult, count_f_grams
from scone.tokenization.counting.count import work_folder
from scone.tokenization.counting.plan import plan_count
from scone.utils.errors import SconeError

OPTIONS: dict = {"vocab_size": 1000, "max_n": 4, "min_freq": 2, "max_f_grams": 500, "separator_ids": [999]}
CHILD = """
import json, resource, sys
import numpy as np
from scone.tokenization.counting import count_f_grams
from scone.utils.errors import SconeError
arguments = json.loads(sys.argv[1])
if limit := arguments.pop("file_bytes", None):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
tokens = np.load(arguments.pop("tokens"), mmap_mode="r")
try:
    result = count_f_grams([tokens], quiet=True, **arguments)
except SconeError as error:
    print(error)
    sys.exit(2)
print(json.dumps([result.vocabulary.fingerprint, result.vocabulary.counts.tolist()]))
"""


def skewed(length: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.minimum(generator.zipf(1.4, length) - 1, 999).astype(np.uint16)


def least_budget(length: int) -> int:
    """A little above the smallest budget for ``OPTIONS``."""
    low, high = 0, 1 << 30
    while high - low > 1000:
        middle = (low + high) // 2
        try:
            plan_count(num_positions=length, memory_budget_bytes=middle, num_threads=2, **_plan_options())
            high = middle
        except SconeError:
            low = middle
    return high


def _plan_options() -> dict:
    return {name: OPTIONS[name] for name in ("vocab_size", "max_n", "min_freq", "max_f_grams")}


def same(one: CountResult, other: CountResult) -> bool:
    equal_counts = one.vocabulary.counts.tolist() == other.vocabulary.counts.tolist()
    return equal_counts and one.vocabulary.fingerprint == other.vocabulary.fingerprint


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
@pytest.mark.parametrize("factor", [1, 1.5, 3])
def test_every_budget_gives_the_same_answer(tokens, factor, tmp_path):
    whole = count_f_grams([tokens], quiet=True, **OPTIONS)
    budget = int(factor * least_budget(len(tokens)))
    result = count_f_grams(
        [tokens], memory_budget_bytes=budget, work_dir=tmp_path, num_threads=2, quiet=True, **OPTIONS
    )
    assert not whole.statistics.on_disk
    assert result.statistics.on_disk or factor > 1
    assert same(result, whole)
    assert left_in(tmp_path) == []


def left_in(work_dir: Path) -> list[Path]:
    """What a count left: nothing but its lock, which must not go (another process may wait for it)."""
    return [path for path in work_dir.rglob("*") if path.suffix != ".lock"]


def test_memory_mapped_corpora_are_read_from_their_files(tmp_path):
    tokens = skewed(5000)
    np.save(tmp_path / "tokens.npy", tokens)
    mapped = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    parts = [mapped[:1234], mapped[1234:1234], mapped[1234:], mapped[::2]]
    assert same(
        count_f_grams(parts, quiet=True, **OPTIONS),
        count_f_grams([np.array(part) for part in parts], quiet=True, **OPTIONS),
    )


def _child(arguments: dict) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, json.dumps(OPTIONS | arguments)], stdout=subprocess.PIPE, text=True
    )


def _kill_when(arguments: dict, pattern: str) -> list[Path]:
    """Start a count, kill it as soon as its work folder has a file like ``pattern``; returns what files are left."""
    child = _child(arguments)
    deadline = time.monotonic() + 60
    while child.poll() is None and time.monotonic() < deadline:
        if list(Path(arguments["work_dir"]).glob(f"count-*/{pattern}")):
            child.send_signal(signal.SIGKILL)
            break
        time.sleep(0.0005)
    child.communicate()
    assert child.returncode == -signal.SIGKILL, f"the count ended before {pattern} was seen"
    return sorted(path for path in left_in(Path(arguments["work_dir"])) if path.is_file())


def files_arguments(folder: Path, tokens: np.ndarray, factor: float = 1) -> dict:
    """Arguments of a count that goes through files."""
    np.save(folder / "tokens.npy", tokens)
    return {
        "tokens": str(folder / "tokens.npy"),
        "work_dir": str(folder / "work"),
        "memory_budget_bytes": int(factor * least_budget(len(tokens))),
        "num_threads": 2,
    }


def assert_ends_right(arguments: dict, tokens: np.ndarray) -> None:
    output, _ = _child(arguments).communicate(timeout=100)
    whole = count_f_grams([tokens], quiet=True, **OPTIONS)
    assert json.loads(output) == [whole.vocabulary.fingerprint, whole.vocabulary.counts.tolist()]
    assert left_in(Path(arguments["work_dir"])) == []


def test_a_killed_count_goes_on_at_the_first_length_that_it_had_not_finished(tmp_path):
    tokens = skewed(150_000)
    arguments = files_arguments(tmp_path, tokens)
    stated = plan_count(
        num_positions=len(tokens),
        memory_budget_bytes=arguments["memory_budget_bytes"],
        num_threads=2,
        **_plan_options(),
    ).temporary_bytes
    inodes: dict[str, int] = {}
    for pattern in ("blocks/*-remainders.npy", "level-002.npz", "level-003.npz"):
        left = _kill_when(arguments, pattern)
        assert sum(path.stat().st_size for path in left) <= stated
        found = {path.name: path.stat().st_ino for path in left if path.name.startswith("level")}
        assert inodes.items() <= found.items()  # what was finished before an earlier kill is not done again
        inodes = found
    assert set(inodes) == {"level-002.npz", "level-003.npz"}
    assert_ends_right(arguments, tokens)


@pytest.mark.parametrize("change", [{"memory_budget_bytes": 1 << 30}, {"num_threads": 1}])
def test_a_killed_count_goes_on_with_another_budget_or_number_of_threads(tmp_path, change):
    tokens = skewed(60_000)
    arguments = files_arguments(tmp_path, tokens)
    (level,) = [path for path in _kill_when(arguments, "level-002.npz") if path.name == "level-002.npz"]
    with np.load(level) as saved:
        forged = dict(saved) | {"num_candidates": np.array(0)}
    np.savez(level, **forged)
    result = count_f_grams([tokens], quiet=True, **OPTIONS | _without_tokens(arguments) | change)
    whole = count_f_grams([tokens], quiet=True, **OPTIONS)
    assert same(result, whole)
    # how far the floor has risen, and so what survives it, depends on budget and threads; what is counted does not
    assert [level.num_f_grams for level in result.statistics.levels] == [
        level.num_f_grams for level in whole.statistics.levels
    ]
    assert result.statistics.levels[0].num_candidates == 0  # so the bigrams were taken from the file


def _without_tokens(arguments: dict) -> dict:
    return {name: value for name, value in arguments.items() if name != "tokens"}


def test_a_killed_count_in_memory_keeps_the_lengths_that_it_finished(tmp_path):
    tokens = skewed(3_000_000)
    arguments = files_arguments(tmp_path, tokens) | {"memory_budget_bytes": 1 << 30}
    left = _kill_when(arguments, "level-002.npz")
    assert {path.name for path in left} <= {"level-002.npz", "level-003.npz"}
    assert_ends_right(arguments, tokens)


@pytest.mark.parametrize("damage", ["a byte", "cut", "empty"])
def test_a_damaged_length_of_a_killed_count_is_counted_again(tmp_path, damage):
    tokens = skewed(60_000)
    arguments = files_arguments(tmp_path, tokens)
    (level,) = [path for path in _kill_when(arguments, "level-002.npz") if path.name == "level-002.npz"]
    content = bytearray(level.read_bytes())
    content[len(content) // 3] ^= 1
    level.write_bytes({"a byte": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    assert_ends_right(arguments, tokens)


def test_a_disk_that_fills_up_ends_with_one_line_and_can_be_resumed(tmp_path):
    tokens = skewed(60_000)
    arguments = files_arguments(tmp_path, tokens, factor=2)
    failing = _child(arguments | {"file_bytes": 5000})
    output, _ = failing.communicate(timeout=100)
    assert failing.returncode == 2
    assert "found no room for temporary files" in output
    assert "run the same command again" in output
    assert output.count("\n") == 1
    assert_ends_right(arguments, tokens)


def test_a_disk_that_is_too_small_is_refused_at_the_start(tmp_path):
    refusal = pytest.raises(SconeError, match=r"free at .*; expected .* for temporary files")
    with refusal, work_folder(tmp_path, "key", 1 << 62):
        pass


def test_one_count_at_a_time_in_a_work_folder(tmp_path):
    with work_folder(tmp_path, "key", 0):
        refusal = pytest.raises(SconeError, match="another process counting")
        with refusal, work_folder(tmp_path, "key", 0):
            pass


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from scone.tokenization.counting import count_f_grams
tokens = np.load(sys.argv[1], mmap_mode="r")
budget = int(sys.argv[2])
options = dict(vocab_size=1000, max_n=4, max_f_grams=20_000, quiet=True, num_threads=2)
for warm_up in (20_000_000, 5_200_000):  # load both ways' code before memory is measured
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
    np.save(tmp_path / "tokens.npy", skewed(6_000_000))
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "tokens.npy"), str(budget)]
    on_disk, growth = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert on_disk == str(budget < 64 << 20)
    assert int(growth) <= 1.05 * budget
