"""Every store returns the same rows, bit for bit."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.stores import RowStore, Tier, parse_placement
from scone.inference.stores.direct import DirectStore
from scone.inference.stores.memory import DeviceStore, MemoryStore
from scone.inference.stores.tiered import TieredStore
from scone.inference.table_format import ROW_TYPES, RowFormat, TableFile
from scone.tests.inference.tables import write_table
from scone.utils.errors import SconeError

NUM_ROWS, WIDTH = 700, 331  # no row type's rows divide a page
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def rows():
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tables(rows, tmp_path_factory):
    """One of each row type."""
    folder = tmp_path_factory.mktemp("tables")
    for row_type in ROW_TYPES:
        write_table(folder / f"{row_type}.cache", rows, row_type)
    return folder


@pytest.fixture(params=ROW_TYPES)
def table(request, tables):
    return tables / f"{request.param}.cache"


def in_many_parts(file: TableFile) -> RowStore:
    """Batches larger than the buffer."""
    store = DirectStore(file)
    store._rows_at_once, store._queue_depth = 7, 3
    return store


def on_threads(file: TableFile) -> RowStore:
    """As where the system has no asynchronous reads."""
    store = DirectStore(file)
    store._use_queues = False
    return store


def tiered(file: TableFile) -> RowStore:
    """All kinds of tiers together."""
    stores = [DeviceStore(file, CPU, 0, 10), MemoryStore.ram(file, 10, 101, CPU), MemoryStore.mapped(file)]
    return TieredStore([*stores, DirectStore(file)], [10, 111, 300])


STORES: dict[str, Callable[[TableFile], RowStore]] = {
    "ram": lambda file: MemoryStore.ram(file, 0, NUM_ROWS, CPU),
    "mmap": MemoryStore.mapped,
    "direct": DirectStore,
    "direct, in many parts": in_many_parts,
    "direct, on threads": on_threads,
    "device": lambda file: DeviceStore(file, CPU, 0, NUM_ROWS),
    "tiered": tiered,
}


@pytest.fixture(params=["fp32", "int4"])  # stores read bytes, whatever they mean: many or few
def content(request, tables, rows):
    """The path of a table, and the bytes that it has to hold."""
    path = tables / f"{request.param}.cache"
    return path, stored(path, rows)


@pytest.fixture(params=STORES)
def store(request, content):
    with TableFile(content[0]) as file:
        store = STORES[request.param](file)
        yield store
        store.close()


def test_every_store_returns_the_same_rows(store, content):
    """Any batch: empty, repeated, unsorted, fetched ahead or not."""

    @settings(max_examples=25, deadline=None)
    @given(ranks=st.lists(st.integers(0, NUM_ROWS - 1), max_size=60), prefetch=st.booleans())
    def check(ranks, prefetch):
        wanted = torch.tensor(ranks, dtype=torch.int64)
        if prefetch:
            store.prefetch(wanted)
        assert torch.equal(read(store, wanted), content[1][wanted])

    check()


def test_all_rows_at_once_and_none_that_is_not_there(store, content):
    """Also in inference mode: stores read on threads, which know nothing of the caller's mode."""
    order = torch.randperm(NUM_ROWS)
    for mode in (False, True):
        with torch.inference_mode(mode):
            assert torch.equal(read(store, order), content[1][order])
    for wrong in (-1, NUM_ROWS, 2**40):
        with pytest.raises(IndexError):
            read(store, torch.tensor([0, wrong, 3]))
    assert store.memory.ram + store.memory.mapped + store.memory.device > 0


def test_threads_may_read_side_by_side(store, content):
    def read_some(seed):
        random = np.random.default_rng(seed)
        for _ in range(5):
            some = torch.from_numpy(random.integers(0, NUM_ROWS, 50))
            store.prefetch(some[:10])
            assert torch.equal(read(store, some), content[1][some])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(read_some, range(4)))


def read(store: RowStore, ranks: torch.Tensor) -> torch.Tensor:
    """The bytes of these rows, uint8 [n, row_bytes]."""
    out = store.new_rows(len(ranks))
    out.view(torch.uint8).fill_(0xA5)
    store.read(ranks, out)
    return out.view(torch.uint8)


def stored(table: Path, rows: torch.Tensor) -> torch.Tensor:
    """The bytes that the table has to hold, uint8 [S, row_bytes]."""
    return torch.from_numpy(RowFormat.of(table.stem, WIDTH).encode(rows))


@pytest.mark.parametrize("placement", ["ram", "mmap", "direct", "ram:50,disk", "ram:50,mmap:60,direct"])
def test_tables_read_the_same_from_every_placement(table, rows, placement):
    row_format = RowFormat.of(table.stem, WIDTH)
    ranks = torch.randint(0, NUM_ROWS, (90,))
    expected = row_format.decode(torch.from_numpy(row_format.encode(rows)))[ranks]
    with EmbeddingTable.open(table, placement) as opened:
        opened.prefetch(ranks)
        assert torch.equal(opened.rows(ranks), expected)
        assert torch.equal(opened.rows(ranks, torch.bfloat16), expected.to(torch.bfloat16))
        out = torch.empty(90, WIDTH)
        assert opened.rows(ranks, out=out) is out
        assert torch.equal(out, expected)
        assert opened.rows(ranks[:0]).shape == (0, WIDTH)
        assert f"{NUM_ROWS:,} rows × {WIDTH}" in opened.describe()
        for wrong in (-1, NUM_ROWS):
            with pytest.raises(SconeError, match=f"found rank {wrong}; expected ranks of the {NUM_ROWS} rows"):
                opened.rows(torch.tensor([0, wrong]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_a_device_holds_are_decoded_there(table, rows, dtype):
    """The CPU stands for an accelerator that holds the first rows, all of them, or none of the batch's."""
    expected = RowFormat.of(table.stem, WIDTH).decode(stored(table, rows), dtype)
    with TableFile(table) as file:
        first = [DeviceStore(file, CPU, 0, 10), MemoryStore.ram(file, 10, 101, CPU), DirectStore(file)]
        for store in (DeviceStore(file, CPU, 0, NUM_ROWS), TieredStore(first, [10, 111])):
            opened = EmbeddingTable(file, store, CPU)
            for ranks in (torch.randint(0, NUM_ROWS, (90,)), torch.arange(9, -1, -1), torch.arange(8, 40)):
                found = opened.rows(ranks, dtype)
                assert found.dtype == dtype
                assert torch.equal(found, expected[ranks])
                assert opened.rows(ranks[:0], dtype).shape == (0, WIDTH)
            with pytest.raises(SconeError, match="found rank -1"):
                opened.rows(torch.tensor([3, -1]))
            store.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # which are read in ways of their own
@pytest.mark.parametrize("placement", ["mmap", "direct", "ram:50,disk"])
@pytest.mark.parametrize("change", ["cut", "overwritten"])
def test_a_file_that_changes_under_a_reader_is_noticed(tmp_path, rows, placement, dtype, change):
    path = tmp_path / "embeddings.cache"
    write_table(path, rows)
    opened_at = path.stat().st_mtime_ns
    with EmbeddingTable.open(path, placement) as opened:
        last = torch.tensor([NUM_ROWS - 1])
        opened.rows(last, dtype)
        if change == "cut":
            os.truncate(path, path.stat().st_size // 2)
        else:
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x7f")
            os.utime(path, ns=(opened_at + 1, opened_at + 1))  # clocks of file systems tick every few milliseconds
        with pytest.raises(SconeError, match="was changed while it was being read"):
            opened.rows(last, dtype)


@pytest.mark.parametrize("placement", ["ram", "mmap", "direct"])
def test_a_file_that_is_replaced_or_deleted_does_no_harm(tmp_path, rows, placement):
    path = tmp_path / "embeddings.cache"
    write_table(path, rows)
    with EmbeddingTable.open(path, placement) as opened:
        path.unlink()
        write_table(path, -rows)
        assert torch.equal(opened.rows(torch.tensor([3])), rows[[3]])
        path.unlink()
        assert torch.equal(opened.rows(torch.tensor([NUM_ROWS - 1])), rows[[NUM_ROWS - 1]])


def test_without_direct_reads_it_warns_once_and_reads_the_same(tmp_path, rows, monkeypatch):
    path = tmp_path / "embeddings.cache"
    write_table(path, rows)
    monkeypatch.setattr(os, "O_DIRECT", os.O_DIRECTORY)  # a flag that the file system refuses for a file
    with pytest.warns(RuntimeWarning, match="refuses direct reads"):
        opened = EmbeddingTable.open(path, "direct")
    with opened, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "through the page cache" in opened.describe()
        assert torch.equal(opened.rows(torch.arange(NUM_ROWS)), rows)


def test_placements_mean_tiers():
    def parse(text):
        return parse_placement(text, num_rows=1000, row_bytes=1024)

    assert parse("ram") == [Tier("ram", 0, 1000)]
    assert parse("disk") == [Tier("direct", 0, 1000)]
    assert parse("gpu:10, ram:0.1MiB ,mmap") == [Tier("gpu", 0, 10), Tier("ram", 10, 102), Tier("mmap", 112, 888)]
    assert parse("gpu:1k,ram:2M,disk") == [Tier("gpu", 0, 1000)]
    assert parse_placement("ram", 0, 4) == [Tier("ram", 0, 0)]
    for wrong in ("", "rom", "ram:5", "ram,disk", "gpu:x,ram", "ram:-3,disk", "ram:4.5k,disk", "ram:5,ram:6"):
        with pytest.raises(SconeError, match="expected"):
            parse(wrong)


def test_a_gpu_tier_needs_an_accelerator(table):
    with pytest.raises(SconeError, match="found a gpu tier with device cpu"):
        EmbeddingTable.open(table, "gpu:5,ram")
