"""Programs at the same time, each with a log of its own, under a time limit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

GRACE_SECONDS = 40.0
"""For torchrun to end its processes; those that do not answer it kills after 30."""
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Program:
    """A command line, where its output goes, and what its environment has besides ours."""

    command: Sequence[str]
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Running:
    """A program's process, when it started (monotonic), and the one GPU that it sees, if it was given one."""

    program: Program
    process: subprocess.Popen[bytes]
    started: float
    gpu: int | None


def run_programs(
    programs: Sequence[Program],
    jobs: int,
    *,
    last_start: float | None = None,
    grace_s: float = GRACE_SECONDS,
    gpus: int | None = None,
    ended: Callable[[Program, int, float], None] = lambda program, status, seconds: None,
) -> list[Program]:
    """Run ``programs``, ``jobs`` at once, each in a process group of its own; returns those that were cut off.

    Args:
        last_start: the monotonic time from which nothing is started and what runs is asked to stop.
        grace_s: how long it may take for that, before it is killed.
        gpus: each program sees one of the first so many GPUs, the one with the fewest others; None: what we see.
        ended: told of each program that ended, its exit status and its seconds.
    """
    waiting, running = list(programs), list[Running]()

    def collect() -> None:
        for each in [each for each in running if each.process.poll() is not None]:
            running.remove(each)
            ended(each.program, each.process.returncode, time.monotonic() - each.started)

    try:
        while (waiting or running) and (last_start is None or time.monotonic() < last_start):
            while waiting and len(running) < jobs:
                taken = [each.gpu for each in running]
                gpu = None if gpus is None else min(range(gpus), key=taken.count)
                running.append(start(waiting.pop(0), gpu))
            time.sleep(POLL_SECONDS)
            collect()
        cut = [*(each.program for each in running), *waiting]
        for each in running:
            each.process.terminate()
        while running and last_start is not None and time.monotonic() < last_start + grace_s:
            time.sleep(POLL_SECONDS)
            collect()
    finally:
        for each in running:  # with its data loaders, at once: its log is on disk
            if each.process.poll() is None:
                os.killpg(each.process.pid, signal.SIGKILL)
                each.process.wait()
    return cut


def start(program: Program, gpu: int | None) -> Running:
    """Start a program in a process group of its own."""
    environment = os.environ | dict(program.environment) | (gpu_for(gpu) if gpu is not None else {})
    with program.log.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(program.command, stdout=log, stderr=log, env=environment, start_new_session=True)
    return Running(program, process, time.monotonic(), gpu)


def gpu_for(place: int) -> dict[str, str]:
    """The environment in which a program sees one GPU: the ``place``-th of those that we were given."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[place] if visible else str(place)}
