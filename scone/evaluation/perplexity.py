"""Perplexity of any causal language model on a run of tokens: each token predicted exactly once, sums in float64.

Losses are also summed by document, and by length and rank of the f-gram that made the prediction.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from scone.models.trunk import evaluating, longest_sequence
from scone.utils.errors import SconeError
from scone.utils.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scone.tokenization.f_gram_vocabulary import FGramVocabulary
    from scone.tokenization.matcher import Matcher

RANK_EDGES = (100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000)
"""Where rank buckets end: ranks below 100, 100 to 999, and so on."""
FEWEST_DOCUMENTS = 3
"""Fewer give no interval."""
Group = dict[str, Any]
"""``num_predicted`` predictions of mean ``loss`` made from positions of one kind: those whose longest f-gram has
``length`` tokens (1: no f-gram), or a rank of ``first_rank … last_rank`` (0 is the first; None: no f-gram).
"""


def mean_interval(sums: np.ndarray, counts: np.ndarray) -> tuple[float, float] | None:
    """95 % interval of Σ sums / Σ counts, where documents [n] are drawn at random; None for fewer than three.

    Normal over documents: the variance of a ratio, linearised (Cochran, Sampling Techniques, 6.4), with Student's
    factor for their number. It says how the value would change with other documents of the same kind, not with
    another training run.
    """
    drawn = counts > 0
    sums, counts = sums[drawn], counts[drawn]
    if len(sums) < FEWEST_DOCUMENTS:
        return None
    total = int(counts.sum())
    mean = float(sums.sum()) / total
    residuals = sums - mean * counts
    deviation = math.sqrt(float((residuals**2).sum()) * len(sums) / (len(sums) - 1)) / total
    half = students_factor(len(sums) - 1) * deviation
    return mean - half, mean + half


def students_factor(degrees: int) -> float:
    """The 97.5 % quantile of Student's distribution, within 4 % from two degrees on.

    Expansion 26.7.5 of Abramowitz and Stegun, Handbook of Mathematical Functions.
    """
    z = 1.959963985
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / degrees**power for power, term in enumerate(terms))


@dataclass(frozen=True)
class PerplexityResult:
    """What a corpus costs a model. Losses are in nats, intervals 95 % over documents (`mean_interval`).

    ``loss``: mean over ``num_predicted`` of ``num_tokens`` tokens: those that begin a window have no context and are
    not predicted. ``bits_per_byte`` and ``word_perplexity``, where the size of the text is known, count them at the
    mean loss, so that windows do not matter. ``num_documents``: those with a predicted token, where they are known.
    Not in `to_dict`: ``window_losses`` (the mean of each window, in order) and ``documents`` (sum of losses and number
    of predicted tokens of each).
    """

    perplexity: float
    perplexity_interval: tuple[float, float] | None
    loss: float
    loss_interval: tuple[float, float] | None
    bits_per_byte: float | None
    word_perplexity: float | None
    num_predicted: int
    num_tokens: int
    num_bytes: int | None
    num_words: int | None
    num_documents: int | None
    seconds: float
    tokens_per_second: float
    by_match_length: Sequence[Group]
    by_rank: Sequence[Group]
    window_losses: Sequence[float] = field(repr=False)
    documents: tuple[np.ndarray, np.ndarray] | None = field(repr=False)

    def to_dict(self) -> dict[str, object]:
        """A JSON-ready mapping."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.repr}


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


class Window(NamedTuple):
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
    found, reached = [], 0
    for start in range(0, num_tokens, stride):
        if reached < num_tokens:
            window = Window(start, min(start + max_length, num_tokens), max(reached, start + 1))
            found += [window] if window.first_target < window.end else []
            reached = window.end
    return found


def token_losses(
    model: PreTrainedModel, tokens: np.ndarray, batch: list[Window], device: torch.device
) -> Iterator[np.ndarray]:
    """Yield for each window of ``batch`` (all of one length) its losses [end − first_target], float64, in nats.

    Logits are made for the predicted positions alone, and the cross-entropy is taken a sequence at a time: a second
    copy of [B, T, V] logits would double the peak memory.
    """
    rows = np.stack([np.asarray(tokens[window.start : window.end], dtype=np.int64) for window in batch])
    input_ids = torch.from_numpy(rows).to(device)
    kept = 1 + max(window.end - window.first_target for window in batch)
    can_keep_few = kept < rows.shape[1] and "logits_to_keep" in inspect.signature(model.forward).parameters
    fewer = {"logits_to_keep": kept} if can_keep_few else {}
    with torch.inference_mode():
        # nothing is padded; the mask says so, where transformers would warn that a padding token occurs in the text
        mask = torch.ones_like(input_ids)
        logits = model(input_ids=input_ids, attention_mask=mask, use_cache=False, **fewer).logits
        for index, window in enumerate(batch):
            predicted = window.end - window.first_target
            predictions = logits[index, -predicted - 1 : -1].float()
            losses: Tensor = torch.nn.functional.cross_entropy(
                predictions, input_ids[index, -predicted:], reduction="none"
            )
            yield losses.double().cpu().numpy()


def perplexity(
    model: PreTrainedModel,
    tokens: np.ndarray,
    max_length: int = 512,
    batch_size: int = 8,
    stride: int | None = None,
    matcher: Matcher | None = None,
    num_bytes: int | None = None,
    quiet: bool = False,
    *,
    num_words: int | None = None,
    separator_id: int | None = None,
) -> PerplexityResult:
    """Perplexity of ``model`` on ``tokens`` [n], a one-dimensional integer array (possibly memory-mapped).

    The corpus is cut into windows of ``max_length`` tokens that start every ``stride`` tokens (default:
    ``max_length``, so they do not overlap; a smaller stride gives every prediction at least ``max_length − stride``
    tokens of context, at ``max_length / stride`` times the cost). ``batch_size`` windows run at once; it changes the
    speed, not the result. With a ``matcher``, losses are also grouped by the length and the rank of the longest f-gram
    that ends at the position which makes the prediction; pass SCONE's matcher for a plain baseline too, to compare the
    two group by group. With ``separator_id``, the token that ends documents, the result has intervals over documents.

    Equals the plain loop: cross-entropy of each window's logits against its next tokens, summed over windows.

    Raises SconeError: fewer than two tokens, tokens outside the vocabulary, windows longer than the model's positions.
    """
    step = max_length if stride is None else stride
    check_windows(model, tokens, max_length, step)
    where = model.device
    # of each token; a few bytes, for a text may have hundreds of millions
    losses, targets, window_losses = np.zeros(len(tokens), np.float32), np.zeros(len(tokens), bool), []
    kinds = np.zeros((2, 0 if matcher is None else len(tokens)), np.uint8)
    batches = [  # of windows of one length, so that nothing is ever padded
        same[first : first + batch_size]
        for _, group in groupby(windows(len(tokens), max_length, step), lambda window: window.end - window.start)
        for same in [list(group)]
        for first in range(0, len(same), batch_size)
    ]
    started = time.perf_counter()
    with evaluating(model), progress(len(tokens), "token", "Evaluating", quiet) as bar:
        for batch in batches:
            for found, window in zip(token_losses(model, tokens, batch, where), batch, strict=True):
                predicted = slice(window.first_target, window.end)
                losses[predicted], targets[predicted] = found, True
                window_losses.append(float(found.mean()))
                if matcher is not None:
                    # the position before a target predicts it; its f-gram does not reach beyond the window
                    reach = max(window.start, window.first_target - matcher.vocabulary.max_n)
                    matched = matcher.match(np.asarray(tokens[reach : window.end - 1]))
                    kinds[:, predicted] = _kinds(matcher.vocabulary, matched[window.first_target - 1 - reach :])
            bar.update(sum(window.end - window.first_target for window in batch))
    seconds = time.perf_counter() - started
    documents = interval = None
    if separator_id is not None:
        ends = np.asarray(tokens) == separator_id
        document = (np.cumsum(ends, dtype=np.int32) - ends)[targets]  # a separator belongs to what it ends
        documents = np.bincount(document, weights=losses[targets]), np.bincount(document)
        interval = mean_interval(*documents)
    loss, num_predicted = float(losses[targets].mean(dtype=np.float64)), int(targets.sum())
    return PerplexityResult(
        _exp(loss),
        None if interval is None else (_exp(interval[0]), _exp(interval[1])),
        loss,
        interval,
        loss * len(tokens) / math.log(2) / num_bytes if num_bytes else None,
        _exp(loss * len(tokens) / num_words) if num_words else None,
        num_predicted,
        len(tokens),
        num_bytes,
        num_words,
        None if documents is None else int(np.count_nonzero(documents[1])),
        seconds,
        num_predicted / seconds if seconds else math.inf,
        *((), ()) if matcher is None else _groups(kinds[:, targets], losses[targets], matcher.vocabulary.num_f_grams),
        window_losses=window_losses,
        documents=documents,
    )


def _kinds(vocabulary: FGramVocabulary, nodes: np.ndarray) -> np.ndarray:
    """Of predictions made from ``nodes`` [n]: length of the f-gram, and bucket of its rank (0: none), uint8 [2, n]."""
    kinds, matched = np.zeros((2, len(nodes)), np.uint8), nodes >= vocabulary.vocab_size
    ranks = nodes[matched] - vocabulary.vocab_size
    kinds[0] = 1
    kinds[0, matched], kinds[1, matched] = vocabulary.lengths[ranks], 1 + np.searchsorted(RANK_EDGES, ranks, "right")
    return kinds


def _groups(kinds: np.ndarray, losses: np.ndarray, num_f_grams: int) -> tuple[Sequence[Group], Sequence[Group]]:
    """The groups that occurred among ``losses`` [n] of these ``kinds`` [2, n], by length and by rank."""
    edges = [0, *RANK_EDGES]

    def bucket(key: int) -> Group:
        if not key:
            return {"first_rank": None, "last_rank": None}
        return {"first_rank": edges[key - 1], "last_rank": min([*edges[key : key + 1], num_f_grams]) - 1}

    def grouped(keys: np.ndarray, name: Callable[[int], Group]) -> list[Group]:
        counts, sums = np.bincount(keys), np.bincount(keys, weights=losses)
        return [
            name(key) | {"num_predicted": int(counts[key]), "loss": float(sums[key] / counts[key])}
            for key in counts.nonzero()[0].tolist()
        ]

    return grouped(kinds[0], lambda key: {"length": key}), grouped(kinds[1], bucket)


def paired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, tuple[float, float]]:
    """Mean of (second − first) over windows, in nats, with its 95 % interval (normal, paired over the same windows).

    Pairing removes most of the variation between texts. Both are ``window_losses`` of the same tokens and windows.
    """
    differences = np.asarray(second) - np.asarray(first)
    mean, half = float(differences.mean()), math.inf
    if len(differences) > 1:
        half = 1.96 * float(differences.std(ddof=1)) / math.sqrt(len(differences))
    return mean, (mean - half, mean + half)


def check_windows(model: PreTrainedModel, tokens: np.ndarray, max_length: int, stride: int) -> None:
    """Refuse what cannot be evaluated, with one line: see `perplexity`."""
    if len(tokens) < 2:
        raise SconeError(f"found {len(tokens)} token(s) to evaluate on; expected at least 2; give a longer text")
    if max_length < 2:
        raise SconeError(f"found a window of {max_length} token(s); expected at least 2; raise --max_length")
    if not 1 <= stride <= max_length:
        raise SconeError(f"found a stride of {stride}; expected 1 to the window's {max_length}; change --stride")
    limit = longest_sequence(model.config)
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


def sizes_of(tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> dict[str, Any]:
    """``num_bytes`` and ``num_words`` (runs without ASCII whitespace) of the text that ``tokens`` [n] encode.

    Special tokens have no bytes, and end a word. None where the tokenizer is not byte-level, whose decoding does not
    give the text back exactly.
    """
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        return {"num_bytes": None, "num_words": None}
    ids = np.asarray(tokens)
    num_bytes = num_words = 0
    for part in np.split(ids, np.flatnonzero(np.isin(ids, tokenizer.all_special_ids))):
        text = backend.decode(part.tolist(), skip_special_tokens=True).encode("utf-8")
        num_bytes, num_words = num_bytes + len(text), num_words + len(text.split())
    return {"num_bytes": num_bytes, "num_words": num_words}
