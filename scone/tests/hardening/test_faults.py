"""A slice of benchmarks/hardening.py: some kills of every long job, and the scenarios of a moment."""

from __future__ import annotations

import json
import os
import sys

import pytest

from scone.tests.hardening.scenarios import main
from scone.tests.processes import forked

SCENARIOS = (
    *("file_size_limit_train", "file_size_limit_precompute", "file_size_limit_count", "two_at_once_convert"),
    *("two_at_once_tokenise", "two_at_once_precompute", "read_error"),
)


KILLS = {"tokenise": 4, "convert": 4, "count": 1, "precompute": 1, "train": 1}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="system calls are watched and fail as on Linux"),
]


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> list[dict]:
    """The JSON lines of one process, which forks; not here, among pytest's threads."""
    folder = tmp_path_factory.mktemp("faults")
    seed = str(int.from_bytes(os.urandom(2), "little")) if not os.environ.get("CI") else "0"
    argv = ["--folder", str(folder), "--seed", seed, "--only", *SCENARIOS]
    process = forked(
        main, [*argv, "--kills", *(f"{job}={kills}" for job, kills in KILLS.items())], said=folder / "said"
    )
    process.join()
    lines = (folder / "said").read_text()
    assert process.exitcode == 0, lines[-3000:]
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]


def test_killed_jobs_go_on_to_the_same_bytes(said):
    *batches, _ = said
    assert [batch["job"] for batch in batches] == list(KILLS)
    for batch in batches:
        assert not batch["failures"], batch
        assert sum(batch["kills"].values()) >= KILLS[batch["job"]]


def test_other_faults_are_survived(said):
    assert said[-1] == dict.fromkeys(said[-1], "survived")
    assert len(said[-1]) == len(SCENARIOS)
