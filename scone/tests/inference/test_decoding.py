"""Decoding laws: however a sequence is decoded, it is what full forward passes over its bare tokens give.

Models are tiny, random, of all trunk kinds, live, from a table and over-encoding, and in double precision, so that no
rounding decides between two tokens. The reference knows no cache, no padding and no batch. Contrastive search is no
longer part of transformers (it became code to download); what it does to a cache (repeat, select, crop) is among the
operations below.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, NoRepeatNGramLogitsProcessor
from transformers.cache_utils import StaticLayer

from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.tests.models.kinds import over_encoding

NEW_TOKENS = 8
PAD = 5  # an ordinary token
NO_REPEATS = {"no_repeat_ngram_size": 2}  # random models repeat one token for ever

kinds = st.sampled_from(list(tiny.TRUNKS))
parts = st.sampled_from([(True, 40), (True, 0), (False, 40)])  # f-gram model, learned rows
HASHED = (False, 0)
lengths = st.integers(2, 4)  # N
seeds = st.integers(0, 10**6)


@cache
def random_model(kind: str, parts: tuple[bool, int], max_n: int, served: bool) -> Any:
    if parts == HASHED:
        return over_encoding(kind).double()
    model = tiny.scone(kind, f_gram_model=parts[0], learned_rows=parts[1], max_n=max_n, min_freq=1)
    if served:
        model.attach_table(tiny.RowsInMemory(model))
    return model.double()


models = st.builds(random_model, kinds, parts | st.just(HASHED), lengths, st.booleans())


def rows_of(seed: int, lengths: list[int]) -> list[list[int]]:
    tokens = tiny.corpus(sum(lengths), seed).tolist()
    return [[tokens.pop() for _ in range(length)] for length in lengths]


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


@torch.no_grad()
def next_logits(model: SconeForCausalLM, row: list[int]) -> torch.Tensor:
    """Logits [V] of the token after ``row``, by one full forward pass."""
    return model(torch.tensor([row]), use_cache=False).logits[0, -1]


def greedy(model: SconeForCausalLM, rows: list[list[int]], ends: int = -1) -> list[list[int]]:
    """The reference: NEW_TOKENS tokens after each row, or up to ``ends``."""
    return [_greedy(model, row, [PAD] * (max(map(len, rows)) - len(row)), ends) for row in rows]


def _greedy(model: SconeForCausalLM, row: list[int], padding: list[int], ends: int) -> list[int]:
    no_repeats, row, start = NoRepeatNGramLogitsProcessor(2), list(row), len(row)
    while len(row) < start + NEW_TOKENS and (len(row) == start or row[-1] != ends):
        # transformers forbids repeating what is in the padding, too
        scores = no_repeats(torch.tensor([padding + row]), next_logits(model, row)[None])
        row.append(int(scores.argmax()))
    return row[start:]


def generate(model: SconeForCausalLM, prompts: dict[str, torch.Tensor], **arguments: Any) -> list[list[int]]:
    """New tokens of each row, by ``generate``."""
    fixed = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD} | NO_REPEATS
    output = model.generate(**prompts, **(fixed | arguments))
    return output[:, prompts["input_ids"].shape[1] :].tolist()


CACHES = st.sampled_from([{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}, {"use_cache": False}])
# before 5.24 transformers takes nothing back from a static cache
CROPPED = st.sampled_from([{}, {"cache_implementation": "static"}] if hasattr(StaticLayer, "crop") else [{}])


@settings(max_examples=15, deadline=None)
@given(model=models, seed=seeds, lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), caching=CACHES)
def test_cached_decoding_equals_full_forward_greedy(model, seed, lengths, caching):
    """Batches of prompts of any length (shorter than N too), dynamic and static caches, prefill in chunks."""
    rows = rows_of(seed, lengths)
    assert generate(model, left_padded(rows), **caching) == greedy(model, rows)


@settings(max_examples=10, deadline=None)
@given(model=models, seed=seeds, length=st.integers(1, 9), how=st.integers(0, 2), caching=CROPPED)
def test_cached_decoding_equals_full_forward_speculative(model, seed, length, how, caching):
    """Guesses of a draft model or of the prompt itself are taken back by cropping the cache."""
    rows = rows_of(seed, [length])
    speculation = (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": tiny.trunk("gpt2", seed=9)},
        {"assistant_model": random_model("llama", (False, 40), 3, False)},
    )[how]
    assert generate(model, left_padded(rows), **speculation, **caching) == greedy(model, rows)


@settings(max_examples=10, deadline=None)
@given(
    model=models,
    seed=seeds,
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    mode=st.sampled_from(
        [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"do_sample": True, "num_beams": 2}]
    ),
    cache=st.sampled_from([{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}]),
)
def test_cached_decoding_equals_full_forward_beams_and_samples(model, seed, lengths, mode, cache):
    """The same seed draws the same samples; beams reorder the cache at every step."""
    prompts = left_padded(rows_of(seed, lengths))
    torch.manual_seed(seed)
    expected = generate(model, prompts, use_cache=False, **mode)
    torch.manual_seed(seed)
    assert generate(model, prompts, **mode, **cache) == expected


@settings(max_examples=10, deadline=None)
@given(model=models, seed=seeds, lengths=st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_rows_that_end_at_different_steps_do_not_disturb_each_other(model, seed, lengths):
    rows = rows_of(seed, lengths)
    end = greedy(model, rows)[0][2]
    expected = greedy(model, rows, end)
    found = generate(model, left_padded(rows), eos_token_id=end)
    assert [row[: len(kept)] for row, kept in zip(found, expected, strict=True)] == expected


class ByHand:
    """A cache driven without ``generate``, beside the bare tokens of each row that it should hold."""

    def __init__(self, model: SconeForCausalLM, cache: Any, num_rows: int) -> None:
        self.model, self.cache = model, cache
        self.rows: list[list[int]] = [[] for _ in range(num_rows)]
        self.mask = torch.zeros(num_rows, 0, dtype=torch.int64)

    @torch.no_grad()
    def feed(self, tokens: torch.Tensor, mask: torch.Tensor) -> None:
        """Continue by ``tokens`` [B, T], of which ``mask`` hides some; compare each visible position's logits."""
        self.mask = torch.cat([self.mask, mask], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits = self.model(
            tokens, attention_mask=self.mask, position_ids=positions, cache=self.cache, use_cache=True
        ).logits
        for row, words, visible, found in zip(self.rows, tokens, mask, logits, strict=True):
            for position in visible.nonzero()[:, 0].tolist():
                row.append(int(words[position]))
                torch.testing.assert_close(found[position], next_logits(self.model, row), atol=1e-9, rtol=1e-9)

    def crop(self, count: int) -> None:
        """Take the last ``count`` positions back."""
        self.cache.crop(-count)
        for row, mask in zip(self.rows, self.mask, strict=True):
            del row[len(row) - int(mask[-count:].sum()) :]
        self.mask = self.mask[:, :-count]

    def select(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        self.cache.batch_select_indices(torch.tensor(rows))
        self._rearrange(rows)

    def reorder(self, rows: list[int]) -> None:
        """As beam search does it."""
        self.cache.reorder_cache(torch.tensor(rows))
        self._rearrange(rows)

    def repeat(self, times: int) -> None:
        """As contrastive search does it."""
        self.cache.batch_repeat_interleave(times)
        self._rearrange([row for row in range(len(self.rows)) for _ in range(times)])

    def _rearrange(self, rows: list[int]) -> None:
        self.rows = [list(self.rows[row]) for row in rows]
        self.mask = self.mask[rows]


@settings(max_examples=20, deadline=None)
@given(model=models, data=st.data(), num_rows=st.integers(1, 3))
def test_cached_decoding_equals_full_forward_by_hand(model, data, num_rows):
    """Any sequence of feeding, cropping, selecting, reordering and repeating; padding left, right and in between."""
    hand = ByHand(model, DynamicCache(config=model.config.get_text_config()), num_rows)
    for _ in range(data.draw(st.integers(1, 6))):
        rows, length = len(hand.rows), hand.mask.shape[1]
        step = data.draw(st.sampled_from(["feed", "feed", "crop", "select", "reorder", "repeat"]))
        order = st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)
        if step == "feed" or length == 0:
            width = data.draw(st.integers(1, 6))
            tokens = tiny.corpus(rows * width, data.draw(seeds)).reshape(rows, width)
            hidden = data.draw(st.lists(st.integers(0, 2), min_size=rows * width, max_size=rows * width))
            mask = torch.tensor(hidden).reshape(rows, width).clamp(max=1)
            mask[:, 0] |= hand.mask.sum(1) == 0  # a row without any token has nothing to attend to
            hand.feed(torch.from_numpy(tokens), mask)
        elif step == "crop" and length > 1:
            hand.crop(data.draw(st.integers(1, length - 1)))
        elif step == "repeat" and rows <= 3:
            hand.repeat(2)
        elif step in ("select", "reorder"):
            getattr(hand, step)(data.draw(order))


def test_generated_text_has_f_grams():
    """Or the laws above would say little."""
    model = random_model("llama", (True, 40), 3, False)
    found = generate(model, left_padded(rows_of(0, [1, 5, 9])))
    assert (model.match(torch.tensor(found)) >= tiny.VOCAB_SIZE).sum() > 5
