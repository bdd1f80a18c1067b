"""Tables on a GPU return the rows that they return on the CPU, from every placement."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.row_types import ROW_TYPES
from scone.tests.inference.tables import write_table

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize("placement", ["gpu", "ram", "mmap", "direct", "gpu:100,ram:200,disk"])
def test_rows_on_a_gpu_are_those_on_the_cpu(tmp_path: Path, row_type: str, placement: str) -> None:
    path = tmp_path / "embeddings.cache"
    write_table(path, torch.randn(700, 331), row_type)
    ranks = torch.randint(0, 700, (500,))
    with EmbeddingTable.open(path) as on_cpu, EmbeddingTable.open(path, placement, device="cuda") as on_gpu:
        for dtype in (torch.float32, torch.bfloat16):
            rows = on_gpu.rows(ranks.cuda(), dtype)
            assert rows.device.type == "cuda"
            assert torch.equal(rows.cpu(), on_cpu.rows(ranks, dtype))
        if placement.startswith("gpu"):
            assert on_gpu.memory.device > 0
