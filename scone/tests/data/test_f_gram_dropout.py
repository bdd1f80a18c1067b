"""Matches that training leaves out: how many, which, and that nothing but the block's place decides."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from scone.data.collator import Collator, FGramDropout
from scone.data.dataset import BlockDataset, BlockIndex, TrainingOrder
from scone.data.token_file import TokenFileWriter
from scone.tests import tiny

VOCABULARY = tiny.vocabulary(max_n=4)
LENGTH = 16
BLOCKS = tiny.corpus(200 * LENGTH, seed=5).reshape(-1, LENGTH)
HALF = FGramDropout(seed=7, dropout=0.5)
BOTH = FGramDropout(seed=7, dropout=0.5, length_warmup_steps=60)


def items(places):
    return [{"input_ids": torch.from_numpy(BLOCKS[place.block]), "place": place} for place in places]


def f_grams(batch) -> np.ndarray:
    """The f-gram at each position, 0 where there is none: what does not depend on the rest of the batch."""
    trie = batch["trie"]
    return torch.cat([trie["f_grams"].new_zeros(1), trie["f_grams"]])[trie["position_index"]].numpy()


def everything(use=None, epoch=0) -> np.ndarray:
    return f_grams(Collator(VOCABULARY, use=use)(items(BlockIndex(block, epoch, 0) for block in range(len(BLOCKS)))))


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            assert_same(value, right[name])
        else:
            assert np.array_equal(value, right[name]), name


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_matches_are_left_out_at_the_rate_and_nothing_else_is_touched(rate):
    whole, left = everything(), everything(FGramDropout(seed=7, dropout=rate))
    matched = whole > 0
    dropped = matched & (left == 0)
    assert np.array_equal(left[~dropped], whole[~dropped])
    count = int(matched.sum())
    assert count > 1000
    assert abs(int(dropped.sum()) - rate * count) < 4 * np.sqrt(count * rate * (1 - rate))


def test_draws_differ_between_blocks_epochs_and_seeds():
    def draws(seed, block, epoch):
        use = FGramDropout(seed, 0.5)
        nodes, tokens = np.ones((1, 64), np.int64), np.zeros((1, 64), np.int64)
        return tuple(use.used(nodes, tokens, [BlockIndex(block, epoch, 0)], VOCABULARY)[0].tolist())

    everywhere = [(seed, block, epoch) for seed in (0, 1, 2**32 - 1) for block in range(20) for epoch in range(3)]
    assert len({draws(*where) for where in everywhere}) == len(everywhere)


def test_a_position_that_is_left_out_has_exactly_its_tokens_embedding():
    model = tiny.scone()
    assert model.f_gram_embedding is not None
    tokens = model.get_input_embeddings()
    assert model.vocabulary is not None
    for use in (None, HALF):
        batch = Collator(model.vocabulary, model.config.learned_rows, use=use)(
            items([BlockIndex(0, 0, 0), BlockIndex(9, 0, 0)])
        )
        vectors = model.f_gram_embedding(batch["input_ids"], tokens, batch["trie"])
        plain = (vectors == tokens(batch["input_ids"])).all(-1)
        assert torch.equal(plain, batch["trie"]["position_index"] == 0)
        assert 0 < plain.sum() < plain.numel()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=9), st.integers(0, 3), st.integers(0, 100))
def test_a_block_is_treated_alike_in_any_batch(blocks, epoch, step):
    places = [BlockIndex(block, epoch, step) for block in blocks]
    together = f_grams(Collator(VOCABULARY, use=BOTH)(items(places)))
    for row, place in zip(together, places, strict=True):
        assert np.array_equal(row, f_grams(Collator(VOCABULARY, use=BOTH)(items([place])))[0])


@given(st.lists(st.integers(0, len(BLOCKS) - 1), min_size=1, max_size=9))
def test_without_dropout_and_in_evaluation_batches_are_what_they_are(blocks):
    training = items(BlockIndex(block, 1, 1) for block in blocks)
    evaluation = [{"input_ids": item["input_ids"]} for item in training]
    present = Collator(VOCABULARY, 40)(evaluation)
    assert_same(present, Collator(VOCABULARY, 40, use=FGramDropout(seed=7))(training))
    assert_same(present, Collator(VOCABULARY, 40, use=BOTH)(evaluation))


@pytest.mark.parametrize("longest", [2, 3, 4])
def test_during_the_warmup_longer_matches_are_those_of_a_vocabulary_without_longer_f_grams(longest):
    """The longest allowed f-gram that ends somewhere is the suffix of the longest one that does."""
    use = FGramDropout(seed=7, length_warmup_steps=100)
    step = {2: 49, 3: 50, 4: 100}[longest]
    found = f_grams(Collator(VOCABULARY, use=use)(items(BlockIndex(block, 0, step) for block in range(len(BLOCKS)))))
    short = tiny.vocabulary(max_n=longest)
    expected = f_grams(Collator(short)(items(BlockIndex(block, 0, step) for block in range(len(BLOCKS)))))
    assert (VOCABULARY.lengths[found[found > 0] - tiny.VOCAB_SIZE].max()) == longest
    for ours, theirs in zip(found.reshape(-1), expected.reshape(-1), strict=True):
        assert (ours > 0) == (theirs > 0)
        assert ours == 0 or VOCABULARY.tokens(int(ours)) == short.tokens(int(theirs))


@given(st.integers(2, 9), st.integers(0, 200))
def test_the_warmup_has_equal_stages_from_2_to_n(max_n, warmup):
    use = FGramDropout(seed=0, length_warmup_steps=warmup)
    lengths = [use.longest(step, max_n) for step in range(warmup + 1)]
    assert lengths == sorted(lengths)
    assert lengths[-1] == max_n
    if warmup and max_n > 2:
        stages = [lengths[:-1].count(length) for length in range(2, max_n)]
        assert sum(stages) == warmup
        assert max(stages) - min(stages) <= 1


def test_workers_prepare_what_the_main_process_would(tmp_path):
    writer = TokenFileWriter(tmp_path, tiny.VOCAB_SIZE, tiny.SEPARATOR)
    writer.add_document(BLOCKS.reshape(-1))
    dataset = BlockDataset(writer.finish({"tokenizer_fingerprint": ""}), LENGTH, drop_last=True)
    found = []
    for num_workers in (0, 2):
        order = TrainingOrder(len(dataset), seed=1, batch_size=2)
        loader = DataLoader(
            dataset,
            batch_size=2,
            sampler=order,
            collate_fn=Collator(VOCABULARY, use=BOTH),
            num_workers=num_workers,
        )
        found.append(list(loader))
    for here, there in zip(*found, strict=True):
        assert_same(here, there)
