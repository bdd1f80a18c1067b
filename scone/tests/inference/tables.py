"""Tables that tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from scone.inference.table_format import RowFormat, TableLayout
from scone.inference.table_writer import TablePlan, TableWriter


def write_table(
    path: Path, rows: torch.Tensor, row_type: str = "fp32", group_size: int | None = None, **fingerprints: str
) -> RowFormat:
    """A table of ``rows`` (float32 [S, D]), written in three chunks in a scattered order."""
    row_format = RowFormat.of(row_type, rows.shape[1], group_size)
    encoded = row_format.encode(rows)
    plan = TablePlan(TableLayout(len(rows), row_format, fingerprints), 3, {})
    order = np.random.default_rng(0).permutation(len(rows))
    with TableWriter(path, plan) as writer:
        for chunk, ranks in enumerate(np.array_split(order, 3)):
            writer.write(ranks, encoded[ranks])
            writer.mark_finished(chunk)
        assert writer.finish()
    return row_format
