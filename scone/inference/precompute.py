"""Make a table: run a model once over every f-gram; check one; change its row type or length without the model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scone.inference.stores.memory import MemoryStore, load_rows
from scone.inference.table_format import (
    FINGERPRINT_NAMES,
    RowFormat,
    TableFile,
    TableLayout,
    check_fingerprints,
    layout_in_the_way,
)
from scone.inference.table_writer import TablePlan, TableWriter, discard_partial
from scone.utils.errors import SconeError
from scone.utils.progress import map_in_order, progress
from scone.utils.text import human_bytes, human_count

if TYPE_CHECKING:
    from scone.models.language_model import SconeForCausalLM

# f-grams computed together, for each unit of batch_size. A chunk repeats the ancestors of its first f-gram and shares
# everything else, so larger chunks gain nothing and hold more memory.
ROWS_PER_BATCH_UNIT = 128
COMPUTE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def precompute_table(
    model: SconeForCausalLM,
    output_path: str | Path,
    *,
    row_type: str = "fp32",
    group_size: int | None = None,
    batch_size: int = 32,
    use_memory_map: bool = False,
    compute_dtype: str = "fp32",
    rank: int = 0,
    world_size: int = 1,
    quiet: bool = False,
) -> bool:
    """Write the table of all f-grams of ``model`` to ``output_path``; returns whether the file is complete.

    Killed at any moment, the same call goes on where it stopped. With ``world_size`` processes each computes its share
    of the chunks, and the last to finish completes the file; the others return False. The file does not depend on how
    it was split or restarted: a chunk is always the same f-grams, computed by one thread.

    Args:
        row_type: how rows are stored: fp32, fp16, bf16, int8 or int4.
        group_size: numbers that share a scale (int8, int4); None for 64.
        batch_size: f-grams computed together, in units of 128. It may change the last bits of rows, as it changes the
            shapes of matrix products.
        use_memory_map: also keep the written pages out of the page cache. Memory is bounded either way: rows are
            always streamed to disk.
        compute_dtype: precision of the f-gram model: fp32, bf16 or fp16.
        rank, world_size: this process among those that work on the table.
        quiet: no progress, no notices.

    Raises SconeError: the path holds something else, the disk is too small or full, rows are not finite.
    """
    path = Path(output_path)
    if compute_dtype not in COMPUTE_DTYPES:
        raise SconeError(f"found computing type {compute_dtype!r}; expected one of {', '.join(COMPUTE_DTYPES)}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not in [0, {world_size})")
    say = (lambda _: None) if quiet or rank else _say
    plan = _plan(model, row_type, group_size, batch_size * ROWS_PER_BATCH_UNIT, compute_dtype)
    if _is_complete(path, plan, say):
        discard_partial(path)
        return True
    if rank == 0:
        layout = plan.layout
        say(
            f"precomputing {layout.num_rows:,} rows × {layout.row_format.width} {row_type} "
            f"({human_bytes(layout.file_bytes)}) into {path}"
        )
    with TableWriter(path, plan, rank, drop_page_cache=use_memory_map) as writer:
        if writer.notice:
            say(writer.notice)
        _compute_chunks(model, writer, compute_dtype, rank, world_size, quiet)
        complete = writer.finish()
    if not complete and world_size > 1:
        _say(f"rank {rank}: all chunks of this rank are finished; the last rank to finish completes the table")
    return complete


def _plan(
    model: SconeForCausalLM, row_type: str, group_size: int | None, chunk_rows: int, compute_dtype: str
) -> TablePlan:
    vocabulary: Any = model.vocabulary
    known = {"tokenizer": vocabulary.tokenizer_fingerprint} | model.table_fingerprints()
    fingerprints = {name: known.get(name, "") for name in FINGERPRINT_NAMES}
    width = model.embed_nodes(torch.zeros(1, dtype=torch.int64)).shape[1]
    row_format = RowFormat.of(row_type, width, group_size)
    layout = TableLayout(vocabulary.num_f_grams, row_format, fingerprints, compute_dtype)
    return TablePlan(layout, -(-vocabulary.num_f_grams // chunk_rows), {"chunk_rows": chunk_rows})


def _is_complete(path: Path, plan: TablePlan, say: Callable[[str], None]) -> bool:
    """Whether the wanted table is already there. Raises SconeError when something that is no table is in its place."""
    found = layout_in_the_way(path)
    if found is None:
        return False
    if found == replace(plan.layout, rows_checksum=found.rows_checksum):
        say(f"{path} is complete already")
        return True
    say(f"{path} holds a table of another model or row type; it is replaced once the new one is complete")
    return False


def _compute_chunks(
    model: SconeForCausalLM, writer: TableWriter, compute_dtype: str, rank: int, world_size: int, quiet: bool
) -> None:
    """Compute this rank's chunks that nobody has finished yet, a few at a time."""
    plan, chunk_rows = writer.plan, writer.plan.settings["chunk_rows"]
    finished = writer.finished_chunks()
    todo = [chunk for chunk in range(rank, plan.num_chunks, world_size) if chunk not in finished]
    if not todo:
        return
    vocabulary: Any = model.vocabulary
    order, device = vocabulary.depth_first_order(), model.device

    def compute(chunk: int) -> int:
        ranks = np.asarray(order[chunk * chunk_rows : (chunk + 1) * chunk_rows], dtype=np.int64)
        nodes = torch.from_numpy(ranks + vocabulary.vocab_size)
        half = torch.autocast(device.type, COMPUTE_DTYPES[compute_dtype], enabled=compute_dtype != "fp32")
        with torch.inference_mode(), half:
            rows = model.embed_nodes(nodes)
        writer.write(ranks, plan.layout.row_format.encode(rows))
        writer.mark_finished(chunk)
        return len(ranks)

    total = sum(min(chunk_rows, len(order) - chunk * chunk_rows) for chunk in todo)
    started, computed, threads = time.perf_counter(), 0, torch.get_num_threads()
    # Matrix products may add in another order when the number of threads changes. With one thread to a chunk, its bits
    # do not depend on how many work beside it. An accelerator computes one chunk while another is written.
    workers = threads if device.type == "cpu" else 2
    one_thread = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with progress(total, "rows", "precompute", quiet or rank > 0) as bar:
        try:
            for rows in map_in_order(compute, todo, workers, **one_thread):
                computed += rows
                bar.update(rows)
        finally:
            torch.set_num_threads(threads)
    seconds = time.perf_counter() - started
    if not quiet:  # every rank says it: one that is slower than the others shows
        who = f"rank {rank}: " if world_size > 1 else ""
        _say(f"{who}computed {computed:,} rows in {seconds:.2f} s: {human_count(computed / seconds)} rows/s")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# Largest difference, relative to the row's largest number, between rows that the same weights gave in batches of
# different shapes. The stored type's own rounding comes on top.
_COMPUTE_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_COMPARED_ROWS = 1000
_CHUNKS_AT_A_TIME = 16  # some 64 MiB
_ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class TableCheck:
    """What was checked: all rows' checksums, and ``sampled_rows`` of them against the model."""

    layout: TableLayout
    sampled_rows: int


def verify_table(path: str | Path, model: SconeForCausalLM | None = None) -> TableCheck:
    """Read the whole file and compare every checksum; with ``model`` also some random rows with its live ones.

    Raises SconeError at the first thing that is wrong: damage, another model's fingerprints, a row that differs.
    """
    with TableFile(path) as file:
        layout, step = file.layout, _CHUNKS_AT_A_TIME * file.layout.checksum_rows
        for first in range(0, max(1, layout.num_rows), step):
            load_rows(file, first, min(step, layout.num_rows - first))  # which checks them
        if model is None or not layout.num_rows:
            return TableCheck(layout, 0)
        check_fingerprints(file.path, layout.fingerprints, model.table_fingerprints())
        vocabulary: Any = model.vocabulary
        if layout.num_rows > vocabulary.num_f_grams:
            raise SconeError(
                f"found {layout.num_rows:,} rows in {path}; expected at most the model's "
                f"{vocabulary.num_f_grams:,} f-grams; give the table that belongs to the model"
            )
        count = min(_COMPARED_ROWS, layout.num_rows)
        ranks = np.sort(np.random.default_rng(0).choice(layout.num_rows, count, replace=False)).astype(np.int64)
        _compare(file, model, torch.from_numpy(ranks), vocabulary.vocab_size)
    return TableCheck(layout, count)


def _compare(file: TableFile, model: SconeForCausalLM, ranks: torch.Tensor, vocab_size: int) -> None:
    row = file.layout.row_format
    store = MemoryStore.mapped(file)
    rows = store.new_rows(len(ranks))
    store.read(ranks, rows)
    store.close()
    raw = rows.view(torch.uint8)
    live = model.embed_nodes(ranks + vocab_size).cpu()
    rounding = _ROUNDING.get(row.row_type)
    allowed = row.steps(raw) / 2 if rounding is None else live.abs() * rounding
    deviation = ((row.decode(raw) - live).abs() - allowed).amax(1).clamp(min=0) / live.abs().amax(1).clamp(min=1e-30)
    worst = int(deviation.argmax())
    if not deviation[worst] <= _COMPUTE_TOLERANCE.get(file.layout.compute_dtype, 1e-4):
        raise SconeError(
            f"row {ranks[worst]:,} of {file.path} differs from the model's by {deviation[worst]:.2g} of its largest "
            "number; expected the same row; precompute the table again from this model"
        )


def convert_table(
    source: str | Path,
    output: str | Path,
    *,
    row_type: str | None = None,
    group_size: int | None = None,
    quiet: bool = False,
) -> TableLayout:
    """Write the rows of ``source`` as ``row_type`` to ``output``; returns the new header.

    It streams: memory does not depend on the table's size. Every chunk of the source is checked on the way. Killed,
    the same call goes on where it stopped. ``output`` appears only when complete, in place of a table that was there.

    Args:
        row_type: None keeps the source's (and then its group size, unless that is given).

    Raises SconeError: bad choices, a damaged source, something else at ``output``, no disk space.
    """
    source, output = Path(source), Path(output)
    with TableFile(source) as file:
        if output.exists() and output.samefile(source):
            raise SconeError(f"found {output} for both tables; expected two paths; choose another output path")
        layout = _new_layout(file.layout, row_type, group_size)
        layout_in_the_way(output)
        chunk_rows = file.layout.checksum_rows  # so that every chunk is read and checked once
        settings = {"source": file.layout.rows_checksum, "chunk_rows": chunk_rows}
        plan = TablePlan(layout, -(-layout.num_rows // chunk_rows), settings)
        old, new = file.layout.row_format, layout.row_format
        with TableWriter(output, plan) as writer, progress(layout.num_rows, "rows", "convert", quiet) as bar:
            finished = writer.finished_chunks()
            for chunk in range(plan.num_chunks):
                first = chunk * chunk_rows
                count = min(chunk_rows, layout.num_rows - first)
                if chunk not in finished:
                    raw = load_rows(file, first, count).reshape(count, old.row_bytes)
                    rows = raw if new == old else new.encode(old.decode(torch.from_numpy(raw)))
                    writer.write(np.arange(first, first + count), rows)
                    writer.mark_finished(chunk)
                bar.update(count)
            if not writer.finish():
                raise SconeError(f"another process is still writing {output}; wait for it, or choose another path")
    return layout


def _new_layout(old: TableLayout, row_type: str | None, group_size: int | None) -> TableLayout:
    if group_size is None and row_type in (None, old.row_format.row_type):
        group_size = old.row_format.group_size or None
    row_format = RowFormat.of(row_type or old.row_format.row_type, old.row_format.width, group_size)
    return replace(old, row_format=row_format)
