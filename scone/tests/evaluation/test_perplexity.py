"""Laws of perplexity: it equals the plain loop, and neither batch size nor windows lose or repeat a token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from scone.evaluation.perplexity import loss_difference, perplexity, windows
from scone.utils.errors import SconeError

VOCAB_SIZE = 40


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCAB_SIZE, size=150).astype(np.uint16)


def textbook_losses(model: GPT2LMHeadModel, tokens: np.ndarray, max_length: int) -> tuple[float, int]:
    """One window at a time, one prediction at a time."""
    total, count = 0.0, 0
    for start in range(0, len(tokens), max_length):
        window = torch.from_numpy(tokens[start : start + max_length].astype(np.int64))
        with torch.no_grad():
            log_probabilities = torch.log_softmax(model(window[None]).logits[0].double(), dim=-1)
        for position in range(len(window) - 1):
            total -= float(log_probabilities[position, window[position + 1]])
            count += 1
    return total, count


@pytest.mark.parametrize("max_length", [2, 7, 16, 32])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_perplexity_equals_the_textbook_loop(
    model: GPT2LMHeadModel, tokens: np.ndarray, max_length: int, batch_size: int
) -> None:
    total, count = textbook_losses(model, tokens, max_length)
    result = perplexity(model, tokens, max_length, batch_size, num_bytes=300, quiet=True)
    assert result.num_predicted == count
    assert result.loss_sum == pytest.approx(total, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(total / count * len(tokens) / math.log(2) / 300, rel=1e-5)


@settings(max_examples=200, deadline=None)
@given(num_tokens=st.integers(2, 200), max_length=st.integers(2, 40), data=st.data())
def test_windows_predict_every_token_once(num_tokens: int, max_length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, max_length))
    predicted: list[int] = []
    for window in windows(num_tokens, max_length, stride):
        assert window.start < window.first_target < window.end <= min(num_tokens, window.start + max_length)
        predicted.extend(range(window.first_target, window.end))
    expected = range(1, num_tokens) if stride < max_length else [i for i in range(num_tokens) if i % max_length]
    assert predicted == list(expected)


def test_sliding_windows_give_each_prediction_more_context(model: GPT2LMHeadModel, tokens: np.ndarray) -> None:
    result = perplexity(model, tokens, max_length=16, stride=1, quiet=True)
    total = 0.0
    for target in range(1, len(tokens)):
        start = max(0, target - 15)
        context = torch.from_numpy(tokens[start:target].astype(np.int64))
        with torch.no_grad():
            logits = model(context[None]).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, dim=-1)[int(tokens[target])])
    assert result.num_predicted == len(tokens) - 1
    assert result.loss_sum == pytest.approx(total, rel=1e-5)


def test_stride_of_the_length_equals_disjoint_windows(model: GPT2LMHeadModel, tokens: np.ndarray) -> None:
    sliding = perplexity(model, tokens, max_length=16, stride=16, quiet=True)
    disjoint = perplexity(model, tokens, max_length=16, quiet=True)
    assert (sliding.loss_sum, sliding.num_predicted) == (disjoint.loss_sum, disjoint.num_predicted)
    assert sliding.loss_sum == pytest.approx(textbook_losses(model, tokens, 16)[0], rel=1e-5)


def test_logits_are_made_for_predicted_positions_alone(model: GPT2LMHeadModel, tokens: np.ndarray) -> None:
    """A stride of 1 must not pay for the output head at every position of every window."""
    rows: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(output.shape[1]))
    perplexity(model, tokens, max_length=16, batch_size=1, stride=2, quiet=True)
    hook.remove()
    assert rows[0] == 16
    assert set(rows[1:]) == {3}


def test_perplexity_per_word_and_per_byte(model: GPT2LMHeadModel, tokens: np.ndarray) -> None:
    result = perplexity(model, tokens, 16, num_bytes=300, num_words=75, quiet=True)
    assert result.word_perplexity == pytest.approx(math.exp(result.loss * 150 / 75))
    assert result.bits_per_byte == pytest.approx(math.log2(result.word_perplexity) * 75 / 300)
    unknown = perplexity(model, tokens, 16, quiet=True)
    assert (unknown.word_perplexity, unknown.bits_per_byte, unknown.perplexity_interval) == (None, None, None)


def test_documents_give_an_interval(model: GPT2LMHeadModel, tokens: np.ndarray) -> None:
    result = perplexity(model, tokens, 16, quiet=True, separator_id=0)
    low, high = result.perplexity_interval
    assert low < result.perplexity < high
    assert result.to_dict()["num_documents"] == np.count_nonzero(result.documents.counts)


def test_evaluation_leaves_the_model_as_it_was(model: GPT2LMHeadModel, tokens: np.ndarray) -> None:
    model.train()
    first = perplexity(model, tokens, 16, quiet=True)
    assert model.training
    model.eval()
    assert perplexity(model, tokens, 16, quiet=True).loss_sum == first.loss_sum


@pytest.mark.parametrize(
    ("length", "max_length", "stride", "message"),
    [
        (1, 16, None, "found 1 token"),
        (50, 1, None, "window of 1"),
        (50, 16, 17, "stride of 17"),
        (50, 16, 0, "stride of 0"),
        (50, 33, None, "the model has 32 positions; set --max_length to 32"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    model: GPT2LMHeadModel, tokens: np.ndarray, length: int, max_length: int, stride: int | None, message: str
) -> None:
    with pytest.raises(SconeError, match=message):
        perplexity(model, tokens[:length], max_length, stride=stride, quiet=True)


def test_tokens_of_another_tokenizer_are_refused(model: GPT2LMHeadModel) -> None:
    with pytest.raises(SconeError, match="found token 40; the model's vocabulary has 40 tokens"):
        perplexity(model, np.array([1, 2, VOCAB_SIZE]), 16, quiet=True)


def test_the_difference_of_two_models_is_paired_over_windows(model: GPT2LMHeadModel, tokens: np.ndarray) -> None:
    first = perplexity(model, tokens, 16, quiet=True)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(1.5)
        second = perplexity(model, tokens, 16, quiet=True)
        model.transformer.wte.weight.div_(1.5)
    difference, (low, high) = loss_difference(first, second)
    each = [b - a for a, b in zip(first.window_losses, second.window_losses, strict=True)]
    mean = sum(each) / len(each)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in each) / (len(each) - 1))
    assert difference == pytest.approx(mean)
    assert (low, high) == pytest.approx((mean - 1.96 * deviation / len(each) ** 0.5, 2 * mean - low))
    backwards, _ = loss_difference(second, first)
    assert backwards == pytest.approx(-difference)
    assert loss_difference(first, first) == (0.0, (0.0, 0.0))
