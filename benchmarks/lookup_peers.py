"""What table look-ups are measured against: fio on the same file, LMDB with the same rows (used by bench_lookup)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np


def drop_from_page_cache(path: Path) -> None:
    """Make the next read of ``path`` come from the disk. Pages that a process has mapped stay: unmap them first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def fio_reads_per_second(
    path: Path, block_bytes: int, depth: int, seconds: float, in_batches: bool = False
) -> float | None:
    """Random aligned reads a second that fio reaches past the page cache (libaio); None where fio is not installed.

    ``depth`` reads are under way at a time, each replaced as it ends; ``in_batches``, when all have ended.
    """
    if shutil.which("fio") is None:
        return None
    command = ["fio", "--name=reads", f"--filename={path}", "--rw=randread", f"--bs={block_bytes}", "--direct=1"]
    command += ["--ioengine=libaio", f"--iodepth={depth}", f"--runtime={seconds}", "--time_based", "--readonly"]
    command += ["--size=" + str(path.stat().st_size // block_bytes * block_bytes), "--output-format=json"]
    if in_batches:
        command += [f"--iodepth_batch_submit={depth}", f"--iodepth_batch_complete_min={depth}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]["iops"])


class LmdbTable:
    """Rows in LMDB: key = rank (8 bytes, big-endian, so that keys are in order), value = the row's bytes."""

    def __init__(self, path: Path) -> None:
        import lmdb

        self.path = path
        self._environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False)

    @staticmethod
    def write(path: Path, rows: Iterator[np.ndarray], num_rows: int, row_bytes: int) -> None:
        """Store ``rows`` (blocks of float32 [n, D] in order of rank)."""
        import lmdb

        environment = lmdb.open(str(path), subdir=False, map_size=4 * num_rows * row_bytes + (64 << 20), sync=False)
        rank = 0
        for block in rows:
            with environment.begin(write=True) as transaction:
                for row in block:
                    transaction.put(rank.to_bytes(8, "big"), row.tobytes(), append=True)
                    rank += 1
        environment.sync(True)
        environment.close()

    def rows_into(self, ranks: np.ndarray, out: np.ndarray) -> None:
        """Fill ``out`` (float32 [n, D]) with the rows ``ranks``."""
        with self._environment.begin(buffers=True) as transaction:
            for place, rank in enumerate(ranks.tolist()):
                out[place] = np.frombuffer(transaction.get(rank.to_bytes(8, "big")), dtype=np.float32)

    def close(self) -> None:
        self._environment.close()
