"""Placement `shared`: one copy of a table's rows in RAM for all processes of a machine."""

from __future__ import annotations

import atexit
import errno
import multiprocessing
import os
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.stores import memory
from scone.tests.inference.tables import write_table
from scone.tests.processes import forked
from scone.utils.errors import SconeError

pytestmark = pytest.mark.skipif(not memory.FOLDER.is_dir(), reason="this system has no /dev/shm")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A table like no other, so that its rows in shared memory are this test's own."""
    rows = torch.randn(5000, 64, generator=torch.Generator().manual_seed(int.from_bytes(os.urandom(6), "big")))
    write_table(tmp_path / "embeddings.cache", rows)
    return tmp_path / "embeddings.cache"


def segments(path: Path) -> list[Path]:
    with EmbeddingTable.open(path, "mmap") as table:
        return sorted(memory.FOLDER.glob(f"scone-*-{table.layout.rows_checksum[:32]}-*"))


def read(path: Path, teller: Connection) -> None:
    """Say what is in the table, and have it open until somebody answers and the process ends."""
    table = EmbeddingTable.open(path, "shared")
    teller.send(table.rows(torch.arange(table.num_rows)).double().sum().item())
    teller.recv()
    atexit._run_exitfuncs()  # as Python does where it ends; processes of multiprocessing leave it out


def reader(path: Path) -> tuple[BaseProcess, Connection]:
    """A process that has the table open, and the end of it that we hold."""
    ours, theirs = multiprocessing.Pipe()
    return forked(read, path, theirs), ours


@pytest.mark.parametrize(("placement", "count"), [("shared", 1), ("shared:700,shared:800,mmap", 2)])
def test_rows_are_those_of_the_file(path: Path, placement: str, count: int) -> None:
    with EmbeddingTable.open(path, "mmap") as table:
        expected = table.rows(torch.arange(5000))
    with EmbeddingTable.open(path, placement) as one, EmbeddingTable.open(path, placement) as other:
        assert len(segments(path)) == count
        for table in (one, other):
            assert torch.equal(table.rows(torch.arange(5000)), expected)
    assert segments(path) == []


def test_processes_have_one_copy_which_the_last_one_removes(path: Path) -> None:
    started = [reader(path) for _ in range(2)]  # at the same time: one fills, the other waits for it
    assert len({told.recv() for _, told in started}) == 1
    (segment,) = segments(path)
    node = segment.stat().st_ino
    for process, told in started:
        assert str(node) in Path(f"/proc/{process.pid}/maps").read_text()
        assert segments(path) == [segment]
        told.send("enough")
        process.join()
        assert process.exitcode == 0
    assert segments(path) == []


def test_what_killed_processes_left_is_removed_by_the_next_one(path: Path, tmp_path: Path) -> None:
    process, told = reader(path)
    told.recv()
    process.kill()
    process.join()
    assert len(segments(path)) == 1
    write_table(tmp_path / "other.cache", torch.randn(10, 8))
    EmbeddingTable.open(tmp_path / "other.cache", "shared").close()
    assert segments(path) == []


def test_what_was_filled_in_part_is_filled_again(path: Path) -> None:
    with EmbeddingTable.open(path, "shared") as table:
        expected = table.rows(torch.arange(5000))
        (segment,) = segments(path)
        content = bytearray(segment.read_bytes())
        content[1000:] = bytes(len(content) - 1000)  # zeros, up to the last byte: whoever filled it was killed
        segment.unlink()
        segment.write_bytes(content)
        with EmbeddingTable.open(path, "shared") as other:
            assert torch.equal(other.rows(torch.arange(5000)), expected)


def test_damage_is_found_and_nothing_stays(path: Path) -> None:
    found = segments(path)
    content = bytearray(path.read_bytes())
    content[20_000] ^= 1
    path.write_bytes(content)
    with pytest.raises(SconeError, match="do not fit their checksum"):
        EmbeddingTable.open(path, "shared")
    assert found == segments(path) == []


def test_too_little_shared_memory_gets_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(SconeError, match=r"found too little shared memory for 1\.\d+ M.*--shm-size.*mmap"):
        EmbeddingTable.open(path, "shared")
    assert segments(path) == []
