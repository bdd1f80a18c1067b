"""Programs at the same time, each with a log and a GPU of its own, under a time limit; and what a failed one said."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 40.0
"""For torchrun to end its processes; those that do not answer it kills after 30."""


@dataclass(frozen=True)
class Program:
    """A command line, where its output goes, and what its environment has besides ours."""

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str]


def run_side_by_side(programs: Sequence[Program], timeout_seconds: float) -> None:
    """Run all to their end, or end what is left after ``timeout_seconds``; its log tells of that, and of signals."""
    deadline = time.monotonic() + timeout_seconds
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for program in programs:
            with program.log.open("w", encoding="utf-8") as log:
                processes.append(
                    subprocess.Popen(
                        program.command,
                        stdout=log,
                        stderr=log,
                        env=os.environ | dict(program.environment),
                        start_new_session=True,
                    )
                )
        for program, process in zip(programs, processes, strict=True):
            note = ""
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
                if process.returncode < 0:
                    note = f"Signal {-process.returncode} ended it"
            except subprocess.TimeoutExpired:
                end(process)
                note = f"TimeoutError: not through after {timeout_seconds:g} s"
            if note:
                with program.log.open("a", encoding="utf-8") as log:
                    log.write(f"\n{note}\n")
    finally:
        for process in processes:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs: asked first, since those that torchrun started have sessions of their own."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def gpu_for(place: int) -> dict[str, str]:
    """The environment in which a program sees one GPU: the ``place``-th of those that we were given."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[place] if visible else str(place)}


def last_words(log: str) -> str:
    """The line of a log that says why its program failed: the last of a Python error, else a signal, else any."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    of_torchrun = r"torch\.distributed\.elastic"
    for pattern in (rf"(\[rank\d+\]: ?)?(?!{of_torchrun})[\w.]*(Error|Exception): .*|error: .*", r".*\bSignal \d+ .*"):
        if said := [line for line in lines if re.fullmatch(pattern, line)]:
            return said[-1]
    return lines[-1] if lines else "no output"
