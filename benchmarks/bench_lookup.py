"""Reading rows of an embedding table: our stores warm and cold, beside torch.index_select, fio and LMDB.

    python benchmarks/bench_lookup.py [--quick] [--json FILE] [--rows N] [--dir DIR]

Rows are 4 KiB (D = 1,024, fp32). Warm batches are Zipf-distributed ranks, as text asks for them; cold ones (page cache
dropped) are uniform and without repeats, so that a row is a read. fio has as many reads under way as a batch has rows,
up to 128: it replaces each as it ends, and in a run of its own waits for all of them, as a batch does. Batches of 1,
16, 1,024 and 16,384; the metric without a suffix is that of 16,384 rows warm, 1,024 cold. The table and LMDB's file
need 13 KB of disk a row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Report, has_peer, interleaved
from workloads import TrainingStep, f_grams_of, gpt2_tokens, gpt2_trunk, most_frequent, write_table

from scone.evaluation.perplexity import perplexity
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.precompute import convert_table, precompute_table
from scone.inference.stores.direct import QUEUE_DEPTH
from scone.inference.table_format import ROW_TYPES
from scone.models.language_model import SconeForCausalLM

WIDTH = 1024
ROW_BYTES = 4 * WIDTH
BATCHES = (1, 16, 1024, 16_384)
COLD_BATCHES = 6


def main() -> None:
    """Measure, print the table of records, write the JSON."""
    report = Report.from_arguments("lookup", __doc__, add_options=_add_options)
    options = report.config
    num_rows = options["rows"] or (20_000 if report.quick else 500_000)
    options |= {"rows": num_rows, "width": WIDTH, "row_bytes": ROW_BYTES, "queue_depth": QUEUE_DEPTH}
    with tempfile.TemporaryDirectory(dir=options["dir"], prefix="bench_lookup.") as folder:
        table, peer = Path(folder) / "embeddings.cache", Path(folder) / "rows.lmdb"
        print(f"writing {num_rows:,} rows of {ROW_BYTES} bytes", flush=True)
        write_table(table, "fp32", num_rows, map(torch.from_numpy, _blocks(num_rows)))
        paths = dict.fromkeys(("ram", "mmap", "mmap_prefetched", "direct"), table)
        lmdb_bytes = None
        if has_peer("lmdb"):
            write_lmdb(peer, _blocks(num_rows), num_rows)
            paths["lmdb"], lmdb_bytes = peer, peer.stat().st_blocks * 512
        report.add("bytes_vs_payload", "bytes", table.stat().st_size, num_rows * ROW_BYTES, "rows alone", most=1.01)
        report.add("disk_vs_lmdb", "bytes", table.stat().st_size, lmdb_bytes, "LMDB", most=0.55)
        measure_warm(report, paths, num_rows)
        measure_cold(report, paths, num_rows)
        measure_cuts(report, table, num_rows)
    measure_row_types(report)
    measure_perplexity(report)
    report.finish()


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, help="rows of the table (500,000; quick: 20,000)")
    parser.add_argument("--dir", type=Path, default=Path(), help="where the files go: the disk that is measured")
    parser.add_argument("--skip_perplexity", action="store_true", help="do not train the small model")


def _blocks(num_rows: int, block: int = 8192) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for low in range(0, num_rows, block):
        yield random.standard_normal((min(block, num_rows - low), WIDTH), dtype=np.float32)


def _zipf(num_rows: int, count: int, random: np.random.Generator) -> torch.Tensor:
    """Ranks whose chance falls as 1 / (rank + 1): int64 [count]."""
    return torch.from_numpy((num_rows ** random.random(count)).astype(np.int64).clip(1, num_rows) - 1)


Reader = Callable[[torch.Tensor, torch.Tensor], object]
"""Fills its second argument, float32 [n, D], with the rows of its first, int64 [n]."""


@contextmanager
def reader(path: Path, kind: str) -> Iterator[Reader]:
    """One way to read rows: a placement of our table, with ``_prefetched`` behind it where it is asked to, or LMDB."""
    if kind == "lmdb":
        import lmdb

        with lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False) as environment:

            def read(ranks: torch.Tensor, out: torch.Tensor) -> None:
                rows = out.numpy()
                with environment.begin(buffers=True) as transaction:
                    for place, rank in enumerate(ranks.tolist()):
                        rows[place] = np.frombuffer(transaction.get(rank.to_bytes(8, "big")), dtype=np.float32)

            yield read
        return
    placement, _, prefetched = kind.partition("_")
    with EmbeddingTable.open(path, placement) as table:
        yield lambda ranks, out: (prefetched and table.prefetch(ranks), table.rows(ranks, out=out))


def measure_warm(report: Report, paths: dict[str, Path], num_rows: int) -> None:
    """Rows a second with everything in memory, in turn with `torch.index_select` and a plain copy of as many bytes."""
    random, whole = np.random.default_rng(1), torch.empty(num_rows, WIDTH)
    with ExitStack() as opened:
        readers = {kind: opened.enter_context(reader(path, kind)) for kind, path in paths.items() if "_" not in kind}
        everything, found = torch.arange(num_rows), torch.empty(num_rows, WIDTH)
        for read in readers.values():  # what is in memory from here on
            read(everything, found)
            assert readers["ram"] is read or torch.equal(found, whole)
            whole.copy_(found)
        del found
        for batch in BATCHES:
            ranks, out = _zipf(num_rows, batch, random), torch.empty(batch, WIDTH)
            run: dict[str, Callable[[], object]] = {
                "copy": lambda out=out, batch=batch: out.copy_(whole[:batch]),
                "index_select": lambda ranks=ranks, out=out: torch.index_select(whole, 0, ranks, out=out),
            }
            run |= {kind: partial(read, ranks, out) for kind, read in readers.items()}
            rates = _rates(run, batch, repeats=200 if batch <= 16 else 5 if report.quick else 20)
            suffix = "" if batch == BATCHES[-1] else f"_b{batch}"
            named = {"peer": rates["index_select"], "peer_name": "torch.index_select", "bound": rates["copy"]}
            for name, store, target in (("ram_vs", "ram", 0.8), ("mmap_warm_vs", "mmap", 0.6)):
                # one row is a few microseconds of Python in a step of milliseconds: a figure, not a target
                named["target"] = None if batch == 1 else target
                report.add(f"{name}_index_select{suffix}", "rows/s", rates[store], **named)
            report.add(f"mmap_warm_vs_lmdb{suffix}", "rows/s", rates["mmap"], rates.get("lmdb"), "LMDB")
            report.add(f"direct_rows_per_second{suffix}", "rows/s", rates["direct"], ratio=None)


def _rates(run: dict[str, Callable[[], object]], batch: int, repeats: int) -> dict[str, float]:
    return {name: batch / seconds for name, seconds in interleaved(run, repeats, warmup=3).items()}


def measure_cold(report: Report, paths: dict[str, Path], num_rows: int) -> None:
    """Rows a second from the disk: the page cache is dropped, and then `COLD_BATCHES` batches are read, no rank twice.
    The first, which also makes and fetches what later ones find, is counted apart.
    """
    random, seconds = np.random.default_rng(2), 1.0 if report.quick else 5.0
    for batch in BATCHES[1:-1] if report.quick else BATCHES[1:]:
        rounds = 2 if report.quick else 5 if batch < 16_384 else 3
        times: dict[str, list[float]] = defaultdict(list)
        for _ in range(rounds):
            for kind in ("fio", "fio in batches"):
                reads = fio_reads_per_second(
                    paths["direct"], ROW_BYTES, min(QUEUE_DEPTH, batch), seconds / rounds, kind != "fio"
                )
                times[kind] += [] if reads is None else [batch / reads]
            batches = list(torch.from_numpy(random.choice(num_rows, (COLD_BATCHES, batch), replace=False)))
            for kind, path in paths.items():
                if kind != "ram":
                    first, *others = _cold(path, kind, batches)
                    times[f"{kind} first"].append(first)
                    times[kind] += others
        rates = defaultdict(lambda: None)  # type: ignore[var-annotated]
        rates |= {kind: batch / statistics.median(found) for kind, found in times.items() if found}
        suffix = "" if batch == 1024 else f"_b{batch}"
        named = {"peer": rates["fio"], "peer_name": "fio", "bound": rates["fio"]}
        report.add(f"direct_cold_vs_fio{suffix}", "rows/s", rates["direct"], **named, target=0.8)
        report.add(f"direct_first_batch_vs_fio{suffix}", "rows/s", rates["direct first"], **named)
        if batch <= QUEUE_DEPTH:  # a larger one is several of fio's
            batched = rates["fio in batches"]
            named = {"peer": batched, "peer_name": "fio, waiting for each batch", "bound": batched}
            report.add(f"direct_cold_vs_fio_in_batches{suffix}", "rows/s", rates["direct"], **named)
        named = {"peer": rates["lmdb"], "peer_name": "LMDB"}
        report.add(f"cold_speed_vs_lmdb{suffix}", "rows/s", rates["direct"], **named, target=3.0)
        report.add(f"mmap_cold_vs_lmdb{suffix}", "rows/s", rates["mmap"], **named)
        report.add(f"mmap_cold_prefetched_vs_lmdb{suffix}", "rows/s", rates["mmap_prefetched"], **named)


def _cold(path: Path, kind: str, batches: list[torch.Tensor]) -> list[float]:
    """Seconds that each of ``batches`` takes, one after the other, in a file that was just opened."""
    drop_from_page_cache(path)
    seconds = []
    with reader(path, kind) as read:
        out = torch.empty(len(batches[0]), WIDTH).fill_(0)  # memory that is there already, as fio's is
        for ranks in batches:
            start = time.perf_counter()
            read(ranks, out)
            seconds.append(time.perf_counter() - start)
    return seconds


def measure_cuts(report: Report, table: Path, num_rows: int) -> None:
    """Latency of a batch of 1,024 Zipf ranks, and memory, as the cut between RAM and disk moves."""
    random = np.random.default_rng(3)
    for share in (0.0, 0.001, 0.01, 0.1, 0.5, 1.0):
        kept = round(num_rows * share)
        with EmbeddingTable.open(table, f"ram:{kept},disk") as tiered:
            batches = [_zipf(num_rows, 1024, random) for _ in range(12)]
            times = []
            for ranks in batches:
                start = time.perf_counter()
                tiered.rows(ranks)
                times.append(time.perf_counter() - start)
            report.add(f"tiered_us_b1024_ram_{share:g}", "µs", statistics.median(times[2:]) * 1000000.0, ratio=None)
            report.add(f"tiered_ram_bytes_{share:g}", "bytes", tiered.memory.ram, ratio=None)


def measure_row_types(report: Report) -> None:
    """Decoding gathers of 16,384 rows, by row type, against copying the fp32 rows that come out."""
    random, num_rows = np.random.default_rng(4), 20_000 if report.quick else 50_000
    ranks, out = _zipf(num_rows, 16_384, random), torch.empty(16_384, WIDTH)
    rows = torch.randn(num_rows, WIDTH)
    with tempfile.TemporaryDirectory(dir=report.config["dir"], prefix="bench_lookup.") as folder:
        tables = {}
        for row_type in ROW_TYPES:
            path = Path(folder) / row_type
            write_table(path, row_type, num_rows, [rows])
            tables[row_type] = EmbeddingTable.open(path, "ram")
        run: dict[str, Callable[[], object]] = {
            row_type: lambda table=table: table.rows(ranks, out=out) for row_type, table in tables.items()
        }
        rates = _rates(run | {"copy": lambda: out.copy_(rows[:16_384])}, 16_384, repeats=10)
        for row_type, table in tables.items():
            report.add(f"ram_{row_type}", "rows/s", rates[row_type], bound=rates["copy"], ratio=None)
            table.close()


# ---------------------------------------------------------------------- quality by row type

VOCAB_SIZE, LENGTH, BATCH = 4096, 128, 16


def measure_perplexity(report: Report) -> None:
    """Perplexity of one small trained model reading its table in each row type, ÷ that of the fp32 table."""
    if report.config["skip_perplexity"]:
        return
    steps, parts = (20, 1) if report.quick else (1000, 2)
    tokens = most_frequent(gpt2_tokens(parts)[0], VOCAB_SIZE)
    train, held_out = np.split(tokens, [-max(8_000, 40 * steps)])
    vocabulary = f_grams_of(train, 100 * steps, (), vocab_size=VOCAB_SIZE, max_n=4, min_freq=10)
    trunk = gpt2_trunk(128, 3, 4, vocab_size=VOCAB_SIZE, n_positions=LENGTH)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    model = SconeForCausalLM.from_trunk(trunk, vocabulary, f_gram_model=sizes, learned_rows=vocabulary.num_f_grams)
    train_model(model, train, steps)
    report.config["perplexity"] = {"steps": steps, "f_grams": vocabulary.num_f_grams, "tokens": len(train)}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "fp32"
        precompute_table(model, whole, quiet=True)
        for row_type in ROW_TYPES:
            path = Path(folder) / row_type
            if row_type != "fp32":
                convert_table(whole, path, row_type=row_type, quiet=True)
            with EmbeddingTable.open(path) as table:
                model.attach_table(table)
                found[row_type] = perplexity(model, held_out, LENGTH, BATCH, quiet=True).perplexity
    for row_type, target in (("bf16", None), ("int8", 1.001), ("int4", None)):
        report.add(f"{row_type}_perplexity", "perplexity", found[row_type], found["fp32"], "fp32 table", most=target)


def train_model(model: SconeForCausalLM, tokens: np.ndarray, steps: int) -> None:
    """A short plain run: what counts is that the rows are trained ones."""
    random, step = np.random.default_rng(0), TrainingStep(model, rows_learning_rate=3e-3)
    for group in step.optimizer.param_groups:
        group["lr"] = 1e-3
    for _ in range(steps):
        starts = random.integers(0, len(tokens) - LENGTH, BATCH)
        batch = torch.from_numpy(np.stack([tokens[start : start + LENGTH] for start in starts]))
        step({"input_ids": batch, "labels": batch})
    model.eval()


# ---------------------------------------------------------------------- peers


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


def write_lmdb(path: Path, blocks: Iterator[np.ndarray], num_rows: int) -> None:
    """Store ``blocks`` of float32 [n, D], in order: key = rank (8 bytes, big-endian, so that keys are in order)."""
    import lmdb

    with lmdb.open(str(path), subdir=False, map_size=4 * num_rows * ROW_BYTES + (64 << 20), sync=False) as environment:
        ranks = itertools.count()
        for block in blocks:
            with environment.begin(write=True) as transaction:
                for row in block:
                    transaction.put(next(ranks).to_bytes(8, "big"), row.tobytes(), append=True)
        environment.sync(True)


if __name__ == "__main__":
    main()
