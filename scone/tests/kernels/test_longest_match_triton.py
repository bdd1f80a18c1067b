"""The Triton matcher equals trying every length: on a GPU, or interpreted (TRITON_INTERPRET=1) without one."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scone.tests.tokenization.f_gram_strategies import Case, batches, cases

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no CUDA device (set TRITON_INTERPRET=1 to interpret the kernel)", allow_module_level=True)

from scone.models.device_matcher import DeviceMatcher  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_triton_equals_trying_every_length(case: Case, data: st.DataObject) -> None:
    """Any batch, any padding in it, cut anywhere into tokens that are past and tokens that are new."""
    rows, masks = data.draw(batches(case.alphabet))
    length = len(rows[0]) if rows else 0
    tokens = torch.tensor(rows, dtype=torch.int64, device=DEVICE).reshape(len(rows), length)
    mask = torch.tensor(masks, dtype=torch.int64, device=DEVICE).reshape(len(rows), length)
    cut = data.draw(st.integers(0, length))
    is_padded = data.draw(st.booleans())
    hidden = torch.where(mask != 0, tokens, ~tokens) if is_padded else tokens
    assume(case.vocabulary.keys.dtype == np.uint32)  # what the accelerator matches; beyond 2³² nodes the host does
    matcher = DeviceMatcher(case.vocabulary, DEVICE)
    found = matcher.match(tokens[:, cut:], mask[:, cut:] if is_padded else None, hidden[:, :cut] if cut else None)
    for row, bare, nodes in zip(rows, masks, found.tolist(), strict=True):
        kept = [i for i in range(len(row)) if bare[i] or not is_padded]
        expected = dict(zip(kept, case.matches([row[i] for i in kept]), strict=True))
        assert nodes == [expected.get(i, row[i]) for i in range(cut, len(row))]
