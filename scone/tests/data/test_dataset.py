"""Blocks of consecutive tokens."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.data.dataset import BlockDataset, Collator
from scone.data.token_file import TokenFileWriter
from scone.utils.errors import SconeError


def token_file(folder, num_tokens: int):
    writer = TokenFileWriter(folder, 70_000, 0)
    writer.add_document(range(1, num_tokens))
    return writer.finish({"tokenizer_fingerprint": ""})


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(2, 20), st.booleans(), st.none() | st.integers(2, 60))
def test_blocks_are_the_tokens_in_order(tmp_path_factory, num_tokens, max_length, drop_last, limit):
    tokens = token_file(tmp_path_factory.mktemp("tokens"), num_tokens)
    num_tokens = num_tokens if limit is None else min(num_tokens, limit)
    if num_tokens < (max_length if drop_last else 2):
        with pytest.raises(SconeError, match="expected at least one block"):
            BlockDataset(tokens, max_length, drop_last, limit)
        return
    dataset = BlockDataset(tokens, max_length, drop_last, limit)
    blocks = [dataset[index]["input_ids"] for index in range(len(dataset))]
    together = torch.cat(blocks).tolist()
    assert together == tokens.tokens.tolist()[: len(together)]
    assert len(together) == dataset.num_tokens
    lost = num_tokens - len(together)
    assert lost == (num_tokens % max_length if drop_last else int(num_tokens % max_length == 1))
    assert all(len(block) == max_length for block in blocks[:-1])
    assert all(block.dtype == torch.int64 for block in blocks)
    assert torch.equal(dataset[-1]["input_ids"], blocks[-1])
    assert len(list(dataset)) == len(dataset)


def test_workers_read_the_same_blocks_from_a_small_pickle(tmp_path):
    tokens = token_file(tmp_path, 3000)
    dataset = BlockDataset(tokens, 100, drop_last=True)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1000
    here, there = (torch.cat([block["input_ids"] for block in each]) for each in (dataset, pickle.loads(pickled)))
    assert torch.equal(here, there)
    with pytest.raises(SconeError, match="found max_length 1; expected at least 2"):
        BlockDataset(tokens, 1)


def test_labels_are_the_tokens_that_something_predicts():
    """Not a block's first, which the trainer would count when it takes means, and no padding."""
    batch = Collator(None)([{"input_ids": torch.tensor([3, 4, 5])}, {"input_ids": torch.tensor([6, 7])}])
    assert batch["labels"].tolist() == [[-100, 4, 5], [-100, 7, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert "attention_mask" not in Collator(None)([{"input_ids": torch.tensor([3, 4])}])
