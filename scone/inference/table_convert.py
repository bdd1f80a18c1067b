"""Change a table's row type, or cut it to its first rows, without the model that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from scone.inference.row_types import RowFormat
from scone.inference.stores.memory import load_rows
from scone.inference.table_format import TableFile, TableLayout, layout_in_the_way
from scone.inference.table_writer import TablePlan, TableWriter
from scone.utils.errors import SconeError
from scone.utils.progress import progress


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
