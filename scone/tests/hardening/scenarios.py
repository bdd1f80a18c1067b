"""Faults other than a kill: `python -m scone.tests.hardening.scenarios --folder F` prints what became of each as JSON.

A scenario is survived when the failing run ends in one line and a status that says so (or does not fail at all), and a
run without the fault afterwards gives the bytes of a run that was never disturbed.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from scone.tests.hardening.jobs import JOBS, Job, finished, nothing, preload, spawned
from scone.tests.hardening.kills import inputs_of, run_kills

SURVIVED = "survived"
UNREADABLE = Path("/proc/self/mem")
"""A regular file whose every read from its start ends with EIO, as on a failing disk (Linux)."""


def file_size_limit(job: Job, folder: Path) -> str:
    """No file may grow beyond a few kilobytes, as under a quota."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))

    work = _fresh(folder, f"{job.name}-fault")
    code, lines = _run(job, folder, work, limit)
    if code != 2 or len(lines) != 1:
        return f"with the fault: exit code {code}, {lines[-1:]}"
    return _same_in_the_end(job, folder, work)


def full_disk(job: Job, folder: Path) -> str:
    """The result's file system is full before the job is done; then it gets more room."""
    work = folder / f"{job.name}-tmpfs"
    work.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "none", work], capture_output=True).returncode:
        return "not possible here: a small file system cannot be mounted"
    try:
        code, lines = _run(job, folder, work, nothing)
        if code != 2 or len(lines) != 1:
            return f"with a full disk: exit code {code}, {lines[-1:]}"
        subprocess.run(["mount", "-o", "remount,size=64m", work], check=True)
        return _same_in_the_end(job, folder, work)
    finally:
        subprocess.run(["umount", "-l", work], check=True)


def two_at_once(job: Job, folder: Path) -> str:
    """Two runs of one command write to one folder at the same time: no mixture, and at least one finishes."""
    work = _fresh(folder, f"{job.name}-twice")
    logs = [folder / f"{job.name}-twice-{number}.log" for number in (0, 1)]
    for log in logs:
        log.unlink(missing_ok=True)
    processes = [spawned(job.run, folder / "inputs", work, log, nothing) for log in logs]
    codes = [finished(process) for process in processes]
    for code, log in zip(codes, logs, strict=True):
        if code not in (0, 2) or (code == 2 and len(_errors(log)) != 1):
            return f"exit codes {codes}: {_errors(log)[-1:]}"
    return _same_in_the_end(job, folder, work) if 0 in codes else f"both failed: {_errors(logs[0])}"


def read_error(folder: Path) -> str:
    """Reading fails with EIO: text, JSON, options, vocabulary, tokens and table say so in one line each."""
    from scone.configs.loading import load_options
    from scone.data.readers import read_documents
    from scone.data.token_file import TokenFile
    from scone.inference.embedding_table import EmbeddingTable
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary
    from scone.utils.errors import SconeError
    from scone.utils.files import read_json

    place = _fresh(folder, "unreadable")
    readers: dict[str, Callable[[Path], object]] = {
        "a.jsonl": lambda path: list(read_documents(path, "text")),
        "a.txt.gz": lambda path: list(read_documents(path, "text")),
        "a.parquet": lambda path: list(read_documents(path, "text")),
        "a.json": read_json,
        "a.yaml": load_options,
        "f_grams.safetensors": FGramVocabulary.load,
        "tokens.json": TokenFile.open,
        "embeddings.cache": EmbeddingTable.open,
    }
    for name, read in readers.items():
        (place / name).symlink_to(UNREADABLE)
        try:
            read(place / name)
        except SconeError:
            continue
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
        return f"{name} was read"
    return SURVIVED


SCENARIOS: dict[str, Callable[[Job, Path], str]] = {
    "file_size_limit": file_size_limit,
    "full_disk": full_disk,
    "two_at_once": two_at_once,
}


def _same_in_the_end(job: Job, folder: Path, work: Path) -> str:
    code, lines = _run(job, folder, work, nothing)
    if code:
        return f"afterwards: exit code {code}, {lines[-1:]}"
    return SURVIVED if job.digest(work) == _whole(job, folder) else "other bytes afterwards"


def _whole(job: Job, folder: Path) -> str:
    """The digest of an undisturbed run's results, made once, as kills make it too."""
    work = folder / "whole" / job.name
    if not work.exists():
        work.mkdir(parents=True)
        code, lines = _run(job, folder, work, nothing)
        assert code == 0, (job.name, code, lines)
    return job.digest(work)


def _run(job: Job, folder: Path, work: Path, set_up: Callable[[], None]) -> tuple[int, list[str]]:
    """Exit code and error lines of one run."""
    log = folder / f"{job.name}-scenario.log"
    log.unlink(missing_ok=True)
    code = finished(spawned(job.run, folder / "inputs", work, log, set_up))
    return code, _errors(log)


def _errors(log: Path) -> list[str]:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return [line for line in lines if line.startswith("error:") or "Traceback" in line]


def _fresh(folder: Path, name: str) -> Path:
    work = folder / name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    return work


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="names such as two_at_once_train; all where it is left out")
    parser.add_argument("--kills", nargs="*", default=[], metavar="JOB=N", help="kills of a job before that")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    chosen = parser.parse_args(argv)
    preload()
    inputs_of(chosen.folder)
    for job, count in (kill.split("=") for kill in chosen.kills):
        print(json.dumps(run_kills(JOBS[job], int(count), chosen.seed, chosen.folder)), flush=True)
    outcomes: dict[str, str] = {}
    for name, scenario in SCENARIOS.items():
        for job in JOBS.values():
            if chosen.only is None or f"{name}_{job.name}" in chosen.only:
                outcomes[f"{name}_{job.name}"] = scenario(job, chosen.folder)
    if chosen.only is None or "read_error" in chosen.only:
        outcomes["read_error"] = read_error(chosen.folder)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
