"""Converting a table equals encoding the same rows anew."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scone.inference.precompute import convert_table
from scone.inference.table_format import ROW_TYPES, TableFile
from scone.scripts.table import main
from scone.tests import tiny
from scone.tests.inference.tables import write_table
from scone.utils.errors import SconeError

NUM_ROWS, WIDTH = 9000, 300  # three chunks of fp32


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(NUM_ROWS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def table(rows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("convert") / "embeddings.cache"
    write_table(path, rows, weights="aa" * 32, vocabulary="bb" * 32)
    return path


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_converted_table_equals_table_written_so(
    table: Path, rows: torch.Tensor, tmp_path: Path, row_type: str
) -> None:
    convert_table(table, tmp_path / "converted", row_type=row_type, quiet=True)
    write_table(tmp_path / "written", rows, row_type, weights="aa" * 32, vocabulary="bb" * 32)
    assert (tmp_path / "converted").read_bytes() == (tmp_path / "written").read_bytes()


def test_converting_an_int8_table_keeps_its_groups(table: Path, tmp_path: Path) -> None:
    convert_table(table, tmp_path / "a", row_type="int8", group_size=50, quiet=True)
    layout = convert_table(tmp_path / "a", tmp_path / "b", quiet=True)
    assert (layout.row_format.row_type, layout.row_format.group_size) == ("int8", 50)


def test_damage_in_the_source_is_found_on_the_way(table: Path, tmp_path: Path) -> None:
    damaged, output = tmp_path / "damaged", tmp_path / "output"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(SconeError, match=r"is damaged: rows 3,\d+ to \d,\d+ do not fit their checksum"):
        convert_table(damaged, output, row_type="fp16", quiet=True)
    assert not output.exists()


def test_bad_choices_are_one_line(table: Path, tmp_path: Path) -> None:
    for output, choice, message in [
        (table, {"row_type": "fp16"}, "for both tables"),
        (tmp_path / "output", {"row_type": "int3"}, "found row type 'int3'"),
    ]:
        assert message in tiny.refusal(convert_table, table, output, **choice)


def test_the_command_converts(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "int4"
    assert main(["convert", str(table), str(output), "--row_type", "int4", "--group_size", "100"]) == 0
    assert "9,000 rows × 300 int4" in capsys.readouterr().out
    with TableFile(output) as file:
        assert (file.layout.row_format.group_size, file.layout.row_bytes) == (100, 156)
        assert file.layout.fingerprints["weights"] == "aa" * 32
