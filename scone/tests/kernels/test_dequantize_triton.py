"""The Triton kernel equals the torch path bit for bit: on a GPU, or interpreted (TRITON_INTERPRET=1) without one."""

from __future__ import annotations

import pytest
import torch

from scone.inference.table_format import ROW_TYPES, RowFormat
from scone.tests.kernels.triton_device import DEVICE, INTERPRETED, zeros_beyond_31_bits


@pytest.mark.parametrize("row_type", ROW_TYPES)
@pytest.mark.parametrize(("width", "group_size"), [(1, 2), (7, 4), (300, 64), (513, 6)])
def test_triton_equals_torch(row_type: str, width: int, group_size: int) -> None:
    """Odd widths, groups that do not divide them, repeats, an empty batch, other output types."""
    from scone.kernels.rows_triton import gather_rows_triton  # where Triton is installed

    row = RowFormat.of(row_type, width, group_size)
    rows = torch.randn(11, width, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 3, 11)[:, None]
    table = torch.from_numpy(row.encode(rows)).to(DEVICE)
    ranks = torch.tensor([3, 3, 0, 10, 7, 1], device=DEVICE)
    expected = row.decode(table.index_select(0, ranks))
    found = gather_rows_triton(table, ranks, row_type, width, row.group_size)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    halves = gather_rows_triton(table, ranks, row_type, width, row.group_size, torch.bfloat16)
    assert INTERPRETED or torch.equal(halves, expected.to(torch.bfloat16))  # the interpreter cuts where a GPU rounds
    assert gather_rows_triton(table, ranks[:0], row_type, width, row.group_size).shape == (0, width)


@pytest.mark.parametrize(("row_type", "width"), [("int8", 1000), ("bf16", 1024)])
def test_rows_behind_two_to_the_31_numbers_are_read(row_type: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from scone.kernels.rows_triton import gather_rows_triton

    row = RowFormat.of(row_type, width, 64)
    stored = row.encode(torch.randn(1, width, generator=torch.Generator().manual_seed(0)))
    numbers = row.float_dtype or torch.uint8
    table = zeros_beyond_31_bits(monkeypatch, row.row_bytes // numbers.itemsize, numbers).view(torch.uint8)
    table[-1] = torch.from_numpy(stored[0]).to(DEVICE)
    found = gather_rows_triton(table, torch.tensor([0, len(table) - 1], device=DEVICE), row_type, width, row.group_size)
    assert not found[0].any()
    assert torch.equal(found[1:].cpu(), row.decode(torch.from_numpy(stored)))
