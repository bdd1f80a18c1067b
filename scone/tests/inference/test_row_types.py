"""Row types keep what they promise: floats round once, quantised numbers stay within half a step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scone.inference.table_format import ROW_TYPES, RowFormat
from scone.utils.errors import SconeError

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@settings(max_examples=150, deadline=None)
@given(
    rows=hnp.arrays(np.float32, st.tuples(st.integers(0, 4), st.integers(1, 41)), elements=FINITE),
    row_type=st.sampled_from(["int8", "int4"]),
    group_size=st.sampled_from([2, 4, 10, 64]),
)
def test_dequantised_error_is_within_half_a_step(rows, row_type, group_size):
    """Exactly: |x − decode(encode(x))| ≤ step / 2, with no slack for rounding."""
    row = RowFormat.of(row_type, rows.shape[1], group_size)
    raw = torch.from_numpy(row.encode(torch.from_numpy(rows)))
    error = (torch.from_numpy(rows).double() - row.decode(raw).double()).abs()
    assert (2 * error <= row.steps(raw).double()).all()


@settings(max_examples=60, deadline=None)
@given(rows=hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 41)), elements=FINITE))
def test_steps_are_as_small_as_the_codes_allow(rows):
    """A step is at most its group's largest magnitude ÷ half the code range, rounded up to a bfloat16; where all have
    one sign, the side of the codes that reaches one further is theirs.
    """
    for values, further in ((torch.from_numpy(rows), 0), (torch.from_numpy(rows).abs(), 1)):
        for row_type, highest in (("int8", 127.5), ("int4", 7.5)):
            row = RowFormat.of(row_type, values.shape[1], 64)
            steps = row.steps(torch.from_numpy(row.encode(values))).double()
            largest = values.double().abs().amax(1, keepdim=True)
            assert (steps <= largest / (highest + further) * (1 + 2**-7) + 1e-40).all()


@settings(max_examples=60, deadline=None)
@given(rows=hnp.arrays(np.float32, (3, 7), elements=st.floats(-65000, 65000, width=32)))
def test_float_rows_are_rounded_once(rows):
    values = torch.from_numpy(rows)
    for row_type, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        row = RowFormat.of(row_type, 7)
        assert torch.equal(row.decode(torch.from_numpy(row.encode(values))), values.to(dtype).float())


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_numbers_that_no_row_can_hold_are_refused(row_type):
    """An infinite one even beside its opposite; and not those whose sum alone is too large."""
    inf, nan = float("inf"), float("nan")
    for numbers in ([0.0, nan, 1.0], [inf, -inf, 0.0], [inf, 1.0, 0.0]):
        with pytest.raises(SconeError, match="not finite"):
            RowFormat.of(row_type, 3).encode(torch.tensor([numbers]))
    if row_type == "fp16":
        with pytest.raises(SconeError, match="fp16 cannot hold"):
            RowFormat.of(row_type, 3).encode(torch.tensor([[0.0, 70000.0, 1.0]]))
    for large in {"fp32": [[3e38, 3e38], [-3e38, -3e38]], "fp16": [[65000.0, 65000.0]]}.get(row_type, []):
        row, rows = RowFormat.of(row_type, 2), torch.tensor([large])
        decoded = row.decode(torch.from_numpy(row.encode(rows)))
        assert torch.equal(decoded, rows.to(row.float_dtype).float())


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_a_row_is_the_same_bytes_whatever_is_stored_with_it(row_type, monkeypatch):
    monkeypatch.setattr("scone.inference.table_format._NUMBERS_ON_A_HOST", 3 * 101 + 5)  # three rows at a time
    row, rows = RowFormat.of(row_type, 101), torch.randn(10, 101, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(row.encode(rows), np.concatenate([row.encode(one) for one in rows.split(1)]))
    assert row.encode(rows[:0]).shape == (0, row.row_bytes)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_an_accelerator_stores_the_same_bytes(row_type):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 101, generator=generator) * 10.0 ** torch.randint(-9, 5, (300, 101), generator=generator)
    row = RowFormat.of(row_type, 101)
    np.testing.assert_array_equal(row.encode(rows.cuda()), row.encode(rows))
