"""What the demo's report says of corpus, f-grams, training and models: facts from results, nothing is run for long
here.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from scone.evaluation import measure
from scone.evaluation.loss_groups import match_lengths
from scone.evaluation.perplexity import PerplexityResult, loss_difference
from scone.models.accounting import parameter_counts
from scone.tokenization.matcher import Matcher

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from scone.data.token_file import TokenFile
    from scone.evaluation.demo_options import DemoOptions
    from scone.tokenization.f_gram_vocabulary import FGramVocabulary

NUM_EXAMPLES = 9


def corpus_facts(name: str, tokenizer: PreTrainedTokenizerBase, splits: dict[str, TokenFile]) -> dict[str, Any]:
    """Where the text comes from and how much there is."""
    builtin = name == "python-stdlib"
    return {
        "name": "the Python standard library's sources" if builtin else name,
        "description": "the sources of the running Python's standard library, without tests" if builtin else name,
        "num_documents": sum(split.num_documents for split in splits.values()),
        "tokens": {split: file.num_tokens for split, file in splits.items()},
        "tokenizer": f"a byte-level BPE of {len(tokenizer):,} tokens trained on the training text",
    }


def training_facts(options: DemoOptions) -> dict[str, Any]:
    """The settings that both models share, and SCONE's input embedding, in words."""
    layers, width = options.num_hidden_layers, options.hidden_size
    return {
        "trunk": f"GPT-2 architecture, {layers} layers × {width} wide, from scratch",
        "steps": options.steps,
        "batch_size": options.batch_size,
        "max_length": options.max_length,
        "tokens": options.steps * options.batch_size * options.max_length,
        "learning_rate": options.learning_rate,
        "schedule": "cosine",
        "seed": options.seed,
        "input_embedding": (
            f"an f-gram model of {options.f_gram_num_hidden_layers} layer(s) and a learned row for each f-gram with "
            "back-off along its suffixes, both starting at zero on top of the token embedding"
        ),
    }


def comparison(plain: PerplexityResult, scone: PerplexityResult, live: PerplexityResult) -> dict[str, Any]:
    """The paired loss difference with its interval, and how far the table is from the live model (on its windows)."""
    difference, interval = loss_difference(plain, scone)
    pairs = zip(live.window_losses, scone.window_losses, strict=False)  # the live model read the beginning only
    return {
        "loss_difference": difference,
        "loss_difference_interval": interval,
        "num_windows": len(scone.window_losses),
        "table_against_live": max(abs(first - second) for first, second in pairs),
    }


def model_facts(
    served: PreTrainedModel,
    trained: PreTrainedModel,
    batch: np.ndarray,
    log: dict[str, Any],
    evaluation: PerplexityResult,
) -> dict[str, Any]:
    """Costs and quality of a model: as it is served, and as it was trained (they differ for SCONE: table or live).

    ``batch``: training tokens [B, T] to count FLOPs on. ``log``: what training wrote.
    """
    steps = log["log"]
    per_step = log["tokens_per_step"]
    trained.requires_grad_(True)
    parameters = parameter_counts(trained)
    training_flops = measure.training_flops_per_token(trained, batch)
    trained.requires_grad_(False)
    return {
        "evaluation": evaluation.to_dict(),
        "resident_parameters": parameter_counts(served).resident,
        "trained_parameters": parameters.resident + parameters.training_only,
        "resident_bytes": measure.resident_bytes(served),
        "inference_flops_per_token": measure.inference_flops_per_token(served, batch[0]),
        "training_flops_per_token": training_flops,
        "training_seconds": log["train_seconds"],
        "training_tokens_per_second": log["steps"] * per_step / log["train_seconds"],
        "training_curve": [[entry["step"] * per_step, entry["loss"]] for entry in steps if "loss" in entry],
        "validation_curve": [[entry["step"] * per_step, entry["eval_loss"]] for entry in steps if "eval_loss" in entry],
    }


def f_gram_facts(vocabulary: FGramVocabulary, tokenizer: PreTrainedTokenizerBase, tokens: np.ndarray) -> dict[str, Any]:
    """How many f-grams, what they match of held-out ``tokens`` [n] as their number grows, and examples by rank."""
    total = vocabulary.num_f_grams
    sizes = [size for exponent in range(2, 9) for size in (10**exponent, 3 * 10**exponent) if size < total] + [total]
    curve = []
    for size in sizes:
        lengths = match_lengths(Matcher(vocabulary.truncated(size)), tokens)
        curve.append([size, float((lengths > 1).mean())])
    return {
        "num_f_grams": total,
        "max_n": vocabulary.max_n,
        "min_count": int(vocabulary.counts[total - 1]),
        "match_rate_by_size": curve,
        "held_out_match_rate": curve[-1][1],
        "held_out_mean_length": float(lengths.mean()),
        "examples": [_example(vocabulary, tokenizer, rank) for rank in _example_ranks(total)],
    }


def _example_ranks(total: int) -> list[int]:
    """Ranks spread evenly on a logarithmic scale: from the most frequent f-gram to the last."""
    spread = np.geomspace(1, total, num=min(NUM_EXAMPLES, total))
    return sorted({math.floor(rank) - 1 for rank in spread})


def _example(vocabulary: FGramVocabulary, tokenizer: PreTrainedTokenizerBase, rank: int) -> dict[str, Any]:
    tokens = vocabulary.tokens(vocabulary.vocab_size + rank)
    text = str(tokenizer.decode(list(tokens)))
    return {
        "text": text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣"),
        "length": len(tokens),
        "rank": rank + 1,
        "count": int(vocabulary.counts[rank]),
    }
