"""Run the f-gram model once over every f-gram and write the rows to an embedding table."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scone.inference.loading import device_of
from scone.inference.row_types import RowFormat
from scone.inference.table_format import FINGERPRINT_NAMES, TableLayout, layout_in_the_way
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
    order, device = vocabulary.depth_first_order(), device_of(model)

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
