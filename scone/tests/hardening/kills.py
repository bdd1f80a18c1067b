"""Kill −9 at random moments (a process of `scenarios` does it)."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scone.tests.hardening.jobs import Job, finished, make_inputs, nothing, spawned

_seen = mmap.mmap(-1, 8)  # shared with the forked processes: how many touches of its files the last one came to
_CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate", "shutil.rmtree")


def kill_at_change(number: int, below: Path) -> Callable[[], None]:
    """A set-up after which the process kills itself at its ``number``-th touch of a file ``below`` (0: never)."""

    def arm() -> None:
        _seen[:] = bytes(8)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in _CHANGES and str(below) in str(arguments[0]):
                seen = touches() + 1
                _seen[:] = seen.to_bytes(8, "little")
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    return arm


def touches() -> int:
    """How often the last armed process touched one of its files."""
    return int.from_bytes(_seen[:], "little")


def run_kills(job: Job, kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Start the job until it was killed ``kills`` times, at random moments and at random touches of its files.

    A trial is up to three kills of one piece of work and a run to its end, whose result must be that of a run that
    was never disturbed. Returns what happened; ``failures`` is empty where nothing was lost.
    """
    inputs, log = folder / "inputs", folder / f"{job.name}.log"
    whole, seconds, changes = _undisturbed(job, inputs, folder / "whole" / job.name, log)
    random_of_trial = random.Random(f"{job.name} {seed}")
    moments: Counter[str] = Counter()
    failures: list[str] = []
    trials = 0
    while sum(moments.values()) < kills:
        work = folder / f"{job.name}-work"
        shutil.rmtree(work, ignore_errors=True)
        trials += 1
        for _ in range(random_of_trial.randint(1, 3)):
            moments[_killed_once(job, inputs, work, log, seconds, changes, random_of_trial)] += 1
        work.mkdir(parents=True, exist_ok=True)
        code = finished(spawned(job.run, inputs, work, log, nothing))
        if code or job.digest(work) != whole:
            kept = folder / f"{job.name}-failed-{seed}-{trials}"
            shutil.rmtree(kept, ignore_errors=True)
            work.rename(kept)
            failures.append(f"trial {trials}: exit code {code}, {'other bytes' if not code else _last_line(log)}")
    return {
        "job": job.name,
        "seed": seed,
        "trials": trials,
        "kills": {moment: moments[moment] for moment in ("before", "while", "after")},
        "seconds_undisturbed": round(seconds, 2),
        "file_touches": changes,
        "failures": failures,
    }


def _killed_once(
    job: Job, inputs: Path, work: Path, log: Path, seconds: float, changes: int, chosen: random.Random
) -> str:
    """Start the job and kill it; "before" its first file, "while" it worked, or "after" it had ended."""
    at_a_change = chosen.random() < 0.5
    arm = kill_at_change(chosen.randint(1, changes), work) if at_a_change else nothing
    process = spawned(job.run, inputs, work, log, arm)
    deadline = time.monotonic() + (60 if at_a_change else chosen.uniform(0.0, 1.1 * seconds))
    while time.monotonic() < deadline and os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)  # the process is ours and not yet waited for, so the number is still its own
    code = finished(process)
    if code != -signal.SIGKILL:
        return "after"
    return "while" if work.exists() and any(work.iterdir()) else "before"


def _undisturbed(job: Job, inputs: Path, work: Path, log: Path) -> tuple[str, float, int]:
    """The digest of the job's results, the seconds that it took, and how often it touched its files."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    started = time.monotonic()
    code = finished(spawned(job.run, inputs, work, log, kill_at_change(0, work)))
    seconds = time.monotonic() - started
    assert code == 0, (job.name, code, _last_line(log))
    digest = job.digest(work)
    assert digest, f"{job.name} left no result"
    return digest, seconds, touches()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def inputs_of(folder: Path) -> Path:
    """The inputs of all jobs in ``folder``, made once."""
    inputs = folder / "inputs"
    if not (inputs / "complete").exists():
        shutil.rmtree(inputs, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

        def make(made: Path, _: Path) -> int:
            make_inputs(made)
            return 0

        assert finished(spawned(make, inputs, inputs, folder / "inputs.log", nothing)) == 0, _last_line(
            folder / "inputs.log"
        )
        (inputs / "complete").touch()
    return inputs
