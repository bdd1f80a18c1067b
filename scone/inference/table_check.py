"""Check a table: its checksums, and some of its rows against the model that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from scone.inference.stores.memory import MemoryStore, load_rows
from scone.inference.table_format import TableFile, TableLayout, check_fingerprints
from scone.utils.errors import SconeError

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
