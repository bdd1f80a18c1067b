"""Laws of perplexity: it equals the plain loop, and neither batch size nor windows lose or repeat a token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scone.evaluation.perplexity import paired_difference, perplexity, sizes_of, windows
from scone.tests import tiny
from scone.tokenization.tokenizers import train_tokenizer
from scone.utils.errors import SconeError

V = tiny.VOCAB_SIZE
TOKENS = np.random.default_rng(0).integers(0, V, size=150).astype(np.uint16)


@pytest.fixture(scope="module")
def model():
    return tiny.trunk("gpt2", n_positions=32)


def textbook_losses(model, starts_and_targets) -> np.ndarray:
    """The loss of each (start of the context, target), one prediction at a time."""
    losses = []
    for start, target in starts_and_targets:
        context = torch.from_numpy(TOKENS[start:target].astype(np.int64))
        with torch.no_grad():
            logits = model(context[None]).logits[0, -1].double()
        losses.append(-float(torch.log_softmax(logits, dim=-1)[int(TOKENS[target])]))
    return np.array(losses)


def disjoint(max_length: int) -> list[tuple[int, int]]:
    return [(i - i % max_length, i) for i in range(len(TOKENS)) if i % max_length]


@pytest.mark.parametrize("max_length", [2, 7, 16, 32])
def test_perplexity_equals_the_textbook_loop(model, max_length):
    losses = textbook_losses(model, disjoint(max_length))
    for batch_size in (1, 3, 8):
        result = perplexity(model, TOKENS, max_length, batch_size, num_bytes=300, num_words=75, quiet=True)
        assert result.num_predicted == len(losses)
        assert result.loss_sum == pytest.approx(losses.sum(), rel=1e-5)
        assert result.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
        assert result.bits_per_byte == pytest.approx(losses.mean() * len(TOKENS) / math.log(2) / 300, rel=1e-5)
        assert result.word_perplexity == pytest.approx(math.exp(losses.mean() * len(TOKENS) / 75), rel=1e-5)
        same = perplexity(model, TOKENS, max_length, batch_size, stride=max_length, quiet=True)
        assert (same.loss_sum, same.num_predicted) == (result.loss_sum, result.num_predicted)
        assert (same.word_perplexity, same.bits_per_byte, same.perplexity_interval) == (None, None, None)


def test_sliding_windows_give_each_prediction_more_context(model):
    result = perplexity(model, TOKENS, max_length=16, stride=1, quiet=True)
    losses = textbook_losses(model, [(max(0, target - 15), target) for target in range(1, len(TOKENS))])
    assert result.num_predicted == len(losses)
    assert result.loss_sum == pytest.approx(losses.sum(), rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(num_tokens=st.integers(2, 200), max_length=st.integers(2, 40), data=st.data())
def test_windows_predict_every_token_once(num_tokens, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    predicted = []
    for window in windows(num_tokens, max_length, stride):
        assert window.start < window.first_target < window.end <= min(num_tokens, window.start + max_length)
        predicted.extend(range(window.first_target, window.end))
    assert predicted == [i for i in range(1, num_tokens) if stride < max_length or i % max_length]


def test_logits_are_made_for_predicted_positions_alone(model):
    """A stride of 1 must not pay for the output head at every position of every window."""
    rows = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    perplexity(model, TOKENS, max_length=16, batch_size=1, stride=2, quiet=True)
    hook.remove()
    assert rows[0] == 16
    assert set(rows[1:]) == {3}


def test_documents_give_an_interval(model):
    result = perplexity(model, TOKENS, 16, quiet=True, separator_id=0)
    low, high = result.perplexity_interval
    assert low < result.perplexity < high
    assert result.to_dict()["num_documents"] == np.count_nonzero(result.documents[1])


def test_evaluation_leaves_the_model_as_it_was(model):
    model.train()
    first = perplexity(model, TOKENS, 16, quiet=True)
    assert model.training
    model.eval()
    assert perplexity(model, TOKENS, 16, quiet=True).loss_sum == first.loss_sum


@pytest.mark.parametrize(
    ("tokens", "max_length", "stride", "message"),
    [
        (TOKENS[:1], 16, None, "found 1 token"),
        (TOKENS[:50], 1, None, "window of 1"),
        (TOKENS[:50], 16, 17, "stride of 17"),
        (TOKENS[:50], 16, 0, "stride of 0"),
        (TOKENS[:50], 33, None, "the model has 32 positions; set --max_length to 32"),
        (np.array([1, 2, V]), 16, None, f"found token {V}; the model's vocabulary has {V} tokens"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_evaluated_is_refused(model, tokens, max_length, stride, message):
    with pytest.raises(SconeError, match=message):
        perplexity(model, tokens, max_length, stride=stride, quiet=True)


def test_the_difference_of_two_models_is_paired_over_windows(model):
    first = perplexity(model, TOKENS, 16, quiet=True)
    second = perplexity(tiny.trunk("gpt2", seed=1, n_positions=32), TOKENS, 16, quiet=True)
    difference, (low, high) = paired_difference(first.window_losses, second.window_losses)
    each = np.array(second.window_losses) - np.array(first.window_losses)
    assert difference == pytest.approx(each.mean())
    assert difference != 0
    half = 1.96 * each.std(ddof=1) / len(each) ** 0.5
    assert (low, high) == pytest.approx((each.mean() - half, each.mean() + half))
    assert paired_difference(second.window_losses, first.window_losses)[0] == pytest.approx(-difference)
    assert paired_difference(first.window_losses, first.window_losses) == (0.0, (0.0, 0.0))


# ------------------------------------------------------------------ bytes and words of a text

SAMPLE = "The cat sat on the mat.\n\nThe dog\tran — naïve façade, 日本語 text;  two  spaces \r\n" * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(iter([SAMPLE]), 400, tmp_path_factory.mktemp("tokenizer"))


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("abc the\n\t\r éß日—.  "), max_size=60))
def test_size_equals_that_of_the_text(tokenizer, text):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not tokens:
        return
    assert sizes_of(tokenizer, tokens) == {"num_bytes": len(text.encode("utf-8")), "num_words": len(text.split())}


def test_special_tokens_have_no_bytes_and_end_words(tokenizer):
    word = tokenizer("cat", add_special_tokens=False)["input_ids"]
    special = tokenizer.all_special_ids[0]
    assert sizes_of(tokenizer, [*word, special, *word, *word]) == {"num_bytes": 9, "num_words": 2}


def test_other_tokenizers_have_no_size(tmp_path):
    from transformers import BertTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the"])}
    assert set(sizes_of(BertTokenizerFast(vocab=vocabulary), [5, 5]).values()) == {None}
