"""Laws of perplexity: it equals the plain loop, whole and by groups; intervals cover; the size of a text is known."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from scone.evaluation.perplexity import mean_interval, paired_difference, perplexity, sizes_of, students_factor
from scone.tests import tiny
from scone.tokenization.tokenizers import train_tokenizer
from scone.utils.errors import SconeError

V = tiny.VOCAB_SIZE
TOKENS = tiny.corpus(200, seed=3).astype(np.uint16)


@pytest.fixture(scope="module")
def model():
    return tiny.scone()


def plain_loop(model, tokens: np.ndarray, max_length: int, stride: int) -> dict[int, list[tuple[int, float, int]]]:
    """By the start of its window: each predicted token, its loss, and the node that the model saw before it."""
    found: dict[int, list[tuple[int, float, int]]] = defaultdict(list)
    ids = torch.from_numpy(tokens.astype(np.int64))
    for target in range(1, len(tokens)):
        start = stride * max(0, -(-(target + 1 - max_length) // stride))  # of the first window that reaches it
        if start == target:
            continue  # nothing comes before it
        if start not in found:
            window = ids[start : start + max_length]
            with torch.no_grad():
                losses = -torch.log_softmax(model(window[None]).logits[0].double(), dim=-1)
            nodes = model.matcher.match(window.numpy())
        loss = float(losses[target - 1 - start, ids[target]])
        found[start].append((target, loss, int(nodes[target - 1 - start])))
    return found


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 64), st.integers(1, 9), st.booleans(), st.data())
@example(16, 3, True, None)
def test_losses_equal_the_plain_loop(model, max_length, batch_size, training, data):
    """In all, by window and document, and by the f-gram that the model saw: one that begins in the window."""
    stride, size = max_length, len(TOKENS)
    if data is not None:
        stride, size = data.draw(st.integers(-(-max_length // 8), max_length)), data.draw(st.integers(2, len(TOKENS)))
    tokens = TOKENS[:size]
    by_window = plain_loop(model.eval(), tokens, max_length, stride)
    predicted = [each for window in by_window.values() for each in window]
    total = sum(loss for _, loss, _ in predicted)
    sizes = {"num_bytes": 300, "num_words": 75, "separator_id": tiny.SEPARATOR}
    result = perplexity(
        model.train(training), tokens, max_length, batch_size, stride, matcher=model.matcher, quiet=True, **sizes
    )
    assert model.training == training
    assert result.num_predicted == len(predicted)
    assert result.loss == pytest.approx(total / len(predicted), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / len(predicted)), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / len(predicted) * size / math.log(2) / 300, rel=1e-5)
    assert result.word_perplexity == pytest.approx(math.exp(total / len(predicted) * size / 75), rel=1e-5)
    means = [np.mean([loss for _, loss, _ in window]) for window in by_window.values()]
    assert result.window_losses == pytest.approx(means, rel=1e-4)

    def sums(key_of) -> dict[int, tuple[int, float]]:
        groups = defaultdict(list)
        for target, loss, node in predicted:
            groups[key_of(target, node)].append(loss)
        return {key: (len(losses), pytest.approx(sum(losses), rel=1e-4)) for key, losses in groups.items()}

    documents = zip(result.documents[1].tolist(), result.documents[0], strict=True)
    expected = sums(lambda target, node: int((tokens[:target] == tiny.SEPARATOR).sum()))
    assert {document: each for document, each in enumerate(documents) if each[0]} == expected
    assert result.num_documents == len(expected)
    if len(expected) > 2:
        assert result.loss_interval == mean_interval(*result.documents)
        assert result.perplexity_interval[0] < result.perplexity < result.perplexity_interval[1]
    lengths = {each["length"]: (each["num_predicted"], each["num_predicted"] * each["loss"])
               for each in result.by_match_length}  # fmt: skip
    assert lengths == sums(lambda target, node: len(model.vocabulary.tokens(node)))
    ranks = {each["first_rank"]: (each["num_predicted"], each["num_predicted"] * each["loss"])
             for each in result.by_rank}  # fmt: skip
    assert ranks == sums(lambda target, node: None if node < V else 0 if node < V + 100 else 100)
    assert {each["last_rank"] for each in result.by_rank} <= {None, 99, model.vocabulary.num_f_grams - 1}


def test_what_is_not_asked_for_is_not_there_and_a_plain_model_is_judged_on_the_same_groups(model):
    plain, ours = (perplexity(each, TOKENS, 16, matcher=model.matcher, quiet=True) for each in (tiny.trunk(), model))
    assert [one["num_predicted"] for one in plain.by_rank] == [one["num_predicted"] for one in ours.by_rank]
    bare = perplexity(tiny.trunk(), TOKENS, 16, quiet=True)
    assert bare.loss == plain.loss
    assert (bare.by_rank, bare.word_perplexity, bare.bits_per_byte, bare.perplexity_interval) == ((), None, None, None)


def test_logits_are_made_for_predicted_positions_alone():
    """A stride of 1 must not pay for the output head at every position of every window."""
    positions, trunk = [], tiny.trunk()
    trunk.lm_head.register_forward_hook(lambda module, inputs, output: positions.append(output.shape[1]))
    perplexity(trunk, TOKENS, max_length=16, batch_size=1, stride=2, quiet=True)
    assert positions[0] == 16
    assert set(positions[1:]) == {3}


@pytest.mark.parametrize(
    ("tokens", "max_length", "stride", "message"),
    [
        (TOKENS[:1], 16, None, "found 1 token"),
        (TOKENS, 1, None, "window of 1"),
        (TOKENS, 16, 17, "stride of 17"),
        (TOKENS, 16, 0, "stride of 0"),
        (TOKENS, 65, None, "the model has 64 positions; set --max_length to 64"),
        (np.array([1, 2, V]), 16, None, f"found token {V}; the model's vocabulary has {V} tokens"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_evaluated_is_refused(model, tokens, max_length, stride, message):
    with pytest.raises(SconeError, match=message):
        perplexity(model, tokens, max_length, stride=stride, quiet=True)


# ------------------------------------------------------------------ intervals


def test_interval_covers_the_mean_about_as_often_as_it_says():
    """2,000 corpora of 12 documents of uneven lengths, whose losses vary by document."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        counts = rng.integers(50, 400, 12)
        low, high = mean_interval(counts * (3.0 + 0.3 * rng.standard_normal(12)), counts)
        covered += low < 3.0 < high
    assert 0.92 < covered / 2000 < 0.97
    assert mean_interval(np.array([3.0, 4.0, 0.0]), np.array([1, 1, 0])) is None, "too few documents"
    assert mean_interval(np.array([3.0, 3.0, 3.0]), np.array([1, 1, 1])) == (3.0, 3.0)
    for degrees, quantile in ((2, 4.303), (5, 2.571), (30, 2.042), (10**6, 1.960)):  # of the tables
        assert students_factor(degrees) == pytest.approx(quantile, rel=0.035)


def test_the_difference_of_two_models_is_paired_over_windows():
    first, second = np.random.default_rng(0).normal(3, 1, (2, 10))
    difference, interval = paired_difference(first, second)
    each = second - first
    half = 1.96 * each.std(ddof=1) / len(each) ** 0.5
    assert difference == pytest.approx(each.mean())
    assert interval == pytest.approx((each.mean() - half, each.mean() + half))
    assert paired_difference(first, first) == (0.0, (0.0, 0.0))


# ------------------------------------------------------------------ bytes and words of a text

SAMPLE = "The cat sat on the mat.\n\nThe dog\tran — naïve façade, 日本語 text;  two  spaces \r\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(iter([SAMPLE]), 400, tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abc the\n\t\r éß日—.  "), min_size=1, max_size=60))
def test_size_equals_that_of_the_text(tokenizer, text):
    """Special tokens have no bytes, and end words."""
    tokens, special = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.all_special_ids[0]
    size = {"num_bytes": len(text.encode("utf-8")), "num_words": len(text.split())}
    assert sizes_of(tokenizer, tokens) == size
    assert sizes_of(tokenizer, [*tokens, special, *tokens]) == {name: 2 * each for name, each in size.items()}


def test_other_tokenizers_have_no_size():
    from transformers import BertTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"])}
    assert set(sizes_of(BertTokenizerFast(vocab=vocabulary), [5, 5]).values()) == {None}
