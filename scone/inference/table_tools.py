"""Check a table by its checksums and its model; change its row type, or cut it to its first rows, without the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scone.inference.row_types import RowFormat
from scone.inference.stores.memory import MemoryStore, load_rows
from scone.inference.table_format import TableFile, TableLayout, check_fingerprints, layout_in_the_way
from scone.inference.table_writer import TablePlan, TableWriter
from scone.utils.errors import SconeError
from scone.utils.progress import progress

if TYPE_CHECKING:
    from scone.models.language_model import SconeForCausalLM

# Largest difference, relative to the row's largest number, between rows that the same weights gave in batches of
# different shapes. The stored type's own rounding comes on top.
_COMPUTE_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_CHUNKS_AT_A_TIME = 16  # some 64 MiB
_ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class TableCheck:
    """What was checked: all rows' checksums, and ``sampled_rows`` of them against the model."""

    layout: TableLayout
    sampled_rows: int


def verify_table(path: str | Path, model: SconeForCausalLM | None = None, sample: int = 1000) -> TableCheck:
    """Read the whole file and compare every checksum; with ``model`` also ``sample`` random rows with its live ones.

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
        count = min(sample, layout.num_rows)
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
    num_rows: int | None = None,
    quiet: bool = False,
) -> TableLayout:
    """Write the first ``num_rows`` rows of ``source`` as ``row_type`` to ``output``; returns the new header.

    It streams: memory does not depend on the table's size. Every chunk of the source is checked on the way. Killed,
    the same call goes on where it stopped. ``output`` appears only when complete, in place of a table that was there.

    Args:
        row_type: None keeps the source's (and then its group size, unless that is given).
        num_rows: None keeps all. The vocabulary of fewer rows is another one, so its fingerprint is left open.

    Raises SconeError: bad choices, a damaged source, something else at ``output``, no disk space.
    """
    source, output = Path(source), Path(output)
    with TableFile(source) as file:
        if output.exists() and output.samefile(source):
            raise SconeError(f"found {output} for both tables; expected two paths; choose another output path")
        layout = _new_layout(file.layout, row_type, group_size, num_rows)
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


def _new_layout(old: TableLayout, row_type: str | None, group_size: int | None, num_rows: int | None) -> TableLayout:
    num_rows = old.num_rows if num_rows is None else num_rows
    if not 0 <= num_rows <= old.num_rows:
        raise SconeError(
            f"found {num_rows:,} rows to keep; expected at most the table's {old.num_rows:,}; ask for fewer"
        )
    if group_size is None and row_type in (None, old.row_format.row_type):
        group_size = old.row_format.group_size or None
    row_format = RowFormat.of(row_type or old.row_format.row_type, old.row_format.width, group_size)
    fingerprints = dict(old.fingerprints) | ({"vocabulary": ""} if num_rows < old.num_rows else {})
    return replace(old, num_rows=num_rows, row_format=row_format, fingerprints=fingerprints)
