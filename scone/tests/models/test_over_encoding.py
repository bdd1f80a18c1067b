"""The peers: rows of hashed grams, and a plain trunk with scaled embeddings."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from scone.models.scaled_trunk import ScaledTrunkForCausalLM
from scone.tests import tiny
from scone.tests.tiny import tokens
from scone.tokenization.matcher import HashedGrams


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), shape=st.tuples(st.integers(1, 3), st.integers(1, 12)), num_rows=st.integers(2, 50))
def test_equal_grams_share_a_row_and_none_crosses_a_separator_padding_or_start(seed, shape, num_rows):
    rng = np.random.default_rng(seed)
    ids, valid = rng.integers(0, 6, shape), rng.random(shape) < 0.9
    starts = rng.random(shape) < 0.2
    rows = HashedGrams(num_rows, (0,)).rows(ids, valid, starts)
    row_of: dict[tuple[int, ...], int] = {}
    for sequence, position, column in np.ndindex(rows.shape):
        start = position - 1 - column
        gram = tuple(ids[sequence, max(start, 0) : position + 1].tolist())
        whole = start >= 0 and 0 not in gram and valid[sequence, max(start, 0) : position + 1].all()
        whole = whole and not starts[sequence, start + 1 : position + 1].any()
        row = rows[sequence, position, column]
        assert (row >= 0) == whole
        if whole:
            assert row_of.setdefault(gram, row) == row
            assert (row < num_rows // 2) == (column == 0)
            assert row < num_rows


def test_a_scaled_plain_trunk_scales_its_token_embeddings_and_nothing_else(tmp_path):
    trunk = tiny.trunk("llama")
    ids = tokens(2, 20)
    model = ScaledTrunkForCausalLM.from_trunk(trunk, embedding_scale=4.0).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        expected = trunk(inputs_embeds=4.0 * trunk.get_input_embeddings()(ids)).logits
        assert torch.equal(model(ids).logits, expected)
        assert torch.equal(loaded(ids).logits, expected)
    arguments = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert model.generate(ids, **arguments).tolist() == model.generate(ids, use_cache=False, **arguments).tolist()
