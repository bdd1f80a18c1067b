"""The file format: what the reader accepts, and that it accepts nothing that was changed."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from scone.inference.embedding_table import EmbeddingTable
from scone.inference.table_format import PAGE_BYTES, ROW_TYPES
from scone.tests.inference.tables import write_table
from scone.utils.errors import SconeError

NUM_ROWS, WIDTH = 300, 40


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def table(rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("format") / "embeddings.cache"
    write_table(path, rows, "int8", weights="aa" * 32, vocabulary="bb" * 32)
    return path


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_file_is_safetensors_with_rows_on_a_page(tmp_path: Path, rows: torch.Tensor, row_type: str) -> None:
    path = tmp_path / "embeddings.cache"
    row = write_table(path, rows, row_type)
    encoded = row.encode(rows)
    (header_bytes,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert (8 + header_bytes) % PAGE_BYTES == 0
    start = 8 + header_bytes
    assert path.read_bytes()[start : start + encoded.size] == encoded.tobytes()
    assert path.read_bytes()[start + encoded.size :] == hashlib.sha256(encoded.tobytes()).digest()
    with safe_open(path, "pt") as file:
        stored = file.get_tensor("rows")
        assert torch.equal(
            row.decode(stored.view(torch.uint8).view(NUM_ROWS, -1)), row.decode(torch.from_numpy(encoded))
        )
        assert file.get_tensor("chunk_checksums").shape == (1, 32)
        assert file.metadata()["row_type"] == row_type
        if row_type == "fp32":
            assert torch.equal(stored, rows)


def _with_metadata(table: Path, path: Path, **changes: object) -> Path:
    """The table with other metadata and a header checksum that fits them: as another program might write it."""
    content = table.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    metadata = header["__metadata__"] | changes
    del metadata["header_checksum"]
    metadata["header_checksum"] = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()
    text = json.dumps(header | {"__metadata__": metadata}, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", length) + text.ljust(length) + content[8 + length :])
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, ""),
        ({"format_version": "2"}, "has format version 2; expected 1; update scone"),
        ({"format": "something else"}, "is no embedding table"),
        ({"num_rows": "999999999999999999"}, "damaged"),
        ({"num_rows": "-1"}, "damaged"),
        ({"num_rows": float("inf")}, "damaged"),
        ({"width": None}, "damaged"),
        ({"width": "0"}, "damaged"),
        ({"row_type": "int2"}, "damaged"),
        ({"group_size": "7"}, "damaged"),
        ({"row_bytes": "41"}, "damaged"),
    ],
)
def test_well_made_but_wrong_headers_are_refused(
    table: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    path = _with_metadata(table, tmp_path / "embeddings.cache", **changes)
    if not message:
        EmbeddingTable.open(path).close()
        return
    with pytest.raises(SconeError, match=message):
        EmbeddingTable.open(path)


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SconeError, match=r"cannot open .*nowhere: No such file or directory; check the path"):
        EmbeddingTable.open(tmp_path / "nowhere")
    with pytest.raises(SconeError, match="is no embedding table"):
        EmbeddingTable.open(tmp_path)
