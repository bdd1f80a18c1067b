"""Perplexity of any causal language model on a run of tokens: each token predicted exactly once, sums in float64."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from scone.inference.loading import device_of, position_limit
from scone.utils.errors import SconeError
from scone.utils.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scone.tokenization.matcher import Matcher


@dataclass(frozen=True)
class LengthLoss:
    """Loss of the predictions made from positions whose longest f-gram has ``length`` tokens (1: no f-gram)."""

    length: int
    num_predicted: int
    loss: float


@dataclass(frozen=True)
class PerplexityResult:
    """What a corpus costs a model. Losses are in nats.

    ``loss_sum`` is over ``num_predicted`` of ``num_tokens`` tokens: those that begin a window have no context and are
    not predicted. ``num_bytes``: UTF-8 bytes of the text, where known.
    """

    loss_sum: float
    num_predicted: int
    num_tokens: int
    seconds: float
    num_bytes: int | None = None
    by_match_length: list[LengthLoss] = field(default_factory=list)
    window_losses: list[float] = field(default_factory=list, repr=False)  # mean loss of each window, in order

    @property
    def loss(self) -> float:
        """Mean loss of a predicted token, in nats."""
        return self.loss_sum / self.num_predicted

    @property
    def perplexity(self) -> float:
        """exp(mean loss); infinity where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits a byte of text, counting the few unpredicted tokens at the mean loss, so that windows do not matter."""
        return self.loss * self.num_tokens / math.log(2) / self.num_bytes if self.num_bytes else None

    @property
    def tokens_per_second(self) -> float:
        """Predicted tokens a second."""
        return self.num_predicted / self.seconds if self.seconds else math.inf

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready mapping."""
        return {
            "perplexity": self.perplexity,
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte,
            "num_predicted": self.num_predicted,
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "by_match_length": [vars(entry) for entry in self.by_match_length],
        }


@dataclass(frozen=True)
class Window:
    """Tokens ``start … end − 1`` are read, tokens ``first_target … end − 1`` are predicted."""

    start: int
    end: int
    first_target: int


def windows(num_tokens: int, max_length: int, stride: int) -> list[Window]:
    """Cover ``num_tokens`` so that each token is predicted once, but for those that begin a window (stride =
    max_length).

    With a smaller stride windows overlap, each predicts what the one before did not reach, and only token 0 is left
    out.
    """
    found: list[Window] = []
    reached = 0
    start = 0
    while reached < num_tokens:
        end = min(start + max_length, num_tokens)
        first_target = max(reached, start + 1)
        if first_target < end:
            found.append(Window(start, end, first_target))
        reached = end
        start += stride
    return found


def token_losses(
    model: PreTrainedModel, tokens: np.ndarray, batch: list[Window], device: torch.device
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each window of ``batch`` (all of one length) its input ids [T] and the losses [end − first_target],
    in nats.

    The cross-entropy is taken a sequence at a time: a second copy of [B, T, V] logits would double the peak memory.
    """
    rows = np.stack([np.asarray(tokens[window.start : window.end], dtype=np.int64) for window in batch])
    input_ids = torch.from_numpy(rows).to(device)
    with torch.inference_mode():
        # nothing is padded; the mask says so, where transformers would warn that a padding token occurs in the text
        logits = model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids), use_cache=False).logits
        for index, window in enumerate(batch):
            skipped = window.first_target - window.start
            predictions = logits[index, skipped - 1 : -1].float()
            losses: Tensor = torch.nn.functional.cross_entropy(
                predictions, input_ids[index, skipped:], reduction="none"
            )
            yield rows[index], losses.double().cpu().numpy()


def perplexity(
    model: PreTrainedModel,
    tokens: np.ndarray,
    max_length: int = 512,
    batch_size: int = 8,
    stride: int | None = None,
    device: str | torch.device | None = None,
    matcher: Matcher | None = None,
    num_bytes: int | None = None,
    quiet: bool = False,
) -> PerplexityResult:
    """Perplexity of ``model`` on ``tokens`` [n], a one-dimensional integer array (possibly memory-mapped).

    The corpus is cut into windows of ``max_length`` tokens that start every ``stride`` tokens (default:
    ``max_length``, so they do not overlap; a smaller stride gives every prediction at least ``max_length − stride``
    tokens of context). ``batch_size`` windows run at once; it changes the speed, not the result. With a ``matcher``,
    losses are also grouped by the length of the longest f-gram that ends at the position which makes the prediction;
    pass SCONE's matcher for a plain baseline too, to compare the two group by group.

    Equals the plain loop: cross-entropy of each window's logits against its next tokens, summed over windows.

    Raises SconeError: fewer than two tokens, tokens outside the vocabulary, windows longer than the model's positions.
    """
    step = max_length if stride is None else stride
    check_windows(model, tokens, max_length, step)
    where = device_of(model) if device is None else torch.device(device)
    if device is not None:
        torch.nn.Module.to(model, where)
    was_training = model.training
    model.eval()
    by_length: dict[int, tuple[int, float]] = {}
    window_losses: list[float] = []
    loss_sum, num_predicted = 0.0, 0
    started = time.perf_counter()
    with progress(len(tokens), "token", "Evaluating", quiet) as bar:
        for batch in _batches(windows(len(tokens), max_length, step), batch_size):
            for (row, losses), window in zip(token_losses(model, tokens, batch, where), batch, strict=True):
                loss_sum += float(losses.sum())
                num_predicted += len(losses)
                window_losses.append(float(losses.mean()))
                if matcher is not None:
                    lengths = match_lengths(matcher, row)[window.first_target - window.start - 1 : -1]
                    _add_by_length(by_length, lengths, losses)
            bar.update(sum(window.end - window.first_target for window in batch))
    model.train(was_training)
    groups = [LengthLoss(length, count, total / count) for length, (count, total) in sorted(by_length.items())]
    seconds = time.perf_counter() - started
    return PerplexityResult(loss_sum, num_predicted, len(tokens), seconds, num_bytes, groups, window_losses)


def loss_difference(first: PerplexityResult, second: PerplexityResult) -> tuple[float, tuple[float, float]]:
    """Mean of (second − first) over windows, in nats, with its 95 % interval (normal, paired over the same windows).

    Pairing removes most of the variation between texts. Both results must come from the same tokens and windows.
    """
    assert len(first.window_losses) == len(second.window_losses), "results of different windows"
    differences = np.asarray(second.window_losses) - np.asarray(first.window_losses)
    mean = float(differences.mean())
    if len(differences) < 2:
        return mean, (-math.inf, math.inf)
    half = 1.96 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


def text_bytes(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> int | None:
    """UTF-8 bytes of the text that ``tokens`` [n] encode, special tokens left out.

    None where the tokenizer is not byte-level: then decoding does not give the text back exactly.
    """
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        return None
    # A byte-level token's characters stand for one byte each, so the text need not be put together.
    special = set(tokenizer.all_special_ids)
    sizes = np.zeros(len(tokenizer), dtype=np.int64)
    for token, index in tokenizer.get_vocab().items():
        sizes[index] = 0 if index in special else len(token)
    return int(sizes[np.asarray(tokens)].sum())


def match_lengths(matcher: Matcher, tokens: np.ndarray) -> np.ndarray:
    """Length in tokens of the longest f-gram ending at each position (1: none), int64, the shape of ``tokens``."""
    vocabulary = matcher.vocabulary
    nodes = np.asarray(matcher.match(tokens))
    lengths = np.ones(nodes.shape, dtype=np.int64)
    matched = nodes >= vocabulary.vocab_size
    lengths[matched] = vocabulary.lengths[nodes[matched] - vocabulary.vocab_size]
    return lengths


def check_windows(model: PreTrainedModel, tokens: np.ndarray, max_length: int, stride: int) -> None:
    """Refuse what cannot be evaluated, with one line: see `perplexity`."""
    if len(tokens) < 2:
        raise SconeError(f"found {len(tokens)} token(s) to evaluate on; expected at least 2; give a longer text")
    if max_length < 2:
        raise SconeError(f"found a window of {max_length} token(s); expected at least 2; raise --max_length")
    if not 1 <= stride <= max_length:
        raise SconeError(f"found a stride of {stride}; expected 1 to the window's {max_length}; change --stride")
    limit = position_limit(model)
    if limit is not None and min(max_length, len(tokens)) > limit:
        raise SconeError(
            f"found windows of {max_length} tokens; the model has {limit} positions; "
            f"set --max_length to {limit} or less"
        )
    vocab_size = model.config.get_text_config().vocab_size
    largest = int(np.max(tokens))
    if largest >= vocab_size or int(np.min(tokens)) < 0:
        raise SconeError(
            f"found token {largest}; the model's vocabulary has {vocab_size} tokens; "
            "use the tokenizer that the model was trained with"
        )


def _batches(all_windows: list[Window], batch_size: int) -> Iterator[list[Window]]:
    """Group windows of equal length, ``batch_size`` at a time, so that nothing is ever padded."""
    batch: list[Window] = []
    for window in all_windows:
        if batch and (len(batch) == batch_size or window.end - window.start != batch[0].end - batch[0].start):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _add_by_length(by_length: dict[int, tuple[int, float]], lengths: np.ndarray, losses: np.ndarray) -> None:
    counts = np.bincount(lengths)
    sums = np.bincount(lengths, weights=losses)
    for length in np.flatnonzero(counts):
        count, total = by_length.get(int(length), (0, 0.0))
        by_length[int(length)] = (count + int(counts[length]), total + float(sums[length]))
