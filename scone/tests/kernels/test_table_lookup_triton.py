"""The Triton lookups equal trying every length, and the rows that PyTorch decodes: bit for bit.

On a GPU, or interpreted (TRITON_INTERPRET=1) without one.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers.cache_utils import StaticLayer

from scone.inference.table_format import ROW_TYPES, RowFormat
from scone.kernels.common import GPUReadableRows
from scone.kernels.longest_match import FIRST_BIT
from scone.models.token_history import StaticTokenHistory, TokenHistory
from scone.tests.kernels import reference
from scone.tests.kernels.triton_device import DEVICE, INTERPRETED, zeros_beyond_31_bits
from scone.tests.tokenization.f_gram_strategies import Case, batches, cases
from scone.tokenization.f_gram_vocabulary import FGramVocabulary

from scone.kernels.table_lookup_triton import DeviceLookup  # isort: skip (where Triton is installed)

pytestmark = [] if INTERPRETED else [pytest.mark.gpu]


def lookup_of(case: Case, row_type: str, width: int, split: int | None) -> tuple[DeviceLookup, torch.Tensor]:
    """The lookup in a table of random rows, from ``split`` on in a block of their own; and the rows, decoded."""
    row_format = RowFormat.of(row_type, width, 4)
    raw = torch.empty(0, row_format.row_bytes, dtype=torch.uint8)
    if size := len(case.f_grams):
        raw = torch.from_numpy(row_format.encode(torch.randn(size, width, generator=torch.Generator().manual_seed(0))))
    raw = raw.to(DEVICE)
    # apart in memory, so that reading beyond a block gives no row of the other
    near, far = (raw, None) if split is None else (raw[:split].clone(), raw[split:].clone())
    rows = GPUReadableRows(near, far, row_type, width, row_format.group_size)
    return lookup_in(case.vocabulary, rows), row_format.decode(raw, row_format.float_dtype or torch.float32)


def lookup_in(vocabulary: FGramVocabulary, rows: GPUReadableRows) -> DeviceLookup:
    return DeviceLookup(vocabulary.index, vocabulary.vocab_size, vocabulary.longest, rows, DEVICE)


def history_of(past: torch.Tensor, room: int | None) -> TokenHistory:
    """The history of ``past`` [B, P], as `marked` writes it; with ``room``, one of that size."""
    if room is None:
        history = TokenHistory()
        history.append(past)
        return history
    layer = StaticLayer(room)
    layer.cumulative_length = torch.tensor(past.shape[1], device=DEVICE)
    static = StaticTokenHistory(layer)
    static.append(past)
    return static


@settings(max_examples=25, deadline=None)
@given(cases(), st.sampled_from(ROW_TYPES), st.data())
def test_a_lookup_is_the_longest_f_grams_row(case: Case, row_type: str, data: st.DataObject) -> None:
    """Any f-grams, any batch, any padding in it, cut anywhere into tokens that are past and tokens that are new."""
    rows, masks = data.draw(batches(case.alphabet))
    assume(case.vocabulary.keys.dtype == np.uint32)  # what the accelerator matches; beyond 2³² nodes the host does
    length = len(rows[0]) if rows else 0
    tokens, mask = (np.array(part, kind).reshape(len(rows), length) for part, kind in ((rows, np.int64), (masks, bool)))
    is_padded, cut = data.draw(st.booleans()), data.draw(st.integers(0, length))
    starts = np.array(data.draw(st.lists(st.booleans(), min_size=tokens.size, max_size=tokens.size)), bool)
    starts = starts.reshape(tokens.shape) & data.draw(st.booleans())
    check(case, tokens, mask if is_padded else None, starts, [cut], row_type, 7, None, data.draw(st.booleans()))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 6),
    st.sampled_from([1.0, 0.7, 0.2]),
    st.sampled_from(ROW_TYPES),
    st.sampled_from([5, 1030]),
    st.data(),
)
def test_where_f_grams_are_dense(
    seed: int, max_n: int, kept: float, row_type: str, width: int, data: st.DataObject
) -> None:
    """Text of which nearly all is f-grams, behind much padding; rows in one block or in two; two steps of one table."""
    random = np.random.default_rng(seed)
    text = random.integers(0, 2, 70).tolist()
    grams = Counter(tuple(text[at : at + n]) for n in range(2, max_n + 1) for at in range(len(text) - n + 1))
    vocabulary = reference.vocabulary_of(grams, vocab_size=5, max_n=max_n)
    case = Case(vocabulary, reference.ranked(grams), (0, 1), grams)
    split = data.draw(st.none() | st.integers(0, len(grams)))
    mask = random.random((2, 30)) < kept if kept < 1 else None
    cuts = data.draw(st.lists(st.integers(20, 30), min_size=2, max_size=2))
    # a token that is outside the vocabulary has the node of an f-gram's number
    tokens = random.choice([0, 1, 7], (2, 30), p=[0.48, 0.48, 0.04])
    starts = random.random((2, 30)) < data.draw(st.sampled_from([0, 0.1]))
    check(case, tokens, mask, starts, cuts, row_type, width, split, data.draw(st.booleans()))


def check(
    case: Case,
    tokens: np.ndarray,
    mask: np.ndarray | None,
    starts: np.ndarray,
    cuts: list[int],
    row_type: str,
    width: int,
    split: int | None,
    is_static: bool,
) -> None:
    """That ``tokens`` int64 [B, L], of which ``starts`` begin examples, are looked up by the law when they follow what
    is before each cut; rows from ``split`` on are a block of their own. A history that ``is_static`` has unused places.
    """
    lookup, decoded = lookup_of(case, row_type, width, split)
    kept = np.ones_like(tokens, bool) if mask is None else mask
    ranks = np.full_like(tokens, -1)
    for b, i in enumerate(kept):
        ranks[b, i] = np.array(case.matches(tokens[b, i].tolist(), None, starts[b, i].tolist()), np.int64)
        ranks[b, i] -= case.vocab_size
    ranks[tokens >= case.vocab_size] = -1
    counts = [0, 0]
    marked = torch.from_numpy(np.where(kept, tokens | np.where(starts, FIRST_BIT, 0), ~tokens)).to(DEVICE)
    for start, cut in enumerate(cuts):  # of the second, vectors start where whole words do not
        shape = (len(tokens), tokens.shape[1] - cut, width)
        expected = torch.randn(shape, device=DEVICE).to(decoded.dtype)
        vectors = (
            torch.empty(start + expected.numel(), dtype=decoded.dtype, device=DEVICE)[start:]
            .view(shape)
            .copy_(expected)
        )
        history = history_of(marked[:, :cut], cut + 3 if is_static else None) if cut else None
        past = (None, None) if history is None else (history.all(), history.places)
        output, found = lookup(vectors, marked[:, cut:], *past)
        assert torch.equal(vectors, expected)
        assert found.cpu().numpy().tolist() == (ranks[:, cut:] >= 0).tolist()
        b, i = np.nonzero(ranks[:, cut:] >= 0)
        expected[b, i] = decoded[ranks[:, cut:][b, i]]
        assert torch.equal(output, expected)
        counts = [counts[0] + tokens[:, cut:].size, counts[1] + len(b)]
    assert lookup.counts.tolist() == (counts if case.f_grams else [0, 0])


@settings(max_examples=40, deadline=None)
@given(cases(), st.sampled_from(ROW_TYPES), st.sampled_from([5, 1030]), st.data())
def test_a_ragged_lookup_is_the_longest_f_grams_row(case: Case, row_type: str, width: int, data: st.DataObject) -> None:
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

    lookup, decoded = lookup_of(case, row_type, width, data.draw(st.none() | st.integers(0, len(case.f_grams))))
    vectors = torch.randn(len(tokens), width, device=DEVICE).to(decoded.dtype)
    output = torch.full_like(vectors, torch.nan)
    requests = (tokens, query_starts.int(), torch.from_numpy(slots), histories, num_computed)
    lookup.look_up_ragged(vectors, output, *(part.to(DEVICE) for part in requests))
    expected = vectors.clone()
    places = np.flatnonzero(np.array(ranks) >= 0)
    if len(places):
        expected[places] = decoded[np.array(ranks)[places]]
    assert torch.equal(output, expected)
    assert lookup.counts.tolist() == ([len(tokens), len(places)] if case.f_grams and len(tokens) else [0, 0])


def test_rows_behind_two_to_the_31_numbers_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one block and of the second of two."""
    width = 1 << 16
    row = RowFormat.of("int8", width, 64)
    raw = zeros_beyond_31_bits(monkeypatch, row.row_bytes, torch.uint8)
    size = len(raw)
    grams = {(rank // 200, rank % 200): size - rank for rank in range(size)}
    vocabulary = reference.vocabulary_of(grams, vocab_size=200, max_n=2)
    stored = torch.from_numpy(row.encode(torch.randn(1, width, generator=torch.Generator().manual_seed(0))))
    raw[-1] = stored[0].to(DEVICE)
    tokens = torch.tensor([[(size - 1) // 200, (size - 1) % 200]], device=DEVICE)
    for near, far in ((raw, None), (raw[:0], raw)):
        lookup = lookup_in(vocabulary, GPUReadableRows(near, far, "int8", width, row.group_size))
        output, found = lookup(torch.ones(1, 2, width, device=DEVICE), tokens, None, None)
        assert found.tolist() == [[False, True]]
        assert torch.equal(output[0, 1].cpu(), row.decode(stored)[0])
