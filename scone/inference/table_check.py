"""Check a table: its checksums, and some of its rows against the model that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from scone.inference.precompute import RowModel
from scone.inference.stores.memory import MemoryStore, load_rows
from scone.inference.table_format import TableFile, TableLayout, check_fingerprints
from scone.utils.errors import SconeError

# Largest difference, relative to the row's largest number, between rows that the same weights gave in batches of
# different shapes. The stored type's own rounding comes on top.
_COMPUTE_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
_CHUNKS_AT_A_TIME = 16  # some 64 MiB
_ROUNDING = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}


@dataclass(frozen=True)
class TableCheck:
    """What was checked: all rows' checksums, and ``sampled_rows`` of them against the model; the largest deviation
    there, relative to the row's largest number (beyond what the row type rounds).
    """

    layout: TableLayout
    sampled_rows: int
    largest_deviation: float


def verify_table(
    path: str | Path, model: RowModel | None = None, sample: int = 1000, seed: int = 0, num_threads: int | None = None
) -> TableCheck:
    """Read the whole file and compare every checksum; with ``model`` also ``sample`` random rows with its live ones.

    Raises SconeError at the first thing that is wrong: damage, another model's fingerprints, a row that differs.
    """
    with TableFile(path) as file:
        step = _CHUNKS_AT_A_TIME * file.layout.checksum_rows
        for first in range(0, max(1, file.layout.num_rows), step):
            count = min(step, file.layout.num_rows - first)
            load_rows(file, first, count, num_threads or torch.get_num_threads())  # which checks them
        if model is None:
            return TableCheck(file.layout, 0, 0.0)
        check_fingerprints(file.path, file.layout.fingerprints, model.table_fingerprints())
        if file.layout.num_rows > model.vocabulary.num_f_grams:
            raise SconeError(
                f"found {file.layout.num_rows:,} rows in {path}; expected at most the model's "
                f"{model.vocabulary.num_f_grams:,} f-grams; give the table that belongs to the model"
            )
        return _compare(file, model, sample, seed)


def _compare(file: TableFile, model: RowModel, sample: int, seed: int) -> TableCheck:
    layout = file.layout
    count = min(sample, layout.num_rows)
    ranks = np.sort(np.random.default_rng(seed).choice(layout.num_rows, count, replace=False)).astype(np.int64)
    if not count:
        return TableCheck(layout, 0, 0.0)
    store = MemoryStore.mapped(file)
    rows = store.new_rows(count)
    store.read(torch.from_numpy(ranks), rows)
    store.close()
    raw = rows.view(torch.uint8)
    stored = layout.row_format.decode(raw)
    live = model.embed_nodes(torch.from_numpy(ranks) + model.vocabulary.vocab_size).cpu()
    rounding = _ROUNDING.get(layout.row_format.row_type)
    allowed = layout.row_format.steps(raw) / 2 if rounding is None else live.abs() * rounding
    scale = live.abs().amax(1).clamp(min=1e-30)
    deviation = ((stored - live).abs() - allowed).amax(1).clamp(min=0) / scale
    worst = int(deviation.argmax())
    if not deviation[worst] <= _COMPUTE_TOLERANCE.get(layout.compute_dtype, 1e-4):
        raise SconeError(
            f"row {ranks[worst]:,} of {file.path} differs from the model's by {deviation[worst]:.2g} of its largest "
            "number; expected the same row; precompute the table again from this model"
        )
    return TableCheck(layout, count, float(deviation[worst]))
