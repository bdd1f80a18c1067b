"""Files of an earlier version still load, and the same input still gives the same bytes.

`fixtures/` holds a token file, the vocabulary counted from it and a table of each row type, all written at ccac518.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from scone.data.token_file import TokenFile, TokenFileWriter
from scone.inference.embedding_table import EmbeddingTable
from scone.inference.table_format import ROW_TYPES, RowFormat, TableLayout
from scone.inference.table_writer import TablePlan, TableWriter
from scone.tokenization.counting import count_f_grams
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

FIXTURES = Path(__file__).with_name("fixtures")
VOCAB_SIZE, SEPARATOR, WIDTH, GROUP_SIZE = 40, 39, 70, 16
TOKENIZER = "ab" * 32


def documents() -> list[list[int]]:
    """Twelve short documents of skewed tokens, the same ones forever."""
    tokens = [(i * i + i // 3) % 7 if i % 5 else i % SEPARATOR for i in range(1200)]
    return [tokens[start : start + 100] for start in range(0, 1200, 100)]


def rows(num_rows: int) -> np.ndarray:
    """Numbers of several magnitudes, float32 [num_rows, WIDTH], the same ones forever."""
    numbers = (np.arange(num_rows * WIDTH, dtype=np.int64) * 2_654_435_761 % 65_537 - 32_768) / 4096
    scales = 2.0 ** (np.arange(num_rows) % 9 - 4)
    return (numbers.reshape(num_rows, WIDTH) * scales[:, None]).astype(np.float32)


def test_an_old_token_file_loads_and_is_written_the_same(tmp_path: Path) -> None:
    old = TokenFile.open(shutil.copytree(FIXTURES / "tokens", tmp_path / "old"), check_content=True)
    assert old.tokens.tolist() == [token for document in documents() for token in (*document, SEPARATOR)]
    assert (old.num_documents, old.vocab_size, old.separator_id) == (12, VOCAB_SIZE, SEPARATOR)
    writer = TokenFileWriter(tmp_path / "new", VOCAB_SIZE, SEPARATOR)
    for document in documents():
        writer.add_document(document)
    writer.finish({"tokenizer_fingerprint": TOKENIZER, "source": "made by hand"})
    for name in ("tokens.npy", "tokens.json"):
        assert (tmp_path / "new" / name).read_bytes() == (FIXTURES / "tokens" / name).read_bytes()


def test_an_old_vocabulary_loads_and_is_counted_and_written_the_same(tmp_path: Path) -> None:
    old = FGramVocabulary.load(FIXTURES / "f_grams.safetensors")
    tokens = TokenFile.open(FIXTURES / "tokens").tokens
    limits = {"vocab_size": VOCAB_SIZE, "max_n": 4, "min_freq": 2, "max_f_grams": 100, "quiet": True}
    facts = {"separator_ids": [SEPARATOR], "tokenizer_fingerprint": TOKENIZER}
    new = count_f_grams([tokens], ranking="frequency", **facts, **limits).vocabulary
    assert old.fingerprint == new.fingerprint
    assert np.array_equal(old.token_matrix(np.arange(100)), new.token_matrix(np.arange(100)))
    assert new.save(tmp_path).read_bytes() == (FIXTURES / "f_grams.safetensors").read_bytes()


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_an_old_table_loads_and_is_written_the_same(row_type: str, tmp_path: Path) -> None:
    vocabulary = FGramVocabulary.load(FIXTURES / "f_grams.safetensors")
    with np.load(FIXTURES / "rows.npz") as archive:
        expected = torch.from_numpy(archive[row_type])
    ranks = torch.arange(vocabulary.num_f_grams).flip(0)
    fingerprints = {"weights": "cd" * 32, "vocabulary": vocabulary.fingerprint, "tokenizer": TOKENIZER}
    for placement in ("ram", "mmap", "direct", "ram:7,mmap:5,direct"):
        path = FIXTURES / f"{row_type}.cache"
        with EmbeddingTable.open(path, placement, expected_fingerprints=fingerprints) as table:
            assert torch.equal(table.rows(ranks), expected[ranks])
    row_format = RowFormat.of(row_type, WIDTH, GROUP_SIZE)
    plan = TablePlan(TableLayout(vocabulary.num_f_grams, row_format, fingerprints), 1, {})
    with TableWriter(tmp_path / "new.cache", plan) as writer:
        encoded = row_format.encode(torch.from_numpy(rows(vocabulary.num_f_grams)))
        writer.write(np.arange(vocabulary.num_f_grams), encoded)
        writer.mark_finished(0)
        assert writer.finish()
    assert (tmp_path / "new.cache").read_bytes() == (FIXTURES / f"{row_type}.cache").read_bytes()
