"""The Triton look-up equals trying every length, and the rows that PyTorch decodes: bit for bit.

On a GPU, or interpreted (TRITON_INTERPRET=1) without one.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scone.inference.row_types import ROW_TYPES, RowFormat
from scone.kernels.reachable_rows import ReachableRows
from scone.tests.tokenization.f_gram_strategies import Case, batches, cases

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no CUDA device (set TRITON_INTERPRET=1 to interpret the kernel)", allow_module_level=True)

from scone.models.device_look_up import DeviceLookUp  # noqa: E402

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(ROW_TYPES), st.sampled_from([1, 7, 1030]), st.data())
def test_a_look_up_is_the_longest_f_grams_row(case: Case, row_type: str, width: int, data: st.DataObject) -> None:
    """Any batch, any padding in it, cut anywhere into tokens that are past and tokens that are new, twice; rows of any
    type in one block or in two.
    """
    rows, masks = data.draw(batches(case.alphabet))
    length = len(rows[0]) if rows else 0
    tokens = torch.tensor(rows, dtype=torch.int64, device=DEVICE).reshape(len(rows), length)
    mask = torch.tensor(masks, dtype=data.draw(st.sampled_from([torch.int64, torch.bool])), device=DEVICE)
    mask = mask.reshape(len(rows), length)
    is_padded = data.draw(st.booleans())
    hidden = torch.where(mask != 0, tokens, ~tokens) if is_padded else tokens
    assume(case.vocabulary.keys.dtype == np.uint32)  # what the accelerator matches; beyond 2³² nodes the host does
    row_format, raw, decoded = some_rows(len(case.f_grams), row_type, width)
    blocks = (raw, None)
    if data.draw(st.booleans()):
        split = data.draw(st.integers(0, len(raw)))
        blocks = (raw[:split], raw[split:])
    look_up = DeviceLookUp(case.vocabulary, ReachableRows(*blocks, row_type, width, row_format.group_size), DEVICE)
    expected, num_found = [], 0
    for row, bare in zip(rows, masks, strict=True):
        kept = [i for i in range(length) if bare[i] or not is_padded]
        found = dict(zip(kept, case.matches([row[i] for i in kept]), strict=True))
        expected.append([found.get(i, 0) - case.vocab_size for i in range(length)])
    for cut in data.draw(st.lists(st.integers(0, length), min_size=1, max_size=2)):
        before = torch.randn(len(rows), length - cut, width, device=DEVICE)
        vectors = before.clone()
        look_up.write(vectors, tokens[:, cut:], mask[:, cut:] if is_padded else None, hidden[:, :cut] if cut else None)
        for b, of_row in enumerate(expected):
            for i, rank in enumerate(of_row[cut:]):
                assert torch.equal(vectors[b, i], decoded[rank] if rank >= 0 else before[b, i])
                num_found += rank >= 0
    assert int(look_up.num_found) == num_found


def some_rows(count: int, row_type: str, width: int) -> tuple[RowFormat, torch.Tensor, torch.Tensor]:
    """Their format, ``count`` rows as they are stored, and decoded."""
    row_format = RowFormat.of(row_type, width, 4)
    rows = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    raw = torch.from_numpy(row_format.encode(rows)).to(DEVICE) if count else torch.empty(0, row_format.row_bytes).byte()
    return row_format, raw.to(DEVICE), row_format.decode(raw.to(DEVICE))
