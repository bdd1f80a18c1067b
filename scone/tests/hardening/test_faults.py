"""A slice of benchmarks/hardening.py: some kills of every long job, and the scenarios of a moment."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

SCENARIOS = (
    *("file_size_limit_train", "file_size_limit_precompute", "file_size_limit_count", "two_at_once_convert"),
    *("two_at_once_tokenise", "two_at_once_precompute", "read_error"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


def results(module: str, *arguments: str) -> list[dict]:
    """The JSON lines that a module prints; processes are forked in there, not here among pytest's threads."""
    command = [sys.executable, "-m", f"scone.tests.hardening.{module}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are watched through Linux's system calls")
@pytest.mark.parametrize(("jobs", "kills"), [(("tokenise", "convert"), 4), (("count", "precompute", "train"), 1)])
def test_killed_jobs_go_on_to_the_same_bytes(folder, jobs, kills):
    seed = str(int.from_bytes(os.urandom(2), "little")) if not os.environ.get("CI") else "0"
    batches = results("kills", *jobs, "--kills", str(kills), "--seed", seed, "--folder", str(folder))
    assert [batch["job"] for batch in batches] == list(jobs)
    for batch in batches:
        assert not batch["failures"], batch
        assert sum(batch["kills"].values()) >= kills


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="read errors come from Linux's /proc")
def test_other_faults_are_survived(folder):
    (outcomes,) = results("scenarios", "--folder", str(folder), "--only", *SCENARIOS)
    assert outcomes == dict.fromkeys(outcomes, "survived")
    assert len(outcomes) == len(SCENARIOS)
