"""Write an embedding table in chunks, by one process or many, so that a kill at any moment loses at most one chunk.

The unfinished table is a folder beside the wanted file, `PATH.part`: the rows (`table`), what they are to be
(`plan.json`), one list of finished chunks for each rank (`done-RANK.txt`) and a lock. Rows reach the disk before the
list does. The process that finds every chunk finished writes checksums and header, and renames the file to `PATH`.
Nothing needs to communicate, and deleting the folder starts over.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import threading
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scone.inference.table_format import TableLayout
from scone.utils.errors import SconeError
from scone.utils.files import Closing, is_at, read_json, sync_folder, translate_disk_full, write_json
from scone.utils.progress import available_cores, map_in_order
from scone.utils.text import human_bytes


@dataclass(frozen=True)
class TablePlan:
    """What a table will be and how it is cut into chunks; a restart goes on only where the plan is the same.

    ``num_chunks``: units of work, numbered from 0; which rows a chunk has is the producer's business.
    ``settings``: whatever else the bytes depend on (chunk size, source …), as JSON values.
    """

    layout: TableLayout
    num_chunks: int
    settings: dict[str, Any]

    def as_json(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        row = self.layout.row_format
        what = {"num_rows": self.layout.num_rows, "width": row.width, "row_type": row.row_type}
        what |= {"group_size": row.group_size, "compute_dtype": self.layout.compute_dtype}
        what |= {"fingerprints": dict(self.layout.fingerprints)}
        return what | {"num_chunks": self.num_chunks, "settings": self.settings}


class TableWriter(Closing):
    """An unfinished table on disk. Use as a context manager; several processes may hold one of the same plan.

    Attributes: ``notice`` says in one line what was found when opened ("" when nothing was).
    """

    def __init__(self, path: str | Path, plan: TablePlan, rank: int = 0, drop_page_cache: bool = False) -> None:
        """Create the unfinished table or go on with it.

        ``rank``: which list of finished chunks is this process's own. ``drop_page_cache``: hand written pages back to
        the system at once, so that a table larger than RAM does not push everything else out of it.

        Raises SconeError: not enough disk space, or another process is writing this table with another plan.
        """
        self.path, self.plan, self.notice = Path(path), plan, ""
        self.folder = self.path.with_name(self.path.name + ".part")
        self._drop_page_cache, self._thread_lock = drop_page_cache, threading.Lock()
        with self._says_when_full():
            self._lock = self._enter_folder()
            self._rows = os.open(self.folder / "table", os.O_RDWR | os.O_CLOEXEC)
            self._journal = _open_journal(self.folder / f"done-{rank}.txt")

    def _enter_folder(self) -> int:
        """Take part in the folder; the first process there prepares it alone. Returns the descriptor of the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self.folder.mkdir(exist_ok=True)
            lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                alone = True
            except BlockingIOError:
                fcntl.flock(lock, fcntl.LOCK_SH)
                alone = False
            if is_at(lock, self.folder / "lock"):  # else it was finished and removed meanwhile
                try:
                    ready = self._prepare(alone)
                except BaseException:
                    os.close(lock)
                    if not (self.folder / "plan.json").exists():
                        shutil.rmtree(self.folder, ignore_errors=True)  # nothing was begun, so nothing is left behind
                    raise
                fcntl.flock(lock, fcntl.LOCK_SH)
                # Changing the kind of lock lets others in for a moment, so what they may have done is looked at again.
                if ready and _read_plan(self.folder / "plan.json") == self.plan.as_json():
                    return lock
            os.close(lock)

    def _prepare(self, alone: bool) -> bool:
        """Make the folder hold this plan. False: the process that was preparing it gave up, try again."""
        plan_path = self.folder / "plan.json"
        # without its rows it is a folder whose table was renamed to its place, and whose removal was cut short
        if plan_path.exists() and (self.folder / "table").exists():
            found, wanted = _read_plan(plan_path), self.plan.as_json()
            if found == wanted:
                self.notice = self.notice or f"going on with {self.folder}"
                self._allocate()
                return True
            differs = [name for name in wanted if found.get(name) != wanted[name]]
            difference = ", ".join(
                f"{name} {found.get(name)!s:.30} instead of {wanted[name]!s:.30}" for name in differs
            )
            if not alone:
                raise SconeError(
                    f"found another process writing {self.path} with another plan ({difference}); "
                    "expected the same one; wait for it, or choose another output path"
                )
            self.notice = f"starting over: {self.folder} is of another plan ({difference})"
        elif not alone:
            return False
        for name in os.listdir(self.folder):
            if name != "lock":
                (self.folder / name).unlink()
        (self.folder / "table").touch()
        self._allocate()
        write_json(plan_path, self.plan.as_json())
        return True

    def _allocate(self) -> None:
        """Claim the disk space now rather than run out of it after hours."""
        needed = self.plan.layout.file_bytes
        with open(self.folder / "table", "r+b") as file:
            status = os.fstat(file.fileno())
            missing = needed - min(needed, 512 * status.st_blocks)
            free = shutil.disk_usage(self.folder).free
            if missing > free:
                raise SconeError(
                    f"found {human_bytes(free)} of free disk space for {self.folder}; expected {human_bytes(missing)}; "
                    "free some space or choose another output path; what is finished is kept"
                )
            if status.st_size != needed or missing:
                os.posix_fallocate(file.fileno(), 0, needed)

    def finished_chunks(self) -> set[int]:
        """Chunks that any process has finished."""
        chunks: set[int] = set()
        for journal in self.folder.glob("done-*.txt"):
            content = journal.read_bytes()  # a line without its end was cut by a kill
            chunks.update(int(line) for line in content[: content.rfind(b"\n") + 1].split() if line.isdigit())
        return {chunk for chunk in chunks if chunk < self.plan.num_chunks}

    def write(self, ranks: np.ndarray, rows: np.ndarray) -> None:
        """Put encoded rows (uint8 [n, row_bytes]) at their ranks (int64 [n]). Neighbouring ranks are written together.

        Raises SconeError when the disk is full or fails; what was finished stays.
        """
        layout = self.plan.layout
        if rows.shape != (len(ranks), layout.row_bytes) or rows.dtype != np.uint8:
            raise ValueError(f"expected uint8 [{len(ranks)}, {layout.row_bytes}], found {rows.dtype} {rows.shape}")
        if not len(ranks):
            return
        order = np.argsort(ranks)
        ranks, rows = ranks[order], np.ascontiguousarray(rows[order])
        if ranks[0] < 0 or ranks[-1] >= layout.num_rows:
            raise ValueError(f"ranks {ranks[0]} to {ranks[-1]} are not all in [0, {layout.num_rows})")
        starts = np.flatnonzero(np.concatenate(([True], np.diff(ranks) != 1)))
        view = rows.data
        with self._says_when_full():
            for low, high in zip(starts.tolist(), [*starts[1:].tolist(), len(ranks)], strict=True):
                _write_all(self._rows, view[low:high].cast("B"), layout.data_start + int(ranks[low]) * layout.row_bytes)

    def mark_finished(self, chunk: int) -> None:
        """Note that all rows of ``chunk`` are written; first they, then the note, are made durable."""
        with self._says_when_full(), self._thread_lock:
            os.fdatasync(self._rows)
            _write_all(self._journal, memoryview(f"{chunk}\n".encode()), None)
            os.fdatasync(self._journal)
            if self._drop_page_cache:
                os.posix_fadvise(self._rows, 0, 0, os.POSIX_FADV_DONTNEED)

    def finish(self) -> bool:
        """Complete the table if every chunk is finished: checksums, header, rename. Returns whether `path` is there.

        False: other processes are still working on their chunks; the last of them completes the table.
        """
        with self._says_when_full():
            try:
                lock = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)  # a lock of its own: one process completes
            except FileNotFoundError:
                return self.path.exists()  # another process completed it meanwhile
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not is_at(self._rows, self.folder / "table"):
                    return self.path.exists()
                if len(self.finished_chunks()) < self.plan.num_chunks:
                    return False
                self._complete()
                return True
            finally:
                os.close(lock)

    def _complete(self) -> None:
        layout = self.plan.layout
        checksums = b"".join(map_in_order(self._checksum, range(layout.num_checksums), available_cores()))
        complete = replace(layout, rows_checksum=hashlib.sha256(checksums).hexdigest())
        _write_all(self._rows, memoryview(checksums), layout.checksums_start)
        _write_all(self._rows, memoryview(complete.header()), 0)
        os.ftruncate(self._rows, layout.file_bytes)
        os.fsync(self._rows)
        os.replace(self.folder / "table", self.path)
        sync_folder(self.path.parent)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _checksum(self, chunk: int) -> bytes:
        layout = self.plan.layout
        span = layout.checksum_rows * layout.row_bytes
        low = layout.data_start + chunk * span
        size = min(span, layout.checksums_start - low)
        content = os.pread(self._rows, size, low)
        if len(content) != size:
            raise SconeError(f"found {self.folder} cut from outside; expected its full size; delete it")
        if self._drop_page_cache:
            os.posix_fadvise(self._rows, low, size, os.POSIX_FADV_DONTNEED)
        return hashlib.sha256(content).digest()

    def _says_when_full(self) -> AbstractContextManager[None]:
        return translate_disk_full(
            f"the table in {self.folder}", "run the same command again: what is finished is kept"
        )

    def close(self) -> None:
        """Release files and lock; what was finished stays for the next run."""
        for descriptor in (self._rows, self._journal, self._lock):
            os.close(descriptor)


def discard_partial(path: str | Path) -> None:
    """Delete what an unfinished run for ``path`` left, unless a process is still writing it."""
    folder = Path(path).with_name(Path(path).name + ".part")
    if not folder.is_dir():
        return
    lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _read_plan(path: Path) -> dict[str, Any]:
    """The plan in an unfinished table's folder; {} where there is none or it is unreadable."""
    try:
        found = read_json(path)
    except SconeError:
        return {}
    return found if isinstance(found, dict) else {}


def _open_journal(path: Path) -> int:
    """Open a list of finished chunks for appending; a line that a kill cut short is taken off first."""
    journal = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    content = path.read_bytes()
    os.ftruncate(journal, content.rfind(b"\n") + 1)
    return journal


def _write_all(descriptor: int, data: memoryview, offset: int | None) -> None:
    """Write all of ``data`` at ``offset``, or at the end (None)."""
    while len(data):
        written = os.write(descriptor, data) if offset is None else os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset = None if offset is None else offset + written
