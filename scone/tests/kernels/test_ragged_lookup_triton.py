"""The ragged Triton lookup equals matching each request's whole text, and the rows that PyTorch decodes: bit for bit.

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
from scone.kernels.common import GPUReadableRows
from scone.tests.tokenization.f_gram_strategies import Case, cases

pytest.importorskip("triton", reason="Triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("no CUDA device (set TRITON_INTERPRET=1 to interpret the kernel)", allow_module_level=True)

from scone.models.table_lookup import DeviceLookup  # noqa: E402

DEVICE = torch.device("cpu") if INTERPRETED else torch.device("cuda", 0)
pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(ROW_TYPES), st.sampled_from([5, 1030]), st.data())
def test_a_lookup_is_the_longest_f_grams_row(case: Case, row_type: str, width: int, data: st.DataObject) -> None:
    """Any f-grams, any requests, cut anywhere into tokens that are computed and tokens that are new; then padding."""
    # what a server's tokens of 32 bits can say, and what the accelerator matches
    assume(case.vocab_size < 2**31 and case.vocabulary.keys.dtype == np.uint32)
    foreign = case.vocab_size + data.draw(st.integers(0, 3))
    alphabet = st.sampled_from((*case.alphabet, foreign))
    texts = data.draw(st.lists(st.lists(alphabet, max_size=14), max_size=5))
    cuts = [data.draw(st.integers(0, len(text))) for text in texts]
    num_padding = data.draw(st.integers(0, 3))
    random = np.random.default_rng(len(texts))
    # a request's slot holds its tokens up to the cut, and behind it what another request left there
    histories = torch.from_numpy(random.choice(case.alphabet, (9, 16)).astype(np.int32))
    slots = random.permutation(9)[: len(texts)]
    num_computed = torch.zeros(9, dtype=torch.int32)
    new, ranks = [], []
    for text, cut, slot in zip(texts, cuts, slots, strict=True):
        histories[slot, :cut] = torch.tensor(text[:cut], dtype=torch.int32)
        num_computed[slot] = cut
        new += text[cut:]
        known = [token < case.vocab_size for token in text]
        nodes = case.matches([token if ok else 0 for token, ok in zip(text, known, strict=True)], known)
        ranks += [node - case.vocab_size if ok else -1 for node, ok in zip(nodes, known, strict=True)][cut:]
    query_starts = torch.tensor(np.cumsum([0, *(len(text) - cut for text, cut in zip(texts, cuts, strict=True))]))
    tokens = torch.tensor([*new, *[case.alphabet[-1]] * num_padding], dtype=torch.int32)

    row_format = RowFormat.of(row_type, width, 4)
    size = len(case.f_grams)
    raw = torch.empty(0, row_format.row_bytes, dtype=torch.uint8)
    if size:
        raw = torch.from_numpy(row_format.encode(torch.randn(size, width, generator=torch.Generator().manual_seed(0))))
    raw = raw.to(DEVICE)
    dtype = row_format.float_dtype or torch.float32
    split = data.draw(st.none() | st.integers(0, size))
    near, far = (raw, None) if split is None else (raw[:split].clone(), raw[split:].clone())
    rows = GPUReadableRows(near, far, row_type, width, row_format.group_size)
    lookup = DeviceLookup(case.vocabulary, rows, DEVICE)
    vectors = torch.randn(len(tokens), width, device=DEVICE).to(dtype)
    output = torch.full_like(vectors, torch.nan)
    requests = (tokens, query_starts.int(), torch.from_numpy(slots), histories, num_computed)
    lookup.look_up_ragged(vectors, output, *(part.to(DEVICE) for part in requests))
    expected = vectors.clone()
    places = np.flatnonzero(np.array(ranks) >= 0)
    if len(places):
        expected[places] = row_format.decode(raw, dtype)[np.array(ranks)[places]]
    assert torch.equal(output, expected)
    assert lookup.counts.tolist() == ([len(tokens), len(places)] if size and len(tokens) else [0, 0])
