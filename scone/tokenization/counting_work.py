"""The work folder of a count: who may use it, whether it has room, and what an interrupted count had finished."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from scone.tokenization.counting_levels import Survivors
from scone.utils.errors import SconeError
from scone.utils.files import atomic_path, read_json, write_json
from scone.utils.text import human_bytes

_FINISHED = ".finished"


@contextmanager
def work_folder(work_dir: Path | None, key: str, temporary_bytes: int) -> Iterator[Path | None]:
    """The folder of the count ``key`` inside ``work_dir``; removed when the count succeeds, left when it fails.

    Without ``work_dir``: a folder of the system's temporary directory that is always removed, or None when nothing
    goes to disk. Raises SconeError when the disk has less than ``temporary_bytes`` free beside what the folder already
    holds, or when another process is counting in it.
    """
    if work_dir is None and not temporary_bytes:
        yield None
        return
    keep_on_failure = work_dir is not None
    folder = Path(tempfile.mkdtemp(prefix="scone-count-")) if work_dir is None else work_dir / f"count-{key[:16]}"
    for finished in folder.parent.glob(f"{folder.name}{_FINISHED}"):  # its removal was cut short by a kill
        shutil.rmtree(finished, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SconeError(
                f"found another process counting in {folder}; expected one at a time; wait for it, or give "
                "another work_dir"
            ) from None
        done = False
        try:
            _check_room(folder, temporary_bytes)
            yield folder
            done = True
        finally:
            if done or not keep_on_failure:
                # at once under another name: half of a work folder would look like an interrupted count's
                finished = folder.with_name(f"{folder.name}{_FINISHED}")
                os.replace(folder, finished)
                shutil.rmtree(finished)


def _check_room(folder: Path, temporary_bytes: int) -> None:
    held = sum(path.stat().st_size for path in folder.iterdir())
    free = shutil.disk_usage(folder).free
    if free + held < temporary_bytes:
        raise SconeError(
            f"found {human_bytes(free)} free at {folder}; expected {human_bytes(temporary_bytes - held)} for temporary "
            "files; free some space, give a work_dir on another disk, or raise the memory budget"
        )


class CountJournal:
    """What a count has finished, as files in its work folder; remembers nothing without a folder."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        for path in folder.glob(".*.part") if folder else ():  # left by a kill in the middle of an atomic write
            path.unlink()

    def level(self, length: int) -> Survivors | None:
        """The survivors of a level that was counted to its end, else None."""
        saved = self._load(f"level-{length:03d}")
        if saved is None:
            return None
        (keys, counts), facts = saved
        return Survivors(facts["num_ids_below"], keys, counts, facts["cut"], facts["num_candidates"], facts["floor"])

    def save_level(self, length: int, level: Survivors) -> None:
        """Keep a finished level; what was kept of its groups goes."""
        facts = {
            "num_ids_below": level.num_ids_below,
            "cut": level.cut,
            "num_candidates": level.num_candidates,
            "floor": level.floor,
        }
        self._save(f"level-{length:03d}", np.stack([level.keys, level.counts]), facts)
        if self._folder:
            for path in self._folder.glob(f"group-{length:03d}-*"):
                path.unlink()

    def group(self, length: int, first: int) -> tuple[np.ndarray, np.ndarray, int] | None:
        """Keys, counts and number of candidates of the group of partitions that begins with ``first``, else None."""
        saved = self._load(f"group-{length:03d}-{first:06d}")
        return None if saved is None else (saved[0][0], saved[0][1], saved[1]["num_candidates"])

    def save_group(self, length: int, first: int, keys: np.ndarray, counts: np.ndarray, num_candidates: int) -> None:
        """Keep a counted group."""
        name = f"group-{length:03d}-{first:06d}"
        self._save(name, np.stack([keys, counts]), {"num_candidates": num_candidates})

    def carries(self, length: int) -> np.ndarray | None:
        """The ids at the last positions of the blocks, saved before any block left level ``length``."""
        saved = self._load(f"carries-{length:03d}")
        return None if saved is None else saved[0][0].astype(np.uint32)

    def save_carries(self, length: int, carries: np.ndarray) -> None:
        self._save(f"carries-{length:03d}", carries.astype(np.uint64)[None], {})

    def _load(self, name: str) -> tuple[np.ndarray, dict[str, int]] | None:
        """The JSON is written after the array, so where it is, both are."""
        if self._folder is None or not (self._folder / f"{name}.json").exists():
            return None
        facts = read_json(self._folder / f"{name}.json")
        try:
            return np.load(self._folder / f"{name}.npy", allow_pickle=False), facts
        except (OSError, ValueError) as error:
            raise SconeError(
                f"found a damaged work file {self._folder / name}.npy: {error}; remove {self._folder} and count again"
            ) from error

    def _save(self, name: str, array: np.ndarray, facts: dict[str, int]) -> None:
        if self._folder is None:
            return
        with atomic_path(self._folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        write_json(self._folder / f"{name}.json", facts)
