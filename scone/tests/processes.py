"""Processes of tests that start at once: forked from one that has imported what any of them needs (conftest.py)."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path


def forked(run: Callable[..., int | None], *arguments: object, said: Path | None = None) -> BaseProcess:
    """A started process that calls ``run``, whose result is its exit status; what it prints is added to ``said``."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(run, arguments, said))
    process.start()
    return process


def _run(run: Callable[..., int | None], arguments: tuple[object, ...], said: Path | None) -> None:
    if said is not None:
        with said.open("a") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
    sys.exit(run(*arguments))
