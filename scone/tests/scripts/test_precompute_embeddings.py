"""The documented command writes the table, alone or as one of several processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from scone.inference.embedding_table import EmbeddingTable
from scone.scripts.precompute_embeddings import main
from scone.tests.inference.tables import VOCAB_SIZE, small_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "final_model"
    small_model().save_pretrained(path)
    return path


def test_it_writes_the_table_as_documented(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "embeddings.cache"
    arguments = ["--model_path", str(folder), "--output_path", str(path), "--batch_size", "32", "--use_memory_map"]
    assert main([*arguments, "--device", "cpu", "--seed", "42"]) == 0
    assert "embeddings.cache: 354 rows × 32 fp32" in capsys.readouterr().out
    with EmbeddingTable.open(path) as table:
        live = small_model().embed_nodes(torch.arange(354) + VOCAB_SIZE)
        torch.testing.assert_close(table.rows(torch.arange(354)), live, rtol=1e-5, atol=1e-6)


def test_processes_share_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The variables that torchrun sets are all that they need; each says what it did."""
    path = tmp_path / "table"
    arguments = ["--model_path", str(folder), "--output_path", str(path), "--batch_size", "1", "--row_type", "int8"]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        assert not path.exists()
        monkeypatch.setenv("RANK", str(rank))
        assert main([*arguments, "--device", "cpu", f"--local-rank={rank}"]) == 0
    EmbeddingTable.open(path).close()
    shares = re.findall(r"^rank (\d): computed (\d+) rows in ", capsys.readouterr().err, re.MULTILINE)
    assert shares == [("1", "128"), ("0", "226")]
