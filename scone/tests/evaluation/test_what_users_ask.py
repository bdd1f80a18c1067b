"""What users ask: silenced rows leave the trunk, visits are counts, and what copies its context finds every needle."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from scone.evaluation.perplexity import perplexity
from scone.tests import tiny
from scone.tests.evaluation import experiments
from scone.tokenization.tokenizers import load_tokenizer, train_tokenizer

users = experiments.module("what_users_ask")
context = experiments.module("long_context")
LENGTH = 64  # positions of the tiny trunks


class Copier(nn.Module):
    """Predicts what followed the last place with the same ``order`` tokens; where there is none, all tokens alike."""

    def __init__(self, vocab_size: int, order: int) -> None:
        super().__init__()
        self.unused, self.vocab_size, self.order = nn.Parameter(torch.zeros(1)), vocab_size, order
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=vocab_size))
        self.device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for sequence, tokens in enumerate(input_ids.tolist()):
            followed: dict[tuple[int, ...], int] = {}
            for end in range(self.order, len(tokens) + 1):
                key = tuple(tokens[end - self.order : end])
                if key in followed:
                    logits[sequence, end - 1, followed[key]] = 30.0
                if end < len(tokens):
                    followed[key] = tokens[end]
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    words = f"{context.NAMES} {context.COLOURS}".split()
    train_tokenizer(iter([f"The house of {word} is {word}." for word in words * 3]), 600, folder)
    return load_tokenizer(str(folder))


def haystack(vocab_size: int) -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {text: draws.integers(vocab_size, size=2000) for text in users.TEXTS}


def test_what_copies_its_context_finds_every_needle_and_what_does_not_guesses(tokenizer):
    size = len(tokenizer)
    texts, distances = haystack(size), (64, 192)
    copies = context.measures(Copier(size, 2), tokenizer, texts, distances, 5)
    guesses = context.measures(Copier(size, 10_000), tokenizer, texts, distances, 5)
    for distance in distances:
        assert copies["needle"][distance].tolist() == [1.0] * 5
        assert guesses["needle"][distance].tolist() == [0.25] * 5, "one answer, whatever is asked"
        assert guesses["pair"][distance].tolist() == guesses["passage"][distance].tolist() == [0.0] * 10


@pytest.mark.parametrize(("test", "order", "share"), [("pair", 1, 1.0), ("passage", 2, 30 / 31)])
def test_what_is_repeated_is_worth_its_whole_loss_to_what_copies(tokenizer, test, order, share):
    """Of a passage all but what the copier needs to find its place."""
    size = len(tokenizer)
    texts = {text: tokens % (size // 4) for text, tokens in haystack(size).items()}  # a pair has other tokens
    found = context.measures(Copier(size, order), tokenizer, texts, (64,), 20)
    assert np.median(found[test][64]) == pytest.approx(share * np.log(size), rel=0.02)


def test_a_distance_is_from_one_beginning_to_the_other(tokenizer):
    draws, texts = np.random.default_rng(0), haystack(len(tokenizer))
    repeated, other = context.repeats(draws, texts, 100, 32, len(tokenizer))
    assert np.array_equal(repeated[-32:], repeated[-132:-100])
    assert np.array_equal(repeated[-100:], other[-100:])
    assert not np.array_equal(repeated[-132:-100], other[-132:-100])
    questions, colours = context.needles(draws, texts, tokenizer, 200)
    said = [tokenizer.decode([*question[200:], colour]) for question, colour in zip(questions, colours, strict=True)]
    sentence = len(questions[0]) - 200 + 2  # the colour and the full stop
    assert tokenizer.decode(questions[0, :sentence]) == f"{said[0]}."
    assert all(f"{each}." in tokenizer.decode(questions[0]) for each in said)
    assert len(set(said)) == len(set(colours.tolist())) == 4


def test_silenced_rows_leave_the_trunk_as_it_is():
    """The trunk of the same seed, without rows, is plain here: silencing must give its losses to the last bit."""
    plain, rows = tiny.trunk(), tiny.scone(f_gram_model=False)
    texts = {name: tiny.corpus(seed=seed) for seed, name in enumerate(("one", "two"))}
    before = rows.f_gram_embedding.rows.weight.clone()
    found = users.losses_of_pair(plain, rows.requires_grad_(False), texts, 4)
    assert torch.equal(rows.f_gram_embedding.rows.weight, before), "and they speak again"
    for name, each in found["by_text"].items():
        whole = texts[name][: len(texts[name]) // LENGTH * LENGTH]
        assert each["plain"] == pytest.approx(each["silenced"], abs=1e-6)
        assert each["plain"] == pytest.approx(perplexity(plain, whole, LENGTH, quiet=True).loss, abs=1e-5)
        assert each["rows"] == pytest.approx(perplexity(rows, whole, LENGTH, quiet=True).loss, abs=1e-5)
        assert abs(each["rows"] - each["plain"]) > 1e-3
        low, high = each["rows_minus_plain"]["interval"]
        assert low < each["rows"] - each["plain"] < high
    for kind in ("plain", "rows"):
        mean = sum(each["share"] * each[kind] for each in found["by_visits"])
        assert mean == pytest.approx(np.mean([each[kind] for each in found["by_text"].values()]), abs=1e-5)
    assert found["by_visits"][0]["first"] == 0


def test_visits_are_how_often_the_counted_text_has_the_longest_f_gram():
    model = tiny.scone(f_gram_model=False)
    vocabulary = model.vocabulary
    counts = {vocabulary.tokens(tiny.VOCAB_SIZE + rank): int(each) for rank, each in enumerate(vocabulary.counts)}
    tokens = tiny.corpus(640, seed=5)
    visits = users.visits_of(model.matcher, tokens, LENGTH)
    assert visits.shape == (10, LENGTH - 1)
    for window, found in zip(tokens.reshape(10, LENGTH).tolist(), visits.tolist(), strict=True):
        for end in range(1, LENGTH):
            grams = [tuple(window[start:end]) for start in range(max(0, end - vocabulary.max_n), end - 1)]
            assert found[end - 1] == next((counts[gram] for gram in grams if gram in counts), 0)


def test_pairs_are_collected():
    parts = [{"users": True, "pairs": [1]}, {"users": True, "pairs": [2]}, {"users": True, "long": 3}]
    assert users.collected(parts) == {"users": True, "pairs": [1, 2], "long": 3}
